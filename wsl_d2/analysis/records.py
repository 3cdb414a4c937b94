"""Reads Detectron2's run folders: config.yaml, metrics.json, inference/coco_instances_results.json."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import yaml


class RunError(ValueError):
    """A run folder lacks something, or two runs cannot be compared."""


@dataclass(frozen=True)
class Run:
    """A finished detection run.

    Args:
        folder: the run's OUTPUT_DIR.
        config: config.yaml as nested dicts.
        results: path of the detections.
    """

    folder: Path
    config: dict
    results: Path


def read_metrics(folder: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """Returns metric -> (iterations, values), sorted; where a resumed run repeats an iteration the last one counts.

    Raises:
        RunError: there is no metrics.json.
    """
    path = Path(folder) / "metrics.json"
    if not path.is_file():
        raise RunError(f"{path} does not exist; is {folder} the OUTPUT_DIR of a training?")
    values: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line a killed run was writing; its resumed successor wrote it again
        iteration = record.pop("iteration")
        for name, value in record.items():
            values.setdefault(name, {})[iteration] = value
    return {name: (sorted(series), [series[i] for i in sorted(series)]) for name, series in values.items()}


def read_run(folder: str | Path) -> Run:
    """Opens a finished detection run.

    Raises:
        RunError: a file is missing; the message says which, and what to run.
    """
    folder = Path(folder)
    config = folder / "config.yaml"
    results = folder / "inference" / "coco_instances_results.json"
    for path in (config, results):
        if not path.is_file():
            raise RunError(
                f"{path} does not exist; finish the run with `tools/train_net.py --config-file ... --resume OUTPUT_DIR "
                f"{folder}`."
            )
    return Run(folder, yaml.safe_load(config.read_text()), results)


COMPARABLE_KEYS = (
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "INPUT.MIN_SIZE_TRAIN",
    "INPUT.MAX_SIZE_TRAIN",
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST",
    "MODEL.BACKBONE.NAME",
    "MODEL.BACKBONE.FREEZE_AT",
    "MODEL.META_ARCHITECTURE",
    "MODEL.RESNETS.NORM",
    "MODEL.ROI_HEADS.NUM_CLASSES",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "TEST.DETECTIONS_PER_IMAGE",
)


def value_at(config: dict, key: str):
    """Returns the value of a dotted key, None where it is absent."""
    node = config
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node


def check_comparable(runs: dict[str, list[Run]]) -> None:
    """Refuses runs that differ in more than initialisation, learning rate and seed.

    Raises:
        RunError: listing each key with the values of the two runs.
    """
    (first_name, first_runs), *_ = runs.items()
    first = first_runs[0]
    differences = []
    for name, members in runs.items():
        for run in members:
            for key in COMPARABLE_KEYS:
                if value_at(run.config, key) != value_at(first.config, key):
                    differences.append(
                        f"{key}: {value_at(first.config, key)} in {first_name} ({first.folder}), "
                        f"{value_at(run.config, key)} in {name} ({run.folder})"
                    )
    if differences:
        raise RunError(
            "the runs cannot be compared, they differ in more than their initialisation:\n  "
            + "\n  ".join(differences)
            + "\nUse --force to compare them all the same."
        )


def without_nan(value):
    """Returns the same with None for NaN and infinities, which JSON lacks (the AP of a size without objects)."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
