"""Train loader of detection images in an order that survives a resume; everything else is Detectron2's."""

from __future__ import annotations

import numpy as np
from detectron2.data import (
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.utils import comm

from wsl_d2.data.order.sampler import PositionSampler


def build_resumable_detection_train_loader(cfg, start_iteration: int = 0):
    """Builds Detectron2's detection loader over a sampler that can start at any iteration.

    Detectron2's own sampler begins its stream anew on every resume, so that an interrupted run sees the first
    images again and never the others.

    Args:
        cfg: Detectron2's keys; ``DATALOADER.SAMPLER_TRAIN`` must be "TrainingSampler" to get the resumable order.
        start_iteration: the first iteration to deliver.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        return build_detection_train_loader(cfg)
    dataset = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, min_keypoints=0
    )
    sampler = PositionSampler(
        np.ones(len(dataset)),
        seed=max(0, cfg.SEED),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
        start_iteration=start_iteration,
    )
    return build_detection_train_loader(cfg, dataset=dataset, sampler=sampler)
