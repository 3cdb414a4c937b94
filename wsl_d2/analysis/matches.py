"""Detections matched to the ground truth, once, by pycocotools.

Shapes: T IoU thresholds (0.50:0.05:0.95), and for one class and area range P images with its objects or detections and
D detections in order of falling score.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IOU_TYPES = ("bbox", "segm")
AREAS = ("all", "small", "medium", "large")
MAX_DETECTIONS = 100


@dataclass(frozen=True)
class ClassMatches:
    """What became of the detections of one class, counting objects of one area range.

    Args:
        images: (P,) int, places in the sorted list of all images.
        num_objects: (P,) int.
        image: (D,) int, places in ``images``.
        true: (T, D) bool, whether a detection found an object.
        counted: (T, D) bool, whether it counts at all.
    """

    images: np.ndarray
    num_objects: np.ndarray
    image: np.ndarray
    true: np.ndarray
    counted: np.ndarray


def load_ground_truth(gt_json: str | Path) -> COCO:
    """Reads COCO annotations without pycocotools' chatter."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(gt_json))


def evaluate(ground_truth: COCO, results: Sequence[dict] | str | Path, iou_type: str) -> COCOeval:
    """Matches and accumulates with pycocotools.

    Args:
        results: detections in COCO's result format, or the path of their JSON.

    Raises:
        ValueError: unknown ``iou_type``, or detections on images that the ground truth lacks.
    """
    if iou_type not in IOU_TYPES:
        raise ValueError(f"iou_type must be one of {', '.join(IOU_TYPES)}, got {iou_type!r}.")
    source, items = "the results", results
    if isinstance(results, (str, Path)):
        source, items = str(results), json.loads(Path(results).read_text())
    found: Sequence[dict] = items  # type: ignore[assignment]
    unknown = {detection["image_id"] for detection in found} - set(ground_truth.getImgIds())
    if unknown:
        raise ValueError(
            f"{source} hold detections on {len(unknown)} images that the ground truth lacks, such as image_id "
            f"{sorted(unknown)[0]}; compare runs on the dataset they were evaluated on."
        )
    with contextlib.redirect_stdout(io.StringIO()):
        # loadRes refuses an empty list; an index without annotations is what it would return
        detections = ground_truth.loadRes([dict(result) for result in found]) if found else COCO()
        if not found:
            detections.dataset = {"images": ground_truth.dataset["images"], "annotations": []}
            detections.createIndex()
        evaluation = COCOeval(ground_truth, detections, iou_type)
        evaluation.params.maxDets = [1, 10, MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def entries_of(evaluation: COCOeval, class_place: int, area: int) -> list[tuple[int, dict]]:
    """Returns (place of the image, pycocotools' result) of the images with objects or detections of a class."""
    params = evaluation.params
    start = (class_place * len(params.areaRng) + area) * len(params.imgIds)
    per_image = evaluation.evalImgs[start : start + len(params.imgIds)]
    return [(place, entry) for place, entry in enumerate(per_image) if entry is not None]


def class_matches(evaluation: COCOeval, class_place: int, area: int) -> ClassMatches | None:
    """Returns one class's matches, None if it has neither objects nor detections.

    Args:
        class_place: of the class in ``evaluation.params.catIds``.
        area: place in :data:`AREAS`.
    """
    entries = entries_of(evaluation, class_place, area)
    if not entries:
        return None
    found = [entry for _, entry in entries]
    scores = np.concatenate([entry["dtScores"] for entry in found])
    order = np.argsort(-scores, kind="mergesort")
    ignored = np.concatenate([entry["dtIgnore"] for entry in found], axis=1)[:, order].astype(bool)
    matched = np.concatenate([entry["dtMatches"] for entry in found], axis=1)[:, order] != 0
    return ClassMatches(
        images=np.array([place for place, _ in entries]),
        num_objects=np.array([np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0) for entry in found]),
        image=np.repeat(np.arange(len(found)), [len(entry["dtScores"]) for entry in found])[order],
        true=matched & ~ignored,
        counted=~ignored,
    )


def image_scores(evaluation: COCOeval, min_score: float) -> np.ndarray:
    """Returns (I,) F1 of each image at IoU 0.5 with the detections of at least ``min_score``; 1 where there is nothing
    to find and nothing found."""
    true = np.zeros(len(evaluation.params.imgIds))
    false, objects = true.copy(), true.copy()
    for k in range(len(evaluation.params.catIds)):
        for place, entry in entries_of(evaluation, k, 0):
            counts = (np.asarray(entry["dtScores"]) >= min_score) & ~entry["dtIgnore"][0].astype(bool)
            matched = entry["dtMatches"][0] != 0
            true[place] += np.count_nonzero(counts & matched)
            false[place] += np.count_nonzero(counts & ~matched)
            objects[place] += np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
    missed = objects - true
    total = 2 * true + false + missed
    return np.divide(2 * true, total, out=np.ones_like(true), where=total > 0)
