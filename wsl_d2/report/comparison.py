"""The page of a comparison: the answer, tables, plots, pictures and provenance."""

from __future__ import annotations

import json
from pathlib import Path

from wsl_d2.analysis.ap_gain import METRICS, SIZES
from wsl_d2.analysis.gain import shown_interval
from wsl_d2.analysis.records import RunError, read_metrics
from wsl_d2.files import write_atomically
from wsl_d2.report.numbers import mean_and_spread, p_value, signed, with_interval
from wsl_d2.report.page import escape, page, panels, paragraph, table
from wsl_d2.report.pictures import SCORE_SHOWN, picture_rows
from wsl_d2.report.plots import IOU_NAMES, plot_curves, plot_errors, plot_gains, plot_groups, plot_precision

_FEW_OBJECTS = 30
_NOTHING_LEARNED = 1.0  # AP


def _without(metric: str) -> str:
    return f"no {SIZES[metric]} objects" if metric in SIZES else "no objects"


def format_cell(cell: dict, metric: str = "AP") -> str:
    """Returns "26.7", "26.7 ± 0.4" with several seeds, or that there are no objects of that size."""
    if cell["mean"] != cell["mean"]:
        return _without(metric)
    return mean_and_spread(cell["mean"], cell["sd"])


def describe_gain(row: dict, iou_type: str, metric: str = "AP") -> str:
    """Returns a sentence that names what it is about, e.g. "wsl adds 9.3 box AP to these detectors (imagenet 17.9, wsl
    27.2), 95% interval 7.5 to 11.0 over images; one run each, nothing about other trainings"."""
    gain = row[iou_type][metric]
    what = f"{IOU_NAMES[iou_type]} {metric}"
    if gain["gain"] != gain["gain"]:
        return f"{row['candidate']} - {row['baseline']}, {what}: {_without(metric)}"
    low, high = shown_interval(gain)
    few, many = gain["interval"]
    adds, costs = low > 0, high < 0
    if costs:
        low, high, few, many = -high, -low, -many, -few
    sign = "" if adds or costs else "+"
    whole, images = (f"{signed(a, sign)} to {signed(b, sign)}" for a, b in ((low, high), (few, many)))
    values = f"({row['baseline']} {gain['baseline']:.1f}, {row['candidate']} {gain['candidate']:.1f})"
    least, most = min(gain["num_runs"]), max(gain["num_runs"])
    runs = f"{least} to {most} runs each" if least < most else f"{most} runs each" if most > 1 else "one run each"
    amount, these = f"{abs(gain['gain']):.1f} {what}", not gain["method_interval"]
    if adds:
        effect = f"adds {amount}" + (" to these detectors" if these else "")
    elif costs:
        effect = f"costs {'these detectors ' if these else ''}{amount}"
    else:
        effect = f"changes {what}{' of these detectors' if these else ''} by {signed(gain['gain'])}"
    answer = f"{row['candidate']} {effect} {values}, 95% interval {whole} over images"
    if these:
        return f"{answer}; {runs}, nothing about other trainings"
    assumed = ", whose spread is assumed" if least == 1 else ", paired by seed" if row.get("paired") else ""
    return f"{answer} and training seeds{assumed} ({images} over images alone); {runs}"


def describe_settling(row: dict, iou_type: str) -> str:
    """Returns what would make the answer about AP more certain."""
    gain, settle = row[iou_type]["AP"], row[iou_type]["settle"]
    if max(gain["baseline"], gain["candidate"]) < _NOTHING_LEARNED:
        return "longer trainings: neither side finds more than a few objects, so there is little to compare"
    low, high = shown_interval(gain)
    name = "half_as_wide" if low > 0 or high < 0 else "exclude_0"
    goal = "half as wide an interval" if name == "half_as_wide" else "an interval on one side of 0"
    ways = []
    if settle[name]["runs"]:
        ways.append(f"{settle[name]['runs']} runs on each side")
    if settle[name]["images"]:
        ways.append(f"{settle[name]['images']:,} images")
    if gain["seed_sds"] is None:
        first = "to learn about other trainings, train each side at least 3 times, or assume a spread with --seed-sd"
        return first + (f"; {goal}, of these detectors: {ways[0]}" if ways else "")
    return f"{goal}: " + (" or ".join(ways) if ways else "more than 1,000 runs or images a thousandfold")


def describe_values(values: list) -> str:
    """Returns the values of a config key in the runs of one initialization, each once."""
    return ", ".join(dict.fromkeys(str(value) or "none" for value in values))


def _with_interval(gain: dict, metric: str = "AP", interval: list[float] | None = None) -> str:
    if gain["gain"] != gain["gain"]:
        return _without(metric)
    return with_interval(gain["gain"], *(interval or shown_interval(gain)))


def write_report(
    comparison: dict,
    path: Path,
    *,
    title: str,
    image_folder: Path | None = None,
    curves: dict[str, Path] | None = None,
    command: str = "",
) -> None:
    """Writes the page.

    Args:
        comparison: made by :func:`wsl_d2.analysis.compare_runs`.
        path: of the HTML file.
        title: shown as the heading.
        image_folder: of the evaluated images; without it there are no pictures.
        curves: name -> folder of a pretraining run, whose loss is plotted.
        command: how to make the page again.
    """
    parts = [
        *_answers(comparison),
        *_tables(comparison),
        *_classes_and_errors(comparison),
        *_training(comparison, curves or {}),
        *([] if image_folder is None else _pictures(comparison, image_folder)),
        *_conditions(comparison, command),
    ]
    write_atomically(path, page(title, *parts))


def _answers(comparison: dict) -> list[str]:
    main = comparison["iou_types"][0]
    told = [
        f"{escape(describe_gain(row, iou_type))}. <b>{row[iou_type]['verdict'].capitalize()}.</b>"
        for row in comparison["gains"]
        for iou_type in comparison["iou_types"]
    ]
    parts = []
    if told:
        settling = describe_settling(comparison["gains"][0], main)
        parts += [
            f'<p class="headline">{told[0]}</p>',
            "<ul>" + "".join(f"<li>{line}</li>" for line in told[1:]) + "</ul>" if told[1:] else "",
            paragraph(f"More certain ({IOU_NAMES[main]} AP) would be {settling}."),
        ]
    for iou_type, reason in comparison["left_out"].items():
        parts.append(paragraph(f"{IOU_NAMES[iou_type]} AP is not compared: {reason}."))
    about = (
        "“Over images”: these models on other images, by a paired bootstrap over "
        f"{comparison['num_images']:,} images ({comparison['num_resamples']:,} resamples). “Over images and training "
        "seeds”: trained again, too; it takes at least 2 runs on each side. The verdict is of the second where there "
        "is one: “gain” where it lies above 0, “loss” where it lies below. Repeated trainings on COCO are reported to "
        "differ by 0.2 to 0.3 AP."
    )
    return [*parts, paragraph(about, "quiet")]


def _about(row: dict) -> str:
    return f"{row['candidate']} − {row['baseline']}"


def _tables(comparison: dict) -> list[str]:
    iou_types, runs, gains = comparison["iou_types"], comparison["runs"], comparison["gains"]
    lines = [(t, m) for t in iou_types for m in METRICS if m in next(iter(runs.values()))[t]]
    header = ["", *(f"{name} (baseline)" if name in comparison["baselines"] else name for name in runs)]
    rows = [[f"{IOU_NAMES[t]} {m}", *(format_cell(run[t][m], m) for run in runs.values())] for t, m in lines]
    sizes = "APs, APm and APl: objects of less than 32² pixels, up to 96², and larger."
    parts = [
        "<h2>AP of each initialization</h2>",
        table(header, rows),
        paragraph(f"AP in points, 0 to 100; ± is the standard deviation between seeds. {sizes}", "quiet"),
    ]
    if gains:
        caption = "95% intervals: thick over images, thin over images and training seeds."
        parts += ["<h2>Gains</h2>", panels(plot_gains(comparison), caption)]
        kinds = [("interval", "p_value", "over images")]
        if any(row[iou_types[0]]["AP"]["method_interval"] for row in gains):
            kinds.insert(0, ("method_interval", "method_p_value", "over images and seeds"))
        columns = [(row, *kind) for row in gains for kind in kinds if row[iou_types[0]]["AP"][kind[0]]]
        rows = [
            [f"{IOU_NAMES[t]} {m}", *(_with_interval(row[t][m], m, row[t][m][kind]) for row, kind, _, _ in columns)]
            for t, m in lines
        ]
        rows += [
            [f"p of {IOU_NAMES[t]} AP", *(p_value(row[t]["AP"][p]) for row, _, p, _ in columns)] for t in iou_types
        ]
        parts.append(table(["gain", *(f"{_about(row)}, {name}" for row, _, _, name in columns)], rows))
        parts.append(paragraph("In brackets 95% intervals; p values are two-sided.", "quiet"))
    curves = {name: run["precision"] for name, run in runs.items()}
    parts += [f"<h2>Precision and recall ({IOU_NAMES[iou_types[0]]} AP)</h2>", panels(plot_precision(curves))]
    return parts


def _classes_and_errors(comparison: dict) -> list[str]:
    main, gains = comparison["iou_types"][0], comparison["gains"]
    parts = []
    if with_errors := [t for t in comparison["iou_types"] if t != "keypoints"]:
        first = with_errors[0]
        daps = {
            name: {kind: cell["mean"] for kind, cell in run[first]["errors"].items()}
            for name, run in comparison["runs"].items()
        }
        caption = (
            f"dAP of TIDE: what AP50 ({IOU_NAMES[first]}) would gain without false positives of one kind (class, "
            "localization or both wrong; duplicates; background), or without missed objects."
        )
        parts += ["<h2>Kinds of error</h2>", panels([plot_errors(daps)], caption)]
        columns = [(row, iou_type) for row in gains for iou_type in with_errors]
        rows = [
            [kind, *(_with_interval(row[iou_type]["errors"][kind]) for row, iou_type in columns)]
            for kind in next(iter(daps.values()))
        ]
        if columns:
            header = ["difference of dAP", *(f"{_about(row)}, {IOU_NAMES[iou_type]}" for row, iou_type in columns)]
            parts.append(table(header, rows))
    xlabel = f"gain in {IOU_NAMES[main]} AP, points"
    caption = (
        f"In brackets the number of objects; gray: fewer than {_FEW_OBJECTS}. Filled: p < 0.05 after Holm’s "
        "correction for their number."
    )
    for kind, name in (("supercategories", "supercategory"), ("classes", "class")):
        plots = [
            plot_groups(row[main][kind], name, _about(row), xlabel, _FEW_OBJECTS) for row in gains if kind in row[main]
        ]
        if plots:
            parts += [f"<h2>Gains by {name}</h2>", panels(plots, caption)]
    return parts


def _training(comparison: dict, curves: dict[str, Path]) -> list[str]:
    names = list(comparison["runs"])
    folders = {name: Path(run["folders"][0]) for name, run in comparison["runs"].items()}
    series: dict[str, dict] = {"detection loss, all terms": {}, "pretraining loss, nats": {}}
    for name, folder in folders.items():
        if (folder / "metrics.json").is_file() and "total_loss" in (metrics := read_metrics(folder)):
            series["detection loss, all terms"][name] = metrics["total_loss"]
    for name, folder in curves.items():
        if "loss_hashtag" not in (metrics := read_metrics(folder)):
            raise RunError(f"{folder / 'metrics.json'} has no loss_hashtag; --curve is for runs of a pretraining.")
        series["pretraining loss, nats"][name] = metrics["loss_hashtag"]
    plots = [plot_curves(lines, names, ylabel) for ylabel, lines in series.items() if lines]
    return ["<h2>Training</h2>", panels(plots)] if plots else []


def _pictures(comparison: dict, image_folder: Path) -> list[str]:
    parts = []
    for row in comparison["gains"][:1]:
        parts.append(f"<h2>Images on which {escape(row['candidate'])} and {escape(row['baseline'])} differ most</h2>")
        for better, images in ((row["candidate"], row["images"]["best"]), (row["baseline"], row["images"]["worst"])):
            if images:
                told = f"{better} is better (by the F1 of each image at a score of {SCORE_SHOWN}, in the first run)"
                parts += [paragraph(f"{told}; click to enlarge:"), picture_rows(comparison, image_folder, images)]
        if len(parts) == 1:
            parts.append(paragraph(f"None differs at a score of {SCORE_SHOWN}, in the first run of each."))
    return parts


def _conditions(comparison: dict, command: str) -> list[str]:
    names = list(comparison["runs"])
    rows = [
        [key, *(describe_values(values[name]) for name in names)]
        for key, values in comparison["initialization"].items()
    ]
    columns = range(1, 1 + len(names))
    provenance = {key: comparison[key] for key in ("ground_truth", "num_images", "num_resamples", "seed", "seed_sd")}
    folders = {name: run["folders"] for name, run in comparison["runs"].items()}
    if comparison["differences"]:
        held = paragraph("The runs are compared by force although they differ in more than their initialization:")
        held += "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in comparison["differences"]) + "</ul>"
    else:
        held = paragraph(
            "By check, all runs have the same value of every config key that can change a result "
            f"({comparison['iterations']} iterations of {comparison['images_per_batch']} images), and the same data as "
            "far as their records tell."
        )
    return [
        f"<h2>What was held equal</h2>{held}",
        *([paragraph("Different are:"), table(["key", *names], rows, columns)] if rows else []),
        f"<h2>Provenance</h2><pre>{escape(json.dumps(provenance | {'runs': folders}, indent=1))}</pre>",
        f"<pre>{escape(command)}</pre>",
    ]
