"""Processes forked from one that has imported the libraries, which saves each the seconds that these take.

The project's own modules are imported by each process: what a command registers and imports is what it does for users.
"""

import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

_LIBRARIES = [
    "torch.distributed.optim",
    "torch.utils.tensorboard",
    "torchvision.transforms.v2",
    "detectron2.checkpoint",
    "detectron2.data",
    "detectron2.engine",
    "detectron2.evaluation",
    "detectron2.modeling",
    "matplotlib.pyplot",
    "nltk.corpus",
    "pyarrow.parquet",
    "scipy.stats",
]
_FORKS = multiprocessing.get_context("forkserver")
_logs = tempfile.TemporaryDirectory(prefix="runs-")
_numbers = itertools.count()


def new_log() -> str:
    """A path for what a process prints, without the endings .stdout and .stderr."""
    return os.path.join(_logs.name, str(next(_numbers)))


def read_log(log: str, name: str) -> str:
    path = Path(f"{log}.{name}")
    return path.read_text() if path.exists() else ""


def fork(script: str, arguments: list[str], environ: dict, log: str, cwd="", namespace: str = "") -> BaseProcess:
    """Starts a script in a process of its own.

    Args:
        script: Python, run as `__main__`.
        arguments: its `sys.argv`.
        environ: its whole environment.
        log: of :func:`new_log`.
        cwd: the folder it works in; "" is this process's.
        namespace: of the network; see network.py.
    """
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    _FORKS.set_forkserver_preload(_LIBRARIES)
    forkserver.ensure_running()
    os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    process = _FORKS.Process(target=_run, args=(script, arguments, environ, log, cwd or os.getcwd(), namespace))
    process.start()
    return process


def _run(script: str, arguments: list[str], environ: dict, log: str, cwd, namespace: str) -> None:
    if namespace:
        with open(f"/run/netns/{namespace}") as file:
            assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0, namespace
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where `nohup` runs the tests
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = arguments
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a run of its own
    torch.set_num_threads(1)
    exec(compile(script, "faulty_train_net.py", "exec"), {"__name__": "__main__"})
