"""The page of a comparison: one HTML file that opens from disk, with table, plots, pictures and provenance."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

from wsl_d2.analysis.ap_gain import load_ground_truth
from wsl_d2.analysis.compare import verdict
from wsl_d2.analysis.records import read_metrics

_NAMES = {"bbox": "box", "segm": "mask"}
_COLUMNS = ("AP", "AP50", "AP75")
_STYLES = [("#555555", ":", "s"), ("#0b5cad", "-", "o"), ("#7aa6d6", "--", "^"), ("#c23b22", "-", "D"),
           ("#7a4fa3", "-.", "v"), ("#2b8a3e", "--", "P")]  # fmt: skip
_SCORE_SHOWN = 0.5
_STYLE_SHEET = """
body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:1100px;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid #ccc}
.headline{font-size:1.15rem;margin:.4rem 0}.verdict{font-weight:700}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr.baseline td{background:#f2f2f2}
img,svg{max-width:100%;height:auto}figure{margin:1rem 0}figcaption{color:#444;font-size:.9rem}
.pictures td,.pictures th{padding:.2rem;text-align:center;border:0}.pictures img{width:205px;max-width:none}
code,pre{font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
"""


def style_of(position: int) -> tuple[str, str, str]:
    """Returns (colour, line style, marker) of the n-th initialisation; distinguishable without colour."""
    return _STYLES[position % len(_STYLES)]


def _svg(figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def format_cell(cell: dict) -> str:
    """Returns "26.7", or "26.7 ± 0.4" with several seeds."""
    return f"{cell['mean']:.1f}" + (f" ± {cell['sd']:.1f}" if cell["sd"] is not None else "")


def describe_gain(row: dict, iou_type: str, metric: str = "AP") -> str:
    """Returns e.g. "wsl - imagenet: +5.1 box AP [3.2, 7.0]: gain"."""
    gain = row[iou_type][metric]
    low, high = gain["interval"]
    return (
        f"{row['candidate']} - {row['baseline']}: {gain['gain']:+.1f} {_NAMES[iou_type]} {metric} "
        f"[{low:+.1f}, {high:+.1f}]: {verdict(gain)}"
    )


def plot_gains(comparison: dict) -> str:
    """Returns an SVG: the gain of each initialisation over each baseline with its 95% interval, box and mask."""
    rows = comparison["gains"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.6 + 0.75 * max(1, len(rows))), sharey=True)
    names = list(comparison["runs"])
    for axis, iou_type in zip(axes, _NAMES, strict=True):
        for y, row in enumerate(reversed(rows)):
            color, _, _ = style_of(names.index(row["candidate"]))
            for metric, offset, marker in (("AP", 0.14, "o"), ("AP50", -0.14, "s")):
                gain = row[iou_type][metric]
                low, high = gain["interval"]
                axis.plot([low, high], [y + offset] * 2, color=color, linewidth=2)
                face = color if metric == "AP" else "white"
                axis.plot(gain["gain"], y + offset, marker, color=color, markerfacecolor=face, markersize=7)
        axis.axvline(0, color="#1a1a1a", linewidth=1)
        axis.set_yticks(range(len(rows)), [f"{r['candidate']} − {r['baseline']}" for r in reversed(rows)])
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.set_xlabel(f"{_NAMES[iou_type]} gain, AP points")
        axis.grid(axis="x", color="#ddd")
    axes[0].plot([], [], "o", color="#1a1a1a", label="AP")
    axes[0].plot([], [], "s", color="#1a1a1a", markerfacecolor="white", label="AP50")
    figure.legend(loc="upper center", ncol=2, frameon=False, bbox_to_anchor=(0.5, 1.12))
    return _svg(figure)


def plot_curves(series: dict[str, tuple[list[int], list[float]]], names: list[str], xlabel: str, ylabel: str) -> str:
    """Returns an SVG of one line per initialisation; ``names`` fixes their styles."""
    figure, axis = plt.subplots(figsize=(9, 3.2))
    for name, (iterations, values) in series.items():
        color, line, _ = style_of(names.index(name)) if name in names else ("#1a1a1a", "-", "o")
        axis.plot(np.asarray(iterations) + 1, values, line, color=color, label=name)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(color="#ddd")
    axis.legend(frameon=False)
    return _svg(figure)


def _outline(image: np.ndarray, mask: np.ndarray, color: str) -> None:
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    image[mask] = (0.55 * image[mask] + 0.45 * rgb).astype(np.uint8)


def draw_objects(path: Path, objects: list[dict], names: dict[int, str], enlarge: float = 2.5) -> bytes:
    """Returns a PNG of an image with boxes, masks and class names.

    Args:
        path: the image file.
        objects: each with "bbox" (x, y, w, h) in pixels, "category_id", and optionally "segmentation" as RLE.
        names: category id -> name.
        enlarge: factor by which the picture is scaled up.
    """
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB")).copy()
    palette = ["#d1495b", "#edae49", "#00798c", "#30638e", "#66a182", "#8d6a9f"]
    order = sorted(names)
    for item in objects:
        color = palette[order.index(item["category_id"]) % len(palette)]
        if isinstance(item.get("segmentation"), dict):
            _outline(pixels, mask_api.decode(item["segmentation"]).astype(bool), color)
    height, width = pixels.shape[:2]
    figure = plt.figure(figsize=(width * enlarge / 100, height * enlarge / 100), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(pixels, interpolation="bilinear")
    axis.set_axis_off()
    for item in objects:
        color = palette[order.index(item["category_id"]) % len(palette)]
        x, y, w, h = item["bbox"]
        axis.add_patch(plt.Rectangle((x, y), w, h, fill=False, edgecolor=color, linewidth=1.5))
        label = names[item["category_id"]] + (f" {100 * item['score']:.0f}%" if "score" in item else "")
        axis.text(x, max(y, 4), label, fontsize=9, color="white", va="bottom", parse_math=False,
                  bbox={"facecolor": color, "edgecolor": "none", "pad": 1})  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _picture(png: bytes) -> str:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def picture_rows(comparison: dict, image_folder: Path, num_images: int) -> str:
    """Returns HTML table rows: ground truth beside each initialisation's detections, evenly chosen images."""
    coco = load_ground_truth(comparison["ground_truth"])
    names = {category["id"]: category["name"] for category in coco.dataset["categories"]}
    detections: dict[str, dict[int, list[dict]]] = {}
    for name, run in comparison["runs"].items():
        path = Path(run["folders"][0]) / "inference" / "coco_instances_results.json"
        detections[name] = {}
        for item in json.loads(path.read_text()):
            if item["score"] >= _SCORE_SHOWN:
                detections[name].setdefault(item["image_id"], []).append(item)
    ids = sorted(coco.getImgIds())
    chosen = [ids[i] for i in np.unique(np.linspace(0, len(ids) - 1, num_images).astype(int))]
    rows = []
    for image_id in chosen:
        info = coco.loadImgs(image_id)[0]
        truth = [a | {"segmentation": coco.annToRLE(a)} for a in coco.imgToAnns[image_id]]
        cells = [draw_objects(image_folder / info["file_name"], truth, names)]
        for name in detections:
            cells.append(draw_objects(image_folder / info["file_name"], detections[name].get(image_id, []), names))
        rows.append("<tr>" + "".join(f"<td>{_picture(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join(rows)


def write_report(
    comparison: dict,
    path: Path,
    *,
    title: str,
    image_folder: Path | None = None,
    curves: dict[str, Path] | None = None,
    command: str = "",
    num_pictures: int = 8,
) -> None:
    """Writes the page.

    Args:
        comparison: made by :func:`wsl_d2.analysis.compare_runs`.
        path: of the HTML file.
        title: shown as the heading.
        image_folder: of the evaluated images; without it there are no pictures.
        curves: name -> folder of a pretraining run, whose loss is plotted.
        command: how to make the page again.
        num_pictures: images shown.
    """
    text = html.escape
    names = list(comparison["runs"])
    seeds = max(len(run["folders"]) for run in comparison["runs"].values())
    body = [f"<h1>{text(title)}</h1>"]
    for row in comparison["gains"]:
        for iou_type in _NAMES:
            sentence, _, outcome = describe_gain(row, iou_type).rpartition(": ")
            body.append(f'<p class="headline">{text(sentence)}: <span class="verdict">{text(outcome)}</span></p>')
    over_seeds = f" and {seeds} training seeds" if seeds > 1 else ", 1 training seed"
    body.append(
        f"<p>95% intervals of a paired bootstrap over {comparison['num_images']} images{over_seeds}; "
        f"{comparison['num_resamples']} resamples. "
        "The verdict is “gain” where the interval lies above 0 and “loss” where it lies below.</p>"
    )
    header = "".join(f"<th>{_NAMES[t]} {m}</th>" for t in _NAMES for m in _COLUMNS)
    body.append(
        f'<h2>AP of each initialisation</h2><div class="scroll"><table><tr><th>initialisation</th>{header}</tr>'
    )
    for name, run in comparison["runs"].items():
        cells = "".join(f"<td>{format_cell(run[t][m])}</td>" for t in _NAMES for m in _COLUMNS)
        marked = ' class="baseline"' if name in comparison["baselines"] else ""
        body.append(f"<tr{marked}><td>{text(name)}</td>{cells}</tr>")
    body.append("</table></div><p>AP in points, 0 to 100. Baselines are shaded.</p>")
    if comparison["gains"]:
        body.append(f"<h2>Gains</h2><figure>{plot_gains(comparison)}</figure>")
    detection = {
        name: metrics["total_loss"]
        for name, run in comparison["runs"].items()
        if "total_loss" in (metrics := read_metrics(run["folders"][0]))
    }
    if detection:
        svg = plot_curves(detection, names, "iterations", "detection loss")
        body.append(
            f"<h2>Training curves</h2><figure>{svg}<figcaption>Mask R-CNN, all loss terms</figcaption></figure>"
        )
    if curves:
        series = {name: read_metrics(folder)["loss_hashtag"] for name, folder in curves.items()}
        svg = plot_curves(series, names, "iterations", "pretraining loss, nats")
        body.append(
            f"<figure>{svg}<figcaption>Pretraining: softmax cross-entropy with 1/k targets</figcaption></figure>"
        )
    if image_folder is not None:
        head = "".join(f"<th>{text(name)}</th>" for name in ["ground truth", *names])
        rows = picture_rows(comparison, image_folder, num_pictures)
        body.append(
            f'<h2>Detections with a score of at least {_SCORE_SHOWN}</h2><div class="scroll">'
            f'<table class="pictures"><tr>{head}</tr>{rows}</table></div>'
        )
    body.append(
        "<h2>What was held equal</h2><p>Architecture, detector, data, schedule "
        f"({comparison['iterations']} iterations of {comparison['images_per_batch']} images), image sizes and "
        'evaluation are equal by check (runs that differ are refused). Different are:</p><div class="scroll"><table>'
        "<tr><th>initialisation</th><th>learning rate</th><th>weights</th></tr>"
    )
    for name, run in comparison["runs"].items():
        rates = ", ".join(f"{rate:g}" for rate in sorted(set(run["base_lr"])))
        weights = ", ".join(weight or "none" for weight in run["weights"])
        body.append(f"<tr><td>{text(name)}</td><td>{rates}</td><td>{text(weights)}</td></tr>")
    body.append("</table></div>")
    provenance = {key: comparison[key] for key in ("ground_truth", "num_images", "num_resamples", "seed")}
    folders = {name: run["folders"] for name, run in comparison["runs"].items()}
    body.append(
        f"<h2>Provenance</h2><pre>{text(json.dumps(provenance | {'runs': folders}, indent=1))}</pre>"
        f"<pre>{text(command)}</pre>"
    )
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE_SHEET}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")
