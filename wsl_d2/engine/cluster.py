"""Runs on a cluster: SLURM through submitit."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from pathlib import Path

from wsl_d2.config import load_config
from wsl_d2.engine.arguments import add_arguments
from wsl_d2.engine.hooks import REQUEUE_EXIT_CODE
from wsl_d2.engine.main import run
from wsl_d2.errors import ConfigError


class ClusterJob:
    """One process of a run on a cluster, called by submitit in each task of a job.

    It always resumes, so that a requeued job continues. A job that is stopped by a signal (which SLURM sends before the
    time limit, or on preemption) saves and requeues itself.

    Args:
        arguments: of :mod:`wsl_d2.engine.arguments`, as on the command line.
        root: the folder to run in.
    """

    def __init__(self, arguments: list[str], root: str):
        self.arguments = arguments if "--resume" in arguments else ["--resume", *arguments]
        self.root = root

    def __call__(self) -> None:
        import submitit

        os.chdir(self.root)
        submitit.helpers.TorchDistributedEnvironment().export(overwrite=True)
        try:
            parser = argparse.ArgumentParser()
            add_arguments(parser)
            run(parser.parse_args(self.arguments))
        except SystemExit as stop:
            if stop.code != REQUEUE_EXIT_CODE:
                raise
            if int(os.environ["RANK"]) == 0 and "SLURM_JOB_ID" in os.environ:
                subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)

    def checkpoint(self):
        """What submitit runs next if the signal comes before training has begun."""
        import submitit

        return submitit.helpers.DelayedSubmission(ClusterJob(self.arguments, self.root))


def without_cluster_options(arguments: list[str]) -> list[str]:
    """Returns command-line arguments without ``--cluster`` and ``--cluster-parameter`` and their values."""
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_option = name in ("--cluster", "--cluster-parameter")
        if not skip and not is_option:
            kept.append(argument)
        skip = is_option and not equals
    return kept


def submit(arguments: list[str], folder: str | Path, cluster: str, parameters: dict, root: str | Path = "."):
    """Submits a run through submitit and returns its job.

    Args:
        arguments: of :mod:`wsl_d2.engine.arguments`, as on the command line, without those for submitting.
        folder: for submitit's logs and pickles; made with access for its owner alone.
        cluster: "slurm", or "local" for processes of this machine.
        parameters: of submitit's executor, such as nodes, tasks_per_node, gpus_per_node, timeout_min, slurm_partition.
        root: the folder in which relative paths of the arguments are found.

    Raises:
        ConfigError: submitit is not installed, or SLURM's commands are not there.
    """
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("--cluster needs submitit; run `pip install submitit`.") from error
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError("--cluster slurm needs SLURM's commands, but there is no sbatch on the PATH.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    defaults: dict = {"name": "wsl_d2"}
    if cluster == "slurm":
        defaults |= {"slurm_signal_delay_s": 120}  # SIGUSR2 to every process two minutes before the time limit
    executor.update_parameters(**(defaults | parameters))
    return executor.submit(ClusterJob(arguments, str(Path(root).resolve())))


def submit_run(args, arguments: list[str]):
    """Hands the run to a cluster, which calls ``run`` in every task; returns submitit's job.

    Args:
        args: of :func:`wsl_d2.engine.arguments.add_arguments`, with ``cluster``.
        arguments: the command line that they were parsed from.
    """
    folder = Path(load_config(args.config_file, args.opts).OUTPUT_DIR) / "submitit"
    return submit(without_cluster_options(arguments), folder, args.cluster, dict(args.cluster_parameter))
