"""How a result grows with the number of pretraining images: straight over the decades, or levelling off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats


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
    _check(num_images, metric, list(names) if names is not None else [f"point {i}" for i in range(len(metric))])
    decades, results = np.log10(np.asarray(num_images, float)), np.asarray(metric, float)
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


def compare_slopes(first: LogLinearFit, second: LogLinearFit) -> dict:
    """By how much the second line is steeper, with Welch's degrees of freedom: "slope_difference", its 95% "interval",
    a two-sided "p_value", and the difference that runs like these find, at 5%, in 80% of such studies: "detectable"."""
    difference = second.slope_per_decade - first.slope_per_decade
    freedom = [fit.num_points - 2 for fit in (first, second)]
    errors = [(fit.slope_interval[1] - fit.slope_per_decade) / _t(fit.num_points) for fit in (first, second)]
    error = math.hypot(*errors)
    pooled = error**4 / sum(e**4 / df for e, df in zip(errors, freedom, strict=True)) if error else 1.0
    width = float(stats.t.ppf(0.975, pooled)) * error
    return {
        "slope_difference": difference,
        "interval": (difference - width, difference + width),
        "p_value": float(2 * stats.t.sf(abs(difference) / error, pooled)) if error else 0.0,
        "detectable": width + float(stats.t.ppf(0.8, pooled)) * error,
    }


def _check(num_images: Sequence[float], metric: Sequence[float], labels: list[str]) -> None:
    for name, images, result in zip(labels, num_images, metric, strict=True):
        if not (math.isfinite(images) and images > 0):
            raise ValueError(f"{name}: the number of images must be above 0, got {images}.")
        if not math.isfinite(result):
            raise ValueError(f"{name}: the result is {result}; finish the run or leave it out.")
    if len(metric) < 3:
        raise ValueError(f"a line needs at least 3 points, got {len(metric)} ({', '.join(labels)}).")
    if len(set(num_images)) == 1:
        raise ValueError(f"all runs have {num_images[0]:g} images; a slope needs different numbers.")


@dataclass(frozen=True)
class SaturatingFit:
    """metric = ceiling - loss_at_one * number_of_images ** -exponent, by least squares.

    Attributes:
        ceiling: where the metric levels off.
        loss_at_one: below the ceiling at one image, extrapolated.
        exponent: in [0.01, 3].
        residuals: (n,) measured minus fitted, in the order given.
    """

    ceiling: float
    loss_at_one: float
    exponent: float
    residuals: np.ndarray

    def predict(self, num_images: float) -> float:
        """Returns the metric at a number of images."""
        return self.ceiling - self.loss_at_one * num_images**-self.exponent


def fit_saturating(
    num_images: Sequence[float], metric: Sequence[float], names: Sequence[str] | None = None
) -> SaturatingFit:
    """Fits a metric that levels off, the alternative to :func:`fit_log_linear`.

    Args:
        num_images: (n,) numbers of images, above 0; at least three different ones.
        metric: (n,) results.
        names: (n,) of the runs, for error messages.

    Raises:
        ValueError: as :func:`fit_log_linear`, or fewer than three different numbers of images.
    """
    _check(num_images, metric, list(names) if names is not None else [f"point {i}" for i in range(len(metric))])
    images, results = np.asarray(num_images, float), np.asarray(metric, float)
    if len(set(num_images)) < 3:
        raise ValueError("a curve that levels off needs at least 3 different numbers of images.")

    def solve(log_exponent: float) -> tuple[np.ndarray, np.ndarray]:
        design = np.stack([np.ones_like(images), -((images / images.min()) ** -math.exp(log_exponent))], axis=1)
        solution = np.linalg.lstsq(design, results, rcond=None)[0]
        return solution, results - design @ solution

    def squares(log_exponent: float) -> float:
        return float((solve(log_exponent)[1] ** 2).sum())

    grid = np.linspace(math.log(0.01), math.log(3), 61)
    best = int(np.argmin([squares(value) for value in grid]))
    bounds = (grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)])
    log_exponent = optimize.minimize_scalar(squares, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x
    (ceiling, loss), residuals = solve(log_exponent)
    exponent = math.exp(log_exponent)
    return SaturatingFit(float(ceiling), float(loss * images.min() ** exponent), exponent, residuals)


def compare_growth(num_images: Sequence[float], metric: Sequence[float]) -> dict[str, float]:
    """Compares the straight line with the curve that levels off.

    Returns:
        "aicc_difference": AICc (Akaike's criterion with the correction for small samples) of the curve minus that of
        the line, negative where the curve is the better description; "error_of_line" and "error_of_curve": of the
        mean result at the most images, predicted from all others.

    Raises:
        ValueError: as :func:`fit_saturating`, with four different numbers of images and six points needed.
    """
    images, results = np.asarray(num_images, float), np.asarray(metric, float)
    if len(set(num_images)) < 4 or len(images) < 6:
        raise ValueError("to compare a line with a curve takes 6 points at 4 different numbers of images.")
    line, curve = fit_log_linear(num_images, metric), fit_saturating(num_images, metric)
    largest = images == images.max()
    others = images[~largest].tolist(), results[~largest].tolist()
    target = float(results[largest].mean())
    return {
        "aicc_difference": _aicc(curve.residuals, 4) - _aicc(line.residuals, 3),
        "error_of_line": abs(fit_log_linear(*others).predict(images.max())[0] - target),
        "error_of_curve": abs(fit_saturating(*others).predict(images.max()) - target),
    }


def _aicc(residuals: np.ndarray, num_parameters: int) -> float:
    """Of a least-squares fit; the errors' size counts among the parameters."""
    n = len(residuals)
    squares = max(float((residuals**2).sum()), 1e-24)
    return n * math.log(squares / n) + 2 * num_parameters * n / (n - num_parameters - 1)


def _t(num_points: int) -> float:
    return float(stats.t.ppf(0.975, num_points - 2))
