"""What the processes of a run must know of each other: decisions they take together, and who has stopped answering."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from detectron2.utils import comm

_LOST = re.compile(r"timed? ?out|connection (closed|reset|refused)|broken pipe|peer|socket|NCCL", re.IGNORECASE)


class LostProcessError(RuntimeError):
    """Other processes of the run have ended or do not answer."""


class Agreement:
    """Small numbers of which all processes use the largest, exchanged once a step.

    Attributes:
        signal: number of the signal this process has received, or 0; set at any time.
        failed_saves: checkpoints in a row that this process could not save.
        agreed_signal, agreed_failed_saves: the largest of all processes, as of the last exchange.

    Args:
        device: on which tensors are exchanged.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.signal = 0
        self.failed_saves = 0
        self.agreed_signal = 0
        self.agreed_failed_saves = 0

    def exchange(self, flags: Sequence[torch.Tensor] = ()) -> list[bool]:
        """Takes part in the exchange; called by all processes, once a step.

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
    """Notes in the job's key-value store what each process is doing, so that the others can say who is missing."""

    def __init__(self) -> None:
        self._store = dist.distributed_c10d._get_default_store() if comm.get_world_size() > 1 else None
        self._iteration = -1

    def note(self, iteration: int, doing: str) -> None:
        """Notes what this process begins to do; does nothing in a run of one process."""
        if self._store is not None:
            self._iteration = iteration
            self._store.set(f"wsl_d2/{comm.get_rank()}", f"{iteration} {doing}")

    def describe(self) -> str:
        """What each process did last, those that are behind first; at most ten."""
        if self._store is None:
            return ""
        found = []
        for rank in range(comm.get_world_size()):
            try:
                iteration, doing = self._store.get(f"wsl_d2/{rank}").decode().split(" ", 1)
            except RuntimeError:  # the process that kept the store has ended, too
                return "their last steps are not known, the process of rank 0 has ended"
            found.append((int(iteration), doing == "computing", rank, doing))
        found.sort()
        return ", ".join(f"rank {rank}: iteration {iteration}, {doing}" for iteration, _, rank, doing in found[:10])

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Turns what the communication library raises when others are gone into an error that names them.

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
                f"rank {comm.get_rank()} waited in vain for other processes at iteration {self._iteration} "
                f"({first_line[:200]}). Last known of all: {self.describe()}. Look for the first error among "
                "the processes' logs; start again with --resume."
            ) from error
