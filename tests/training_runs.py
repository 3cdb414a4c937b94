"""Runs of tools/train_net.py on a toy dataset, each in its own process; and what they leave behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
OPTS = {
    "DATASETS.HASHTAG_FOLDERS": "[['toy_train', 'toy/train'], ['toy_val', 'toy/val']]",
    "DATASETS.TRAIN": "('toy_train',)",
    "DATASETS.TEST": "('toy_val',)",
    "INPUT.RANDOM_RESIZED_CROP.SIZE": "32",
    "SOLVER.IMS_PER_BATCH": "8",
    "SOLVER.LR_PER_256_IMAGES": "0.4",
    "SOLVER.TOTAL_IMAGES": "240",
    "SOLVER.WARMUP_IMAGES": "40",
    "SOLVER.LOG_PERIOD": "1",
    "SOLVER.CHECKPOINT_PERIOD": "7",
}


def command(output: Path, launcher=(sys.executable,), flags=(), **opts) -> list[str]:
    config = ROOT / "configs" / "Base-Miniworld-Pretraining.yaml"
    merged = OPTS | {key.replace("__", "."): str(value) for key, value in opts.items()} | {"OUTPUT_DIR": str(output)}
    pairs = [text for pair in merged.items() for text in pair]
    return [*launcher, str(ROOT / "tools" / "train_net.py"), "--config-file", str(config), *flags, *pairs]


def train(datasets, output, check=True, **kwargs) -> subprocess.CompletedProcess:
    result = subprocess.run(command(output, **kwargs), env=environment(datasets), capture_output=True, text=True)
    if check:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def environment(datasets) -> dict:
    return os.environ | {"DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"}


def losses(output: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {record["iteration"]: record["loss_hashtag"] for record in records if "loss_hashtag" in record}


def merged_records(output: Path) -> dict:
    """The last value of every metric."""
    merged = {}
    for line in (output / "metrics.json").read_text().splitlines():
        merged |= json.loads(line)
    return merged


def weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


def wait_for_records(process: subprocess.Popen, output: Path, number: int) -> None:
    metrics = output / "metrics.json"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= number):
        assert process.poll() is None and time.monotonic() < deadline, (output / "log").read_text()[-3000:]
        time.sleep(0.002)
