"""What came out of a study: tables with intervals, fits and plots, as text, JSON and one page."""

from __future__ import annotations

import csv
import json
import string
from pathlib import Path

import numpy as np
from tabulate import tabulate

from wsl_d2.analysis.records import without_nan
from wsl_d2.analysis.study import analyze_item, ascending
from wsl_d2.files import write_atomically
from wsl_d2.report.gains import write_gains
from wsl_d2.report.numbers import mean_and_spread, p_value, signed, with_interval
from wsl_d2.report.page import escape, page, panels, paragraph, table
from wsl_d2.report.plots import INK, QUIET, log_ticks, panel, style_of
from wsl_d2.study.study import Cell, Study


def analyze(study: Study, rows: list[dict]) -> list[dict]:
    """Works out each item of the study's report from the rows of :meth:`Study.read_results`.

    Raises:
        RunError: an item has no rows.
    """
    items = [item for item in study.report if item["kind"] != "comparison"]
    return [analyze_item({**item, "labels": study.labels}, study.axes, rows) for item in items]


def format_text(study: Study, analysis: list[dict]) -> str:
    """Returns the report for a terminal."""
    parts = [study.title]
    for item in analysis:
        headers, rows = table_of_item(item)
        shown = tabulate(rows, headers, tablefmt="plain", disable_numparse=True)
        parts.append("\n".join([heading_of_item(item), *sentences_of_item(item), "", shown]))
    return "\n\n".join(parts)


def _label(item: dict, key: str) -> str:
    """The name of an axis or result, with its unit where the study file has one."""
    return item.get("labels", {}).get(item[key], item[key])


def _name(item: dict, key: str) -> str:
    """The same without the unit, for sentences."""
    return str(_label(item, key)).partition(", ")[0]


def heading_of_item(item: dict) -> str:
    """What one item of :func:`analyze` shows of what, such as "top-1 accuracy by loss"."""
    return f"{_name(item, 'y')} by {_name(item, 'x')}" + (f" and {item['series']}" if "series" in item else "")


def table_of_item(item: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one item of :func:`analyze`."""
    if item["kind"] == "levels":
        rows = [
            [
                str(level["value"]),
                _mean(level),
                "" if level["value"] == item["baseline"] else _difference(level),
                p_value(level["p_value"]),
            ]
            for level in item["levels"]
        ]
        return [_label(item, "x"), _label(item, "y"), f"minus {item['baseline']}", "p"], rows
    numbers = [f"{point['x']:,}" for point in item["lines"][0]["points"]]
    last = "per decade" if item["kind"] == "scaling" else "best"
    rows = []
    for line in item["lines"]:
        if item["kind"] == "scaling":
            end = _change(line["slope_per_decade"], *line["slope_interval"])
        else:
            end = "none" if line["best"] is None else f"{line['best']:,}"
        rows.append([str(line["series"]), *map(_mean, line["points"]), end])
    return [f"{item['series']} \\ {_label(item, 'x')}", *numbers, last], rows


def _mean(point: dict) -> str:
    """The mean of a point or level, with its interval from two runs; and how many runs have no result."""
    diverged, runs = point.get("diverged", 0), point.get("runs", 0)
    if point["mean"] is None:
        return "diverged" if diverged or "runs" not in point else "no run"
    width = point["half_width"]
    return mean_and_spread(point["mean"], width) + (f" ({diverged} of {runs} diverged)" if diverged else "")


def _change(value: float | None, low: float | None, high: float | None) -> str:
    """A difference or slope with its interval, or that it has none."""
    if value is None:
        return "no pair"
    if low is None or high is None:
        return f"{signed(value)} (one run)"
    return with_interval(value, low, high)


def _difference(level: dict) -> str:
    value, width = level["difference"], level["difference_half_width"]
    ends = (None, None) if value is None or width is None else (value - width, value + width)
    return _change(value, *ends)


def sentences_of_item(item: dict) -> list[str]:
    """What came out, the answer first."""
    return {"levels": _about_levels, "scaling": _about_growth, "sweep": _about_sweep}[item["kind"]](item)


def _about_levels(item: dict) -> list[str]:
    levels = [level for level in item["levels"] if level["mean"] is not None]
    y, baseline = _name(item, "y"), item["baseline"]
    best = max(levels, key=lambda level: level["mean"])
    answer = f"{item['x']} {best['value']} has the highest {y}: {_mean(best)}"
    if best["value"] != baseline:
        answer += f", {_difference(best)} against {baseline}"
        width = best["difference_half_width"]
        answer += ", which may be chance" if width is not None and best["difference"] <= width else ""
    if all(len(level["results"]) < 2 for level in levels):
        note = f"One run of each {item['x']}: no interval; --axis seed=0,1,2 runs more, if the study has it."
    else:
        note = f"Differences are paired by {', '.join(item['paired_by'])}; ± and brackets are 95% intervals."
    return [f"{answer}.", note]


def _about_sweep(item: dict) -> list[str]:
    found, notes = [], []
    for line in item["lines"]:
        best = next((point for point in line["points"] if point["x"] == line["best"]), None)
        found.append(f"{line['series']} none" if best is None else f"{line['series']} {best['x']:,} ({_mean(best)})")
        if line["at_end"]:
            better = {"lowest": "lower", "highest": "higher"}[line["at_end"]]
            notes.append(f"The best of {line['series']} is the {line['at_end']} that was tried; try {better} ones.")
    if all(point["runs"] < 2 for line in item["lines"] for point in line["points"]):
        notes.append("One run at each place: no intervals, and neighbors may differ by chance.")
    return [f"Best {_name(item, 'x')} by {_name(item, 'y')}: {', '.join(found)}.", *notes]


def _equals(value: float) -> str:
    text = p_value(value)
    return text if text.startswith("<") else f"= {text}"


def _about_growth(item: dict) -> list[str]:
    x, y = _name(item, "x"), _name(item, "y")
    sentences = []
    for line in item["lines"]:
        at, growth = line["prediction"], line["growth"]
        sentence = f"{line['series']}: {_change(line['slope_per_decade'], *line['slope_interval'])} {y} per tenfold {x}"
        is_possible = at["interval"][1] <= 100 or not _label(item, "y").endswith("%")
        if (growth is None or growth["aicc_difference"] >= 0) and is_possible:  # the line is not the worse description
            between = "[{:.1f}, {:.1f}]".format(*at["interval"])
            sentence += f"; a new run with {at['x']:,} would give {at['value']:.1f} {between} if the line went on"
        sentences.append(f"{sentence}.")
    for line in item["lines"]:
        if (growth := line["growth"]) is not None:
            better = "levels off describes" if growth["aicc_difference"] < 0 else "levels off does not describe"
            sentences.append(
                f"{line['series']}: a curve that {better} the results better than the line (AICc "
                f"{growth['aicc_difference']:+.1f}); predicting the most {x} from the rest, the line is off by "
                f"{growth['error_of_line']:.1f}, the curve by {growth['error_of_curve']:.1f}."
            )
    for row in item["differences"]:
        sentences.append(
            f"The slope of {row['series']} is {_change(row['slope_difference'], *row['interval'])} steeper than that "
            f"of {row['than']} (p {_equals(row['p_value'])}); four in five such studies find a difference of "
            f"{row['detectable']:.1f}."
        )
    if all(point["runs"] < 2 for line in item["lines"] for point in line["points"]):
        sentences.append("One run at each place: the intervals are of the scatter about the lines.")
    else:
        sentences.append("± and brackets are 95% intervals.")
    return sentences


def _plot(item: dict) -> str:
    plots: list[str] = []
    with panel(plots, heading_of_item(item), xlabel=_label(item, "x"), ylabel=_label(item, "y")) as axis:
        if item["kind"] == "levels":
            for position, level in enumerate(item["levels"]):
                axis.plot([position] * len(level["results"]), level["results"], "o", color=QUIET, markersize=4)
                if level["mean"] is not None:
                    axis.errorbar(position, level["mean"], level["half_width"] or 0, fmt="D", color=INK, capsize=4)
            axis.set_xticks(range(len(item["levels"])), [str(level["value"]) for level in item["levels"]])
            axis.margins(x=0.2)
        else:
            _plot_lines(axis, item)
    return plots[0]


def _plot_lines(axis, item: dict) -> None:
    log_ticks(axis.xaxis, [point["x"] for point in item["lines"][0]["points"]])
    for position, line in enumerate(item["lines"]):
        color, style, marker = style_of(position)
        numbers, means = (np.array([point[key] for point in line["points"]], float) for key in ("x", "mean"))
        widths = [point["half_width"] or 0 for point in line["points"]]
        axis.errorbar(numbers, means, widths, fmt=marker, color=color, capsize=3, label=str(line["series"]))
        if item["kind"] == "scaling":
            ends = np.array([min(numbers), max(numbers)])
            axis.plot(ends, line["intercept"] + line["slope_per_decade"] * np.log10(ends), linestyle=style, color=color)
        else:
            axis.plot(numbers, means, linestyle=style, color=color)
            lost = [point["x"] for point in line["points"] if point["diverged"]]
            at = axis.get_xaxis_transform()
            axis.plot(lost, [0.05 + 0.06 * position] * len(lost), "x", color=color, markersize=8, transform=at)
    if any(point.get("diverged") for line in item["lines"] for point in line["points"]):
        low, high = axis.get_ylim()
        axis.set_yticks([tick for tick in axis.get_yticks() if low <= tick <= high])
        axis.set_ylim(low - 0.08 * (1 + len(item["lines"])) * (high - low), high)
        axis.axhline(low, color=INK, linewidth=1)
        axis.plot([], [], "x", color=INK, label="diverged")


def write_report(study: Study, rows: list[dict], analysis: list[dict], output: str | Path) -> Path:
    """Writes ``results.csv``, ``report.json``, ``report.txt`` and ``report.html``; returns the page's path."""
    output = Path(output)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(output / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
    content = {"title": study.title, "study": study.path.name, "analysis": analysis, "rows": rows}
    write_atomically(output / "report.json", json.dumps(without_nan(content), indent=1) + "\n")
    write_atomically(output / "report.txt", format_text(study, analysis) + "\n")
    told = [sentences_of_item(item) for item in analysis]
    parts = [paragraph(answer, "headline") for answer, *_ in told]
    for item, (_, *others) in zip(analysis, told, strict=True):
        parts += [f"<h2>{escape(heading_of_item(item))}</h2>", panels([_plot(item)]), table(*table_of_item(item))]
        parts += map(paragraph, others)
    parts.append(paragraph(study.description, "quiet"))
    places = {axis: ascending(values) for axis, values in study.axes.items()}
    rows = sorted(rows, key=lambda row: [values.index(row[axis]) for axis, values in places.items() if axis in row])
    cells = [[_cell(row, column, column in study.results) for column in columns] for row in rows]
    parts += ["<h2>Every run</h2>", table([study.labels.get(column, column) for column in columns], cells)]
    parts.append(f"<h2>Study file</h2><pre>{escape(study.path.read_text(encoding='utf-8'))}</pre>")
    write_atomically(output / "report.html", page(study.title, *parts))
    return output / "report.html"


def _cell(row: dict, column: str, is_result: bool) -> str:
    if column not in row:
        return ""
    if row[column] is None:
        return "diverged"
    return f"{row[column]:.2f}" if is_result else str(row[column])


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
    if analysis := analyze(study, rows):
        page = write_report(study, rows, analysis, output)
        texts += [format_text(study, analysis), f"{page}, {output / 'report.json'}, {output / 'results.csv'}"]
    return "\n".join(texts)


def _compare(study: Study, output: Path, item: dict) -> list[str]:
    """A page for each combination of the axes that the ground truth has, and of those of "pages"; all other runs of an
    arm are its seeds."""
    stage, arms = item["stage"], item["arms"]
    named = {name for _, name, _, _ in string.Formatter().parse(item["ground_truth"]) if name}
    of_page = {axis for name in named for axis in study.stages.get(name, {}).get("axes", [name])} & study.axes.keys()
    of_page |= set(item.get("pages", []))
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
            if cell.stage == item.get("curves") and all(
                first.values[axis] == cell.values[axis] for axis in of_page & cell.values.keys()
            ):
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
            seed_sd=item.get("seed_sd"),
        )
        texts += [*([place] if place else []), text, "", str(folder / "report.html")]
    return texts
