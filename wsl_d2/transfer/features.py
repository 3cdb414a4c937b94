"""Features of a frozen backbone over a dataset, extracted once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from wsl_d2.data import HashtagDataset
from wsl_d2.data.read.loaders import collate
from wsl_d2.errors import UserError
from wsl_d2.files import write_atomically
from wsl_d2.modeling import HashtagClassifier

_BATCHES_BETWEEN_FLUSHES = 50


class ProbeError(UserError, ValueError):
    """A dataset, backbone or option with which no linear probe is possible."""


@dataclass
class Features:
    """Pooled features of the images of a dataset with one label each.

    Attributes:
        values: (N, D) float32, on disk (a memory map).
        labels: (N,) int64.
        kept: (M,) int64, the rows whose image could be decoded; M = N unless images are damaged.
    """

    values: np.ndarray
    labels: np.ndarray
    kept: np.ndarray


def feature_key(dataset: HashtagDataset, weights_sha256: str, settings: dict) -> str:
    """Names a set of features by everything that decides them.

    Args:
        dataset: its images, labels, and all settings of its mapper.
        weights_sha256: of the backbone.
        settings: further ones, of the model.
    """
    facts = {
        "images": hashlib.sha256((dataset.folder / "manifest.json").read_bytes()).hexdigest(),
        "weights": weights_sha256,
        "mapper": dataset.mapper.settings if dataset.mapper else None,
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def extract_features(
    model: HashtagClassifier,
    dataset: HashtagDataset,
    folder: str | Path,
    key: str,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    max_damaged_fraction: float = 1e-3,
) -> Features:
    """Returns the features of every image, computing what an earlier call with the same key has not.

    Args:
        model: its ``features`` are taken, "res5" averaged over the image.
        dataset: with a test mapper; every image has exactly one label.
        folder: where features are kept, in ``<key>.npy`` and ``<key>.json``.
        key: see :func:`feature_key`.
        batch_size: images per forward pass.
        num_workers: processes that decode.
        max_damaged_fraction: more damaged images than this are an error; fewer are left out and logged.

    Raises:
        ProbeError: an image has not exactly one label, or too many images are damaged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    num_images = len(dataset)
    device = next(model.parameters()).device
    dimension = model.backbone.output_shape()["res5"].channels
    progress_path, values_path = folder / f"{key}.json", folder / f"{key}.npy"
    done, damaged = 0, []
    if progress_path.is_file() and values_path.is_file():
        progress = json.loads(progress_path.read_text())
        done, damaged = progress["done"], progress["damaged"]
        values = np.load(values_path, mmap_mode="r+")
        labels = np.load(folder / f"{key}.labels.npy", mmap_mode="r+")
    else:
        values = np.lib.format.open_memmap(values_path, mode="w+", dtype=np.float32, shape=(num_images, dimension))
        labels = np.lib.format.open_memmap(folder / f"{key}.labels.npy", mode="w+", dtype=np.int64, shape=(num_images,))

    def save_progress() -> None:
        values.flush()
        labels.flush()
        write_atomically(progress_path, json.dumps({"done": done, "damaged": damaged}))

    loader: DataLoader = DataLoader(
        Subset(dataset, range(done, num_images)),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    model.eval()
    with torch.inference_mode(), tqdm(total=num_images, initial=done, unit="image", desc="features") as bar:
        for number, batch in enumerate(loader):
            rows = slice(done, done + len(batch["keys"]))
            labels[rows] = _single_labels(batch)
            values[rows] = model.features(batch).float().cpu().numpy()
            if batch["skipped"]:
                damaged += _damaged_rows(dataset, rows)
            done = rows.stop
            bar.update(len(batch["keys"]))
            if number % _BATCHES_BETWEEN_FLUSHES == 0 or done == num_images:
                save_progress()
    if damaged:
        logging.getLogger(__name__).warning(f"{len(damaged)} of {num_images} images of {dataset.folder} are damaged")
    if len(damaged) > max_damaged_fraction * num_images:
        raise ProbeError(
            f"{dataset.folder}: {len(damaged)} of {num_images} images cannot be decoded, more than "
            f"DATALOADER.MAX_DAMAGED_FRACTION = {max_damaged_fraction} allows; `wsl-d2 data verify` lists them."
        )
    kept = np.setdiff1d(np.arange(num_images), np.array(damaged, np.int64))
    return Features(values, np.asarray(labels), kept)


def _single_labels(batch: dict) -> np.ndarray:
    counts = np.bincount(batch["image_index"].numpy(), minlength=len(batch["keys"]))
    if (counts != 1).any():
        row = int(np.flatnonzero(counts != 1)[0])
        raise ProbeError(
            f"image {batch['keys'][row]!r} has {counts[row]} labels; a linear probe needs datasets with exactly one "
            "label an image, such as class folders (`wsl-d2 data from-folders`)."
        )
    return batch["labels"].numpy()


def _damaged_rows(dataset: HashtagDataset, rows: slice) -> list[int]:
    """The images of a range that cannot be decoded (the loader delivered their neighbours in their place)."""
    return [row for row in range(rows.start, rows.stop) if dataset[row]["skipped"]]
