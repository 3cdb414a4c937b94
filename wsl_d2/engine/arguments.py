"""The arguments of a run: Detectron2's and ours. Standard library alone, so that --help is fast."""

from __future__ import annotations

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a run to a parser; those of Detectron2 have its names and meanings."""
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="YAML of the run, or name of a config of wsl_d2"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR, if there is one")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in an OUTPUT_DIR that holds a run")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, train nothing")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs (processes) of each machine")
    parser.add_argument("--num-machines", type=int, default=1, help="machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    port = 2**15 + 2**14 + hash(os.getuid() if hasattr(os, "getuid") else 1) % 2**14
    parser.add_argument(
        "--dist-url", default=f"tcp://127.0.0.1:{port}", help="where the processes meet; see torch.distributed"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, do two iterations, print length, learning rates, memory and hours; write nothing",
    )
    parser.add_argument(
        "--images-per-second", type=float, help="with --dry-run: the speed from which the hours are computed"
    )
    parser.add_argument(
        "--override-resume",
        action="store_true",
        help="with --resume: continue although the config differs from the checkpoint's, and record the differences",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="with --cluster slurm: start a job again whose processes died, at most so often",
    )
    add_cluster_arguments(parser, "submit the run through submitit; it requeues and resumes itself at its time limit")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys to override: KEY VALUE ...")


def add_cluster_arguments(parser: argparse.ArgumentParser, about: str) -> None:
    """Adds --cluster and --cluster-parameter."""
    parser.add_argument("--cluster", choices=["slurm", "local"], help=about)
    parser.add_argument(
        "--cluster-parameter",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for submitit's executor, such as timeout_min=1440 (needed on SLURM), slurm_partition, nodes, "
        "tasks_per_node, gpus_per_node or mem_gb; may be repeated",
    )


def setting(text: str) -> tuple[str, int | float | str]:
    """Parses NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
