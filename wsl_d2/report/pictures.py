"""Pictures of detections beside each other."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

from wsl_d2.analysis.matches import load_ground_truth
from wsl_d2.analysis.records import RunError

SCORE_SHOWN = 0.5


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


def picture_rows(comparison: dict, image_folder: Path, image_ids: list[int]) -> str:
    """Returns HTML table rows: ground truth beside the detections of each initialisation's first run.

    Raises:
        RunError: an image is not in the folder.
    """
    coco = load_ground_truth(comparison["ground_truth"])
    names = {category["id"]: category["name"] for category in coco.dataset["categories"]}
    detections: dict[str, dict[int, list[dict]]] = {}
    for name, run in comparison["runs"].items():
        path = Path(run["folders"][0]) / "inference" / "coco_instances_results.json"
        detections[name] = {}
        for item in json.loads(path.read_text()):
            if item["score"] >= SCORE_SHOWN:
                detections[name].setdefault(item["image_id"], []).append(item)
    rows = []
    for image_id in image_ids:
        info = coco.loadImgs(image_id)[0]
        if not (image_folder / info["file_name"]).is_file():
            raise RunError(
                f"{image_folder / info['file_name']} does not exist; give the folder of the evaluated images."
            )
        truth = [a | {"segmentation": coco.annToRLE(a)} for a in coco.imgToAnns[image_id]]
        cells = [draw_objects(image_folder / info["file_name"], truth, names)]
        for name in detections:
            cells.append(draw_objects(image_folder / info["file_name"], detections[name].get(image_id, []), names))
        rows.append("<tr>" + "".join(f"<td>{_picture(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join(rows)
