"""Which image comes when: pure functions from (seed, position) to an image, and the sampler over them.

Position p counts images drawn by the whole run, over all processes. An epoch is the resampled dataset of
L = round(sum of repeat factors) draws; epoch e = p // L. Within an epoch a keyed permutation maps p % L to a slot
v, and slot v to the image whose stretch of the cumulative repeat factors holds (v + u_e) / L of the total, u_e a
random offset of the epoch. So image I comes floor(r(I)) or ceil(r(I)) times with mean r(I); with all factors 1
every image comes exactly once. Nothing depends on the number of processes or workers, and resuming is a number.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from wsl_d2.data.resampling import image_repeat_factors
from wsl_d2.data.shards import HashtagIndex

_FEISTEL_ROUNDS = 6


def mix64(values: np.ndarray, key: int) -> np.ndarray:
    """A 64-bit integer hash (the finaliser of splitmix64), vectorised over uint64."""
    with np.errstate(over="ignore"):
        x = values + np.uint64(key & 0xFFFFFFFFFFFFFFFF)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def keyed_permutation(positions: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Permutes [0, size) without storing it: a Feistel network with cycle walking.

    Args:
        positions: (n,) integers in [0, size).
        size: at least 1, below 2**62.
        seed, epoch: the key; another key gives another order.

    Returns:
        (n,) int64 in [0, size); a bijection of [0, size).
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(0, 2**63, _FEISTEL_ROUNDS)

    def encrypt(x: np.ndarray) -> np.ndarray:
        left, right = x >> half_bits, x & mask
        for key in keys:
            left, right = right, left ^ (mix64(right, int(key)) & mask)
        return (left << half_bits) | right

    result = encrypt(np.asarray(positions).astype(np.uint64))
    outside = result >= np.uint64(size)
    while outside.any():  # the network permutes the next power of four, less than 4 * size: walk until inside
        result[outside] = encrypt(result[outside])
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


def epoch_length(cumulative_repeat_factors: np.ndarray) -> int:
    """Returns L, the number of draws in an epoch: the sum of the repeat factors, rounded."""
    return max(1, int(round(float(cumulative_repeat_factors[-1]))))


def images_at(positions: np.ndarray, cumulative_repeat_factors: np.ndarray, seed: int) -> np.ndarray:
    """Returns the images drawn at the given positions of the run.

    Args:
        positions: (n,) non-negative integers, position of each draw counted over all processes.
        cumulative_repeat_factors: (N,) float64, ``np.cumsum`` of the images' repeat factors.
        seed: a non-negative integer.

    Returns:
        (n,) int64 image indices in [0, N).
    """
    positions = np.asarray(positions, np.int64)
    length = epoch_length(cumulative_repeat_factors)
    images = np.empty(len(positions), np.int64)
    epochs, slots = np.divmod(positions, length)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        slot = keyed_permutation(slots[chosen], length, seed, int(epoch))
        offset = np.random.Generator(np.random.Philox(key=[seed, int(epoch) ^ (1 << 62)])).random()
        target = (slot + offset) * (cumulative_repeat_factors[-1] / length)
        images[chosen] = np.searchsorted(cumulative_repeat_factors, target, side="right")
    return np.minimum(images, len(cumulative_repeat_factors) - 1)  # rounding of the very last slot


class PositionSampler(Sampler):
    """Infinite stream of dataset indices for one process, in an order fixed by the seed and repeat factors alone.

    Iteration i of a run draws the positions [i * batch_size, (i + 1) * batch_size); rank r of W takes the r-th of W
    equal, contiguous parts, so that the ranks' parts together are the batch of a single process.

    Args:
        repeat_factors: (N,) float64, each image's expected number of draws per epoch, at least 1.
        seed: a non-negative integer.
        batch_size: images per iteration over all processes (``SOLVER.IMS_PER_BATCH``).
        rank, world_size: this process and their number. Given explicitly, since worker processes cannot ask.
        start_iteration: the first iteration to draw; resuming at k equals skipping k iterations.

    Raises:
        ValueError: ``batch_size`` is not a multiple of ``world_size``, or a value is out of range.
    """

    def __init__(
        self,
        repeat_factors: np.ndarray,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_iteration: int = 0,
    ):
        if seed < 0:
            raise ValueError(f"the sampler's seed must be non-negative, got {seed}; set SEED in the config.")
        if batch_size <= 0 or batch_size % world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is {batch_size}, which {world_size} processes cannot share equally; "
                f"use a multiple of {world_size}."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"the sampler's rank must be in [0, {world_size}), got {rank}.")
        if start_iteration < 0:
            raise ValueError(f"the sampler's start_iteration must not be negative, got {start_iteration}.")
        self.seed = seed
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start_iteration = start_iteration
        self.cumulative_repeat_factors = np.cumsum(repeat_factors)

    @property
    def epoch_length(self) -> int:
        """Draws per epoch of the resampled dataset."""
        return epoch_length(self.cumulative_repeat_factors)

    def draws(self, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns this rank's (positions, images) of one iteration, each (batch_size / world_size,) int64."""
        share = self.batch_size // self.world_size
        start = iteration * self.batch_size + self.rank * share
        positions = np.arange(start, start + share, dtype=np.int64)
        return positions, images_at(positions, self.cumulative_repeat_factors, self.seed)

    def batches(self) -> Iterator[list[tuple[int, int]]]:
        """Yields, per iteration, this rank's list of (dataset index, position); the position seeds the crop."""
        iteration = self.start_iteration
        while True:
            positions, images = self.draws(iteration)
            yield list(zip(images.tolist(), positions.tolist(), strict=True))
            iteration += 1

    def __iter__(self) -> Iterator[int]:
        for batch in self.batches():
            for image, _ in batch:
                yield image


class HashtagSampler(PositionSampler):
    """The order of hashtag images under resampling; see :class:`PositionSampler`.

    Args:
        index: labels of the images.
        mode, threshold: see :func:`wsl_d2.data.resampling.repeat_factors`.
    """

    def __init__(self, index: HashtagIndex, *, mode: str = "sqrt", threshold: float = 1e-3, **kwargs):
        super().__init__(image_repeat_factors(index, threshold, mode), **kwargs)
