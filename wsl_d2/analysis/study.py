"""What came out of a grid of runs: levels of an axis, growth over a number, the best of a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

from wsl_d2.analysis.records import RunError, without_nan
from wsl_d2.analysis.scaling import compare_growth, compare_slopes, fit_log_linear


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """Returns (mean, half width of its 95% interval by Student's t); the half width is NaN for one value, both for
    none."""
    array = np.asarray(list(values), float)
    if len(array) < 2:
        return float(array.sum()) if len(array) else float("nan"), float("nan")
    return float(array.mean()), float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))


def analyze_item(item: Mapping, axes: Mapping[str, Iterable], rows: Sequence[Mapping]) -> dict:
    """Works out one item of a study's report.

    Args:
        item: "kind" ("levels", "scaling" or "sweep") and what it needs, see :mod:`wsl_d2.study.study`.
        axes: axis -> its values.
        rows: of runs: axis -> value, and result -> number, None of a run that diverged.

    Returns:
        The item and, JSON-able, what came out, None where there is no number; axes are ascending.

    Raises:
        RunError: no run has both x and y, or a line has too few points.
    """
    x, y = item["x"], item["y"]
    members = [row for row in rows if x in row and y in row]
    if all(row[y] is None for row in members):
        raise RunError(f"no run has both {x} and {y}; the stage of {y} must have the axis {x}.")
    kinds = {"levels": _levels, "scaling": _scaling, "sweep": best_of_sweep}
    run = {axis: {row[axis] for row in members} for axis in (x, item.get("series")) if axis}  # by the stage of y
    ordered = {axis: [v for v in ascending(values) if v in run.get(axis, values)] for axis, values in axes.items()}
    return without_nan({**item, **kinds[item["kind"]](item, ordered, members)})


def ascending(values: Iterable) -> list:
    """Returns values in their order, numbers ascending."""
    values = list(values)
    return sorted(values) if all(isinstance(value, int | float) for value in values) else values


def _points(item: Mapping, axes: Mapping[str, list], rows: Sequence[Mapping]) -> list[dict]:
    """The mean over all other axes at each x, with its interval, and how many of the runs there diverged."""
    points = []
    for value in axes[item["x"]]:
        here = [row for row in rows if row[item["x"]] == value]
        mean, half_width = mean_interval(row[item["y"]] for row in here if row[item["y"]] is not None)
        diverged = sum(row[item["y"]] is None for row in here)
        points.append({"x": value, "mean": mean, "half_width": half_width, "runs": len(here), "diverged": diverged})
    return points


def best_of_sweep(item: Mapping, axes: Mapping[str, list], rows: Sequence[Mapping]) -> dict:
    """Finds the best x of each series: the highest y among those where no run diverged; arguments as those of
    :func:`analyze_item`, axes ascending."""
    lines = []
    for name in axes[item["series"]]:
        points = _points(item, axes, [row for row in rows if row[item["series"]] == name])
        whole = [point for point in points if point["runs"] and not point["diverged"]]
        best = max(whole, key=lambda point: point["mean"], default=None)
        end = "" if best is None else "lowest" if best is points[0] else "highest" if best is points[-1] else ""
        lines.append({"series": name, "points": points, "best": best and best["x"], "at_end": end})
    return {"lines": lines}


def _scaling(item: Mapping, axes: Mapping[str, list], rows: Sequence[Mapping]) -> dict:
    """A straight line over log10(x) for each series, all seeds as points, and the slopes' differences."""
    fits, lines = [], []
    for name in axes[item["series"]]:
        members = [row for row in rows if row[item["series"]] == name and row[item["y"]] is not None]
        numbers, results = [row[item["x"]] for row in members], [row[item["y"]] for row in members]
        labels = [", ".join(f"{axis}={row[axis]}" for axis in axes if axis in row) for row in members]
        try:
            fit = fit_log_linear(numbers, results, labels)
        except ValueError as error:
            raise RunError(f"{item['y']} of {name}: {error}") from error
        fits.append(fit)
        next_decade = 10 * max(numbers)
        value, interval = fit.predict(next_decade)
        is_enough = len(set(numbers)) >= 4 and len(numbers) >= 6  # for a curve
        lines.append(
            {
                "series": name,
                "points": _points(item, axes, members),
                "slope_per_decade": fit.slope_per_decade,
                "slope_interval": fit.slope_interval,
                "intercept": fit.intercept,
                "residual_sd": fit.residual_sd,
                "num_points": fit.num_points,
                "growth": compare_growth(numbers, results) if is_enough else None,
                "prediction": {"x": next_decade, "value": value, "interval": interval},
            }
        )
    differences = [
        {"series": line["series"], "than": lines[0]["series"], **compare_slopes(fits[0], fit)}
        for line, fit in zip(lines[1:], fits[1:], strict=True)
    ]
    return {"lines": lines, "differences": differences}


def _levels(item: Mapping, axes: Mapping[str, list], rows: Sequence[Mapping]) -> dict:
    """Mean of each value of an axis, and its difference from the baseline paired by all other axes."""
    x, baseline, y = item["x"], item["baseline"], item["y"]
    others = [axis for axis in axes if axis != x and axis in rows[0]]
    results: dict = {value: {} for value in axes[x]}
    for row in rows:
        if row[y] is not None:
            results[row[x]][tuple(row[axis] for axis in others)] = row[y]
    levels = []
    for point in _points(item, axes, rows):
        value = point.pop("x")
        base = results.get(baseline, {})
        gains = [result - base[key] for key, result in results[value].items() if key in base]
        difference, half_width = mean_interval(gains)
        has_p = value != baseline and len(gains) > 1 and np.ptp(gains) > 0
        levels.append(
            {
                "value": value,
                **point,
                "results": list(results[value].values()),
                "difference": difference,
                "difference_half_width": half_width,
                "p_value": float(stats.ttest_1samp(gains, 0).pvalue) if has_p else None,
            }
        )
    return {"paired_by": others, "levels": levels}
