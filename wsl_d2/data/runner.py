"""Runs one function on many parts in a pool of processes, with few parts waiting at a time."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from tqdm import tqdm

from wsl_d2.errors import UserError

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")
_shared: list[Any] = [None]


def _start_worker(shared: Any) -> None:
    """Leaves Ctrl-C to the parent, and keeps what all parts share, which is sent to a process once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _shared[0] = shared


def _call(work: Callable, part: Any) -> Any:
    return work(_shared[0], part)


def run_parts(
    work: Callable[[Any, _Part], _Result],
    parts: Iterable[_Part],
    shared: Any,
    *,
    workers: int = 1,
    unit: str = "part",
    total: int | None = None,
) -> Iterator[_Result]:
    """Yields ``work(shared, part)`` for every part, in the order of completion, with a progress bar.

    Args:
        work: a function of a module, so that it can be sent to other processes.
        parts: taken as they are needed.
        shared: sent to each process once, such as a vocabulary.
        workers: processes; 1 runs everything in this one.
        unit: of the progress bar.
        total: number of parts, for the time that is left.

    Raises:
        Whatever ``work`` raises, after the running parts have finished; no more are started.
        UserError: a process was killed.
    """
    with tqdm(unit=unit, total=total, disable=None) as bar:
        if workers == 1:
            for part in parts:
                yield work(shared, part)
                bar.update()
            return
        pool = ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(shared,)
        )
        pending: set[Future] = set()
        try:
            for part in parts:
                pending.add(pool.submit(_call, work, part))
                while len(pending) > 2 * workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
                        bar.update()
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                    bar.update()
        except BrokenProcessPool as error:
            raise UserError(
                "a process was killed, perhaps because memory ran out. What was finished is kept: repeat the command, "
                "with fewer --workers if it happens again."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
