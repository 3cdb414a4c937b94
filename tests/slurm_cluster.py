"""A SLURM of one node on this machine, from Debian's packages slurm-wlm and munge, for the tests marked `slurm`."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from waiting import wait_until

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
ReturnToService=2
AccountingStorageType=accounting_storage/none
KillWait=30
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 Port={node} CPUs=8 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


def why_not() -> str | None:
    """Why no cluster can be started here."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)}; `apt-get install --no-install-recommends slurm-wlm munge` has them"
    return "starts SLURM's daemons, which needs root" if os.getuid() else None


class Cluster:
    """A running cluster; ``environ`` makes SLURM's commands talk to it."""

    def __init__(self, folder: Path):
        self.environ = {"SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: str, **environ: str) -> str:
        done = subprocess.run(command, env=os.environ | environ | self.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def jobs(self) -> list[dict[str, str]]:
        """What `scontrol show job` tells of all jobs, those that have ended included."""
        lines = self.call("scontrol", "--oneliner", "show", "job").splitlines()
        return [dict(word.partition("=")[::2] for word in line.split()) for line in lines if line.startswith("JobId=")]

    def job(self, number: str) -> dict[str, str]:
        return next(job for job in self.jobs() if job["JobId"] == number)

    def wait_for_end(self, number: str, log: Callable[[], str]) -> None:
        """Waits until a job has ended well."""
        ended = wait_until(lambda: (state := self.job(number)["JobState"]) in _ENDED and state, log)
        assert ended == "COMPLETED", f"{ended} {log()}"

    def wait_for_requeue(self, number: str, log: Callable[[], str]) -> None:
        """Waits until a job was requeued once, and spares it the two minutes that it would wait then.

        But for two seconds: SLURM ends a job as "credential revoked" that starts in the second in which it was stopped.
        """
        wait_until(lambda: self.job(number)["Restarts"] == "1" and self.job(number)["JobState"] == "PENDING", log)
        self.call("scontrol", "update", f"JobId={number}", "StartTime=now+2")


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Starts a cluster, and ends it with its jobs."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        for inner in ("state", "spool"):
            (folder / inner).mkdir()
        with socket.socket() as one, socket.socket() as two:
            one.bind(("", 0)), two.bind(("", 0))
            ports = {"controller": one.getsockname()[1], "node": two.getsockname()[1]}
        host = socket.gethostname().partition(".")[0]
        (folder / "slurm.conf").write_text(_CONF.format(folder=folder, host=host, **ports))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(64))
        files = [f"--{what}-file={folder}/munged.{what}" for what in ("pid", "log", "seed")]
        made = Cluster(folder)
        for command in (
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}", *files],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D", "-N", host],
        ):
            log = stack.enter_context(open(folder / f"{command[0]}.out", "w"))
            daemon = subprocess.Popen(command, env=os.environ | made.environ, stdout=log, stderr=log)
            stack.callback(lambda daemon=daemon: (daemon.terminate(), daemon.wait()))
            time.sleep(0.5)
        wait_until(lambda: "idle" in made.call("sinfo", "--noheader"), seconds=60)
        try:
            yield made
        finally:
            made.call("scancel", "--me")
            wait_until(lambda: not made.call("squeue", "--noheader"), seconds=90)  # else their processes stay
