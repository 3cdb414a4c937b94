"""AP of a run on all images and on resampled ones, and the gains of one set of runs over another.

Detections are matched to the ground truth once. A resampled set of images then only changes how often each image
counts, so the AP of all resamples is worked out together.

Shapes: B resamples, I images; for one class and area range P images, D detections and J true positives.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import sparse

from wsl_d2.analysis.gain import BootstrapEstimate, gain_of
from wsl_d2.analysis.matches import ClassMatches, as_ground_truth, class_matches, evaluate

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}  # in pycocotools' words; keypoints have no small ones
_THRESHOLDS = {"AP50": slice(0, 1), "AP75": slice(5, 6)}  # of IoU or OKS 0.50:0.05:0.95
_RESAMPLES_AT_A_TIME = 1000


@dataclass(frozen=True)
class BootstrapAP:
    """AP of one run.

    Args:
        metrics: metric -> AP; those of :data:`METRICS` that its type has.
        groups: "classes", and "supercategories" where the ground truth has several and they are not the classes ->
            name -> AP, of a supercategory the mean over its classes.
        num_objects: the same keys -> name -> objects in the ground truth.
        precision: "0.50" and "0.75" -> (101,) precision over recall 0, 0.01 ... 1, mean over classes.
    """

    metrics: dict[str, BootstrapEstimate]
    groups: dict[str, dict[str, BootstrapEstimate]] = field(default_factory=dict)
    num_objects: dict[str, dict[str, int]] = field(default_factory=dict)
    precision: dict[str, np.ndarray] = field(default_factory=dict)


def draw_counts(num_images: int, num_resamples: int, seed: int) -> np.ndarray:
    """Returns (B, I) int: how often each image is drawn in each resample of ``num_images`` with replacement."""
    rng = np.random.Generator(np.random.Philox(seed))
    return rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=num_resamples)


def bootstrap_ap(
    ground_truth: COCO | str | Path, results: Sequence[dict] | str | Path, iou_type: str, counts: np.ndarray
) -> BootstrapAP:
    """Evaluates one result set on all images and on resampled ones.

    Args:
        ground_truth: COCO annotations, or the path of their JSON.
        results: detections in COCO's result format, or the path of their JSON.
        iou_type: "bbox", "segm" or "keypoints".
        counts: (B, I) from :func:`draw_counts`; equal counts make the comparison of two runs a paired one.

    Raises:
        CocoError, ValueError: see :func:`wsl_d2.analysis.matches.evaluate`.
    """
    return bootstrap_evaluation(evaluate(as_ground_truth(ground_truth), results, iou_type), counts)


def bootstrap_evaluation(evaluation: COCOeval, counts: np.ndarray) -> BootstrapAP:
    """As :func:`bootstrap_ap`, of results that are matched already."""
    precision = evaluation.eval["precision"][..., -1]  # (T, 101, classes, areas), -1 without ground truth
    points = np.where(precision > -1, precision, np.nan).mean(axis=1)  # (T, classes, areas)
    replicates, number = _replicates(evaluation, counts)  # (areas, T, classes, B), (classes,)
    metrics = {}
    areas = evaluation.params.areaRngLbl
    for metric in METRICS:
        thresholds, label = _THRESHOLDS.get(metric, slice(None)), SIZES.get(metric, "all")
        if label not in areas:
            continue
        area = areas.index(label)
        defined = precision[thresholds, :, :, area]
        defined = defined[defined > -1]
        point = 100 * float(defined.mean()) if len(defined) else float("nan")
        metrics[metric] = BootstrapEstimate(point, 100 * mean_of_defined(replicates[area, thresholds], axis=(0, 1)))
    members = _groups(evaluation.cocoGt.loadCats(evaluation.params.catIds))
    groups = {
        kind: {
            name: BootstrapEstimate(
                100 * float(mean_of_defined(points[:, places, 0], axis=(0, 1))),
                100 * mean_of_defined(replicates[0][:, places], axis=(0, 1)),
            )
            for name, places in named.items()
        }
        for kind, named in members.items()
    }
    num_objects = {
        kind: {name: sum(number[k] for k in places) for name, places in named.items()}
        for kind, named in members.items()
    }
    present = points[0, :, 0] > -1
    curves = {
        name: precision[t][:, present, 0].mean(axis=1) if present.any() else np.full(precision.shape[1], np.nan)
        for name, t in (("0.50", 0), ("0.75", 5))
    }
    return BootstrapAP(metrics, groups, num_objects, curves)


def _groups(categories: Sequence[dict]) -> dict[str, dict[str, list[int]]]:
    """The places of the categories in each group; see :class:`BootstrapAP`."""
    supercategories: dict[str, list[int]] = {}
    for k, category in enumerate(categories):
        supercategories.setdefault(str(category.get("supercategory", "")), []).append(k)
    groups = {"classes": {category["name"]: [k] for k, category in enumerate(categories)}}
    return groups | ({"supercategories": supercategories} if 1 < len(supercategories) < len(categories) else {})


def mean_of_defined(values: np.ndarray, axis: tuple[int, ...]) -> np.ndarray:
    """The mean of what is defined, NaN where nothing is."""
    defined = ~np.isnan(values)
    number = defined.sum(axis=axis)
    total = np.where(defined, values, 0.0).sum(axis=axis)
    return np.divide(total, number, out=np.full(number.shape, np.nan), where=number > 0)


def _replicates(evaluation: COCOeval, counts: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Returns (areas, T, classes, B) AP in [0, 1], NaN where a resample has no object; and each class's objects."""
    params = evaluation.params
    shape = len(params.areaRng), len(params.iouThrs), len(params.catIds), len(counts)
    ap = np.full(shape, np.nan)
    parts = [slice(start, start + _RESAMPLES_AT_A_TIME) for start in range(0, len(counts), _RESAMPLES_AT_A_TIME)]
    # Whole numbers up to 16 million are exact in float32.
    weights = [np.ascontiguousarray(counts[part].T, np.float32) for part in parts]

    def work(k: int) -> int:
        found = class_matches(evaluation, k, range(shape[0]))
        for area, matches in enumerate(found):
            for part, columns in zip(parts, weights, strict=True):
                ap[area, :, k, part] = resampled_ap(matches, columns, params.recThrs)
        return int(found[0].num_objects.sum()) if found else 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return ap, list(pool.map(work, range(shape[2])))


def resampled_ap(matches: ClassMatches, weights: np.ndarray, recall_thresholds: np.ndarray) -> np.ndarray:
    """AP of one class on resampled images.

    Precision only matters where recall grows, at the true positives. With S[j, i] the number of detections of image i
    between the j-1st and the j-th of them, the running sum of ``S @ weights`` counts the detections of all resamples.

    Args:
        matches: of the class in one area range.
        weights: (I, B) float32 or float64, how often each image counts.
        recall_thresholds: COCO's 101.

    Returns:
        (T, B) AP in [0, 1], NaN where a resample has no object.
    """
    some = np.flatnonzero(matches.num_objects)
    objects = _count(np.zeros(len(some), int), matches.images[some], matches.num_objects[some], weights, 1)[0]
    result = np.where(objects > 0, np.zeros((len(matches.true), 1)), np.nan)
    positions = np.flatnonzero(matches.true.any(axis=0))
    if len(positions) == 0:
        return result
    image = matches.images[matches.image]
    interval = np.searchsorted(positions, np.arange(len(image)))  # first true positive at or after

    def count_up_to(chosen: np.ndarray, sign: int = 1) -> np.ndarray:
        """(J, B): detections among the chosen ones up to each true positive."""
        place = np.flatnonzero(chosen & (interval < len(positions)))
        number = _count(interval[place], image[place], np.full(len(place), sign), weights, len(positions))
        return _accumulate(np.add, number)

    base = matches.counted[0]
    counted_by_base = count_up_to(base)
    cumulative_true = gained = np.zeros(0)
    for t, (true, counted) in enumerate(zip(matches.true, matches.counted, strict=True)):
        found = np.flatnonzero(true)
        if len(found) == 0:
            continue
        rows = np.searchsorted(positions, found)
        precision = counted_by_base[rows]
        if (more := counted & ~base).any():
            precision += count_up_to(more)[rows]
        if (less := base & ~counted).any():
            precision += count_up_to(less, -1)[rows]
        precision += np.spacing(precision.dtype.type(1))
        if t == 0 or (true != matches.true[t - 1]).any():
            cumulative_true = _accumulate(np.add, weights[image[found]])
            level = _last_threshold_reached(cumulative_true, objects, recall_thresholds)
            gained = np.empty_like(level)
            gained[0] = level[0] + 1
            np.subtract(level[1:], level[:-1], out=gained[1:])
        np.divide(cumulative_true, precision, out=precision)
        _accumulate(np.maximum, precision[::-1])
        ap = np.einsum("jb,jb->b", precision, gained, dtype=np.float64) / len(recall_thresholds)
        result[t] = np.where(objects > 0, ap, np.nan)
    return result


def _count(row: np.ndarray, image: np.ndarray, number: np.ndarray, weights: np.ndarray, num_rows: int) -> np.ndarray:
    """(num_rows, B): the sum of the numbers of each row, times how often their images count."""
    shape = num_rows, len(weights)
    return sparse.csr_matrix((number.astype(weights.dtype), (row, image)), shape) @ weights


def _accumulate(operation: np.ufunc, values: np.ndarray) -> np.ndarray:
    """``operation.accumulate`` over rows, in place: several times as fast as numpy's, which goes column by column."""
    for before, row in zip(values, values[1:], strict=False):
        operation(before, row, out=row)
    return values


def _last_threshold_reached(found: np.ndarray, objects: np.ndarray, recall_thresholds: np.ndarray) -> np.ndarray:
    """The place of the last recall threshold that (n, B) objects found reach of (B,), as floating-point numbers do.

    Thresholds are k / 100 but for rounding, and a recall that is equal to one reaches it unless it was rounded up.
    """
    steps = len(recall_thresholds) - 1
    total = np.maximum(objects, 1).astype(np.float64)
    kind = found.dtype if total.max() < 20_000 else np.float64  # float32 tells recalls so near to each other apart
    level = found * (steps / total).astype(kind)
    level += (0.5 / total).astype(kind)
    np.floor(level, out=level)
    rounded_up = np.flatnonzero(recall_thresholds > np.arange(steps + 1) / steps)
    columns = np.flatnonzero((total[:, None] * rounded_up % steps == 0).any(axis=1))
    part = level[:, columns]
    part -= found[:, columns] / total[columns] < recall_thresholds[part.astype(np.intp)]
    level[:, columns] = part
    return level


def gain_between(
    baseline: Sequence[BootstrapAP],
    candidate: Sequence[BootstrapAP],
    seed: int = 0,
    seed_sd: float | None = None,
    paired: bool = False,
) -> dict[str, dict]:
    """Returns metric -> :func:`wsl_d2.analysis.gain.gain_of`."""
    return {
        metric: gain_of(
            [run.metrics[metric] for run in baseline],
            [run.metrics[metric] for run in candidate],
            seed,
            seed_sd=seed_sd,
            paired=paired,
        )
        for metric in baseline[0].metrics
    }


def gains_by(
    kind: str, baseline: Sequence[BootstrapAP], candidate: Sequence[BootstrapAP], **options
) -> dict[str, dict]:
    """Returns class or supercategory -> :func:`wsl_d2.analysis.gain.gain_of` with "num_objects" and "p_value_holm": the
    p value of the method, or of these models where there is none, corrected for their number.

    Args:
        kind: of :attr:`BootstrapAP.groups`.
        baseline, candidate: runs.
        options: of ``gain_of``.
    """
    found: dict[str, dict] = {}
    for name, number in baseline[0].num_objects[kind].items():
        if number:
            before, after = ([run.groups[kind][name] for run in runs] for runs in (baseline, candidate))
            found[name] = {"num_objects": number} | gain_of(before, after, **options)
    of_class = {name: row["p_value"] if (p := row["method_p_value"]) is None else p for name, row in found.items()}
    largest = 0.0
    for rank, name in enumerate(sorted(found, key=of_class.__getitem__)):
        largest = max(largest, min(1.0, (len(found) - rank) * of_class[name]))
        found[name]["p_value_holm"] = largest
    return found


def paired_bootstrap(
    gt_json: str | Path,
    baseline_results: Sequence[dict] | str | Path,
    candidate_results: Sequence[dict] | str | Path,
    iou_type: str,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """Compares two result sets on the same resampled images; see :func:`bootstrap_ap` and :func:`gain_between`.

    Args:
        gt_json: path of the ground truth in COCO's format.
        baseline_results, candidate_results: detections in COCO's result format, or paths of their JSON.
        iou_type: "bbox", "segm" or "keypoints".
        num_resamples: B.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        For AP, AP50, AP75, APs, APm and APl (of keypoints without APs) what :func:`wsl_d2.analysis.gain.gain_of`
        returns.
    """
    ground_truth = as_ground_truth(gt_json)
    counts = draw_counts(len(ground_truth.getImgIds()), num_resamples, seed)
    sides = [bootstrap_ap(ground_truth, results, iou_type, counts) for results in (baseline_results, candidate_results)]
    return gain_between([sides[0]], [sides[1]], seed)
