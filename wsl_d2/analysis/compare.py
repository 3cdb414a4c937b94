"""Compares the runs of several initializations: AP of each, and the paired gains over the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsl_d2.analysis.ap_gain import BootstrapAP, bootstrap_evaluation, draw_counts, gain_between, gains_by
from wsl_d2.analysis.errors import KINDS, error_dap
from wsl_d2.analysis.gain import BootstrapEstimate, gain_of, verdict, what_would_settle
from wsl_d2.analysis.matches import as_ground_truth, evaluate, image_scores
from wsl_d2.analysis.records import Run, RunError, check_comparable, differences_of, initialization_of, read_run
from wsl_d2.coco import GroundTruth, Results, read_results, shared_iou_types

_SCORE_THAT_COUNTS = 0.5  # of a detection, for the choice of images to show
_IMAGES_SHOWN = 4
_PAIRS_THAT_PAY = 5  # runs with the seeds of the other side's; with fewer, pairing costs more width than it can save


def compare_runs(
    folders: dict[str, list[Path]],
    ground_truth: str | Path,
    baselines: Sequence[str],
    num_resamples: int = 1000,
    seed: int = 0,
    force: bool = False,
    seed_sd: float | None = None,
) -> dict:
    """Compares initializations.

    Args:
        folders: initialization -> its run folders, one per training seed.
        ground_truth: COCO annotations of the images all runs were evaluated on.
        baselines: the initializations that gains of all others are counted from.
        num_resamples: resampled image sets.
        seed: of the bootstrap.
        force: compare runs of different schedules or data, too.
        seed_sd: standard deviation of AP between training seeds to assume for initializations with a single run.

    Returns:
        A JSON-able dict.

        - "iou_types": those of "bbox", "segm" and "keypoints" that the ground truth and all runs have; "left_out":
          another that some have -> why it is not among them.
        - "runs": initialization (candidates, then baselines; those from random weights last) -> folders, weights,
          base_lr, precision over recall, and iou_type -> metric, or (not of keypoints) "errors" and the kind, -> mean,
          sd over seeds, values.
        - "gains": a row per pair: candidate, baseline, "paired" (by seed), iou_type -> metric, or "classes" or
          "supercategories" and the name, or "errors" and the kind, -> see :func:`wsl_d2.analysis.gain.gain_of`; and of
          AP "verdict" and "settle", see :func:`wsl_d2.analysis.gain.what_would_settle`; "images" -> "best" and "worst",
          ids of the images where the candidate gained and lost most.
        - "initialization": the keys that runs may differ in, and do -> initialization -> values; "differences": what
          else differs, by force.
        - "ground_truth", "num_images", "num_resamples", "seed", "seed_sd", "baselines", "iterations",
          "images_per_batch".

    Raises:
        CocoError: the ground truth or detections cannot be read.
        RunError: an unknown baseline, a missing file, or runs that cannot be compared.
    """
    for baseline in baselines:
        if baseline not in folders:
            raise RunError(f"the baseline {baseline!r} is none of the runs {', '.join(folders)}.")
    if not folders.keys() - set(baselines):
        raise RunError(f"there is nothing to compare with {', '.join(baselines)}; give a run of another name.")
    if num_resamples < 2:
        raise RunError(f"the number of resamples is {num_resamples}; it must be at least 2, and 1000 for a report.")
    if seed < 0:
        raise RunError(f"the seed of the bootstrap is {seed}; it must not be negative.")
    if seed_sd is not None and not seed_sd >= 0:
        raise RunError(f"the standard deviation between seeds is {seed_sd}; it must not be negative.")
    places = [Path(folder).resolve() for members in folders.values() for folder in members]
    if again := [place for place in places if places.count(place) > 1]:
        raise RunError(f"{again[0]} is given {places.count(again[0])} times; a run counts once, as one training.")
    runs: dict[str, list[Run]] = {name: [read_run(folder) for folder in members] for name, members in folders.items()}
    if not force:
        check_comparable(runs)
    runs = {name: runs[name] for name in sorted(runs, key=lambda name: _place(name, runs, baselines))}
    truth = as_ground_truth(ground_truth)
    results = {name: [read_results(truth, run.results) for run in members] for name, members in runs.items()}
    first = next(iter(runs.values()))[0]
    sigmas = first.value("TEST.KEYPOINT_OKS_SIGMAS") or ()
    iou_types, left_out = shared_iou_types(truth, [one for members in results.values() for one in members], sigmas)
    counts = draw_counts(len(truth.imgs), num_resamples, seed)
    evaluated = {
        name: [_evaluate(truth, one, iou_types, counts, sigmas) for one in members] for name, members in results.items()
    }
    gains = [
        _gains(truth, name, baseline, runs, evaluated, {"seed": seed, "seed_sd": seed_sd})
        for name in runs
        for baseline in baselines
        if name not in baselines
    ]
    return {
        "ground_truth": str(ground_truth),
        "num_images": len(truth.imgs),
        "num_resamples": num_resamples,
        "seed": seed,
        "seed_sd": seed_sd,
        "baselines": list(baselines),
        "iou_types": iou_types,
        "left_out": left_out,
        "iterations": first.value("SOLVER.MAX_ITER"),
        "images_per_batch": first.value("SOLVER.IMS_PER_BATCH"),
        "initialization": initialization_of(runs),
        "differences": differences_of(runs) if force else [],
        "runs": {name: _table_row(members, evaluated[name], iou_types) for name, members in runs.items()},
        "gains": gains,
    }


def _place(name: str, runs: dict[str, list[Run]], baselines: Sequence[str]) -> tuple[bool, bool]:
    """Sorts candidates before baselines, and what starts from random weights, which is of least interest, last."""
    return not any(run.value("MODEL.WEIGHTS") for run in runs[name]), name in baselines


@dataclass(frozen=True)
class _Evaluated:
    """One run: by type of IoU its AP and the dAP of its errors; (I,) a score of each image."""

    ap: dict[str, BootstrapAP]
    errors: dict[str, dict[str, BootstrapEstimate]]
    image_scores: np.ndarray


def _evaluate(
    truth: GroundTruth, results: Results, iou_types: list[str], counts: np.ndarray, sigmas: Sequence[float]
) -> _Evaluated:
    ap, errors, scores = {}, {}, np.zeros(0)
    for iou_type in iou_types:
        evaluation = evaluate(truth, results, iou_type, sigmas)
        ap[iou_type] = bootstrap_evaluation(evaluation, counts)
        if iou_type != "keypoints":  # TIDE is about boxes and masks
            errors[iou_type] = error_dap(evaluation, counts)
        if iou_type == iou_types[0]:
            scores = image_scores(evaluation, _SCORE_THAT_COUNTS)
    return _Evaluated(ap, errors, scores)


def _table_row(members: list[Run], evaluated: list[_Evaluated], iou_types: list[str]) -> dict:
    row: dict = {
        "folders": [str(run.folder) for run in members],
        "weights": [run.value("MODEL.WEIGHTS") for run in members],
        "base_lr": [run.value("SOLVER.BASE_LR") for run in members],
    }
    row["precision"] = {
        iou: np.mean([one.ap[iou_types[0]].precision[iou] for one in evaluated], axis=0).tolist()
        for iou in ("0.50", "0.75")
    }
    for iou_type in iou_types:
        metrics = evaluated[0].ap[iou_type].metrics
        row[iou_type] = {
            metric: _over_runs([one.ap[iou_type].metrics[metric] for one in evaluated]) for metric in metrics
        }
        if iou_type in evaluated[0].errors:
            row[iou_type]["errors"] = {
                kind: _over_runs([one.errors[iou_type][kind] for one in evaluated]) for kind in KINDS
            }
    return row


def _over_runs(values: Sequence[BootstrapEstimate]) -> dict:
    points = [value.point for value in values]
    sd = float(np.std(points, ddof=1)) if len(points) > 1 else None
    return {"mean": float(np.mean(points)), "sd": sd, "values": points}


def _gains(
    truth: GroundTruth,
    candidate: str,
    baseline: str,
    runs: dict[str, list[Run]],
    evaluated: dict[str, list[_Evaluated]],
    options: dict,
) -> dict:
    orders = [_order_of_seeds(runs[name]) for name in (baseline, candidate)]
    paired = len(orders[0]) >= _PAIRS_THAT_PAY and orders[0].keys() == orders[1].keys()
    before, after = evaluated[baseline], evaluated[candidate]
    if paired:
        before, after = ([side[i] for i in order.values()] for side, order in zip((before, after), orders, strict=True))
    options = options | {"paired": paired}
    row: dict = {"candidate": candidate, "baseline": baseline, "paired": paired}
    for iou_type in before[0].ap:
        aps = [one.ap[iou_type] for one in before], [one.ap[iou_type] for one in after]
        row[iou_type] = gain_between(*aps, **options)
        row[iou_type]["verdict"] = verdict(row[iou_type]["AP"])
        row[iou_type]["settle"] = what_would_settle(row[iou_type]["AP"], len(truth.imgs))
        row[iou_type] |= {kind: gains_by(kind, *aps, **options) for kind in aps[0][0].groups}
        if iou_type in before[0].errors:
            row[iou_type]["errors"] = {
                kind: gain_of(
                    [one.errors[iou_type][kind] for one in before],
                    [one.errors[iou_type][kind] for one in after],
                    **options,
                )
                for kind in KINDS
            }
    # Of the runs whose detections are shown.
    difference = np.subtract(evaluated[candidate][0].image_scores, evaluated[baseline][0].image_scores)
    order = np.argsort(-difference, kind="stable")
    ids = [truth.images.original(number) for number in sorted(truth.imgs)]
    row["images"] = {
        "best": [ids[i] for i in order[:_IMAGES_SHOWN] if difference[i] > 0],
        "worst": [ids[i] for i in order[::-1][:_IMAGES_SHOWN] if difference[i] < 0],
    }
    return row


def _order_of_seeds(side: list[Run]) -> dict[int, int]:
    """Seed -> place of its run, by rising seed; empty where seeds are random or repeat."""
    places = {run.value("SEED"): place for place, run in enumerate(side)}
    is_known = len(places) == len(side) and all(isinstance(seed, int) and seed >= 0 for seed in places)
    return dict(sorted(places.items())) if is_known else {}
