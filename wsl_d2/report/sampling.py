"""What an epoch of a training set holds after resampling, before any training: its length, and the hashtags."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from wsl_d2.data.order.resampling import EpochDistribution

_SHARES = (0.01, 0.1, 0.5)  # of the hashtags on an image, the most frequent first


def describe_epoch(counts: np.ndarray, num_images: int, epoch: EpochDistribution) -> list[str]:
    """Lines of text about (C,) counts of images with each hashtag, before and after resampling."""
    used = counts > 0
    factors = epoch.draws[used] / counts[used]
    lines = [
        f"{num_images:,} labelled images, {used.sum():,} of {len(counts):,} hashtags on an image",
        f"one epoch: {epoch.length:,} draws, {epoch.length / num_images:.3f} an image; an image of a hashtag comes "
        f"{factors.min():.2f} to {factors.max():.2f} times on average",
    ]
    before, after = np.sort(counts[used])[::-1], epoch.draws[used][np.argsort(-counts[used], kind="stable")]
    for share in _SHARES:
        top = max(1, round(share * len(before)))
        lines.append(
            f"the {top:,} most frequent hashtags have {before[:top].sum() / before.sum():.1%} of all labels, "
            f"{after[:top].sum() / after.sum():.1%} after resampling"
        )
    return lines


def plot_epoch(counts: np.ndarray, epoch: EpochDistribution, num_images: int) -> Figure:
    """Frequency against rank, before and after resampling, on logarithmic axes."""
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    ranks = np.arange(1, len(order) + 1)
    axes.loglog(ranks, epoch.draws[order] / epoch.length, "--", color="#b35806", label="draws of an epoch")
    axes.loglog(ranks, counts[order] / num_images, color="#1a1a1a", label="images")
    axes.set_xlabel("hashtag, by its number of images")
    axes.set_ylabel("fraction that carries it")
    axes.legend(frameon=False)
    return figure
