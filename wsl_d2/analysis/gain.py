"""The gain of one set of runs over another, and what it is uncertain about.

Two questions have two intervals. "These models, on other images": the paired bootstrap over images. "This pretraining,
trained again, on other images": for that, the value of run j of a side is taken as

    mean + seed_j + images_of_side + images_of_run_j

The bootstrap estimates of all runs share the draws of images. Their mean over k runs varies by ``images_of_side`` and a
k-th of ``images_of_run``; how much they differ from each other is ``images_of_run``. The points are all of the same
images: their spread s2 over runs is ``seed`` and ``images_of_run``, and nothing of ``images_of_side``. So

    variance of the gain = bootstrap variance of the difference of the means
                           + max(0, s2 - images_of_run) / k of each side

and what images do to a run is not counted twice, nor can the interval be narrower than that over images alone. The
spread has k - 1 degrees of freedom; the sum has Satterthwaite's (Biometrics Bulletin 2, 1946), in which the spread
counts by the share of it that is the seeds'. `tools/benchmark.py coverage` shows how often the interval covers.
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
        paired: whether the n-th runs of both sides belong together, as those of one seed; at least 3 pairs. It pays
            where seeds explain much of the spread (a correlation above 0.6 with 3 pairs, 0.3 with 5); else it costs
            width. Two pairs would cover 87% where seeds outweigh images.

    Returns:
        "baseline", "candidate" (means over runs), "gain", in points; "num_runs" of the two sides;
        "interval": 95%, of these models on other images (percentiles of the paired bootstrap), with "p_value",
        two-sided, and "probability_of_gain"; "method_interval": 95%, of this pretraining trained again, on other
        images, with "method_p_value" and "degrees_of_freedom" (None: infinite), all None with a single run on a side
        unless ``seed_sd`` is given; and the standard deviations that it is made of: "image_sd" of the gain, which
        more runs do not lessen (without a method's interval: of these models), and for the runs of each side (or the
        pairs) "seed_sds" and "run_image_sds", None where unknown.

    Raises:
        ValueError: pairs that are none.
    """
    if paired and not len(baseline) == len(candidate) >= 3:
        raise ValueError(f"pairs need 3 runs or more, as many on each side; got {len(baseline)} and {len(candidate)}.")
    sides = [
        (np.array([run.point for run in runs]), np.stack([run.replicates for run in runs]))
        for runs in (baseline, candidate)
    ]
    means = [float(points.mean()) for points, _ in sides]
    gain = means[1] - means[0]
    gains = sides[1][1].mean(axis=0) - sides[0][1].mean(axis=0)
    is_defined = ~np.isnan(gains)
    gains = gains[is_defined]
    result = {"baseline": means[0], "candidate": means[1], "gain": gain, "num_runs": [len(p) for p, _ in sides]}
    result |= _over_images(gains if math.isfinite(gain) else gains[:0])
    unknown = ("method_interval", "method_p_value", "degrees_of_freedom", "image_sd", "seed_sds", "run_image_sds")
    result |= dict.fromkeys(unknown)
    if len(gains) < 2 or not math.isfinite(gain):
        return result
    groups = [(points, replicates[:, is_defined]) for points, replicates in sides]
    if paired:
        groups = [(groups[1][0] - groups[0][0], groups[1][1] - groups[0][1])]
    parts = [part for points, replicates in groups if (part := _spread(points, replicates, seed_sd))]
    image_variance = float(gains.var(ddof=1))
    if len(parts) == len(groups):
        image_variance = max(0.0, image_variance - sum(part.image_variance / part.runs for part in parts))
        half_width, error, freedom = _half_width(image_variance, parts)
        result["method_interval"] = [gain - half_width, gain + half_width]
        result["method_p_value"] = float(2 * stats.t.sf(abs(gain) / error, freedom)) if error else float(gain == 0)
        result["degrees_of_freedom"] = freedom if math.isfinite(freedom) else None
        result["seed_sds"] = [math.sqrt(part.seed_variance) for part in parts]
        result["run_image_sds"] = [math.sqrt(part.image_variance) for part in parts]
    result["image_sd"] = math.sqrt(image_variance)
    return result


@dataclass(frozen=True)
class _Spread:
    """Of the runs of a side: variance between seeds, and of what images do to a run alone; degrees of freedom."""

    seed_variance: float
    image_variance: float
    runs: int
    freedom: float


def _spread(points: np.ndarray, replicates: np.ndarray, seed_sd: float | None) -> _Spread | None:
    if len(points) == 1:
        return None if seed_sd is None else _Spread(seed_sd**2, 0.0, 1, math.inf)
    deviations = replicates - replicates.mean(axis=1, keepdims=True)
    of_images = float(deviations.var(axis=0, ddof=1).sum()) / (replicates.shape[1] - 1)
    return _Spread(max(0.0, float(points.var(ddof=1)) - of_images), of_images, len(points), len(points) - 1)


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


def _half_width(image_variance: float, parts: Sequence[_Spread]) -> tuple[float, float, float]:
    """Returns (half width of the 95% interval, standard error, degrees of freedom)."""
    spreads = [part.seed_variance + part.image_variance for part in parts]
    total = image_variance + sum(spread / part.runs for spread, part in zip(spreads, parts, strict=True))
    uncertain = sum(
        spread * part.seed_variance / part.runs**2 / part.freedom for spread, part in zip(spreads, parts, strict=True)
    )
    freedom = total**2 / uncertain if uncertain > 0 else math.inf
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
    seed_sds, run_image_sds = gain["seed_sds"] or [], gain["run_image_sds"] or []

    def half_width(images: float = 1.0, runs: int = 0) -> float:
        """With so many times the images, and so many runs a side instead of those that there are."""
        parts = []
        for seed_sd, image_sd, number in zip(seed_sds, run_image_sds, gain["num_runs"], strict=False):
            freedom = (runs or number) - 1 or math.inf  # of one run the spread is assumed
            parts.append(_Spread(seed_sd**2, image_sd**2 / images, runs or number, freedom))
        return _half_width(gain["image_sd"] ** 2 / images, parts)[0]

    for name, enough in (
        ("exclude_0", abs(gain["gain"]) * (1 - 1e-9)),
        ("half_as_wide", half_width() / 2 * (1 + 1e-9)),
    ):
        for runs in range(max(2, *gain["num_runs"]), _MOST_RUNS + 1) if seed_sds else ():
            if half_width(runs=runs) < enough:
                answers[name]["runs"] = runs
                break
        for factor in np.geomspace(1, _MOST_IMAGES, 201):
            if half_width(images=factor) < enough:
                answers[name]["images"] = _two_digits(num_images * factor)
                break
    return answers


def _two_digits(number: float) -> int:
    """Rounded up to two significant digits."""
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit - 1e-6) * unit
