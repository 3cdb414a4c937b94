"""The training data of a detector on one page: what the check finds, and images with their objects."""

from __future__ import annotations

import os

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from wsl_d2.coco import read_coco
from wsl_d2.data.read.detection_check import SECONDS_AT_START, check_detection
from wsl_d2.data.read.detection_image import read_detection_image
from wsl_d2.errors import ConfigError
from wsl_d2.report.page import page, paragraph, pictures, table
from wsl_d2.report.pictures import draw_objects, objects_of


def detection_data_page(cfg: CfgNode, num_images: int) -> str:
    """Builds the page of the first dataset in DATASETS.TRAIN.

    Args:
        cfg: of a detector, with its datasets registered.
        num_images: shown, evenly spread over those with objects, whose sizes must be known.

    Raises:
        ConfigError: the dataset is not registered, or not in COCO's format.
        CocoError: its annotations cannot be read.
        OSError: an image file is missing or cannot be read.
    """
    name = cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else ""
    metadata = MetadataCatalog.get(name) if name in DatasetCatalog.list() else None
    if metadata is None or not metadata.get("json_file"):
        raise ConfigError(
            f"DATASETS.TRAIN {name!r} is no registered dataset in COCO's format; there is nothing to show."
        )
    check = check_detection(metadata.json_file, metadata.image_root, cfg, seconds=SECONDS_AT_START)
    truth = read_coco(metadata.json_file)
    names = {row["id"]: row["name"] for row in truth.dataset["categories"]}
    with_objects = [i for i in sorted(truth.imgs) if truth.imgToAnns[i] and truth.imgs[i]["height"]]
    chosen = np.linspace(0, len(with_objects) - 1, min(num_images, len(with_objects))).astype(int)
    figures = []
    for image in (truth.imgs[with_objects[place]] for place in chosen):
        pixels = read_detection_image(os.path.join(metadata.image_root, image["file_name"]))
        figures.append(draw_objects(pixels, objects_of(truth, image["id"]), names, image["file_name"], "annotations"))
    counts = {i: 0 for i in names}
    for row in truth.anns.values():
        counts[row["category_id"]] += not row["iscrowd"]
    faults = [*check.errors, *check.warnings]
    found = f"{len(check.errors)} errors and {len(check.warnings)} warnings" if faults else "no fault"
    answer = f"{len(truth.imgs):,} images with {len(truth.anns):,} objects of {len(names):,} categories; {found}."
    return page(
        name,
        paragraph(answer, "headline"),
        *map(paragraph, faults),
        table(["", "count"], [[what, f"{count:,}"] for what, count in check.facts]),
        "<h2>Images</h2>" + pictures(figures, 4),
        "<h2>Objects of each category</h2>",
        table(["category", "objects"], [[names[i], f"{count:,}"] for i, count in counts.items()]),
    )
