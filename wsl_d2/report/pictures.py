"""Pictures of detections beside each other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_api

from wsl_d2.analysis.records import RunError
from wsl_d2.coco import GroundTruth, read_coco, read_results
from wsl_d2.data.read.detection_image import read_detection_image
from wsl_d2.report.page import Box, picture, pictures

SCORE_SHOWN = 0.5
_PALETTE = ("#d1453b", "#1f6fb8", "#2b8a3e", "#b35806", "#8e5bbf", "#00798c", "#a3195b", "#5c5c5c")


def draw_objects(pixels: np.ndarray, objects: list[dict], names: dict[int, str], caption: str, title: str) -> str:
    """A picture of (H, W, 3) RGB with objects, each with "bbox" (x, y, w, h) in pixels, "category_id", and optionally
    "score" and "segmentation" as RLE."""
    pixels = pixels.copy()
    height, width = pixels.shape[:2]
    order = sorted(names)
    boxes = []
    for item in sorted(objects, key=lambda item: item.get("score", 0)):
        color = _PALETTE[order.index(item["category_id"]) % len(_PALETTE)]
        if isinstance(item.get("segmentation"), dict):
            mask = mask_api.decode(item["segmentation"]).astype(bool)
            if mask.shape == (height, width):  # the file may have another size than its annotation
                rgb = np.frombuffer(bytes.fromhex(color[1:]), np.uint8)
                pixels[mask] = (0.6 * pixels[mask] + 0.4 * rgb).astype(np.uint8)
        if "bbox" in item:  # not with keypoints alone
            x, y, w, h = item["bbox"]
            left, top, right, bottom = max(0, x), max(0, y), min(width, x + w), min(height, y + h)
            score = f" {100 * item['score']:.0f}%" if "score" in item else ""
            place = (left / width, top / height, (right - left) / width, (bottom - top) / height)
            boxes.append(Box(*place, color, names[item["category_id"]] + score))
    found = Counter(names[item["category_id"]] for item in objects)
    seen = ", ".join(f"{number} {name}" for name, number in found.items()) or "no objects"
    return picture(pixels, f"{title}, {caption}: {seen}", caption, boxes)


def objects_of(truth: GroundTruth, image_id: int) -> list[dict]:
    """The annotations of an image as :func:`draw_objects` takes them; its masks need its size."""
    has_size = truth.imgs[image_id]["height"]
    return [
        row | {"segmentation": truth.annToRLE(row) if row.get("segmentation") and has_size else None}
        for row in truth.imgToAnns[image_id]
    ]


def picture_rows(comparison: dict, image_folder: Path, image_ids: list) -> str:
    """Returns HTML: of each image the ground truth beside the detections of each initialization's first run.

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
        try:
            pixels = read_detection_image(path)
        except OSError as error:
            raise RunError(f"{path} cannot be read as an image: {error}.") from error
        columns = {"ground truth": objects_of(truth, info["id"])} | {
            name: found.get(info["id"], []) for name, found in detections.items()
        }
        cells = [draw_objects(pixels, members, names, name, path.name) for name, members in columns.items()]
        rows.append(pictures(cells, min(6, len(cells))))
    return "\n".join(rows)
