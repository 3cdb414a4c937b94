"""Signals that end a run, and its exit status then. Standard library alone: these handlers come before all imports."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL: "try again later"
INTERRUPTED_EXIT_CODE = 130  # Ctrl-C, as shells have it
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # from SLURM before the time limit; the second is submitit's
STOP_SIGNALS = (*REQUEUE_SIGNALS, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Stopped(SystemExit):
    """The end of a run that a signal stopped.

    Attributes:
        number: of the signal.
        asks_for_requeue: whether a job on a cluster is to be started again by itself. Not after SIGTERM, by which
            ``scancel`` ends a job for good; where a scheduler preempts by SIGTERM, it starts the job again itself.
    """

    code: int

    def __init__(self, number: int):
        super().__init__(INTERRUPTED_EXIT_CODE if number == signal.SIGINT else REQUEUE_EXIT_CODE)
        self.number = number
        self.asks_for_requeue = number in REQUEUE_SIGNALS


def handle(numbers: tuple[int, ...], handler: Callable) -> dict:
    """Sets a handler for signals and returns those before; leaves alone what `nohup` ignores.

    Python allows handlers in the main thread alone: elsewhere nothing is set.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}


def stop_at_once(
    numbers: tuple[int, ...] = STOP_SIGNALS[:-1], note: str = "stopped; --resume continues from the last checkpoint"
) -> dict:
    """Lets signals end this process with :class:`Stopped` while it has nothing to save itself; returns the handlers
    before. Ctrl-C stays Python's KeyboardInterrupt unless it is named. ``note`` is printed at once, if there is one."""

    def stop(number: int, frame) -> None:
        handle(STOP_SIGNALS, lambda *_: None)  # a second one must not disturb the end
        if note:
            with contextlib.suppress(OSError):  # the terminal may be what has gone
                print(f"{signal.Signals(number).name}: {note}", file=sys.stderr)
        raise Stopped(number)

    return handle(numbers, stop)
