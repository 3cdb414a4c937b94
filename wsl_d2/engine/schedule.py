"""Schedules counted in images -> Detectron2's solver keys, counted in iterations."""

from __future__ import annotations

import math

from wsl_d2.errors import ConfigError


def resolve_schedule(cfg, images_per_epoch: int) -> None:
    """Fills SOLVER.MAX_ITER, BASE_LR, WARMUP_ITERS, WARMUP_FACTOR and STEPS from the keys counted in images.

    The learning rate scales linearly with the batch, ``LR_PER_256_IMAGES * IMS_PER_BATCH / 256``, and warm-up starts
    at the rate of 256 images (arXiv 1706.02677). Where a key is 0, Detectron2's own keys count.

    Args:
        cfg: a node that is not frozen; changed in place.
        images_per_epoch: draws in one epoch of the resampled training set.

    Raises:
        ConfigError: TOTAL_IMAGES and TOTAL_EPOCHS are both given, or a value is negative or leaves no iteration.
    """
    solver = cfg.SOLVER
    if solver.LOG_PERIOD < 1:
        raise ConfigError(f"SOLVER.LOG_PERIOD must be at least 1 iteration, got {solver.LOG_PERIOD}.")
    for key in ("LR_PER_256_IMAGES", "TOTAL_IMAGES", "TOTAL_EPOCHS", "WARMUP_IMAGES", "NUM_LR_HALVINGS"):
        if solver[key] < 0:
            raise ConfigError(f"SOLVER.{key} must not be negative, got {solver[key]}.")
    if solver.TOTAL_IMAGES > 0 and solver.TOTAL_EPOCHS > 0:
        raise ConfigError(
            f"SOLVER.TOTAL_IMAGES ({solver.TOTAL_IMAGES}) and SOLVER.TOTAL_EPOCHS ({solver.TOTAL_EPOCHS}) both set the "
            "length of the run; set one of them to 0."
        )
    total_images = solver.TOTAL_IMAGES or round(solver.TOTAL_EPOCHS * images_per_epoch)
    if total_images > 0:
        solver.MAX_ITER = math.ceil(total_images / solver.IMS_PER_BATCH)
    if solver.LR_PER_256_IMAGES > 0:
        solver.BASE_LR = solver.LR_PER_256_IMAGES * solver.IMS_PER_BATCH / 256
    if solver.WARMUP_IMAGES > 0:
        solver.WARMUP_ITERS = math.ceil(solver.WARMUP_IMAGES / solver.IMS_PER_BATCH)
        if solver.WARMUP_ITERS >= solver.MAX_ITER:
            raise ConfigError(
                f"SOLVER.WARMUP_IMAGES ({solver.WARMUP_IMAGES}) must be less than the images of the whole run "
                f"({solver.MAX_ITER * solver.IMS_PER_BATCH})."
            )
        if solver.LR_PER_256_IMAGES > 0 and solver.IMS_PER_BATCH > 256:
            solver.WARMUP_FACTOR = 256 / solver.IMS_PER_BATCH
    if solver.NUM_LR_HALVINGS > 0:
        solver.GAMMA = 0.5
        solver.STEPS = halving_steps(solver.MAX_ITER, solver.NUM_LR_HALVINGS)


def halving_steps(max_iter: int, num_halvings: int) -> tuple[int, ...]:
    """Returns ``num_halvings`` evenly spaced iterations strictly inside (0, max_iter).

    Raises:
        ConfigError: the run is too short for that many distinct steps.
    """
    steps = tuple(round(max_iter * k / (num_halvings + 1)) for k in range(1, num_halvings + 1))
    if len(set(steps)) < num_halvings or steps[0] <= 0 or steps[-1] >= max_iter:
        raise ConfigError(f"SOLVER.NUM_LR_HALVINGS is {num_halvings}, too many for {max_iter} iterations.")
    return steps


def images_to_process(num_images: int) -> int:
    """Returns for how many images, repetitions counted, to pretrain on a dataset of ``num_images``.

    The rule that the recipe is recalled to have: 100 epochs at 1.2 million images, 2 epochs at 3.5 billion, linear in
    the number of images between; below and above the epochs stay.
    """
    (few, at_few), (many, at_many) = (1_200_000, 120_000_000), (3_500_000_000, 7_000_000_000)
    if num_images <= few:
        return num_images * at_few // few
    if num_images >= many:
        return num_images * at_many // many
    return at_few + round((num_images - few) * (at_many - at_few) / (many - few))
