"""The datasets of a probe, and the features of a frozen backbone over them: in memory, or kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.evaluation import inference_context
from tqdm import tqdm

from wsl_d2.data import HashtagDataset
from wsl_d2.data.read.loaders import build_hashtag_test_loader, get_hashtag_dataset
from wsl_d2.data.read.mapper import HashtagMapper
from wsl_d2.errors import UserError
from wsl_d2.files import write_atomically
from wsl_d2.modeling import HashtagClassifier

_BATCHES_BETWEEN_FLUSHES = 50


class ProbeError(UserError, ValueError):
    """A dataset, backbone or option with which no linear probe is possible."""


@dataclass
class ProbeData:
    """The two datasets of a probe, with their test mapper.

    Attributes:
        train, test: of one vocabulary, with one label an image.
        train_labels, test_labels: (N,) and (M,) int64 in [0, num_classes).
    """

    train: HashtagDataset
    test: HashtagDataset
    train_labels: np.ndarray
    test_labels: np.ndarray

    @property
    def num_classes(self) -> int:
        return self.train.num_labels


def open_probe_data(cfg, train: str, test: str) -> ProbeData:
    """Opens two registered datasets (``DATASETS.HASHTAG_FOLDERS``) for a probe.

    Raises:
        ProbeError: a name is not registered, their vocabularies differ, or an image has not exactly one label.
        ShardError: a dataset cannot be used.
    """
    sets, labels = [], []
    for name in (train, test):
        try:
            dataset = get_hashtag_dataset(name)
        except KeyError as error:
            known = ", ".join(row[0] for row in cfg.DATASETS.HASHTAG_FOLDERS) or "none"
            raise ProbeError(
                f"dataset {name!r} of the probe is not registered; DATASETS.HASHTAG_FOLDERS has {known}."
            ) from error
        sets.append(dataset)
    if sets[0].vocabulary_checksum != sets[1].vocabulary_checksum:
        raise ProbeError(
            f"{train} ({sets[0].folder}) and {test} ({sets[1].folder}) have different vocabularies, so their "
            "labels do not agree; prepare both with the same vocabulary.json."
        )
    for dataset in sets:
        dataset.check_shards()
        labels.append(_single_labels(dataset))
        dataset.mapper = HashtagMapper.from_config(cfg, is_train=False)
    return ProbeData(*sets, *labels)


def _single_labels(dataset: HashtagDataset) -> np.ndarray:
    counts = np.diff(dataset.index.indptr)
    if (counts != 1).any():
        row = int(np.flatnonzero(counts != 1)[0])
        raise ProbeError(
            f"{dataset.folder}: image {dataset[row]['key']!r} has {counts[row]} labels; a linear probe needs datasets "
            "with exactly one label an image, such as class folders (`wsl-d2 data from-folders`)."
        )
    return dataset.index.labels.astype(np.int64)


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


def pooled_features(
    cfg, model: HashtagClassifier, dataset: HashtagDataset, images: range
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yields, batch by batch, (n, D) float32 features of images of a dataset, and which of its images are damaged.

    Args:
        cfg: reads TEST.IMS_PER_BATCH and DATALOADER.
        model: its ``features`` are taken, "res5" averaged over the image, in evaluation mode.
        dataset: with a test mapper.
        images: their numbers, in sequence.
    """
    first = images.start
    with inference_context(model):
        for batch in build_hashtag_test_loader(cfg, dataset, images):
            rows = range(first, first + len(batch["keys"]))
            # In place of an image that cannot be decoded, the loader delivered its neighbor.
            damaged = [row for row in rows if dataset[row]["skipped"]] if batch["skipped"] else []
            with torch.inference_mode():
                values = model.features(batch).float().cpu().numpy()
            yield values, damaged
            first = rows.stop


def without_damaged(cfg, dataset: HashtagDataset, values: np.ndarray, labels: np.ndarray, damaged: list) -> Features:
    """Returns the features of a dataset, of all of whose images they are; damaged ones are left out and logged.

    Raises:
        ProbeError: more of them are damaged than DATALOADER.MAX_DAMAGED_FRACTION allows.
    """
    num_images = len(dataset)
    if damaged:
        logging.getLogger(__name__).warning(f"{len(damaged)} of {num_images} images of {dataset.folder} are damaged")
    if len(damaged) > cfg.DATALOADER.MAX_DAMAGED_FRACTION * num_images:
        raise ProbeError(
            f"{dataset.folder}: {len(damaged)} of {num_images} images cannot be decoded, more than "
            f"DATALOADER.MAX_DAMAGED_FRACTION = {cfg.DATALOADER.MAX_DAMAGED_FRACTION} allows; `wsl-d2 data verify` "
            "lists them."
        )
    return Features(values, labels, np.setdiff1d(np.arange(num_images), np.array(damaged, np.int64)))


def extract_features(
    cfg, model: HashtagClassifier, dataset: HashtagDataset, labels: np.ndarray, folder: str | Path, key: str
) -> Features:
    """Returns the features of every image, computing what an earlier call with the same key has not.

    Args:
        cfg, model, dataset: see :func:`pooled_features`.
        labels: (N,) of the dataset.
        folder: where features are kept, in ``<key>.npy`` and ``<key>.json``.
        key: see :func:`feature_key`.

    Raises:
        ProbeError: too many images are damaged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    num_images = len(dataset)
    progress_path, values_path = folder / f"{key}.json", folder / f"{key}.npy"
    done, damaged = 0, []
    if progress_path.is_file() and values_path.is_file():
        progress = json.loads(progress_path.read_text())
        done, damaged = progress["done"], progress["damaged"]
        values = np.load(values_path, mmap_mode="r+")
    else:
        shape = num_images, model.backbone.output_shape()["res5"].channels
        values = np.lib.format.open_memmap(values_path, mode="w+", dtype=np.float32, shape=shape)
    with tqdm(total=num_images, initial=done, unit="image", desc="features") as bar:
        for number, (part, damaged_part) in enumerate(pooled_features(cfg, model, dataset, range(done, num_images))):
            values[done : done + len(part)] = part
            damaged += damaged_part
            done += len(part)
            bar.update(len(part))
            if number % _BATCHES_BETWEEN_FLUSHES == 0 or done == num_images:
                values.flush()
                write_atomically(progress_path, json.dumps({"done": done, "damaged": damaged}))
    return without_damaged(cfg, dataset, values, labels, damaged)
