"""Runs on a cluster: SLURM through submitit."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from wsl_d2.engine.arguments import add_arguments
from wsl_d2.engine.signals import REQUEUE_SIGNALS, STOP_SIGNALS, Stopped, stop_at_once
from wsl_d2.errors import ConfigError, LostProcessError, UserError
from wsl_d2.jobs import check_cluster, open_executor, submitting

_SIGNAL_DELAY_S = 120  # SIGUSR2 to every process so long before the time limit
# Python that keeps those signals pending until the job's own handlers are there: its imports take seconds.
_PYTHON = f"{shlex.quote(sys.executable)} -c " + shlex.quote(
    "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2]); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
# After srun in the script of a job. 2, 75, 130 and 143 are the user's: a mistake, a signal, Ctrl-C, an early scancel.
_START_AGAIN = """\
status=$?
case $status in
  0|2|75|130|143) exit $status;;
  138|140) exec scontrol requeue $SLURM_JOB_ID;; # SIGUSR1 or SIGUSR2 while Python itself started
esac
echo "$(date -Is) status $status" >> {failures}
count=$(wc -l < {failures})
died="processes of the job died (status $status)"
if [ "$count" -gt {max_restarts} ]; then
  echo "$died again after {max_restarts} restarts (--max-restarts)" >&2
  exit $status
fi
echo "$died: restart $count of {max_restarts}" >&2
scontrol requeue $SLURM_JOB_ID
"""


@contextlib.contextmanager
def on_cluster() -> Iterator[None]:
    """Around the work of a job: signals end it with :class:`Stopped`, SIGUSR1 and SIGUSR2 also requeue it.

    Raises:
        SystemExit: with status 2 and one line after a mistake of the user, with 1 after other processes were lost.
    """
    stop_at_once(STOP_SIGNALS)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUEUE_SIGNALS)
        yield
    except Stopped as stop:
        if stop.asks_for_requeue and "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_PROCID", "0") == "0":
            array = [os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK")]
            command = ["scontrol", "requeue", "_".join(filter(None, array)) or os.environ["SLURM_JOB_ID"]]
            done = subprocess.run(command, capture_output=True, text=True)
            print(f"{shlex.join(command)}: {done.stderr.strip() or 'done'}", file=sys.stderr)
        raise
    except (UserError, FloatingPointError) as error:
        print(f"wsl-d2: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(1 if isinstance(error, LostProcessError) else 2) from None


class ClusterJob:
    """One process of a run on a cluster, called by submitit in each task of a job.

    It always resumes, so that a requeued job continues. A job that gets SIGUSR1 or SIGUSR2, which SLURM sends before
    the time limit, saves and requeues itself; one that gets SIGTERM, as from ``scancel``, saves and ends.

    Args:
        arguments: of :mod:`wsl_d2.engine.arguments`, as on the command line.
        root: the folder to run in.
    """

    def __init__(self, arguments: list[str], root: str):
        arguments = [argument for argument in arguments if argument != "--overwrite"]  # done when it was submitted
        self.arguments = arguments if "--resume" in arguments else ["--resume", *arguments]
        self.root = root

    def __call__(self) -> None:
        with on_cluster():
            import submitit

            os.chdir(self.root)
            submitit.helpers.TorchDistributedEnvironment().export(overwrite=True)
            parser = argparse.ArgumentParser()
            add_arguments(parser)
            from wsl_d2.engine.main import run

            run(parser.parse_args(self.arguments))


def without_cluster_options(arguments: list[str]) -> list[str]:
    """Returns command-line arguments without those for submitting, and their values."""
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_option = name in ("--cluster", "--cluster-parameter", "--max-restarts")
        if not skip and not is_option:
            kept.append(argument)
        skip = is_option and not equals
    return kept


def make_executor(folder: str | Path, cluster: str, parameters: dict, name: str, max_restarts: int = 0):
    """Returns submitit's executor, which submits jobs.

    Args:
        folder: for submitit's logs and pickles; made with access for its owner alone.
        cluster: "slurm", or "local" for processes of this machine.
        parameters: of submitit's executor, such as nodes, tasks_per_node, gpus_per_node, timeout_min, slurm_partition.
        name: of the jobs, if the parameters have none.
        max_restarts: so often SLURM starts a job again whose processes died.

    Raises:
        ConfigError: submitit is not installed, SLURM's commands are not there, or a parameter is wrong or missing.
    """
    check_cluster(cluster, "--cluster")
    options: dict = {"name": parameters.get("name", name)}
    folder = Path(folder).resolve()
    if cluster == "slurm":
        options["slurm_signal_delay_s"] = delay = parameters.get("slurm_signal_delay_s", _SIGNAL_DELAY_S)
        minutes = parameters.get("timeout_min", parameters.get("slurm_time"))
        if minutes is None:
            raise ConfigError(
                "--cluster slurm needs the time limit of a job, in minutes: --cluster-parameter timeout_min=1440. At "
                "its end a job saves and is requeued. (Without it submitit asks for 5 minutes.)"
            )
        if isinstance(minutes, int | float) and 60 * minutes <= delay:
            raise ConfigError(
                f"timeout_min={minutes:g} is no longer than slurm_signal_delay_s={delay}, the seconds before it at "
                "which a job begins to save; raise the first or lower the second."
            )
        if max_restarts:
            failures = shlex.quote(str(folder)) + '/"$SLURM_JOB_ID"_failures'
            script = _START_AGAIN.format(failures=failures, max_restarts=max_restarts)
            options["slurm_teardown"] = [*parameters.get("slurm_teardown", []), *script.splitlines()]
    python = {"slurm_python": _PYTHON} if cluster == "slurm" else {}
    return open_executor(folder, cluster, "--cluster", parameters | options, **python)


def submit(
    arguments: list[str],
    folder: str | Path,
    cluster: str,
    parameters: dict,
    root: str | Path = ".",
    max_restarts: int = 0,
):
    """Submits a run through submitit and returns its job.

    Args:
        arguments: of :mod:`wsl_d2.engine.arguments`, as on the command line, without those for submitting.
        folder, cluster, parameters, max_restarts: of :func:`make_executor`.
        root: the folder in which relative paths of the arguments are found.

    Raises:
        ConfigError: see :func:`make_executor`; or the cluster refuses the job.
    """
    executor = make_executor(folder, cluster, parameters, "wsl_d2", max_restarts)
    with submitting("--cluster"):
        return executor.submit(ClusterJob(arguments, str(Path(root).resolve())))


def submit_run(args, arguments: list[str]):
    """Hands the run to a cluster, which calls ``run`` in every task; returns submitit's job.

    Args:
        args: of :func:`wsl_d2.engine.arguments.add_arguments`, with ``cluster``.
        arguments: the command line that they were parsed from.

    Raises:
        ConfigError: see :func:`submit` and :func:`wsl_d2.engine.folder.begin_folder`.
    """
    from wsl_d2.config import load_config  # with Detectron2, which studies need not
    from wsl_d2.engine.folder import begin_folder, lock_folder

    output = load_config(args.config_file, args.opts).OUTPUT_DIR
    arguments, parameters = without_cluster_options(arguments), dict(args.cluster_parameter)
    with lock_folder(output):
        begin_folder(output, args.resume, args.overwrite)
    return submit(arguments, Path(output) / "submitit", args.cluster, parameters, max_restarts=args.max_restarts)
