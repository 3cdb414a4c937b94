"""Processes that a longer piece of work starts and that do not outlive it, and the memory that one keeps."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1  # of prctl(2): a signal to this process when its parent has ended
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_system = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent(number: signal.Signals, parent: int) -> None:
    """Lets this process get a signal when its parent has ended, however it did, or has already; on Linux.

    Args:
        number: of the signal.
        parent: process number of the parent.
    """
    if _system is not None:
        _system.prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, where its C library is glibc.

    A training on CPUs frees and takes the same memory in every step. By default the kernel takes back what is larger
    than 128 KiB to 32 MiB, and clears it before it gives it again.
    """
    if _system is not None and hasattr(_system, "mallopt"):
        _system.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        _system.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def start_program(command: Sequence[str], **options: Any) -> subprocess.Popen:
    """Starts a program in a session of its own, which Ctrl-C in a terminal does not reach.

    On Linux it gets SIGTERM, upon which a training saves and ends, also where this process was killed.

    Args:
        command: the program and its arguments.
        options: of ``subprocess.Popen``.
    """
    parent = os.getpid()
    # What is run around a fork would swallow the exception that a signal raises.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        end_with_parent(signal.SIGTERM, parent)

    try:
        return subprocess.Popen(command, start_new_session=True, preexec_fn=prepare, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


def stop_programs(processes: Iterable[subprocess.Popen]) -> None:
    """Lets programs that :func:`start_program` began save and end, and waits until they have."""
    processes = list(processes)
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        process.wait()
