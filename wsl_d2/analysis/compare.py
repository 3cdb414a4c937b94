"""Compares the runs of several initialisations: AP of each, and the paired gains over the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wsl_d2.analysis.ap_gain import IOU_TYPES, METRICS, bootstrap_ap, draw_counts, gain_between, load_ground_truth
from wsl_d2.analysis.records import Run, RunError, check_comparable, read_run, value_at


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
        A JSON-able dict: "runs" (initialisation -> learning rate, weights, "bbox"/"segm" -> metric -> mean, sd over
        seeds, values), "gains" (a row per pair: candidate, baseline, "bbox"/"segm" -> metric -> see
        :func:`gain_between`), "num_images", "num_resamples", "seed", "baselines".

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
    bootstrapped = {
        name: {
            iou_type: [bootstrap_ap(coco, run.results, iou_type, counts) for run in members] for iou_type in IOU_TYPES
        }
        for name, members in runs.items()
    }
    table = {}
    for name, members in runs.items():
        row: dict = {
            "folders": [str(run.folder) for run in members],
            "weights": [value_at(run.config, "MODEL.WEIGHTS") for run in members],
            "base_lr": [value_at(run.config, "SOLVER.BASE_LR") for run in members],
        }
        for iou_type in IOU_TYPES:
            row[iou_type] = {}
            for metric in METRICS:
                values = [ap.point[metric] for ap in bootstrapped[name][iou_type]]
                sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
                row[iou_type][metric] = {"mean": float(np.mean(values)), "sd": sd, "values": values}
        table[name] = row
    pairs = [(name, baseline) for baseline in baselines for name in runs if name not in baselines]
    gains: list[dict] = []
    for candidate, reference in pairs:
        gains.append(
            {"candidate": candidate, "baseline": reference}
            | {t: gain_between(bootstrapped[reference][t], bootstrapped[candidate][t], seed) for t in IOU_TYPES}
        )
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


def verdict(gain: dict) -> str:
    """Returns "gain", "loss" or "no gain shown", by whether the 95% interval excludes 0."""
    low, high = gain["interval"]
    return "gain" if low > 0 else "loss" if high < 0 else "no gain shown"
