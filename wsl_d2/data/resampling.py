"""Resampling of the hashtag distribution: hashtag frequencies -> repeat factors. Pure functions.

Same form as Detectron2's ``RepeatFactorTrainingSampler``: r(h) = max(1, phi(t / f(h))) with phi the square root
("sqrt") or the identity ("uniform"), f(h) the fraction of images with hashtag h, and r(I) the largest r(h) over
the hashtags of image I.
"""

from __future__ import annotations

import numpy as np

from wsl_d2.data.shards import HashtagIndex

MODES = ("natural", "sqrt", "uniform")


def repeat_factors(hashtag_frequency: np.ndarray, threshold: float, mode: str) -> np.ndarray:
    """Returns how often an image of each hashtag is to be seen in one epoch.

    Args:
        hashtag_frequency: (C,) fraction of images carrying each hashtag, in [0, 1]. A hashtag that never occurs
            gets the factor 1.
        threshold: t, the frequency below which images are repeated; unused in mode "natural".
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
    return np.maximum(1.0, np.sqrt(ratio) if mode == "sqrt" else ratio)


def image_repeat_factors(index: HashtagIndex, threshold: float, mode: str) -> np.ndarray:
    """Returns (N,) float64: for each image the largest repeat factor among its hashtags."""
    if index.num_images == 0:
        raise ValueError("the dataset has no image with a label of its vocabulary.")
    per_hashtag = repeat_factors(index.hashtag_counts() / index.num_images, threshold, mode)
    return np.maximum.reduceat(per_hashtag[index.labels], index.indptr[:-1])
