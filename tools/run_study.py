#!/usr/bin/env python3
"""Runs a study, a grid of trainings and measurements, as far as it is missing, and reports what came out.

tools/run_study.py configs/Studies/miniworld_data_size.yaml --plan
tools/run_study.py configs/Studies/miniworld_data_size.yaml --jobs 2

Shows the plan and its cost first. Finished runs are never repeated; after Ctrl-C the same command goes on. With
--cluster slurm every stage is submitted as one array through submitit.
"""

import argparse
import os
import sys
from pathlib import Path

from wsl_d2.analysis.records import RunError
from wsl_d2.report.study import analyse, format_text, write_report
from wsl_d2.study.runner import describe_plan, run_locally, run_on_cluster
from wsl_d2.study.study import Study, StudyError

ROOT = Path(__file__).resolve().parent.parent


def setting(text: str) -> tuple[str, int | str]:
    """An argument NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, int(value) if value.isdecimal() else value


def main(arguments: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("study", type=Path, help="study file, such as those of configs/Studies")
    parser.add_argument("--output", type=Path, help="folder of the runs (default: output/studies/<name of the file>)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time on this machine")
    parser.add_argument("--plan", action="store_true", help="show the plan and stop")
    parser.add_argument("--report-only", action="store_true", help="report finished runs, run nothing")
    parser.add_argument("--cluster", choices=["slurm", "local"], help="submit through submitit instead")
    parser.add_argument(
        "--cluster-parameter", type=setting, action="append", default=[], help="NAME=VALUE for submitit's executor"
    )
    args = parser.parse_args(arguments)
    output = (args.output or ROOT / "output" / "studies" / args.study.stem).resolve()
    try:
        study = Study.load(args.study)
        cells = study.cells(output)
        print(describe_plan(study, cells, args.jobs), flush=True)
        if args.plan:
            return
        if not args.report_only:
            say = lambda text: print(text, flush=True)  # noqa: E731
            if args.cluster:
                parameters = dict(args.cluster_parameter)
                run_on_cluster(
                    cells, folder=output / "submitit", root=ROOT, cluster=args.cluster, parameters=parameters, say=say
                )
            else:
                run_locally(cells, jobs=args.jobs, root=ROOT, say=say)
        rows = study.read_results(output)
        analysis = analyse(study, rows)
        page = write_report(study, rows, analysis, output)
    except (StudyError, RunError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here.")
    print(format_text(study, analysis))
    print(f"written: {page}, {output / 'report.json'}, {output / 'results.csv'}")


if __name__ == "__main__":
    main()
