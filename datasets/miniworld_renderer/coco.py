"""Annotations of the detection set in COCO's format: visible pixels as compressed RLE, boxes around them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pycocotools import mask as coco_mask

from .concepts import detection_concepts, load_concepts
from .render import DetectionObject

LICENSES = [
    {"id": 1, "name": "CC BY-SA 4.0", "url": "https://creativecommons.org/licenses/by-sa/4.0/"},
]


def annotate(objects: list[DetectionObject]) -> list[dict]:
    """Returns a picture's annotations without ids.

    Boxes are (x, y, width, height) in pixels and enclose the mask's pixels exactly.
    """
    category_of_concept = {concept: k for k, concept in enumerate(detection_concepts(), start=1)}
    annotations = []
    for item in objects:
        rle = coco_mask.encode(np.asfortranarray(item.mask, dtype=np.uint8))
        annotations.append(
            {
                "category_id": category_of_concept[item.concept],
                "iscrowd": 0,
                "area": int(item.mask.sum()),
                "bbox": [float(value) for value in coco_mask.toBbox(rle)],
                "segmentation": {
                    "size": [int(n) for n in rle["size"]],
                    "counts": rle["counts"].decode("ascii"),
                },
            }
        )
    return annotations


def coco_document(annotations: Mapping[int, list[dict]], side: int, seed: int) -> dict:
    """Returns the content of an ``instances_*.json``.

    Args:
        annotations: picture number (from 0) -> what :func:`annotate` returned; image ids are numbers plus 1.
        side: of the pictures, in pixels.
        seed: of the world, for the description.
    """
    images: list[dict] = []
    rows: list[dict] = []
    for number in sorted(annotations):
        image_id = number + 1
        images.append({"id": image_id, "file_name": f"{image_id:06d}.jpg", "width": side, "height": side, "license": 1})
        for annotation in annotations[number]:
            rows.append({"id": len(rows) + 1, "image_id": image_id, **annotation})
    concepts = load_concepts()
    sets = {True: "classes of the clean set", False: "classes known from hashtags alone"}
    categories = [
        {"id": k, "name": concepts[i].name, "supercategory": sets[concepts[i].clean]}
        for k, i in enumerate(detection_concepts(), start=1)
    ]
    info = {
        "description": f"wsl_d2 mini-world, seed {seed}: emoji artwork, see ATTRIBUTION.txt",
        "version": "1",
    }
    return {
        "info": info,
        "licenses": LICENSES,
        "images": images,
        "annotations": rows,
        "categories": categories,
    }
