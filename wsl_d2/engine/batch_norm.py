"""Ghost batch norm (arXiv 1705.08741) whose running statistics do not depend on the number of processes.

A ghost batch is the images that are normalized together: one micro-batch of one process. The ghost batches of a global
batch stand for the paper's GPUs, whichever processes compute them. Training normalizes by a ghost batch's own
statistics. The running statistics, for evaluation and export, are updated by the mean over all ghost batches:

    running <- (1 - momentum) * running + momentum * mean over ghost batches of their statistics

This mean is taken in every step, over the ghost batches of a process and over processes. So all processes hold the same
statistics, and saving a checkpoint does not change them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules


def running_statistics(model: torch.nn.Module) -> list[torch.Tensor]:
    """Returns the running means and variances of all batch norms in training mode."""
    return [statistic for norm in get_bn_modules(model) for statistic in (norm.running_mean, norm.running_var)]


class GhostBatchStatistics:
    """Averages running statistics over the ghost batches that one process computes in a step.

    Args:
        model: in training mode.
        num_batches: ghost batches (micro-batches) of a step in this process.
    """

    def __init__(self, model: torch.nn.Module, num_batches: int):
        self.num_batches = num_batches
        self._running = running_statistics(model) if num_batches > 1 else []
        self._counters = [norm.num_batches_tracked for norm in get_bn_modules(model)] if num_batches > 1 else []
        self._before: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []

    @torch.no_grad()
    def after_batch(self, number: int) -> None:
        """Called after the backward pass of each micro-batch, ``number`` counting from 0."""
        if not self._running:
            return
        if number == 0:
            self._sums = [statistic.clone() for statistic in self._running]
        else:
            torch._foreach_add_(self._sums, self._running)
            torch._foreach_sub_(self._counters, 1)  # a step counts as one batch
        if number < self.num_batches - 1:
            torch._foreach_copy_(self._running, self._before)
        else:
            torch._foreach_div_(self._sums, self.num_batches)
            torch._foreach_copy_(self._running, self._sums)
            self._sums = []

    @torch.no_grad()
    def before_step(self) -> None:
        """Called before the first forward pass of a step."""
        if not self._before:
            self._before = [statistic.clone() for statistic in self._running]
        elif self._running:
            torch._foreach_copy_(self._before, self._running)


@torch.no_grad()
def average_over_processes(statistics: list[torch.Tensor]) -> None:
    """Averages running statistics over processes, with one all-reduce; called by all of them."""
    if comm.get_world_size() == 1 or not statistics:
        return
    flat = torch.cat([statistic.flatten() for statistic in statistics])
    dist.all_reduce(flat)
    flat /= comm.get_world_size()
    parts = flat.split([statistic.numel() for statistic in statistics])
    torch._foreach_copy_(statistics, [part.view_as(s) for part, s in zip(parts, statistics, strict=True)])
