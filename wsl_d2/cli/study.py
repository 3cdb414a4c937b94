"""The verbs study and demo."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from wsl_d2.cli.verb import Verb, local_path, positive
from wsl_d2.engine.arguments import add_cluster_arguments
from wsl_d2.errors import UserError

DEMO = "Studies/miniworld.yaml"


def axis(text: str) -> tuple[str, list]:
    """Parses AXIS=VALUE,VALUE; values are read as YAML reads them."""
    import yaml

    name, equals, values = text.partition("=")
    if not (name and equals and values):
        raise argparse.ArgumentTypeError(f"{text!r} is not AXIS=VALUE,VALUE,...")
    return name, [yaml.safe_load(value) for value in values.split(",")]


def add_axis(parser: argparse.ArgumentParser) -> None:
    """Adds --axis."""
    parser.add_argument(
        "--axis",
        type=axis,
        action="append",
        default=[],
        metavar="AXIS=V,V",
        help="run these values of an axis, such as seed=0,1,2; may be repeated",
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """Adds what decides where runs are made."""
    parser.add_argument(
        "--jobs",
        type=positive,
        default=os.cpu_count() or 1,
        help="runs at a time on this machine; all cores if not given",
    )
    parser.add_argument("--plan", action="store_true", help="show the plan and its cost, and stop")
    parser.add_argument("--report-only", action="store_true", help="report finished runs, run nothing")
    add_cluster_arguments(parser, "submit through submitit instead; the same command reattaches to what is submitted")


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=local_path, help="study file, such as those of configs/Studies")
    parser.add_argument(
        "--output", type=local_path, help="folder of the runs; output/studies/NAME-OF-THE-FILE if left out"
    )
    add_axis(parser)
    add_running(parser)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=local_path, default=Path("output/demo"), help="folder of the runs")
    add_axis(parser)
    add_running(parser)


def study(args: argparse.Namespace) -> None:
    """Runs a study, a grid of trainings and measurements, as far as it is missing, and reports what came out.

    wsl-d2 study configs/Studies/miniworld_data_size.yaml --plan
    wsl-d2 study configs/Studies/miniworld_data_size.yaml --jobs 2
    wsl-d2 study my_study.yaml --axis seed=0,1,2 --cluster slurm --cluster-parameter slurm_partition=gpu

    Shows the plan and its cost first. Finished runs are never repeated; after Ctrl-C the same command goes on. With
    --cluster slurm every stage is submitted as one array through submitit. The format of a study file is told at the
    top of wsl_d2/study/study.py.
    """
    run_study(args.study, args.output or Path("output", "studies", args.study.stem), args)


def demo(args: argparse.Namespace) -> None:
    """The whole system in miniature: renders a world of photos, pretrains, trains detectors, compares their AP.

    wsl-d2 demo                         # about 16 minutes on 2 cores
    wsl-d2 demo --axis seed=0,1,2       # more trainings: what the next one would give
    wsl-d2 demo --axis world=held_out_styles

    It is the study configs/Studies/miniworld.yaml, whose every run is a command of its own, printed before it starts.
    Needs a clone of the repository, whose datasets/ renders the world.
    """
    from wsl_d2.config import get_config_file

    path = Path(get_config_file(DEMO))
    if not (_root_of(path) / "datasets" / "prepare_miniworld.py").is_file():
        raise UserError(
            "the demo renders its photos by datasets/prepare_miniworld.py, which only a clone of the repository has; "
            "run it there."
        )
    run_study(path, args.output, args)


def _root_of(path: Path) -> Path:
    """The folder that a study's scripts are relative to: the repository of its file, or the current one."""
    return next((folder for folder in path.resolve().parents if (folder / "setup.py").is_file()), Path.cwd())


def run_study(path: Path, output: Path, args: argparse.Namespace) -> None:
    """Shows the plan of a study, runs what is missing, and reports, as the options say.

    Args:
        path: of the study file.
        output: folder of its runs.
        args: of :func:`add_axis` and :func:`add_running`.

    Raises:
        UserError: the study is wrong, or a run failed.
    """
    from wsl_d2.report.study import write_study
    from wsl_d2.study.runner import describe_plan, run_locally, run_on_cluster
    from wsl_d2.study.study import Study

    def say(text: str) -> None:
        print(text, flush=True)

    output = output.resolve()
    description = Study.load(path, dict(args.axis))
    cells = description.cells(output)
    say(describe_plan(description, cells, args.jobs))
    if args.plan:
        return
    root = _root_of(path)
    if args.cluster and not args.report_only:
        run_on_cluster(
            cells,
            folder=output / "submitit",
            root=root,
            cluster=args.cluster,
            parameters=dict(args.cluster_parameter),
            say=say,
        )
    elif not args.report_only:
        run_locally(cells, jobs=args.jobs, root=root, say=say)
    if report := write_study(description, output):
        say(report)


_KEPT = "finished runs are kept, and the same command goes on"
STUDY = Verb(study, _study_arguments, _KEPT, extra="analysis", starts_runs=True)
DEMO_VERB = Verb(demo, _demo_arguments, _KEPT, extra="analysis", starts_runs=True)
