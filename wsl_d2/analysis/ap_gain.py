"""The gain in COCO AP of one set of runs over another, with a paired bootstrap over images and seeds.

Detections are matched to the ground truth once, by pycocotools. A resampled set of images then only changes how
often each image counts, so every replicate is a matrix product of draw counts with the matches.

Shapes: B resamples, I images, J true positives of one class, area range and IoU threshold, in order of score.
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

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
IOU_TYPES = ("bbox", "segm")
_AREAS = {"AP": 0, "AP50": 0, "AP75": 0, "APs": 1, "APm": 2, "APl": 3}
_THRESHOLDS = {"AP50": slice(0, 1), "AP75": slice(5, 6)}  # of IoU 0.50:0.05:0.95
_MAX_DETECTIONS = 100


@dataclass(frozen=True)
class BootstrapAP:
    """AP of one run.

    Args:
        point: metric -> AP in points (0-100) on all images; NaN where no object is of that size.
        replicates: metric -> (B,) AP on the resampled images.
    """

    point: dict[str, float]
    replicates: dict[str, np.ndarray]


def draw_counts(num_images: int, num_resamples: int, seed: int) -> np.ndarray:
    """Returns (B, I) int: how often each image is drawn in each resample of ``num_images`` with replacement."""
    rng = np.random.Generator(np.random.Philox(seed))
    return rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=num_resamples)


def load_ground_truth(gt_json: str | Path) -> COCO:
    """Reads COCO annotations without pycocotools' chatter."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(gt_json))


def bootstrap_ap(
    ground_truth: COCO | str | Path, results: Sequence[dict] | str | Path, iou_type: str, counts: np.ndarray
) -> BootstrapAP:
    """Evaluates one result set on all images and on resampled ones.

    Args:
        ground_truth: COCO annotations, or the path of their JSON.
        results: detections in COCO's result format, or the path of their JSON.
        iou_type: "bbox" or "segm".
        counts: (B, I) from :func:`draw_counts`; equal counts make the comparison of two runs a paired one.

    Raises:
        ValueError: unknown ``iou_type``, or detections on images that the ground truth lacks.
    """
    if iou_type not in IOU_TYPES:
        raise ValueError(f"iou_type must be one of {', '.join(IOU_TYPES)}, got {iou_type!r}.")
    if not isinstance(ground_truth, COCO):
        ground_truth = load_ground_truth(ground_truth)
    source = "the results"
    if isinstance(results, (str, Path)):
        source = str(results)
        detections = json.loads(Path(results).read_text())
    else:
        detections = results
    unknown = {detection["image_id"] for detection in detections} - set(ground_truth.getImgIds())
    if unknown:
        raise ValueError(
            f"{source} hold detections on {len(unknown)} images that the ground truth lacks, such as image_id "
            f"{sorted(unknown)[0]}; compare runs on the dataset they were evaluated on."
        )
    weights = np.concatenate([np.ones((1, counts.shape[1]), counts.dtype), counts])
    ap = _average_precision(_match(ground_truth, detections, iou_type), weights)  # (areas, T, K, 1 + B)
    values = {}
    for metric in METRICS:
        chosen = ap[_AREAS[metric], _THRESHOLDS.get(metric, slice(None))]
        defined = ~np.isnan(chosen)
        total = np.where(defined, chosen, 0.0).sum(axis=(0, 1))
        number = defined.sum(axis=(0, 1))
        values[metric] = 100 * np.divide(total, number, out=np.full(len(total), np.nan), where=number > 0)
    return BootstrapAP({m: float(v[0]) for m, v in values.items()}, {m: v[1:] for m, v in values.items()})


def _match(ground_truth: COCO, results: Sequence[dict], iou_type: str) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        # loadRes refuses an empty list; an index without annotations is what it would return
        detections = ground_truth.loadRes([dict(result) for result in results]) if results else COCO()
        evaluation = COCOeval(ground_truth, detections, iou_type)
        evaluation.params.maxDets = [1, 10, _MAX_DETECTIONS]
        if results:
            evaluation.evaluate()
        else:
            detections.dataset = {"images": ground_truth.dataset["images"], "annotations": []}
            detections.createIndex()
            evaluation.evaluate()
    return evaluation


def _average_precision(evaluation: COCOeval, weights: np.ndarray) -> np.ndarray:
    """Returns (areas, IoU thresholds, classes, rows of weights) AP in [0, 1], NaN without ground truth."""
    params = evaluation.params
    num_images, num_areas, num_classes = len(params.imgIds), len(params.areaRng), len(params.catIds)
    num_thresholds = len(params.iouThrs)
    weights = weights.astype(np.float64)
    ap = np.full((num_areas, num_thresholds, num_classes, len(weights)), np.nan)
    for k in range(num_classes):
        for a in range(num_areas):
            start = (k * num_areas + a) * num_images
            per_image = evaluation.evalImgs[start : start + num_images]
            present = [(i, entry) for i, entry in enumerate(per_image) if entry is not None]
            if not present:
                continue
            num_objects = np.zeros(num_images)
            for i, entry in present:
                num_objects[i] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
            objects = weights @ num_objects
            if not objects.any():
                continue
            scores = np.concatenate([entry["dtScores"][:_MAX_DETECTIONS] for _, entry in present])
            order = np.argsort(-scores, kind="mergesort")
            image = np.concatenate([np.full(len(e["dtScores"][:_MAX_DETECTIONS]), i) for i, e in present])[order]
            matched = np.concatenate([e["dtMatches"][:, :_MAX_DETECTIONS] for _, e in present], axis=1)[:, order]
            ignored = np.concatenate([e["dtIgnore"][:, :_MAX_DETECTIONS] for _, e in present], axis=1)[:, order]
            for t in range(num_thresholds):
                counted = ignored[t] == 0
                is_true = (matched[t][counted] != 0).astype(bool)
                ap[a, t, k] = _resampled_ap(is_true, image[counted].astype(int), objects, weights, params.recThrs)
    return ap


def _resampled_ap(
    is_true: np.ndarray, image: np.ndarray, objects: np.ndarray, weights: np.ndarray, recall_thresholds: np.ndarray
) -> np.ndarray:
    """AP of one class for each row of weights.

    Precision only matters where recall grows, at the true positives. With A[i, j] the number of detections of image i
    up to the j-th of them, ``weights @ A`` are the cumulative counts of all rows at once.

    Args:
        is_true: (D,) bool in order of falling score.
        image: (D,) int, the image of each detection.
        objects: (rows,) ground-truth objects.
        weights: (rows, I).
        recall_thresholds: COCO's 101.
    """
    positions = np.flatnonzero(is_true)
    result = np.where(objects > 0, 0.0, np.nan)
    if len(positions) == 0:
        return result
    interval = np.searchsorted(positions, np.arange(len(is_true)), side="left")  # first true positive at or after
    inside = interval < len(positions)
    every = np.zeros((weights.shape[1], len(positions)))
    np.add.at(every, (image[inside], interval[inside]), 1)
    true = np.zeros_like(every)
    true[image[positions], np.arange(len(positions))] = 1
    cumulative_true = np.cumsum(weights @ true, axis=1)
    cumulative = np.cumsum(weights @ every, axis=1)
    precision = cumulative_true / (cumulative + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = cumulative_true / np.maximum(objects, 1)[:, None]
    reached = np.searchsorted(recall_thresholds, recall.ravel(), side="right").reshape(recall.shape)
    gained = np.diff(reached, axis=1, prepend=0)
    return np.where(objects > 0, (precision * gained).sum(axis=1) / len(recall_thresholds), np.nan)


def gain_between(
    baseline: Sequence[BootstrapAP], candidate: Sequence[BootstrapAP], seed: int = 0
) -> dict[str, dict[str, float | list[float]]]:
    """The gain of a candidate's runs over a baseline's, all bootstrapped with the same draw counts.

    With one run each, the interval covers the choice of images. With several, each replicate also draws runs with
    replacement from both sides, so that the interval covers training seeds as well.

    Returns:
        metric -> {"baseline", "candidate" (means over runs), "gain", "interval" (95%, percentile),
        "probability_of_gain"}, in points.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    result: dict[str, dict] = {}
    num_resamples = len(next(iter(baseline[0].replicates.values())))
    drawn = [rng.integers(0, len(side), (num_resamples, len(side))) for side in (baseline, candidate)]
    for metric in METRICS:
        means, replicates = [], []
        for side, draws in zip((baseline, candidate), drawn, strict=True):
            means.append(float(np.mean([run.point[metric] for run in side])))
            values = np.stack([run.replicates[metric] for run in side])  # (runs, B)
            replicates.append(values[draws, np.arange(num_resamples)[:, None]].mean(axis=1))
        gains = replicates[1] - replicates[0]
        low, high = np.nanpercentile(gains, [2.5, 97.5]) if not np.isnan(gains).all() else (np.nan, np.nan)
        result[metric] = {
            "baseline": means[0],
            "candidate": means[1],
            "gain": means[1] - means[0],
            "interval": [float(low), float(high)],
            "probability_of_gain": float(np.mean(gains > 0)),
        }
    return result


def paired_bootstrap(
    gt_json: str | Path,
    baseline_results: Sequence[dict] | str | Path,
    candidate_results: Sequence[dict] | str | Path,
    iou_type: str,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float | list[float]]]:
    """Compares two result sets on the same resampled images; see :func:`bootstrap_ap` and :func:`gain_between`.

    Args:
        gt_json: path of the ground truth in COCO's format.
        baseline_results, candidate_results: detections in COCO's result format, or paths of their JSON.
        iou_type: "bbox" or "segm".
        num_resamples: B.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        For AP, AP50, AP75, APs, APm and APl: AP of both, gain, 95% interval, probability of a gain; in points.
    """
    ground_truth = load_ground_truth(gt_json)
    counts = draw_counts(len(ground_truth.getImgIds()), num_resamples, seed)
    sides = [bootstrap_ap(ground_truth, results, iou_type, counts) for results in (baseline_results, candidate_results)]
    return gain_between([sides[0]], [sides[1]], seed)
