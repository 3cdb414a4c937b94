"""What an epoch of a training set holds after resampling, before any training: its length, and the hashtags."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from wsl_d2.data.order.resampling import EpochDistribution
from wsl_d2.report.plots import draw_ranks

_SHARES = (0.01, 0.1, 0.5)  # of the hashtags on an image, the most frequent first


def describe_epoch(counts: np.ndarray, num_images: int, epoch: EpochDistribution) -> list[str]:
    """Lines of text about (C,) counts of images with each hashtag, before and after resampling."""
    used = counts > 0
    factors = epoch.draws[used] / counts[used]
    lines = [
        f"{num_images:,} labeled images, {used.sum():,} of {len(counts):,} hashtags on an image",
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
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    curves = {"images": counts / num_images, "draws of an epoch": epoch.draws / epoch.length}
    draw_ranks(axes, curves, "share that carries it")
    axes.legend(frameon=False)
    return figure
