"""The record of a finished run: config, data, weights, versions, results."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from wsl_d2.engine.plan import RunPlan
from wsl_d2.files import sha256_of, write_atomically
from wsl_d2.run_keys import flatten

_PACKAGES = ("wsl-d2", "detectron2", "sal-detectron2", "torch", "torchvision", "pycocotools", "numpy")


class WriteRecord(HookBase):
    """Writes ``record.json`` at the end of a run, on the main process."""

    def before_train(self) -> None:
        self._start = time.time()

    def after_train(self) -> None:
        trainer = self.trainer
        if comm.is_main_process() and trainer.iter >= trainer.max_iter:
            hours = (time.time() - self._start) / 3600
            record = describe_run(trainer.plan, getattr(trainer, "_last_eval_results", {}) or {})
            record |= {"iterations": trainer.max_iter, "hours_since_last_start": round(hours, 4)}
            path = Path(trainer.cfg.OUTPUT_DIR) / "record.json"
            write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def describe_run(plan: RunPlan, results: dict) -> dict:
    """Returns a run's record.

    Args:
        plan: of the run. The hash of its fingerprint, with the weights' own in place of their path, is the same for
            runs that compute the same numbers.
        results: task -> metric -> value of the last evaluation.
    """
    cfg, fingerprint = plan.cfg, plan.fingerprint
    checksum = _checksum(cfg.MODEL.WEIGHTS)
    text = json.dumps(fingerprint | {"MODEL.WEIGHTS": checksum or cfg.MODEL.WEIGHTS}, sort_keys=True)
    return {
        "name": os.path.basename(os.path.normpath(cfg.OUTPUT_DIR)),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "seed": cfg.SEED,
        "config": flatten(cfg),
        "data": {name: value for name, value in fingerprint.items() if not name.isupper() and "." not in name}
        | {f"annotations of {name}": checksum for name, checksum in _annotations(cfg).items()},
        "weights": {"path": os.path.relpath(cfg.MODEL.WEIGHTS) if checksum else cfg.MODEL.WEIGHTS, "sha256": checksum},
        "processes": comm.get_world_size(),
        "device": torch.cuda.get_device_name() if cfg.MODEL.DEVICE.startswith("cuda") else platform.machine(),
        "versions": {"python": platform.python_version()} | _versions(),
        "results": {
            name: value if math.isfinite(value) else None for name, value in flatten_results_dict(results).items()
        },
    }


def _annotations(cfg) -> dict[str, str]:
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    files = {name: getattr(MetadataCatalog.get(name), "json_file", "") for name in names}
    return {name: _checksum(path) for name, path in files.items() if path}


def _checksum(path: str) -> str:
    """SHA-256 of a local file; empty for none, or for a URL, whose checksum its downloader knows."""
    return sha256_of(path) if path and os.path.isfile(path) else ""


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return found
    return found | ({"commit": done.stdout.strip()} if done.returncode == 0 else {})
