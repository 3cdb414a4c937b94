"""Which config keys may differ between two runs, and a config as flat text. Standard library alone.

A name stands for a key or for the whole group below it. Resuming a run and comparing two runs both start from here.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

# Where and how fast a run computes, and what it logs. May differ in a resumed run and in a comparison.
KEYS_OF_PLACE_AND_SPEED = (
    "CUDNN_BENCHMARK",
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.PREFETCH_BATCHES",
    "DATALOADER.READ_ATTEMPTS",
    "DATALOADER.SHARD_CACHE_GB",
    "DATALOADER.TIMEOUT_SECONDS",
    "DATASETS.COCO_FOLDERS",
    "DATASETS.HASHTAG_FOLDERS",
    "MODEL.COMPILE",
    "MODEL.DEVICE",
    "MODEL.RESNEXT.CHECKPOINT_STAGES",
    "OUTPUT_DIR",
    "SOLVER.CHECKPOINTS_TO_KEEP",
    "SOLVER.CHECKPOINT_IN_BACKGROUND",
    "SOLVER.CHECKPOINT_MILESTONES",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.LOG_PERIOD",
    "SOLVER.PEAK_TFLOPS",
    "SOLVER.PROCESS_TIMEOUT_SECONDS",
    "SOLVER.ZERO_STAGE_1",
    "TEST.EVAL_PERIOD",
    "TEST.EXPECTED_RESULTS",
    "TEST.FAST_EVAL",
    "TEST.PROBE",
    "TEST.PROBE_SHOTS",
    "VERSION",
    "VIS_PERIOD",
    "WANDB",
)

# May differ in a resumed run, not in a comparison: how a checkpoint is evaluated ...
KEYS_OF_EVALUATION = ("DATASETS.TEST", "TEST")

# ... and the limits at which a run stops. (Instead of the micro-batch, resuming compares the ghost batch size.)
KEYS_OF_TOLERANCE = ("DATALOADER.MAX_DAMAGED_FRACTION", "SOLVER.IMS_PER_MICRO_BATCH", "SOLVER.MAX_SKIPPED_STEPS")

# What a checkpoint that does not know a key was trained with, where that is not the key's default: for a new key whose
# default changes the numbers. And for a key that was removed, the value that the code now always takes.
VALUES_WHERE_UNKNOWN: dict[str, str] = {}

# May differ in a comparison: the initialization, what belongs to it, and the seed.
KEYS_OF_INITIALIZATION = (
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.WEIGHTS",
    "SEED",
    "SOLVER.BASE_LR",
    "SOLVER.LR_PER_256_IMAGES",
)

# ... and between a run without MODEL.WEIGHTS and one with them. Random weights leave nothing to freeze: neither stages,
# nor the statistics of a batch norm ("freezing BN is invalid when training from scratch", arXiv 1811.08883).
KEYS_OF_RANDOM_WEIGHTS = ("MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS.NORM")


def is_among(key: str, names: tuple[str, ...]) -> bool:
    """Whether a dotted key, or a group that it is in, is one of the names."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flatten(config: Mapping, prefix: str = "") -> dict[str, str]:
    """Returns dotted key -> the value's repr, of nested mappings such as Detectron2's CfgNode or a parsed config.yaml.

    Tuples are written as lists and whole floats as ints, because ``config.yaml`` does not tell them apart.
    """
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = repr(_plain(value))
    return flat


def same_spelling(flat: Mapping[str, str]) -> dict[str, str]:
    """Returns a flat config as :func:`flatten` spells it, whoever wrote it."""
    return {key: _respell(text) for key, text in flat.items()}


def _respell(text: str) -> str:
    try:
        return repr(_plain(ast.literal_eval(text)))
    except (ValueError, SyntaxError):
        return text  # not a number, infinity


def _plain(value):
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value
