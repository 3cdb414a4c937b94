"""The gain of one set of runs over another, and what it is uncertain about.

Two questions have two intervals. "These models, on other images": the paired bootstrap over images. "This pretraining,
trained again, on other images": for that, the values of run j on a side are taken as

    value(j, images) = mean + seed(j) + side(images) + both(j, images)

The bootstrap estimates of all runs share the draws of images, so their mean over runs varies by ``side`` and a k-th of
``both``. The points of all runs are of the same images, so their spread over runs is that of ``seed`` and ``both``, and
``side`` is not in it. Hence

    variance of the gain = (bootstrap variance of the means' difference - both / k of each side) + spread / k of each
    side,

where ``both`` is how much the runs' bootstrap estimates differ beyond their means. The first part is known well, a
spread with k - 1 degrees of freedom; those of the sum are Satterthwaite's (Biometrics Bulletin 2, 1946).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_MOST_RUNS = 1000
_MOST_IMAGES = 1024  # times as many


@dataclass(frozen=True)
class BootstrapEstimate:
    """A number of one run, in points (0-100), on all images and on resampled ones.

    Args:
        point: NaN where it is not defined, such as the AP of a size without objects.
        replicates: (B,), with the same draws of images for all runs that are compared.
    """

    point: float
    replicates: np.ndarray


def gain_of(
    baseline: Sequence[BootstrapEstimate],
    candidate: Sequence[BootstrapEstimate],
    seed: int = 0,
    seed_sd: float | None = None,
    paired: bool = False,
) -> dict:
    """The gain of a candidate's runs over a baseline's in one number.

    Args:
        baseline, candidate: one estimate a run.
        seed: not used, nothing is drawn here.
        seed_sd: standard deviation between training seeds to assume, in points, for a side with a single run.
        paired: whether the n-th runs of both sides belong together, as those of one seed. That pays where seeds
            explain much of the spread (a correlation above 0.6 with 3 pairs, 0.3 with 5); else it costs width.

    Returns:
        "baseline", "candidate" (means over runs), "gain", in points; "num_runs" of the two sides;
        "interval": 95%, of these models on other images (percentiles of the paired bootstrap), with "p_value",
        two-sided, and "probability_of_gain"; "method_interval": 95%, of this pretraining trained again, on other
        images, with "method_p_value", both None with a single run on a side unless ``seed_sd`` is given; what the
        second consists of: "image_sd" of the gain and "seed_sds" of the runs of each side (of the pairs, if paired),
        None where unknown, and "degrees_of_freedom".
    """
    sides = [(np.array([run.point for run in runs]), np.stack([run.replicates for run in runs])) for runs in
             (baseline, candidate)]  # fmt: skip
    means = [float(points.mean()) for points, _ in sides]
    gain = means[1] - means[0]
    gains = sides[1][1].mean(axis=0) - sides[0][1].mean(axis=0)
    is_defined = ~np.isnan(gains)
    gains = gains[is_defined]
    result = {"baseline": means[0], "candidate": means[1], "gain": gain, "num_runs": [len(p) for p, _ in sides]}
    result |= _over_images(gains if math.isfinite(gain) else gains[:0])
    unknown = {"method_interval": None, "method_p_value": None, "image_sd": None, "seed_sds": None}
    result |= unknown | {"degrees_of_freedom": None}
    if len(gains) < 2 or not math.isfinite(gain):
        return result
    groups = [(points, replicates[:, is_defined]) for points, replicates in sides]
    if paired:
        groups = [(groups[1][0] - groups[0][0], groups[1][1] - groups[0][1])]
    parts: list[tuple[float, int, float]] = []
    both = 0.0
    for points, replicates in groups:
        runs = len(points)
        if runs > 1:
            deviations = replicates - replicates.mean(axis=1, keepdims=True)
            both += float(deviations.var(axis=0, ddof=1).mean()) / runs
            parts.append((float(points.var(ddof=1)), runs, runs - 1))
        elif seed_sd is not None:
            parts.append((seed_sd**2 * (1 + paired), 1, math.inf))
    image_variance = max(0.0, float(gains.var(ddof=1)) - both)
    result["image_sd"] = math.sqrt(image_variance)
    if len(parts) == len(groups):
        half_width, error, freedom = _half_width(image_variance, parts)
        result["method_interval"] = [gain - half_width, gain + half_width]
        result["method_p_value"] = float(2 * stats.t.sf(abs(gain) / error, freedom)) if error else float(gain == 0)
        result["seed_sds"] = [math.sqrt(variance) for variance, _, _ in parts]
        result["degrees_of_freedom"] = freedom if math.isfinite(freedom) else None
    return result


def _over_images(gains: np.ndarray) -> dict:
    if len(gains) == 0:
        nothing = float("nan")
        return {"interval": [nothing, nothing], "p_value": nothing, "probability_of_gain": nothing}
    low, high = np.percentile(gains, [2.5, 97.5])
    tail = min(float(np.mean(gains <= 0)), float(np.mean(gains >= 0)))
    return {
        "interval": [float(low), float(high)],
        "p_value": min(1.0, 2 * max(tail, 1 / (len(gains) + 1))),
        "probability_of_gain": float(np.mean(gains > 0)),
    }


def _half_width(image_variance: float, parts: list[tuple[float, int, float]]) -> tuple[float, float, float]:
    """Returns (half width of the 95% interval, standard error, degrees of freedom).

    Args:
        parts: (variance between runs, number of runs, its degrees of freedom) of each side.
    """
    seeds = [(variance / runs, freedom) for variance, runs, freedom in parts]
    total = image_variance + sum(variance for variance, _ in seeds)
    spread = sum(variance**2 / freedom for variance, freedom in seeds)
    freedom = total**2 / spread if spread > 0 else math.inf
    error = math.sqrt(total)
    return float(stats.t.ppf(0.975, freedom)) * error, error, freedom


def shown_interval(gain: dict) -> list[float]:
    """The interval of the method where there is one, else that of these models."""
    return gain["method_interval"] or gain["interval"]


def verdict(gain: dict) -> str:
    """Returns "gain", "loss" or "no gain shown", by whether the 95% interval of the method excludes 0; where there is
    none, the same of the detectors, and that it is about them only."""
    low, high = shown_interval(gain)
    outcome = "gain" if low > 0 else "loss" if high < 0 else "no gain shown"
    return outcome if gain["method_interval"] else f"these detectors only: {outcome}"


def what_would_settle(gain: dict, num_images: int) -> dict[str, dict[str, int | None]]:
    """How many runs a side, or how many images, would give a more certain answer, if all else stays as estimated.

    Args:
        gain: of :func:`gain_of`.
        num_images: that it was evaluated on.

    Returns:
        "exclude_0" (an interval on one side of 0) and "half_as_wide" -> "runs" on each side with these images, and
        "images" with these runs; None where no number that can be paid for is enough, or, for runs, where their spread
        is unknown. Without an interval of the method it is about that of these detectors.
    """
    nothing: dict[str, int | None] = {"runs": None, "images": None}
    answers = {"exclude_0": dict(nothing), "half_as_wide": dict(nothing)}
    if gain["image_sd"] is None:
        return answers
    image_variance = gain["image_sd"] ** 2
    variances = [sd**2 for sd in gain["seed_sds"] or []]
    numbers = gain["num_runs"] if len(variances) == 2 else gain["num_runs"][:1]
    known = [(v, n, n - 1 if n > 1 else math.inf) for v, n in zip(variances, numbers, strict=False)]
    targets = {"exclude_0": abs(gain["gain"]), "half_as_wide": _half_width(image_variance, known)[0] / 2}
    for name, target in targets.items():
        enough = target * (1 - 1e-9) if name == "exclude_0" else target * (1 + 1e-9)
        for runs in range(max(2, *gain["num_runs"]), _MOST_RUNS + 1) if variances else ():
            if _half_width(image_variance, [(variance, runs, runs - 1) for variance in variances])[0] < enough:
                answers[name]["runs"] = runs
                break
        for factor in np.geomspace(1, _MOST_IMAGES, 201):
            if _half_width(image_variance / factor, known)[0] < enough:
                answers[name]["images"] = _two_digits(num_images * factor)
                break
    return answers


def _two_digits(number: float) -> int:
    """Rounded up to two significant digits."""
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit - 1e-6) * unit
