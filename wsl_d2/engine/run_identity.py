"""What must be the same for a checkpoint to be continued: the config keys that change a run's numbers, and its data."""

from __future__ import annotations

import json
import logging
import os
import time

from detectron2.config import CfgNode

from wsl_d2.engine.schedule import ConfigError

# Keys, or groups of them, that change where and how fast a run computes, or what it tells, but not what it computes.
_FREE = (
    "CUDNN_BENCHMARK",
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.PREFETCH_BATCHES",
    "DATALOADER.READ_ATTEMPTS",
    "DATALOADER.SHARD_CACHE_GB",
    "DATALOADER.TIMEOUT_SECONDS",
    "DATALOADER.MAX_DAMAGED_FRACTION",
    "DATASETS.COCO_FOLDERS",
    "DATASETS.HASHTAG_FOLDERS",
    "DATASETS.CLASS_FOLDERS",
    "DATASETS.TEST",
    "MODEL.COMPILE",
    "MODEL.DEVICE",
    "MODEL.RESNEXT.CHECKPOINT_STAGES",
    "OUTPUT_DIR",
    "SOLVER.CHECKPOINT_IN_BACKGROUND",
    "SOLVER.CHECKPOINT_MILESTONES",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.CHECKPOINTS_TO_KEEP",
    "SOLVER.IMS_PER_MICRO_BATCH",  # the images of a batch-norm group are compared instead
    "SOLVER.LOG_PERIOD",
    "SOLVER.MAX_SKIPPED_STEPS",
    "SOLVER.PEAK_TFLOPS",
    "SOLVER.PROCESS_TIMEOUT_SECONDS",
    "SOLVER.ZERO_STAGE_1",
    "TEST",
    "VERSION",
    "VIS_PERIOD",
    "WANDB",
)


def run_identity(cfg: CfgNode, data: dict | None = None) -> dict[str, str]:
    """Returns name -> value, as text, of all that a run's numbers depend on.

    Args:
        cfg: of the run, with its schedule resolved.
        data: further facts, such as checksums of the data.
    """
    return _flat(cfg) | {name: str(value) for name, value in (data or {}).items()}


def _flat(node: CfgNode, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in node.items():
        name = prefix + key
        if name in _FREE:
            continue
        if isinstance(value, CfgNode):
            found |= _flat(value, f"{name}.")
        else:
            found[name] = repr(list(value) if isinstance(value, tuple) else value)
    return found


def compare_identities(saved: dict[str, str], now: dict[str, str]) -> list[str]:
    """Returns one line for each difference; names that only one side has are differences, too."""
    return [
        f"{name} was {saved.get(name, 'not there')}, is now {now.get(name, 'not there')}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]


def check_identity(saved: dict[str, str], now: dict[str, str], output_dir: str, override: bool, iteration: int) -> None:
    """Refuses to continue a checkpoint of another run.

    Args:
        saved: of the checkpoint.
        now: of this run.
        output_dir: where an override is noted, in ``resume_overrides.json``, one line each.
        override: continue all the same (``--override-resume``).
        iteration: the checkpoint's.

    Raises:
        ConfigError: they differ; lists each difference.
    """
    differences = compare_identities(saved, now)
    if not differences:
        return
    if not override:
        raise ConfigError(
            "the checkpoint in OUTPUT_DIR belongs to another run: "
            + "; ".join(differences)
            + ". Restore the old values, choose another OUTPUT_DIR, or continue all the same with --override-resume."
        )
    logging.getLogger(__name__).warning(f"continuing with other settings: {'; '.join(differences)}")
    if os.path.isdir(output_dir):
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "iteration": iteration, "differences": differences}
        with open(os.path.join(output_dir, "resume_overrides.json"), "a") as file:
            file.write(json.dumps(record) + "\n")
