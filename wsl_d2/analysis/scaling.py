"""How a result grows with the number of pretraining images: a straight line over the decades."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class LogLinearFit:
    """metric = intercept + slope_per_decade * log10(number of images), by least squares.

    Attributes:
        intercept: metric at one image, extrapolated; only its sum with the rest means anything.
        slope_per_decade: points per tenfold number of images.
        slope_interval: 95% interval of the slope, by Student's t with ``num_points - 2`` degrees of freedom.
        residuals: (n,) measured minus fitted, in the order given.
        residual_sd: their standard deviation, with that many degrees of freedom.
        num_points: n.
    """

    intercept: float
    slope_per_decade: float
    slope_interval: tuple[float, float]
    residuals: np.ndarray
    residual_sd: float
    num_points: int
    _mean_decade: float
    _sum_of_squares: float

    def predict(self, num_images: float) -> tuple[float, tuple[float, float]]:
        """Returns the metric at a number of images, and the 95% interval of a new measurement there."""
        decade = math.log10(num_images)
        value = self.intercept + self.slope_per_decade * decade
        spread = (decade - self._mean_decade) ** 2 / self._sum_of_squares
        half = _t(self.num_points) * self.residual_sd * math.sqrt(1 + 1 / self.num_points + spread)
        return value, (value - half, value + half)


def fit_log_linear(
    num_images: Sequence[float], metric: Sequence[float], names: Sequence[str] | None = None
) -> LogLinearFit:
    """Fits a metric, such as top-1 accuracy or AP, as a straight line over log10 of the number of images.

    The intervals hold for independent errors of one size that are normally distributed; several seeds at a number of
    images are so many points.

    Args:
        num_images: (n,) numbers of images, above 0; at least two different ones.
        metric: (n,) results.
        names: (n,) of the runs, for error messages.

    Raises:
        ValueError: fewer than 3 points, lengths that differ, a number of images that is not above 0, or a result that
            is not finite, as that of an unfinished run; the message names the run.
    """
    if len(num_images) != len(metric) or (names is not None and len(names) != len(metric)):
        raise ValueError(f"{len(num_images)} numbers of images for {len(metric)} results; there must be one for each.")
    labels = list(names) if names is not None else [f"point {i}" for i in range(len(metric))]
    for name, images, result in zip(labels, num_images, metric, strict=True):
        if not (math.isfinite(images) and images > 0):
            raise ValueError(f"{name}: the number of images must be above 0, got {images}.")
        if not math.isfinite(result):
            raise ValueError(f"{name}: the result is {result}; finish the run or leave it out.")
    if len(metric) < 3:
        raise ValueError(f"a line needs at least 3 points, got {len(metric)} ({', '.join(labels)}).")
    decades, results = np.log10(np.asarray(num_images, float)), np.asarray(metric, float)
    if np.ptp(decades) == 0:
        raise ValueError(f"all runs have {num_images[0]:g} images; a slope needs different numbers.")
    fit = stats.linregress(decades, results)
    residuals = results - (fit.intercept + fit.slope * decades)
    half = _t(len(results)) * fit.stderr
    return LogLinearFit(
        intercept=float(fit.intercept),
        slope_per_decade=float(fit.slope),
        slope_interval=(float(fit.slope - half), float(fit.slope + half)),
        residuals=residuals,
        residual_sd=float(np.sqrt((residuals**2).sum() / (len(results) - 2))),
        num_points=len(results),
        _mean_decade=float(decades.mean()),
        _sum_of_squares=float(((decades - decades.mean()) ** 2).sum()),
    )


def _t(num_points: int) -> float:
    return float(stats.t.ppf(0.975, num_points - 2))
