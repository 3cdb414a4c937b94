"""What the processes of a run tell each other: flags that all must agree on in every step, and where each one is."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from detectron2.utils import comm

from wsl_d2.errors import UserError

_LOST = re.compile(r"timed? ?out|connection (closed|reset|refused)|broken pipe|peer|socket|NCCL", re.IGNORECASE)


class LostProcessError(UserError, RuntimeError):
    """Other processes of the run have died or hang."""


class Agreement:
    """Flags that all processes agree on: the maximum over processes, by one all-reduce in each step.

    Attributes:
        signal: number of the signal this process has received, or 0; set at any time.
        failed_saves: checkpoints in a row that this process could not save.
        agreed_signal, agreed_failed_saves: their maxima over processes, as of the last exchange.

    Args:
        device: of the tensor that is reduced.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.signal = 0
        self.failed_saves = 0
        self.agreed_signal = 0
        self.agreed_failed_saves = 0

    def exchange(self, flags: Sequence[torch.Tensor] = ()) -> list[bool]:
        """Reduces the flags over processes; called by all of them, once a step.

        Args:
            flags: scalars on the device, the same number in every process.

        Returns:
            For each flag whether it holds in any process; the one value read back from the device in a step.
        """
        own = torch.tensor([self.signal, self.failed_saves], dtype=torch.int32).to(self.device, non_blocking=True)
        if flags:
            own = torch.cat([own, torch.stack(list(flags)).to(torch.int32)])
        if comm.get_world_size() > 1:
            dist.all_reduce(own, op=dist.ReduceOp.MAX)
        self.agreed_signal, self.agreed_failed_saves, *agreed = own.tolist()
        return [bool(flag) for flag in agreed]


class Heartbeat:
    """Records what each process is doing: names those that are behind when a collective fails, and ends this process if
    it hangs.

    Args:
        timeout_seconds: the collective timeout. A process that does one thing for clearly longer is ended, since a
            launcher's signals do not reach Python code that waits for a disk; 0: never.
    """

    def __init__(self, timeout_seconds: float = 0.0) -> None:
        self._store = dist.distributed_c10d._get_default_store() if comm.get_world_size() > 1 else None
        self._iteration = -1
        self._doing: tuple[float, str] | None = None
        self._limit = 1 + 1.2 * timeout_seconds if timeout_seconds > 0 else math.inf
        self._watcher: threading.Thread | None = None

    def note(self, iteration: int, doing: str) -> None:
        """Records what this process begins to do, for itself and in the job's key-value store."""
        self._iteration = iteration
        self._doing = time.monotonic(), doing
        if self._watcher is None and self._limit < math.inf:
            self._watcher = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._watcher.start()
        if self._store is not None:
            self._store.set(f"wsl_d2/{comm.get_rank()}", f"{iteration} {doing}")

    def pause(self) -> None:
        """Stops the clock between steps, where saving and evaluation may take any time."""
        self._doing = None

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._limit / 20))
            doing = self._doing
            if doing is None or time.monotonic() - doing[0] < self._limit:
                continue
            logging.getLogger(__name__).error(
                f"rank {comm.get_rank()} hangs: {doing[1]} at iteration {self._iteration} for over "
                f"{self._limit:.0f} s. It is ended; its stack follows. Start again with --resume."
            )
            faulthandler.dump_traceback(all_threads=True)
            sys.stdout.flush()
            os._exit(1)

    def describe(self) -> str:
        """Returns what each process did last, those that are behind first; at most ten."""
        if self._store is None:
            return ""
        found = []
        for rank in range(comm.get_world_size()):
            try:
                iteration, doing = self._store.get(f"wsl_d2/{rank}").decode().split(" ", 1)
            except RuntimeError:  # the process that kept the store has ended, too
                return "unknown, since the process of rank 0 has ended"
            found.append((int(iteration), doing == "computing", rank, doing))
        found.sort()
        return ", ".join(f"rank {rank}: iteration {iteration}, {doing}" for iteration, _, rank, doing in found[:10])

    @contextlib.contextmanager
    def name_lost_processes(self) -> Iterator[None]:
        """Turns the errors of a collective whose other processes are gone into one that names them.

        Raises:
            LostProcessError: with this process's rank and iteration, and what the others did last.
        """
        try:
            yield
        except RuntimeError as error:
            if self._store is None or not _LOST.search(str(error)) or isinstance(error, LostProcessError):
                raise
            first_line = str(error).strip().splitlines()[0]
            raise LostProcessError(
                f"rank {comm.get_rank()} lost contact with other processes at iteration {self._iteration} "
                f"({first_line[:200]}). Last known state: {self.describe()}. Look for the first error in the logs "
                "of the processes, and start again with --resume."
            ) from error
