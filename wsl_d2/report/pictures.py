"""Pictures of detections beside each other."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

from wsl_d2.analysis.records import RunError
from wsl_d2.coco import read_coco, read_results

SCORE_SHOWN = 0.5


def _outline(image: np.ndarray, mask: np.ndarray, color: str) -> None:
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    image[mask] = (0.55 * image[mask] + 0.45 * rgb).astype(np.uint8)


def draw_objects(path: str | Path, objects: list[dict], names: dict[int, str], enlarge: float = 2.5) -> bytes:
    """Returns a PNG of an image with boxes, masks and class names.

    Args:
        path: the image file.
        objects: each with "bbox" (x, y, w, h) in pixels, "category_id", and optionally "segmentation" as RLE.
        names: category id -> name.
        enlarge: factor by which the picture is scaled up.

    Raises:
        RunError: the file is no image.
    """
    try:
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB")).copy()
    except OSError as error:
        raise RunError(f"{path} cannot be read as an image: {error}.") from error
    palette = ["#d1495b", "#edae49", "#00798c", "#30638e", "#66a182", "#8d6a9f"]
    order = sorted(names)
    for item in objects:
        color = palette[order.index(item["category_id"]) % len(palette)]
        if isinstance(item.get("segmentation"), dict):
            mask = mask_api.decode(item["segmentation"]).astype(bool)
            if mask.shape == pixels.shape[:2]:  # the file may have another size than its annotation
                _outline(pixels, mask, color)
    height, width = pixels.shape[:2]
    figure = plt.figure(figsize=(width * enlarge / 100, height * enlarge / 100), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(pixels, interpolation="bilinear")
    axis.set_axis_off()
    for item in objects:
        if "bbox" not in item:  # keypoints alone
            continue
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


def picture(png: bytes) -> str:
    """Returns a picture of :func:`draw_objects` as HTML."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def picture_rows(comparison: dict, image_folder: Path, image_ids: list) -> str:
    """Returns HTML table rows: ground truth beside the detections of each initialisation's first run.

    Raises:
        RunError: an image is not in the folder, or cannot be read.
    """
    truth = read_coco(comparison["ground_truth"])
    names = {category["id"]: category["name"] for category in truth.dataset["categories"]}
    detections: dict[str, dict[int, list[dict]]] = {}
    for name, run in comparison["runs"].items():
        results = read_results(truth, Path(run["folders"][0]) / "inference" / "coco_instances_results.json")
        detections[name] = {}
        for item in results.detections:
            if item["score"] >= SCORE_SHOWN:
                detections[name].setdefault(item["image_id"], []).append(item)
    rows = []
    for original in image_ids:
        info = truth.imgs[truth.images.number(original)]
        path = image_folder / str(info.get("file_name"))
        if not path.is_file():
            raise RunError(f"{path} does not exist; give the folder of the evaluated images.")
        objects = [
            row | {"segmentation": truth.annToRLE(row) if row.get("segmentation") and info["height"] else None}
            for row in truth.imgToAnns[info["id"]]
        ]
        cells = [draw_objects(path, objects, names)]
        cells += [draw_objects(path, found.get(info["id"], []), names) for found in detections.values()]
        rows.append("<tr>" + "".join(f"<td>{picture(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join(rows)
