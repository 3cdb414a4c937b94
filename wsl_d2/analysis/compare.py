"""Compares the runs of several initialisations: AP of each, and the paired gains over the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsl_d2.analysis.ap_gain import (
    METRICS,
    BootstrapAP,
    Replicated,
    bootstrap_evaluation,
    class_gains,
    draw_counts,
    gain_between,
    gain_of,
)
from wsl_d2.analysis.errors import KINDS, error_costs
from wsl_d2.analysis.matches import IOU_TYPES, evaluate, image_scores, load_ground_truth
from wsl_d2.analysis.records import Run, RunError, check_comparable, read_run, value_at

_SCORE_THAT_COUNTS = 0.5  # of a detection, for the choice of images to show
_IMAGES_SHOWN = 4


def compare_runs(
    folders: dict[str, list[Path]],
    ground_truth: str | Path,
    baselines: Sequence[str],
    num_resamples: int = 1000,
    seed: int = 0,
    force: bool = False,
) -> dict:
    """Compares initialisations.

    Args:
        folders: initialisation -> its run folders, one per training seed.
        ground_truth: COCO annotations of the images all runs were evaluated on.
        baselines: the initialisations that gains of all others are counted from.
        num_resamples: resampled image sets.
        seed: of the bootstrap.
        force: compare runs of different schedules or data, too.

    Returns:
        A JSON-able dict: "runs" (initialisation -> learning rate, weights, precision over recall, "bbox"/"segm" ->
        metric, or "errors" and its kind, -> mean, sd over seeds, values), "gains" (a row per pair: candidate, baseline,
        "bbox"/"segm" -> metric, or "classes" and the class, or "errors" and the kind, -> see :func:`gain_of`; "images"
        -> "best" and "worst", image ids where the candidate gained and lost most), "num_images", "num_resamples",
        "seed", "baselines".

    Raises:
        RunError: an unknown baseline, a missing file, or runs that cannot be compared.
    """
    for baseline in baselines:
        if baseline not in folders:
            raise RunError(f"the baseline {baseline!r} is none of the runs {', '.join(folders)}.")
    runs: dict[str, list[Run]] = {name: [read_run(folder) for folder in members] for name, members in folders.items()}
    if not force:
        check_comparable(runs)
    coco = load_ground_truth(ground_truth)
    counts = draw_counts(len(coco.getImgIds()), num_resamples, seed)
    evaluated = {name: [_evaluate(coco, run, counts) for run in members] for name, members in runs.items()}
    table = {}
    for name, members in runs.items():
        row: dict = {
            "folders": [str(run.folder) for run in members],
            "weights": [value_at(run.config, "MODEL.WEIGHTS") for run in members],
            "base_lr": [value_at(run.config, "SOLVER.BASE_LR") for run in members],
            "precision": {
                iou: np.mean([one.ap["bbox"].precision[iou] for one in evaluated[name]], axis=0).tolist()
                for iou in ("0.50", "0.75")
            },
        }
        for iou_type in IOU_TYPES:
            row[iou_type] = {m: _over_runs([one.ap[iou_type].metrics[m] for one in evaluated[name]]) for m in METRICS}
            row[iou_type]["errors"] = {
                kind: _over_runs([one.costs[iou_type][kind] for one in evaluated[name]]) for kind in KINDS
            }
        table[name] = row
    gains: list[dict] = []
    for baseline in baselines:
        for name in runs:
            if name not in baselines:
                gains.append(_gains(name, evaluated[name], baseline, evaluated[baseline], coco.getImgIds(), seed))
    return {
        "ground_truth": str(ground_truth),
        "num_images": len(coco.getImgIds()),
        "num_resamples": num_resamples,
        "seed": seed,
        "baselines": list(baselines),
        "iterations": value_at(next(iter(runs.values()))[0].config, "SOLVER.MAX_ITER"),
        "images_per_batch": value_at(next(iter(runs.values()))[0].config, "SOLVER.IMS_PER_BATCH"),
        "runs": table,
        "gains": gains,
    }


@dataclass(frozen=True)
class _Evaluated:
    """One run: by type of IoU its AP and the costs of its errors; (I,) a score of each image."""

    ap: dict[str, BootstrapAP]
    costs: dict[str, dict[str, Replicated]]
    image_scores: np.ndarray


def _evaluate(coco, run: Run, counts: np.ndarray) -> _Evaluated:
    ap, costs, scores = {}, {}, np.zeros(0)
    for iou_type in IOU_TYPES:
        evaluation = evaluate(coco, run.results, iou_type)
        ap[iou_type] = bootstrap_evaluation(evaluation, counts)
        costs[iou_type] = error_costs(evaluation, counts)
        if iou_type == "bbox":
            scores = image_scores(evaluation, _SCORE_THAT_COUNTS)
    return _Evaluated(ap, costs, scores)


def _over_runs(values: Sequence[Replicated]) -> dict:
    points = [value.point for value in values]
    sd = float(np.std(points, ddof=1)) if len(points) > 1 else None
    return {"mean": float(np.mean(points)), "sd": sd, "values": points}


def _gains(
    candidate: str, ours: list[_Evaluated], baseline: str, theirs: list[_Evaluated], image_ids: list[int], seed: int
) -> dict:
    row: dict = {"candidate": candidate, "baseline": baseline}
    for iou_type in IOU_TYPES:
        before, after = [one.ap[iou_type] for one in theirs], [one.ap[iou_type] for one in ours]
        row[iou_type] = gain_between(before, after, seed)
        row[iou_type]["classes"] = class_gains(before, after, seed)
        row[iou_type]["errors"] = {
            kind: gain_of(
                [one.costs[iou_type][kind] for one in theirs], [one.costs[iou_type][kind] for one in ours], seed
            )
            for kind in KINDS
        }
    difference = np.mean([one.image_scores for one in ours], axis=0)
    difference -= np.mean([one.image_scores for one in theirs], axis=0)
    order = np.argsort(-difference, kind="stable")
    ids = np.array(sorted(image_ids))
    row["images"] = {
        "best": [int(ids[i]) for i in order[:_IMAGES_SHOWN] if difference[i] > 0],
        "worst": [int(ids[i]) for i in order[::-1][:_IMAGES_SHOWN] if difference[i] < 0],
    }
    return row


def verdict(gain: dict) -> str:
    """Returns "gain", "loss" or "no gain shown", by whether the 95% interval excludes 0."""
    low, high = gain["interval"]
    return "gain" if low > 0 else "loss" if high < 0 else "no gain shown"
