"""From a config, weights and two datasets to a finished linear probe on disk."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from wsl_d2.checkpoint import load_backbone
from wsl_d2.config import check_devices
from wsl_d2.data import HashtagDataset, register_datasets
from wsl_d2.files import sha256_of, write_atomically
from wsl_d2.hashtags import Vocabulary
from wsl_d2.modeling import is_hashtag_classifier
from wsl_d2.transfer.features import Features, ProbeError, extract_features, feature_key, open_probe_data
from wsl_d2.transfer.linear_probe import HELD_OUT_FRACTION, L2_GRID, probe_features

logger = logging.getLogger(__name__)


def probe_backbone(
    cfg,
    weights: str,
    train: str,
    test: str,
    output: str | Path,
    *,
    l2: float | None = None,
    grid: Sequence[float] = L2_GRID,
    held_out_fraction: float = HELD_OUT_FRACTION,
    shots: Sequence[int] = (),
    num_seeds: int = 5,
    seed: int = 0,
) -> tuple[dict, list[dict]]:
    """Probes a backbone and writes ``probe.json`` and ``classes.csv``; features are kept in ``output/features``.

    Args:
        cfg: of a HashtagClassifier, not frozen; gives architecture, pixel statistics, image size and device.
        weights: a file or a name in the weight catalog; every tensor of the backbone must be in it.
        train, test: names of registered datasets (``DATASETS.HASHTAG_FOLDERS``) with one label an image and the same
            vocabulary.
        output: a folder.
        l2, grid, held_out_fraction, seed: see :func:`wsl_d2.transfer.linear_probe.linear_probe`.
        shots: numbers of training images a class for further probes, each drawn ``num_seeds`` times.

    Returns:
        (what probe.json holds, the rows of classes.csv). Half widths are of 95% intervals: over test images for the
        whole training set, over draws for few shots.

    Raises:
        ProbeError: the datasets' vocabularies differ, an image has not exactly one label, or a class too few images.
        ConfigError: MODEL.DEVICE is not there.
        IncompleteLoadError, PixelStatisticsError, ShardError: weights or datasets that cannot be used.
    """
    from scipy import stats  # every training imports this module, and none waits for scipy

    output = Path(output)
    if not is_hashtag_classifier(cfg):
        raise ProbeError(
            f"the config trains a {cfg.MODEL.META_ARCHITECTURE}; a probe needs one of a HashtagClassifier."
        )
    check_devices(cfg)
    register_datasets(cfg)
    data = open_probe_data(cfg, train, test)
    cfg.MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES = data.num_classes
    cfg.freeze()
    model = build_model(cfg).to(memory_format=torch.channels_last)  # as in pretraining
    path = PathManager.get_local_path(weights)
    load_backbone(model, path, cfg)
    folder = output / "features"
    fitted = _features(cfg, model, path, data.train, data.train_labels, folder)
    judged = _features(cfg, model, path, data.test, data.test_labels, folder)
    result, draws = probe_features(
        fitted,
        judged,
        data.num_classes,
        l2=l2,
        grid=grid,
        held_out_fraction=held_out_fraction,
        shots=shots,
        num_seeds=num_seeds,
        seed=seed,
        device=cfg.MODEL.DEVICE,
    )
    logger.info(f"top-1 {result.top1:.2f}, top-5 {result.top5:.2f} with l2 {result.l2:g}")
    few_shot = []
    for number, top1 in draws.items():
        spread = float(np.std(top1, ddof=1)) if num_seeds > 1 else math.nan
        width = float(stats.t.ppf(0.975, num_seeds - 1)) * spread / math.sqrt(num_seeds) if num_seeds > 1 else math.nan
        few_shot.append({"shots": number, "top1": top1, "top1_mean": float(np.mean(top1)), "top1_half_width": width})
        logger.info(f"{number} images a class: top-1 {few_shot[-1]['top1_mean']:.2f}")

    share = result.top1 / 100
    record = {
        "train": train,
        "test": test,
        "weights": weights,
        "weights_sha256": sha256_of(path),
        "architecture": cfg.MODEL.BACKBONE.NAME,
        "num_train": result.num_train,
        "num_test": result.num_test,
        "num_damaged": sum(len(part.labels) - len(part.kept) for part in (fitted, judged)),
        "top1": result.top1,
        "top1_half_width": 196 * math.sqrt(share * (1 - share) / result.num_test),
        "top5": result.top5,
        "l2": result.l2,
        "l2_was_chosen": l2 is None,
        "held_out_top1": {f"{strength:g}": value for strength, value in result.held_out_top1.items()},
        "few_shot_l2": result.l2,
        "few_shot": few_shot,
        "seed": seed,
    }
    classes = _classes(data.train, result.per_class_top1, judged.labels[judged.kept])
    with open(output / "classes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(classes[0]))
        writer.writeheader()
        writer.writerows(classes)
    write_atomically(output / "probe.json", json.dumps(_without_nan(record), indent=1) + "\n")
    return record, classes


def _features(cfg, model, weights_path: str, dataset: HashtagDataset, labels: np.ndarray, folder: Path) -> Features:
    settings = {
        "backbone": cfg.MODEL.BACKBONE.NAME,
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
    }
    key = feature_key(dataset, sha256_of(weights_path), settings)
    return extract_features(cfg, model, dataset, labels, folder, key)


def _classes(dataset: HashtagDataset, per_class_top1: np.ndarray, test_labels: np.ndarray) -> list[dict]:
    vocabulary = Vocabulary.load(dataset.folder / "vocabulary.json")
    counts = np.bincount(test_labels, minlength=len(vocabulary))
    return [
        {"synset": synset, "name": names[0], "num_test": int(count), "top1": float(top1)}
        for synset, names, count, top1 in zip(
            vocabulary.synsets, vocabulary.hashtags, counts, per_class_top1, strict=True
        )
    ]


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
