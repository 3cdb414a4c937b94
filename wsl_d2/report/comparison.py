"""The page of a comparison: one HTML file that opens from disk, with tables, plots, pictures and provenance."""

from __future__ import annotations

import html
import json
from pathlib import Path

from wsl_d2.analysis.ap_gain import METRICS
from wsl_d2.analysis.compare import verdict
from wsl_d2.analysis.records import read_metrics
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


def format_cell(cell: dict) -> str:
    """Returns "26.7", or "26.7 ± 0.4" with several seeds."""
    return f"{cell['mean']:.1f}" + (f" ± {cell['sd']:.1f}" if cell["sd"] is not None else "")


def describe_gain(row: dict, iou_type: str, metric: str = "AP") -> str:
    """Returns e.g. "wsl - imagenet: +5.1 box AP [3.2, 7.0]: gain"."""
    gain = row[iou_type][metric]
    low, high = gain["interval"]
    return (
        f"{row['candidate']} - {row['baseline']}: {gain['gain']:+.1f} {IOU_NAMES[iou_type]} {metric} "
        f"[{low:+.1f}, {high:+.1f}]: {verdict(gain)}"
    )


def _with_interval(gain: dict) -> str:
    low, high = gain["interval"]
    return f"{gain['gain']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _p_value(value: float) -> str:
    return "" if value != value else "&lt; 0.002" if value < 0.002 else f"{value:.3f}"


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
    parts = [f"<h1>{text(title)}</h1>"]
    for row in comparison["gains"]:
        for iou_type in IOU_NAMES:
            sentence, _, outcome = describe_gain(row, iou_type).rpartition(": ")
            parts.append(f'<p class="headline">{text(sentence)}: <span class="verdict">{text(outcome)}</span></p>')
    numbers = sorted({len(run["folders"]) for run in comparison["runs"].values()})
    seeds = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    caution = (
        "With one training seed, the interval tells what other images would give, not what another training would: "
        "repeated trainings on COCO are reported to differ by 0.2 to 0.3 AP. "
        if numbers[0] == 1
        else ""
    )
    parts.append(
        f"<p>95% intervals of a paired bootstrap over {comparison['num_images']:,} images; training seeds of each "
        f"initialisation: {seeds}; {comparison['num_resamples']:,} resamples. {caution}"
        "The verdict is “gain” where the interval lies above 0 and “loss” where it lies below.</p>"
    )
    return parts


def _tables(comparison: dict) -> list[str]:
    text = html.escape
    headers = ["initialisation", *(f"{IOU_NAMES[t]} {m}" for t in IOU_NAMES for m in _COLUMNS)]
    rows = [
        [text(name), *(format_cell(run[t][m]) for t in IOU_NAMES for m in _COLUMNS)]
        for name, run in comparison["runs"].items()
    ]
    shaded = ["baseline" if name in comparison["baselines"] else "" for name in comparison["runs"]]
    parts = ["<h2>AP of each initialisation</h2>", _table(headers, rows, shaded)]
    parts.append("<p>AP in points, 0 to 100. Baselines are shaded.</p>")
    if not comparison["gains"]:
        return parts
    parts.append(f"<h2>Gains</h2><figure>{plot_gains(comparison)}</figure>")
    rows = []
    for row in comparison["gains"]:
        for iou_type, name in IOU_NAMES.items():
            ap = row[iou_type]["AP"]
            of_seeds = "" if ap["p_value_of_seeds"] is None else f"{ap['p_value_of_seeds']:.3f}"
            rows.append(
                [f"{text(row['candidate'])} − {text(row['baseline'])}, {name}"]
                + [_with_interval(row[iou_type][metric]) for metric in METRICS]
                + [_p_value(ap["p_value"]), of_seeds]
            )
    parts.append(_table(["gain", *METRICS, "p of AP", "p of seeds"], rows))
    parts.append(
        "<p>APs, APm and APl: objects of less than 32² pixels, up to 96², and larger. “p of AP” is of the bootstrap, "
        "two-sided; “p of seeds” of Welch’s t test on the runs’ AP alone.</p>"
    )
    curves = {name: run["precision"] for name, run in comparison["runs"].items()}
    parts.append(f"<h2>Precision and recall, boxes</h2><figure>{plot_precision(curves)}</figure>")
    return parts


def _classes_and_errors(comparison: dict) -> list[str]:
    text = html.escape
    costs = {
        name: {kind: cell["mean"] for kind, cell in run["bbox"]["errors"].items()}
        for name, run in comparison["runs"].items()
    }
    kinds = list(next(iter(costs.values())))
    parts = [
        "<h2>What kinds of error cost</h2>"
        f"<figure>{plot_errors(costs)}<figcaption>Points of AP50 (boxes) that mending one kind of error would give: "
        "class, place or both wrong; found twice; nothing there; missed. After TIDE.</figcaption></figure>"
    ]
    rows = [
        [f"{text(row['candidate'])} − {text(row['baseline'])}, {name}"]
        + [_with_interval(row[iou_type]["errors"][kind]) for kind in kinds]
        for row in comparison["gains"]
        for iou_type, name in IOU_NAMES.items()
    ]
    if rows:
        parts.append(_table(["difference of the costs", *kinds], rows))
    for row in comparison["gains"]:
        title = f"{text(row['candidate'])} − {text(row['baseline'])}"
        svg = plot_classes(row["bbox"]["classes"], "gain in box AP, points", _FEW_OBJECTS)
        parts.append(
            f"<h2>{title}, by class</h2><figure>{svg}<figcaption>In brackets the number of objects; grey: fewer than "
            f"{_FEW_OBJECTS}. Filled: p &lt; 0.05 after Holm’s correction for the number of classes.</figcaption>"
            "</figure>"
        )
    return parts


def _training(comparison: dict, curves: dict[str, Path]) -> list[str]:
    names, parts = list(comparison["runs"]), []
    detection = {
        name: metrics["total_loss"]
        for name, run in comparison["runs"].items()
        if "total_loss" in (metrics := read_metrics(run["folders"][0]))
    }
    if detection:
        svg = plot_curves(detection, names, "iterations", "detection loss")
        parts.append(f"<h2>Training</h2><figure>{svg}<figcaption>Detector, all loss terms</figcaption></figure>")
    if curves:
        series = {name: read_metrics(folder)["loss_hashtag"] for name, folder in curves.items()}
        svg = plot_curves(series, names, "iterations", "pretraining loss, nats")
        parts.append(
            f"<figure>{svg}<figcaption>Pretraining: softmax cross-entropy with 1/k targets</figcaption></figure>"
        )
    return parts


def _pictures(comparison: dict, image_folder: Path) -> list[str]:
    text = html.escape
    head = "".join(f"<th>{text(name)}</th>" for name in ["ground truth", *comparison["runs"]])
    parts = []
    largest = sorted(comparison["gains"], key=lambda row: -row["bbox"]["AP"]["gain"])
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
    rows = []
    for name, run in comparison["runs"].items():
        rates = ", ".join(f"{rate:g}" for rate in sorted(set(run["base_lr"])))
        weights = ", ".join(text(weight or "none") for weight in run["weights"])
        rows.append([text(name), rates, weights])
    provenance = {key: comparison[key] for key in ("ground_truth", "num_images", "num_resamples", "seed")}
    folders = {name: run["folders"] for name, run in comparison["runs"].items()}
    return [
        "<h2>What was held equal</h2><p>Architecture, detector, data, schedule "
        f"({comparison['iterations']} iterations of {comparison['images_per_batch']} images), image sizes and "
        "evaluation are equal by check (runs that differ are refused). Different are:</p>",
        _table(["initialisation", "learning rate", "weights"], rows),
        f"<h2>Provenance</h2><pre>{text(json.dumps(provenance | {'runs': folders}, indent=1))}</pre>",
        f"<pre>{text(command)}</pre>",
    ]
