"""Resampling of the hashtag distribution: hashtag frequencies -> repeat factors. Pure functions.

Same form as Detectron2's ``RepeatFactorTrainingSampler``: r(h) = max(1, phi(t / f(h))) with phi the square root
("sqrt") or the identity ("uniform"), f(h) the fraction of images with hashtag h, and r(I) the largest r(h) over
the hashtags of image I.

For order and sums, repeat factors are integers in units of 1 / ONE: exact, whatever the order of adding them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from wsl_d2.data.format.labels import HashtagIndex, ShardedIndex

MODES = ("natural", "sqrt", "uniform")
ONE = 1 << 20
_READERS = 8
_SHARDS_AT_ONCE = 256


def repeat_factors(hashtag_frequency: np.ndarray, threshold: float, mode: str) -> np.ndarray:
    """Returns how often an image of each hashtag is to be seen in one epoch.

    Args:
        hashtag_frequency: (C,) fraction of images carrying each hashtag, in [0, 1]. A hashtag that never occurs
            gets the factor 1.
        threshold: t, the frequency below which images are repeated; of modes "sqrt" and "uniform".
        mode: "natural" (all 1), "sqrt" or "uniform".

    Returns:
        (C,) float64, each at least 1.

    Raises:
        ValueError: unknown mode, frequencies outside [0, 1], or a threshold outside (0, 1].
    """
    frequency = np.asarray(hashtag_frequency, np.float64)
    if mode not in MODES:
        raise ValueError(f"DATALOADER.RESAMPLING.MODE {mode!r} is unknown; choose one of {', '.join(MODES)}.")
    if not np.all((frequency >= 0) & (frequency <= 1)):
        raise ValueError(f"hashtag frequencies are fractions in [0, 1], got {frequency.min()} to {frequency.max()}.")
    if mode == "natural":
        return np.ones_like(frequency)
    if not 0 < threshold <= 1:
        raise ValueError(f"DATALOADER.RESAMPLING.THRESHOLD is a fraction of images in (0, 1], got {threshold}.")
    ratio = np.divide(threshold, frequency, out=np.zeros_like(frequency), where=frequency > 0)
    return np.maximum(1.0, ratio if mode == "uniform" else np.sqrt(ratio))


def fixed_point(factors: np.ndarray) -> np.ndarray:
    """Returns positive factors as int64 in units of 1 / ONE."""
    return np.maximum(1, np.rint(factors * ONE)).astype(np.int64)


def largest_factors(indptr: np.ndarray, labels: np.ndarray, per_hashtag: np.ndarray) -> np.ndarray:
    """Returns for each of n images the largest factor among its hashtags.

    Args:
        indptr: (n + 1,) image i has ``labels[indptr[i]:indptr[i + 1]]``, at least one.
        labels: (L,) integers in [0, C).
        per_hashtag: (C,) factors of the hashtags.

    Returns:
        (n,) of the same type as ``per_hashtag``.
    """
    return np.maximum.reduceat(per_hashtag[labels], indptr[:-1]) if len(indptr) > 1 else per_hashtag[:0]


def image_repeat_factors(index: HashtagIndex, threshold: float, mode: str) -> np.ndarray:
    """Returns (N,) float64: for each image the largest repeat factor among its hashtags."""
    if index.num_images == 0:
        raise ValueError("the dataset has no image with a label of its vocabulary.")
    per_hashtag = repeat_factors(index.hashtag_counts() / index.num_images, threshold, mode)
    return largest_factors(index.indptr, index.labels, per_hashtag)


@dataclass
class EpochDistribution:
    """What one epoch holds, exactly.

    Attributes:
        totals: (S,) int64, sum of the repeat factors of each shard's images, in units of 1 / ONE.
        length: draws in an epoch.
        draws: (C,) float64, expected number of draws that carry each hashtag.
    """

    totals: np.ndarray
    length: int
    draws: np.ndarray


def shard_totals(index: HashtagIndex | ShardedIndex, per_hashtag: np.ndarray) -> np.ndarray:
    """Returns (S,) int64: the sum of each shard's repeat factors, for (C,) int64 factors of the hashtags."""
    return _sum_up(index, per_hashtag)[0]


def epoch_distribution(index: HashtagIndex | ShardedIndex, threshold: float, mode: str) -> EpochDistribution:
    """Sums the repeat factors of every image, reading the labels shard by shard."""
    per_hashtag = fixed_point(repeat_factors(index.hashtag_counts() / index.num_images, threshold, mode))
    totals, draws = _sum_up(index, per_hashtag)
    total = int(totals.sum())
    length = max(1, round(total / ONE))
    return EpochDistribution(totals, length, draws * (length * ONE / total))


def _sum_up(index: HashtagIndex | ShardedIndex, per_hashtag: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    num_shards = len(index.first_image) - 1
    draws = np.zeros(len(per_hashtag))

    def read(shard: int) -> tuple[int, np.ndarray, np.ndarray]:
        indptr, labels = index.labels_of(shard)
        factors = largest_factors(indptr, labels, per_hashtag)
        found, place = np.unique(labels, return_inverse=True)
        return int(factors.sum()), found, np.bincount(place, weights=np.repeat(factors, np.diff(indptr)))

    totals = np.empty(num_shards, np.int64)
    with (
        ThreadPoolExecutor(_READERS) as pool,
        tqdm(total=num_shards, unit="shard", desc="repeat factors", disable=None if num_shards > 99 else True) as bar,
    ):
        for start in range(0, num_shards, _SHARDS_AT_ONCE):
            numbers = range(start, min(num_shards, start + _SHARDS_AT_ONCE))
            for shard, (total, found, weights) in zip(numbers, pool.map(read, numbers), strict=True):
                totals[shard] = total
                draws[found] += weights
                bar.update()
    return totals, draws / ONE
