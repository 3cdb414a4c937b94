"""The training data of a detector on one page: what the check finds, and images with their objects."""

from __future__ import annotations

import os

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from wsl_d2.coco import read_coco
from wsl_d2.data.read.detection_check import SECONDS_AT_START, check_detection
from wsl_d2.errors import ConfigError
from wsl_d2.report.page import escape, page, table
from wsl_d2.report.pictures import draw_objects, picture

_LONG_SIDE = 480  # pixels of a picture


def detection_data_page(cfg: CfgNode, num_images: int) -> str:
    """Builds the page of the first dataset in DATASETS.TRAIN.

    Args:
        cfg: of a detector, with its datasets registered.
        num_images: shown, evenly spread over those with objects, whose sizes must be known.

    Raises:
        ConfigError: the dataset is not registered, or not in COCO's format.
        CocoError: its annotations cannot be read.
        RunError: an image cannot be read.
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
        path = os.path.join(metadata.image_root, image["file_name"])
        objects = [
            row | {"segmentation": truth.annToRLE(row) if row.get("segmentation") else None}
            for row in truth.imgToAnns[image["id"]]
        ]
        drawn = draw_objects(path, objects, names, _LONG_SIDE / max(image["width"], image["height"]))
        caption = escape(image["file_name"])
        figures.append(f"<figure>{picture(drawn)}<figcaption>{caption}</figcaption></figure>")
    counts = {i: 0 for i in names}
    for row in truth.anns.values():
        counts[row["category_id"]] += not row["iscrowd"]
    lines = [*check.errors, *check.warnings]
    return page(
        name,
        table(["", "count"], [[what, f"{count:,}"] for what, count in check.facts])
        + (f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else "<p>No fault found.</p>")
        + f'<h2>Images</h2><div class="sheet">{"".join(figures)}</div>'
        + "<h2>Objects of each category</h2>"
        + table(["category", "objects"], [[names[i], f"{count:,}"] for i, count in counts.items()]),
    )
