"""What the processes of a run tell each other: flags that all must agree on in every step, and where each one is."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from detectron2.utils import comm

from wsl_d2.engine.signals import handle
from wsl_d2.errors import LostProcessError, UserError

_LOST = re.compile(r"timed? ?out|connection (closed|reset|refused)|broken pipe|peer|socket|NCCL", re.IGNORECASE)
_SOURCE = re.compile(r"^\[\S+:\d+\] ")  # the line of gloo's source, before its message
_SECONDS_TO_ANSWER = 5.0  # of the other processes, once a collective has failed in this one
_SECONDS_TO_END = 30.0  # for the rest after that, such as a checkpoint that is being written


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
    """Records what each process is doing: names those that are lost when a collective fails, and ends this process if
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
            with contextlib.suppress(RuntimeError):  # its process is gone: torchrun, while the run saves and ends
                self._store.set(f"wsl_d2/{comm.get_rank()}", f"{iteration} {doing} on {socket.gethostname()}")

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

    def find_lost(self) -> tuple[str, str]:
        """Asks the other processes for a sign of life, through the job's key-value store.

        Returns:
            Those that give none in a few seconds, as "rank 1, rank 3"; and what these did last, or all of them if none
            is lost. At most ten of each.
        """
        found: list[tuple[str, str]] = []
        asking = threading.Thread(target=lambda: found.append(self._ask()), name="question", daemon=True)
        asking.start()  # the store of a host that is cut off never answers
        asking.join(_SECONDS_TO_ANSWER + 2)
        return found[0] if found else self._lost_store()

    def _lost_store(self) -> tuple[str, str]:
        store = self._store
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        host = getattr(store, "host", "")
        return "rank 0" + (f" ({host})" if host else ""), "unknown, as it is kept there"

    def _ask(self) -> tuple[str, str]:
        assert self._store is not None
        ranks = range(comm.get_world_size())
        missing = {rank: f"wsl_d2/{rank}/answer" for rank in ranks}
        end = time.monotonic() + _SECONDS_TO_ANSWER
        try:
            self._store.set(missing.pop(comm.get_rank()), "here")
            while missing and time.monotonic() < end:
                time.sleep(0.1)
                missing = {rank: key for rank, key in missing.items() if not self._store.check([key])}
            found = []
            for rank in missing or ranks:
                is_noted = self._store.check([f"wsl_d2/{rank}"])
                note = self._store.get(f"wsl_d2/{rank}").decode() if is_noted else "-1 starting"
                iteration, doing = note.split(" ", 1)
                found.append((int(iteration), doing.startswith("computing"), rank, doing))
        except RuntimeError:  # the process that kept the store has ended
            return self._lost_store()
        found.sort()
        lost = ", ".join(f"rank {rank}" for rank in list(missing)[:10]) + (", ..." if len(missing) > 10 else "")
        return lost, ", ".join(
            f"rank {rank}: {f'iteration {iteration}, ' if iteration >= 0 else ''}{doing}"
            for iteration, _, rank, doing in found[:10]
        )

    @contextlib.contextmanager
    def name_lost_processes(self) -> Iterator[None]:
        """Turns the errors of a collective whose other processes are gone into one that names them.

        This process then ends within half a minute, whatever still waits for the others, and is deaf to SIGTERM.

        Raises:
            LostProcessError: with this process's rank and iteration, the lost ones and what they did last.
        """
        try:
            yield
        except RuntimeError as error:
            reason = reason_of_loss(str(error))
            if self._store is None or not reason or isinstance(error, UserError):
                raise
            self.pause()
            handle((signal.SIGTERM,), lambda *_: None)  # of a launcher that has seen another one end
            lost, state = self.find_lost()
            when = f"iteration {self._iteration}" if self._iteration >= 0 else "the start"
            message = (
                f"rank {comm.get_rank()} lost contact with {lost or 'other processes'} at {when} ({reason}). "
                f"Last known state: {state}. Look for the first error in the logs of the processes, and start again "
                "with --resume."
            )
            timer = threading.Timer(_SECONDS_TO_END, _end, [message])
            timer.daemon = True
            timer.start()
            raise LostProcessError(message) from error


def reason_of_loss(text: str) -> str:
    """Returns what an error of torch's says of another process that is gone or a connection to it, else nothing."""
    line = _SOURCE.sub("", text.strip().partition("\n")[0])
    return line[:200] if _LOST.search(text) else ""


def _end(message: str) -> None:
    sys.stdout.flush()
    print(f"wsl-d2: {message}", file=sys.stderr, flush=True)
    os._exit(1)
