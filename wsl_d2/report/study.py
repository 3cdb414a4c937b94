"""What came out of a study: tables with intervals, fits and plots, as text, JSON and one page."""

from __future__ import annotations

import csv
import html
import json
import string
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from wsl_d2.analysis.records import without_nan
from wsl_d2.analysis.scaling import compare_growth, fit_log_linear
from wsl_d2.report.gains import write_gains
from wsl_d2.report.plots import STYLE_SHEET, style_of, svg_of
from wsl_d2.study.study import Cell, Study, StudyError


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """Returns (mean, half width of its 95% interval by Student's t); the half width is NaN for one value."""
    array = np.asarray(list(values), float)
    if len(array) < 2:
        return float(array.mean()), float("nan")
    return float(array.mean()), float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))


def analyse(study: Study, rows: list[dict]) -> list[dict]:
    """Works out each item of the study's report from the rows of :meth:`Study.read_results`.

    Raises:
        StudyError: an item has no rows.
    """
    kinds = {"scaling": _scaling, "levels": _levels}
    return [kinds[item["kind"]](study, rows, item) for item in study.report if item["kind"] in kinds]


def _with(rows: list[dict], axis: str, result: str) -> list[dict]:
    chosen = [row for row in rows if axis in row and result in row]
    if not chosen:
        raise StudyError(f"no run has both {axis} and {result}; the stage of {result} must have the axis {axis}.")
    return chosen


def _scaling(study: Study, rows: list[dict], item: dict) -> dict:
    """A straight line over log10(x) for each series, all seeds as points, and the slopes' differences."""
    x, series, y = item["x"], item["series"], item["y"]
    lines = []
    for name in study.axes[series]:
        members = [row for row in _with(rows, x, y) if row[series] == name]
        labels = [", ".join(f"{axis}={row[axis]}" for axis in study.axes if axis in row) for row in members]
        fit = fit_log_linear([row[x] for row in members], [row[y] for row in members], labels)
        next_decade = 10 * max(row[x] for row in members)
        value, interval = fit.predict(next_decade)
        points = []
        for number in study.axes[x]:
            mean, half_width = mean_interval(row[y] for row in members if row[x] == number)
            points.append({"x": number, "mean": mean, "half_width": half_width})
        lines.append(
            {
                "series": name,
                "points": points,
                "slope_per_decade": fit.slope_per_decade,
                "slope_interval": fit.slope_interval,
                "intercept": fit.intercept,
                "residual_sd": fit.residual_sd,
                "num_points": fit.num_points,
                "growth": _compare_growth([row[x] for row in members], [row[y] for row in members]),
                "prediction": {"x": next_decade, "value": value, "interval": interval},
            }
        )
    differences = []
    for line in lines[1:]:
        difference = line["slope_per_decade"] - lines[0]["slope_per_decade"]
        half = [(one["slope_interval"][1] - one["slope_interval"][0]) / 2 for one in (line, lines[0])]
        freedom = [one["num_points"] - 2 for one in (line, lines[0])]
        errors = [width / stats.t.ppf(0.975, df) for width, df in zip(half, freedom, strict=True)]
        error = float(np.hypot(*errors))
        pooled = error**4 / sum(e**4 / df for e, df in zip(errors, freedom, strict=True)) if error else 1.0  # Welch
        width = float(stats.t.ppf(0.975, pooled)) * error
        differences.append(
            {
                "series": line["series"],
                "than": lines[0]["series"],
                "slope_difference": difference,
                "interval": (difference - width, difference + width),
                "p_value": float(2 * stats.t.sf(abs(difference) / error, pooled)) if error else 0.0,
            }
        )
    return {**item, "lines": lines, "differences": differences}


def _compare_growth(numbers: list, results: list) -> dict | None:
    """Line against curve, None with too few points for it."""
    if len(set(numbers)) < 4 or len(numbers) < 6:
        return None
    return compare_growth(numbers, results)


def _levels(study: Study, rows: list[dict], item: dict) -> dict:
    """Mean of each value of an axis, and its difference from the baseline paired by all other axes."""
    x, baseline, y = item["x"], item["baseline"], item["y"]
    members = _with(rows, x, y)
    others = [axis for axis in study.axes if axis != x and axis in members[0]]
    base = {tuple(row[axis] for axis in others): row[y] for row in members if row[x] == baseline}
    levels = []
    for value in study.axes[x]:
        here = {tuple(row[axis] for axis in others): row[y] for row in members if row[x] == value}
        mean, half_width = mean_interval(here.values())
        gains = [here[key] - base[key] for key in here]
        difference, difference_half_width = mean_interval(gains)
        p_value = None
        if value != baseline and len(gains) > 1 and np.ptp(gains) > 0:
            p_value = float(stats.ttest_1samp(gains, 0).pvalue)
        levels.append(
            {
                "value": value,
                "mean": mean,
                "half_width": half_width,
                "results": list(here.values()),
                "difference": difference,
                "difference_half_width": difference_half_width,
                "p_value": p_value,
            }
        )
    return {**item, "paired_by": others, "levels": levels}


def format_text(study: Study, analysis: list[dict]) -> str:
    """Returns the report for a terminal."""
    lines = [study.title, ""]
    for item in analysis:
        headers, table = table_of_item(item)
        widths = [max(len(row[i]) for row in [headers, *table]) for i in range(len(headers))]
        lines.append(_heading(item))
        for row in [headers, *table]:
            lines.append(
                "  ".join(
                    cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
                )
            )
        lines += [*_sentences(item), ""]
    return "\n".join(lines)


def _heading(item: dict) -> str:
    return f"{item['y']} by {item['x']}" + (f" and {item['series']}" if item["kind"] == "scaling" else "")


def table_of_item(item: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one item of :func:`analyse`."""
    if item["kind"] == "scaling":
        headers = [item["series"], *(f"{point['x']:,}" for point in item["lines"][0]["points"]), "per decade"]
        table = [
            [
                str(line["series"]),
                *(_plus_minus(point["mean"], point["half_width"]) for point in line["points"]),
                f"{line['slope_per_decade']:+.1f} [{line['slope_interval'][0]:+.1f}, {line['slope_interval'][1]:+.1f}]",
            ]
            for line in item["lines"]
        ]
        return headers, table
    headers = [item["x"], item["y"], f"minus {item['baseline']}", "p"]
    table = []
    for level in item["levels"]:
        is_baseline = level["value"] == item["baseline"]
        low, high = (level["difference"] + s * level["difference_half_width"] for s in (-1, 1))
        table.append(
            [
                str(level["value"]),
                _plus_minus(level["mean"], level["half_width"]),
                "" if is_baseline else f"{level['difference']:+.1f} [{low:+.1f}, {high:+.1f}]",
                "" if level["p_value"] is None else f"{level['p_value']:.3f}",
            ]
        )
    return headers, table


def _plus_minus(mean: float, half_width: float) -> str:
    return f"{mean:.1f}" + (f" ± {half_width:.1f}" if np.isfinite(half_width) else "")


def _sentences(item: dict) -> list[str]:
    if item["kind"] == "levels":
        return [f"Differences are paired by {', '.join(item['paired_by'])}; ± and brackets are 95% intervals."]
    sentences = []
    for line in item["lines"]:
        at = line["prediction"]
        sentences.append(
            f"{line['series']}: {line['slope_per_decade']:+.1f} per tenfold {item['x']}; a new run with {at['x']:,} "
            f"would give {at['value']:.1f} [{at['interval'][0]:.1f}, {at['interval'][1]:.1f}] if the line went on."
        )
    for line in item["lines"]:
        if (growth := line["growth"]) is not None:
            better = "levels off describes" if growth["aicc_difference"] < 0 else "levels off does not describe"
            sentences.append(
                f"{line['series']}: a curve that {better} the results better than the line (AICc "
                f"{growth['aicc_difference']:+.1f}); predicting the most {item['x']} from the rest, the line is off by "
                f"{growth['error_of_line']:.1f}, the curve by {growth['error_of_curve']:.1f}."
            )
    for row in item["differences"]:
        sentences.append(
            f"The slope of {row['series']} is {row['slope_difference']:+.1f} "
            f"[{row['interval'][0]:+.1f}, {row['interval'][1]:+.1f}] steeper than that of {row['than']} "
            f"(p = {row['p_value']:.3f})."
        )
    return sentences


def _plot(item: dict) -> str:
    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    if item["kind"] == "scaling":
        for position, line in enumerate(item["lines"]):
            color, style, marker = style_of(position + 1)
            numbers = [point["x"] for point in line["points"]]
            means = [point["mean"] for point in line["points"]]
            widths = np.nan_to_num([point["half_width"] for point in line["points"]])
            axis.errorbar(numbers, means, widths, fmt=marker, color=color, capsize=3, label=str(line["series"]))
            ends = np.array([min(numbers), max(numbers)])
            axis.plot(ends, line["intercept"] + line["slope_per_decade"] * np.log10(ends), style, color=color)
        axis.set_xscale("log")
        axis.legend(frameon=False, title=item["series"])
    else:
        names = [str(level["value"]) for level in item["levels"]]
        for position, level in enumerate(item["levels"]):
            axis.plot([position] * len(level["results"]), level["results"], "o", color="#888888", markersize=4)
            axis.errorbar(
                position, level["mean"], np.nan_to_num(level["half_width"]), fmt="D", color="#1a1a1a", capsize=4
            )
        axis.set_xticks(range(len(names)), names)
        axis.margins(x=0.2)
    axis.set_xlabel(item["x"])
    axis.set_ylabel(item["y"])
    axis.grid(color="#dddddd")
    return svg_of(figure)


def write_report(study: Study, rows: list[dict], analysis: list[dict], output: str | Path) -> Path:
    """Writes ``results.csv``, ``report.json``, ``report.txt`` and ``report.html``; returns the page's path."""
    output = Path(output)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(output / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
    content = {"title": study.title, "study": study.path.name, "analysis": analysis, "rows": rows}
    (output / "report.json").write_text(json.dumps(without_nan(content), indent=1) + "\n")
    (output / "report.txt").write_text(format_text(study, analysis) + "\n", encoding="utf-8")

    escape = html.escape
    parts = [f"<h1>{escape(study.title)}</h1>", f"<p>{escape(study.description)}</p>"]
    for item in analysis:
        headers, table = table_of_item(item)
        head = "".join(f"<th>{escape(cell)}</th>" for cell in headers)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table)
        parts.append(f"<h2>{escape(_heading(item))}</h2><figure>{_plot(item)}</figure>")
        parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')
        parts += [f"<p>{escape(sentence)}</p>" for sentence in _sentences(item)]
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_cell(row.get(column, '')))}</td>" for column in columns) + "</tr>"
        for row in rows
    )
    parts.append(f'<h2>Every run</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div>')
    parts.append(f"<h2>Study file</h2><pre>{escape(study.path.read_text(encoding='utf-8'))}</pre>")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(study.title)}</title><style>{STYLE_SHEET}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path = output / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def write_study(study: Study, output: str | Path) -> str:
    """Writes all that a study file's report asks for; returns it as text for a terminal, with the places of the pages.

    Raises:
        StudyError: runs are unfinished.
        RunError: the runs of a comparison differ in more than their initialization.
    """
    output = Path(output)
    texts = []
    for item in study.report:
        if item["kind"] == "comparison":
            texts += _compare(study, output, item)
    rows = study.read_results(output)
    if analysis := analyse(study, rows):
        page = write_report(study, rows, analysis, output)
        texts += [format_text(study, analysis), f"{page}, {output / 'report.json'}, {output / 'results.csv'}"]
    return "\n".join(texts)


def _compare(study: Study, output: Path, item: dict) -> list[str]:
    """A page for each combination of the axes that the ground truth has; all other runs of an arm are its seeds."""
    stage, arms = item["stage"], item["arms"]
    named = {name for _, name, _, _ in string.Formatter().parse(item["ground_truth"]) if name}
    of_page = {axis for name in named for axis in study.stages.get(name, {}).get("axes", [name])} & study.axes.keys()
    pages: dict[str, list[Cell]] = {}
    cells = study.cells(output)
    for cell in cells:
        if cell.stage == stage:
            study.check_finished(cell)
            place = ",".join(f"{axis}={value}" for axis, value in cell.values.items() if axis in of_page)
            pages.setdefault(place, []).append(cell)
    texts = []
    for place, members in pages.items():
        first = members[0]
        folders: dict[str, list[Path]] = {}
        for cell in members:
            folders.setdefault(str(cell.values[arms]), []).append(cell.folder)
        curves: dict[str, Path] = {}
        for cell in cells:
            if cell.stage == item["curves"] and all(first.values[axis] == cell.values[axis] for axis in of_page):
                curves.setdefault(str(cell.values[arms]), cell.folder)
        folder = output / "report" / place
        text = write_gains(
            folders,
            study.fill(item["ground_truth"], output, stage, first.values),
            list(map(str, item["baselines"])),
            folder,
            title=study.title,
            command=f"wsl-d2 study {study.path} --output {output} --report-only",
            images=study.fill(item["images"], output, stage, first.values),
            curves=curves,
        )
        texts += [*([place] if place else []), text, "", str(folder / "report.html")]
    return texts


def _cell(value) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
