"""Starts ``main`` in every process of a run: Detectron2's launcher, torchrun, or SLURM through submitit."""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessRaisedException

from wsl_d2.engine.arguments import add_arguments
from wsl_d2.engine.hooks import REQUEUE_EXIT_CODE
from wsl_d2.errors import ConfigError, UserError

_OWN_ERROR = re.compile(r"^wsl_d2\.[\w.]+Error: ", re.MULTILINE)
_TORCHRUN_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}


def start(main: Callable, args: Namespace, timeout_seconds: float) -> None:
    """Calls ``main(args)`` in every process: under torchrun in this one, else through Detectron2's ``launch``.

    Args:
        main: of one process.
        args: of :mod:`wsl_d2.engine.arguments`.
        timeout_seconds: how long a process waits for the others in one exchange before it gives up.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if _TORCHRUN_VARIABLES <= os.environ.keys():
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # The store outlives a restart by torchrun: the processes must not find the addresses of those before them.
        store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        comm.synchronize()
        main(args)
        dist.destroy_process_group()
    else:
        try:
            launch(
                main,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
                timeout=timeout,
            )
        except ProcessRaisedException as error:  # holds the traceback of one process as text
            if found := list(_OWN_ERROR.finditer(str(error))):
                raise UserError(str(error)[found[-1].end() :]) from error
            raise


class ClusterJob:
    """One process of a run on a cluster, called by submitit in each task of a job.

    It always resumes, so that a job that is started again goes on. A job that was stopped by a signal (which SLURM
    sends before the time is over, or on preemption) saves and puts itself back into the queue.

    Args:
        arguments: of ``tools/train_net.py``.
        root: the folder to run in.
    """

    def __init__(self, arguments: list[str], root: str):
        self.arguments = arguments if "--resume" in arguments else ["--resume", *arguments]
        self.root = root

    def __call__(self) -> None:
        import submitit

        from wsl_d2.engine.main import run

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
        arguments: of ``tools/train_net.py``, without those for submitting.
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
        defaults |= {"slurm_signal_delay_s": 120}  # SIGUSR2 to every process two minutes before the end
    executor.update_parameters(**(defaults | parameters))
    return executor.submit(ClusterJob(arguments, str(Path(root).resolve())))
