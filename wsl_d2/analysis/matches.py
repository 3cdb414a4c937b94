"""Detections matched to the ground truth, once, by pycocotools.

Shapes: T IoU thresholds (0.50:0.05:0.95), and for one class and area range P images with its objects or detections and
D detections in order of falling score.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from wsl_d2.coco import (
    IOU_TYPES,
    PLURALS,
    CocoError,
    GroundTruth,
    Results,
    match,
    read_coco,
    read_results,
    shared_iou_types,
)


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


def as_ground_truth(ground_truth: COCO | str | Path) -> GroundTruth:
    """Reads annotations to compare by; what :func:`wsl_d2.coco.read_coco` gives is returned as it is.

    Raises:
        CocoError: see :func:`wsl_d2.coco.read_coco`; or there are no objects.
    """
    if isinstance(ground_truth, GroundTruth):
        found = ground_truth
    elif isinstance(ground_truth, COCO):
        found = GroundTruth(copy.deepcopy(ground_truth.dataset), "the ground truth")
    else:
        found = read_coco(ground_truth)
    if not found.dataset["annotations"]:
        raise CocoError(f"{found.source} has no annotations; there is nothing to compare detections with.")
    return found


def evaluate(
    ground_truth: COCO | str | Path,
    results: Results | Sequence[dict] | str | Path,
    iou_type: str,
    oks_sigmas: Sequence[float] = (),
) -> COCOeval:
    """Matches and accumulates with pycocotools.

    Args:
        results: detections in COCO's result format, or the path of their JSON.
        oks_sigmas: of keypoints; COCO's by default.

    Raises:
        ValueError: unknown ``iou_type``.
        CocoError: the ground truth or the detections cannot be read, or lack what ``iou_type`` needs.
    """
    if iou_type not in IOU_TYPES:
        raise ValueError(f"iou_type must be one of {', '.join(IOU_TYPES)}, got {iou_type!r}.")
    truth = as_ground_truth(ground_truth)
    found = results if isinstance(results, Results) else read_results(truth, results)
    lacking = [one.source for one in (truth, found) if iou_type not in one.iou_types]
    _, left_out = shared_iou_types(truth, [found], oks_sigmas)
    if reason := left_out.get(iou_type, lacking and f"no {PLURALS[iou_type]} in {' and '.join(lacking)}"):
        raise CocoError(f"{iou_type} cannot be evaluated: {reason}.")
    return match(truth, found, iou_type, oks_sigmas=oks_sigmas)


def entries_of(evaluation: COCOeval, class_place: int, area: int) -> list[tuple[int, dict]]:
    """Returns (place of the image, pycocotools' result) of the images with objects or detections of a class."""
    params = evaluation.params
    start = (class_place * len(params.areaRng) + area) * len(params.imgIds)
    per_image = evaluation.evalImgs[start : start + len(params.imgIds)]
    return [(place, entry) for place, entry in enumerate(per_image) if entry is not None]


def class_matches(evaluation: COCOeval, class_place: int, areas: Sequence[int] = (0,)) -> list[ClassMatches]:
    """Returns one class's matches in each of the area ranges; nothing if it has neither objects nor detections.

    Args:
        class_place: of the class in ``evaluation.params.catIds``.
        areas: places in ``evaluation.params.areaRng``; 0 is all.
    """
    places, order = np.zeros(0, int), np.zeros(0, int)
    result = []
    for number, area in enumerate(areas):
        entries = entries_of(evaluation, class_place, area)
        if not entries:
            return []
        found = [entry for _, entry in entries]
        if number == 0:  # images and detections are those of every area
            images = np.array([place for place, _ in entries])
            places = np.repeat(np.arange(len(found)), [len(entry["dtScores"]) for entry in found])
            order = order_of_scores(found)[1]
        ignored = np.concatenate([entry["dtIgnore"] for entry in found], axis=1)[:, order].astype(bool)
        matched = np.concatenate([entry["dtMatches"] for entry in found], axis=1)[:, order] != 0
        objects = np.repeat(np.arange(len(found)), [len(entry["gtIgnore"]) for entry in found])
        counts = np.concatenate([entry["gtIgnore"] for entry in found]) == 0
        num_objects = np.bincount(objects[counts], minlength=len(found))
        result.append(ClassMatches(images, num_objects, places[order], matched & ~ignored, ~ignored))
    return result


def order_of_scores(entries: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (D,) scores of all detections in pycocotools' results, and their order by falling score."""
    scores = np.fromiter(itertools.chain.from_iterable(entry["dtScores"] for entry in entries), float)
    return scores, np.argsort(-scores, kind="mergesort")


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
