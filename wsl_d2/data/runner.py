"""Runs one function on many parts: in this process, in processes of this machine, or in jobs of a SLURM cluster.

The function and the results are the same everywhere. A part whose process is killed is done again, up to three times,
and named; few parts wait at a time, so that they can be made while others run.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from wsl_d2.errors import UserError
from wsl_d2.jobs import open_executor, queued_jobs, submitting
from wsl_d2.process import end_with_parent

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")

ATTEMPTS = 3
_LARGEST_ARRAY = 1000  # jobs; SLURM's own limit is 1001 by default
_LARGEST_BLOCK = 16  # parts of one job, which are lost together where it is killed
_POLL_SECONDS, _QUEUE_SECONDS = 0.5, 10.0
_RESULT_SECONDS = 10.0  # for a result to show up on a network file system after its job has left the queue


@dataclass(frozen=True)
class Cluster:
    """Machines that share files and the Python environment with this one; stands where a number of processes may.

    Attributes:
        workers: jobs in the queue at a time.
        folder: on a shared disk, for the jobs' parts, logs and results; removed when all is done.
        kind: "slurm", or "local" for jobs of this machine without SLURM.
        parameters: of submitit's executor, such as {"slurm_partition": "cpu", "mem_gb": 8, "timeout_min": 600}.
    """

    workers: int
    folder: Path
    kind: str = "slurm"
    parameters: dict[str, Any] = field(default_factory=dict)


Workers = int | Cluster


class _KilledError(Exception):
    """The process of a part is gone; the message says what is known about it."""


def run_parts(
    work: Callable[[Any, _Part], _Result],
    parts: Iterable[_Part],
    shared: Any,
    *,
    workers: Workers = 1,
    unit: str = "part",
    total: int | None = None,
) -> Iterator[_Result]:
    """Yields ``work(shared, part)`` for every part, in the order of completion, with a progress bar.

    Args:
        work: a function of a module, so that it can be sent to other processes. As a part may be done twice, it writes
            its files atomically; done again it finds them.
        parts: taken as they are needed; their ``str`` names them.
        shared: sent to each process or job once, such as a vocabulary.
        workers: processes, 1 for this one alone; or a cluster.
        unit: of the progress bar.
        total: number of parts, for the time that is left.

    Raises:
        Whatever ``work`` raises; the running parts of this machine finish, those of a cluster are cancelled.
        UserError: a part was killed three times, or the cluster does not take jobs.
    """
    with tqdm(unit=unit, total=total, disable=None) as bar:
        if workers == 1:
            for part in parts:
                yield work(shared, part)
                bar.update()
            return
        if isinstance(workers, int):
            pool: _Processes | _Jobs = _Processes(work, shared, workers)
            blocks = _blocks(parts, 1)
        else:
            pool = _Jobs(work, shared, workers)
            blocks = _blocks(parts, min(_LARGEST_BLOCK, max(1, (total or 0) // (4 * workers.workers))))
        try:
            for results in _results(pool, blocks):
                for result in results:
                    yield result
                    bar.update()
        except BaseException:
            pool.close(failed=True)
            raise
        pool.close(failed=False)


def _blocks(parts: Iterable[_Part], size: int) -> Iterator[list[_Part]]:
    iterator = iter(parts)
    while block := list(itertools.islice(iterator, size)):
        yield block


def _results(pool: _Processes | _Jobs, blocks: Iterator[list[_Part]]) -> Iterator[list]:
    running: dict[Any, tuple[list[_Part], int]] = {}  # handle of the pool -> parts, attempt
    killed: deque[tuple[list[_Part], int]] = deque()
    while True:
        chosen: list[tuple[list[_Part], int]] = []
        if killed and pool.dies_together:  # alone, so that it is known which one it was
            chosen = [killed.popleft()] if not running else []
        elif killed:
            chosen = [killed.popleft() for _ in range(min(len(killed), _LARGEST_ARRAY))]
        elif len(running) <= pool.capacity // 2:
            chosen = [(block, 1) for block in itertools.islice(blocks, pool.capacity - len(running))]
        if chosen:
            running |= zip(pool.submit([block for block, _ in chosen]), chosen, strict=True)
        if not running:
            return
        for handle in pool.finished(running):
            block, attempt = running.pop(handle)
            try:
                results = pool.result(handle)
            except _KilledError as reason:
                names = ", ".join(str(part)[:200] for part in block[:3]) + (", ..." if len(block) > 3 else "")
                if attempt == ATTEMPTS:
                    raise UserError(
                        f"{names}: the process that did this was killed {ATTEMPTS} times, perhaps because memory ran "
                        f"out ({reason}). What was finished is kept: repeat the command, with more memory if it "
                        "happens again."
                    ) from None
                logging.getLogger(__name__).warning(
                    f"{names}: the process that did this was killed ({reason}); attempt {attempt + 1} of {ATTEMPTS}"
                )
                killed += [([part], attempt + 1) for part in block]
            else:
                yield results


_shared: list[Any] = [None]


def _start_process(shared: Any) -> None:
    """Leaves Ctrl-C to the parent, ends with it, and keeps what all parts share, which is sent to a process once."""
    if (parent := parent_process()) and parent.pid:
        end_with_parent(signal.SIGKILL, parent.pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _shared[0] = shared


def _call(work: Callable, part: Any) -> Any:
    return work(_shared[0], part)


class _Processes:
    """Processes of this machine. Where one is killed, all are, and what they did is done again."""

    dies_together = True

    def __init__(self, work: Callable, shared: Any, workers: int):
        self.work, self.shared, self.workers = work, shared, workers
        self.capacity = 2 * workers
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, blocks: list[list]) -> list[Future]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers, mp_context=get_context("spawn"), initializer=_start_process, initargs=(self.shared,)
            )
        # Processes are started here, and Ctrl-C in the terminal is for this one alone, also while they import.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return [self._pool.submit(_call, self.work, part) for (part,) in blocks]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)

    def finished(self, running: Collection[Future]) -> list[Future]:
        return list(wait(running, return_when=FIRST_COMPLETED).done)

    def result(self, future: Future) -> list:
        try:
            return [future.result()]
        except BrokenProcessPool as error:
            self.close(failed=True)
            raise _KilledError("on this machine, with others at the same time") from error

    def close(self, failed: bool) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _call_block(work: Callable, shared: Any, block: list) -> tuple[list, Exception | None]:
    """Returns the results of a block's parts up to the first error, and this."""
    results = []
    for part in block:
        try:
            results.append(work(shared, part))
        except Exception as error:
            return results, error
    return results, None


@contextlib.contextmanager
def _marked() -> Iterator[None]:
    """Jobs submitted inside of it know themselves as part of a command, and start without detectron2."""
    os.environ["WSL_D2_JOB"] = "1"
    try:
        yield
    finally:
        del os.environ["WSL_D2_JOB"]


class _Jobs:
    """Array jobs of a cluster, through submitit. The queue says which ones are gone: accounting is not everywhere."""

    dies_together = False

    def __init__(self, work: Callable, shared: Any, cluster: Cluster):
        self.is_slurm = cluster.kind == "slurm"
        self.work, self.shared = work, shared
        self.folder, self.capacity = cluster.folder, min(cluster.workers, _LARGEST_ARRAY)
        parameters = {"name": "wsl-d2", "timeout_min": 240} | cluster.parameters
        self.executor = open_executor(cluster.folder, cluster.kind, "--runner", parameters)
        self._left: dict[Any, float] = {}  # job that is no longer in the queue -> since when
        self._open: set[Any] = set()
        self._looked = 0.0

    def submit(self, blocks: list[list]) -> list[Any]:
        with _marked(), submitting("--runner"), self.executor.batch():
            jobs = [self.executor.submit(_call_block, self.work, self.shared, block) for block in blocks]
        self._open |= set(jobs)
        self._looked = time.monotonic()
        return jobs

    def finished(self, running: Collection[Any]) -> list[Any]:
        while True:
            now = time.monotonic()
            if self.is_slurm and now - self._looked > _QUEUE_SECONDS:
                self._look(running, now)
            done = [job for job in running if self._has_ended(job, now)]
            if done:
                return done
            time.sleep(_POLL_SECONDS)

    def _has_ended(self, job: Any, now: float) -> bool:
        if job.paths.result_pickle.exists():
            return True
        if not self.is_slurm:
            return job.done()
        return now - self._left.get(job, now) > _RESULT_SECONDS

    def _look(self, running: Collection[Any], now: float) -> None:
        self._looked = now
        queue, problem = queued_jobs()
        if not problem:  # else the controller does not answer at the moment
            self._left = {job: self._left.get(job, now) for job in running if job.job_id not in queue}

    def result(self, job: Any) -> list:
        self._open.discard(job)
        if not job.paths.result_pickle.exists():
            lines = (job.stderr() or "").strip().splitlines() or ["nothing in its log"]
            raise _KilledError(f"job {job.job_id}, {job.paths.stderr}: {lines[-1][:200]}")
        try:
            results, error = job.result()
        except Exception as reason:  # of submitit: the function could not be loaded there, say
            raise _KilledError(f"job {job.job_id}, {job.paths.stderr}: {str(reason).strip()[-300:]}") from reason
        if error:
            raise error
        return results

    def close(self, failed: bool) -> None:
        for job in self._open:
            job.cancel(check=False)
        if not failed:
            shutil.rmtree(self.folder, ignore_errors=True)
