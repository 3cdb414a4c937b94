"""Jobs of a cluster through submitit: what submits them, and which of them the queue still holds."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wsl_d2.errors import ConfigError


def check_cluster(cluster: str, option: str) -> None:
    """Refuses what cannot submit jobs.

    Args:
        cluster: "slurm", or "local" for processes of this machine.
        option: of the command line that asks for it, such as "--cluster"; for messages.

    Raises:
        ConfigError: submitit is not installed, or SLURM's commands are not there.
    """
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{option} needs submitit; run `pip install submitit`.") from error
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError(f"{option} slurm needs SLURM's commands, but there is no sbatch on the PATH.")


def open_executor(folder: Path, cluster: str, option: str, parameters: dict, **own: Any) -> Any:
    """Returns submitit's executor.

    Args:
        folder: for submitit's logs and pickles; made with access for its owner alone.
        cluster, option: of :func:`check_cluster`.
        parameters: of the executor, such as {"timeout_min": 600, "slurm_partition": "cpu"}.
        own: further arguments of ``submitit.AutoExecutor``.

    Raises:
        ConfigError: see :func:`check_cluster`; or a parameter is wrong.
    """
    check_cluster(cluster, option)
    import submitit

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **own)
        executor.update_parameters(**parameters)
    except (NameError, ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"{option}-parameter: {' '.join(str(error).split())}") from error
    return executor


@contextlib.contextmanager
def submitting(option: str) -> Iterator[None]:
    """Around a submission.

    Raises:
        ConfigError: the cluster refuses it; says its reason.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # sbatch's words, which are in the error, too
            yield
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        lines = [line.partition("error: ")[2] for line in str(error).splitlines() if "error:" in line] or [str(error)]
        raise ConfigError(f"the cluster refuses the job: {'; '.join(lines)}; see {option}-parameter.") from error


def queued_jobs() -> tuple[set[str], str]:
    """Returns the ids of this user's jobs that SLURM has not ended, and why they are not known, if they are not."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%F_%K"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return set(), done.stderr.strip() or f"status {done.returncode}"
    return {line.strip().removesuffix("_N/A") for line in done.stdout.splitlines()}, ""
