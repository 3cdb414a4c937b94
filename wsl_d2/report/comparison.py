"""The page of a comparison: one HTML file that opens from disk, with tables, plots, pictures and provenance."""

from __future__ import annotations

import html
import json
from pathlib import Path

from wsl_d2.analysis.ap_gain import METRICS
from wsl_d2.analysis.gain import shown_interval
from wsl_d2.analysis.records import RunError, read_metrics
from wsl_d2.report.pictures import SCORE_SHOWN, picture_rows
from wsl_d2.report.plots import (
    IOU_NAMES,
    STYLE_SHEET,
    plot_classes,
    plot_curves,
    plot_errors,
    plot_gains,
    plot_precision,
)

_COLUMNS = ("AP", "AP50", "AP75")
_FEW_OBJECTS = 30
_INTERVALS = "<figcaption>95% intervals: thick over images, thin over images and training seeds.</figcaption>"
_WITHOUT = {"APs": "no small objects", "APm": "no medium objects", "APl": "no large objects"}


def format_cell(cell: dict, metric: str = "AP") -> str:
    """Returns "26.7", "26.7 ± 0.4" with several seeds, or that there are no objects of that size."""
    if cell["mean"] != cell["mean"]:
        return _WITHOUT.get(metric, "no objects")
    return f"{cell['mean']:.1f}" + (f" ± {cell['sd']:.1f}" if cell["sd"] is not None else "")


def describe_gain(row: dict, iou_type: str, metric: str = "AP") -> str:
    """Returns a sentence that names what it is about, e.g. "wsl adds 9.3 box AP to these detectors (imagenet 17.9, wsl
    27.2), 95% interval 7.5 to 11.0 over images; one run each, nothing about other trainings"."""
    gain = row[iou_type][metric]
    what = f"{IOU_NAMES[iou_type]} {metric}"
    if gain["gain"] != gain["gain"]:
        return f"{row['candidate']} - {row['baseline']}, {what}: {_WITHOUT.get(metric, 'no objects')}"
    low, high = shown_interval(gain)
    amount, adds = f"{abs(gain['gain']):.1f} {what}", gain["gain"] >= 0
    values = f"({row['baseline']} {gain['baseline']:.1f}, {row['candidate']} {gain['candidate']:.1f})"
    least, most = min(gain["num_runs"]), max(gain["num_runs"])
    runs = f"{least} to {most} runs each" if least < most else f"{most} runs each" if most > 1 else "one run each"
    if not gain["method_interval"]:
        effect = f"adds {amount} to these detectors" if adds else f"costs these detectors {amount}"
        return (
            f"{row['candidate']} {effect} {values}, 95% interval {low:.1f} to {high:.1f} over images; {runs}, nothing "
            "about other trainings"
        )
    few, many = gain["interval"]
    assumed = ", whose spread is assumed" if least == 1 else ", paired by seed" if row.get("paired") else ""
    return (
        f"{row['candidate']} {'adds' if adds else 'costs'} {amount} {values}, 95% interval {low:.1f} to {high:.1f} "
        f"over images and training seeds{assumed} ({few:.1f} to {many:.1f} over images alone); {runs}"
    )


def describe_settling(row: dict, iou_type: str) -> str:
    """Returns what would make the answer about AP more certain."""
    gain, settle = row[iou_type]["AP"], row[iou_type]["settle"]
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


def _with_interval(gain: dict, metric: str = "AP", interval: list[float] | None = None) -> str:
    if gain["gain"] != gain["gain"]:
        return _WITHOUT.get(metric, "no objects")
    low, high = interval or shown_interval(gain)
    return f"{gain['gain']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _p_value(value: float | None) -> str:
    return "" if value is None or value != value else "&lt; 0.002" if value < 0.002 else f"{value:.3f}"


def _table(headers: list[str], rows: list[list[str]], classes: list[str] | None = None) -> str:
    """An HTML table of cells that are HTML already."""
    marks = classes or [""] * len(rows)
    head = "".join(f"<th>{cell}</th>" for cell in headers)
    body = "".join(
        f'<tr class="{mark}">' + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
        for row, mark in zip(rows, marks, strict=True)
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


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
        *_headlines(comparison, title),
        *_tables(comparison),
        *_classes_and_errors(comparison),
        *_training(comparison, curves or {}),
        *([] if image_folder is None else _pictures(comparison, image_folder)),
        *_conditions(comparison, command),
    ]
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE_SHEET}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n",
        encoding="utf-8",
    )


def _headlines(comparison: dict, title: str) -> list[str]:
    text = html.escape
    main = comparison["iou_types"][0]
    parts = [f"<h1>{text(title)}</h1>"]
    for row in sorted(comparison["gains"], key=lambda row: -row[main]["AP"]["gain"]):
        for iou_type in comparison["iou_types"]:
            verdict = f': <span class="verdict">{row[iou_type]["verdict"]}</span>'
            known = verdict if row[iou_type]["AP"]["method_interval"] else ""
            parts.append(f'<p class="headline">{text(describe_gain(row, iou_type))}{known}.</p>')
        parts.append(f"<p>More certain ({IOU_NAMES[main]} AP) would be {text(describe_settling(row, main))}.</p>")
    for iou_type, reason in comparison["left_out"].items():
        parts.append(f"<p>{IOU_NAMES[iou_type]} AP is not compared: {text(reason)}.</p>")
    parts.append(
        "<p>“Over images”: these models on other images, by a paired bootstrap over "
        f"{comparison['num_images']:,} images ({comparison['num_resamples']:,} resamples). “Over images and training "
        "seeds”: trained again, too; it takes at least 2 runs on each side. The verdict is of the second: “gain” where "
        "it lies above 0, “loss” where it lies below. Repeated trainings on COCO are reported to differ by 0.2 to 0.3 "
        "AP.</p>"
    )
    return parts


def _tables(comparison: dict) -> list[str]:
    text = html.escape
    iou_types = comparison["iou_types"]
    headers = ["initialisation", *(f"{IOU_NAMES[t]} {m}" for t in iou_types for m in _COLUMNS)]
    rows = [
        [text(name), *(format_cell(run[t][m], m) for t in iou_types for m in _COLUMNS)]
        for name, run in comparison["runs"].items()
    ]
    shaded = ["baseline" if name in comparison["baselines"] else "" for name in comparison["runs"]]
    parts = ["<h2>AP of each initialisation</h2>", _table(headers, rows, shaded)]
    parts.append("<p>AP in points, 0 to 100; ± is the standard deviation between seeds. Baselines are shaded.</p>")
    if not comparison["gains"]:
        return parts
    parts.append(f"<h2>Gains</h2><figure>{plot_gains(comparison)}{_INTERVALS}</figure>")
    rows = []
    for row in comparison["gains"]:
        for iou_type in iou_types:
            gains = row[iou_type]
            about = f"{text(row['candidate'])} − {text(row['baseline'])}, {IOU_NAMES[iou_type]}"
            kinds = [
                ("over images and seeds", "method_interval", "method_p_value"),
                ("over images", "interval", "p_value"),
            ]
            for kind, interval, p_value in kinds:
                if gains["AP"][interval]:
                    cells = [_with_interval(gains[m], m, gains[m][interval]) if m in gains else "" for m in METRICS]
                    rows.append([f"{about}, {kind}", *cells, _p_value(gains["AP"][p_value])])
    parts.append(_table(["gain", *METRICS, "p of AP"], rows))
    parts.append(
        "<p>APs, APm and APl: objects of less than 32² pixels, up to 96², and larger. p values are two-sided.</p>"
    )
    curves = {name: run["precision"] for name, run in comparison["runs"].items()}
    main = IOU_NAMES[iou_types[0]]
    parts.append(f"<h2>Precision and recall ({main} AP)</h2><figure>{plot_precision(curves)}</figure>")
    return parts


def _classes_and_errors(comparison: dict) -> list[str]:
    text = html.escape
    main = comparison["iou_types"][0]
    parts = []
    with_errors = [t for t in comparison["iou_types"] if t != "keypoints"]
    if with_errors:
        daps = {
            name: {kind: cell["mean"] for kind, cell in run[with_errors[0]]["errors"].items()}
            for name, run in comparison["runs"].items()
        }
        kinds = list(next(iter(daps.values())))
        parts.append(
            f"<h2>Kinds of error</h2><figure>{plot_errors(daps)}<figcaption>dAP of TIDE: what AP50 "
            f"({IOU_NAMES[with_errors[0]]}) would gain without false positives of one kind (class, localization or "
            "both wrong; duplicates; background), or without missed objects.</figcaption></figure>"
        )
        rows = [
            [f"{text(row['candidate'])} − {text(row['baseline'])}, {IOU_NAMES[iou_type]}"]
            + [_with_interval(row[iou_type]["errors"][kind]) for kind in kinds]
            for row in comparison["gains"]
            for iou_type in with_errors
        ]
        if rows:
            parts.append(_table(["difference of dAP", *kinds], rows))
    for row in comparison["gains"]:
        title = f"{text(row['candidate'])} − {text(row['baseline'])}"
        svg = plot_classes(row[main]["classes"], f"gain in {IOU_NAMES[main]} AP, points", _FEW_OBJECTS)
        parts.append(
            f"<h2>{title}, by class</h2><figure>{svg}<figcaption>In brackets the number of objects; grey: fewer than "
            f"{_FEW_OBJECTS}. Filled: p &lt; 0.05 after Holm’s correction for the number of classes.</figcaption>"
            "</figure>"
        )
    return parts


def _training(comparison: dict, curves: dict[str, Path]) -> list[str]:
    names, parts = list(comparison["runs"]), []
    folders = {name: Path(run["folders"][0]) for name, run in comparison["runs"].items()}
    detection = {
        name: metrics["total_loss"]
        for name, folder in folders.items()
        if (folder / "metrics.json").is_file() and "total_loss" in (metrics := read_metrics(folder))
    }
    if detection:
        svg = plot_curves(detection, names, "iterations", "detection loss")
        parts.append(f"<h2>Training</h2><figure>{svg}<figcaption>Detector, all loss terms</figcaption></figure>")
    series = {}
    for name, folder in curves.items():
        metrics = read_metrics(folder)
        if "loss_hashtag" not in metrics:
            raise RunError(f"{folder / 'metrics.json'} has no loss_hashtag; --curve is for runs of a pretraining.")
        series[name] = metrics["loss_hashtag"]
    if series:
        svg = plot_curves(series, names, "iterations", "pretraining loss, nats")
        parts.append(
            f"<figure>{svg}<figcaption>Pretraining: softmax cross-entropy with 1/k targets</figcaption></figure>"
        )
    return parts


def _pictures(comparison: dict, image_folder: Path) -> list[str]:
    text = html.escape
    main = comparison["iou_types"][0]
    head = "".join(f"<th>{text(name)}</th>" for name in ["ground truth", *comparison["runs"]])
    parts = []
    largest = sorted(comparison["gains"], key=lambda row: -row[main]["AP"]["gain"])
    for row in largest[:1]:
        pair = f"{text(row['candidate'])} and {text(row['baseline'])}"
        parts.append(f"<h2>Images on which {pair} differ most</h2>")
        for better, images in ((row["candidate"], row["images"]["best"]), (row["baseline"], row["images"]["worst"])):
            if images:
                rows = picture_rows(comparison, image_folder, images)
                parts.append(
                    f"<p>{text(better)} is better (by the F1 of each image at a score of {SCORE_SHOWN}):</p>"
                    f'<div class="scroll"><table class="pictures"><tr>{head}</tr>{rows}</table></div>'
                )
    return parts


def _conditions(comparison: dict, command: str) -> list[str]:
    text = html.escape
    names = list(comparison["runs"])
    rows = [
        [text(key), *(text(", ".join(dict.fromkeys(str(value) for value in values[name]))) for name in names)]
        for key, values in comparison["initialisation"].items()
    ]
    provenance = {key: comparison[key] for key in ("ground_truth", "num_images", "num_resamples", "seed", "seed_sd")}
    folders = {name: run["folders"] for name, run in comparison["runs"].items()}
    if comparison["differences"]:
        held = "The runs are compared by force although they differ in more than their initialisation:"
        held += "<ul>" + "".join(f"<li>{text(line)}</li>" for line in comparison["differences"]) + "</ul>"
    else:
        held = (
            "By check, all runs have the same value of every config key that can change a result, but for those below "
            f"({comparison['iterations']} iterations of {comparison['images_per_batch']} images), and the same data as "
            "far as their records tell."
        )
    return [
        f"<h2>What was held equal</h2><p>{held}</p><p>Different are:</p>",
        _table(["key", *map(text, names)], rows),
        f"<h2>Provenance</h2><pre>{text(json.dumps(provenance | {'runs': folders}, indent=1))}</pre>",
        f"<pre>{text(command)}</pre>",
    ]
