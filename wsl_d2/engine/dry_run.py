"""What a run will be, before it starts: length, learning rates, memory and hours."""

from __future__ import annotations

import resource
import time

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

_ITERATIONS = 2


def learning_rates(trainer) -> list[tuple[int, float]]:
    """Returns (iteration, rate) where the schedule begins, ends its warm-up, steps, and ends."""
    solver = trainer.cfg.SOLVER
    last = trainer.max_iter - 1
    steps = [step for step in solver.STEPS if step <= last] if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" else []
    iterations = {0, min(solver.WARMUP_ITERS, last), last // 2, last, *steps}
    schedule = trainer.scheduler._multiplier
    return [(iteration, solver.BASE_LR * schedule(iteration / trainer.max_iter)) for iteration in sorted(iterations)]


def dry_run(trainer, images_per_second: float | None = None) -> list[str]:
    """Does two iterations from the start of a run, on all processes, and returns its facts as lines of text.

    Args:
        trainer: built, with its weights loaded; it must not be used afterwards.
        images_per_second: the speed from which the hours are computed; that of the second iteration if None.
    """
    cfg, loop = trainer.cfg, trainer._trainer
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    loop.reset_data_loader(lambda: trainer.build_loader(0))
    loop.model.train()
    seconds = []
    with EventStorage(0) as storage:
        loop.storage = storage
        for iteration in range(_ITERATIONS):
            start = time.perf_counter()
            loop.iter = iteration
            loop.run_step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            storage.step()
    measured = batch_size / seconds[-1]
    images = trainer.max_iter * batch_size
    speed = images_per_second or measured
    parameters = sum(p.numel() for p in loop.model.parameters())
    facts = [
        f"model: {cfg.MODEL.META_ARCHITECTURE}, {cfg.MODEL.BACKBONE.NAME}, {parameters / 1e6:.2f} M parameters",
        f"length: {trainer.max_iter:,} iterations of {batch_size:,} images on {comm.get_world_size()} processes, "
        f"{images:,} images",
    ]
    if trainer.plan.is_pretraining:
        facts.append(f"data: {trainer.plan.describe_length()}")
    facts += [f"learning rate at iteration {iteration:,}: {rate:.6g}" for iteration, rate in learning_rates(trainer)]
    facts.append(f"memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB peak")
    if torch.cuda.is_available():
        facts.append(f"memory of its GPU: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB peak")
    facts.append(f"two iterations took {seconds[0]:.2f} s (with warm-up) and {seconds[1]:.2f} s")
    facts.append(
        f"time at {speed:,.1f} images/s{'' if images_per_second else ', measured on one iteration alone'}: "
        f"{images / speed / 3600:,.1f} hours"
    )
    return facts
