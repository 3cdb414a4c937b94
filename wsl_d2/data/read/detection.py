"""Detection images: COCO annotations as dataset dicts, and a train loader that resumes at any
iteration."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_api
from torch.utils.data import DataLoader, Sampler

from wsl_d2.coco import CocoError, read_coco, without_garbage_collection
from wsl_d2.data.order.sampler import PositionSampler
from wsl_d2.data.read.detection_image import as_8_bits
from wsl_d2.data.read.loaders import WorkerIterator, outlive_signals


def load_coco_dataset(json_file: str | Path, image_root: str | Path, dataset_name: str) -> list[dict]:
    """Returns the dataset dicts that Detectron2's ``load_coco_json`` returns, but also for files that it cannot read.

    Sets the dataset's ``thing_classes`` and ``thing_dataset_id_to_contiguous_id``. Images keep the ids of the file.

    Raises:
        CocoError: see :func:`wsl_d2.coco.read_coco`; or an image has no file_name, height or width.
    """
    truth = read_coco(PathManager.get_local_path(str(json_file)))
    categories = sorted(truth.dataset["categories"], key=lambda row: row["id"])
    number_of = {row["id"]: number for number, row in enumerate(categories)}
    MetadataCatalog.get(dataset_name).set(
        thing_classes=[row["name"] for row in categories],
        thing_dataset_id_to_contiguous_id={truth.categories.original(i): n for i, n in number_of.items()},
    )
    dataset, left_out = [], 0
    for image_id in sorted(truth.imgs):
        image = truth.imgs[image_id]
        original = truth.images.original(image_id)
        for key, kind in (("file_name", str), ("height", int), ("width", int)):
            if not image.get(key) or not isinstance(image[key], kind):
                raise CocoError(f"{json_file}: image {original!r} has the {key} {image.get(key)!r}; training needs it.")
        objects = []
        for row in truth.imgToAnns[image_id]:
            item = {key: row[key] for key in ("iscrowd", "bbox") if key in row}
            mask = row.get("segmentation")
            if mask == []:  # polygons of fewer than 3 points, which Detectron2 leaves out, too
                left_out += 1
                continue
            if mask is not None:
                is_uncompressed = isinstance(mask, dict) and isinstance(mask["counts"], list)
                item["segmentation"] = mask_api.frPyObjects(mask, *mask["size"]) if is_uncompressed else mask
            if "keypoints" in row:  # of pixels -> of the plane, where a pixel's center is at one half
                item["keypoints"] = [v if n % 3 == 2 else v + 0.5 for n, v in enumerate(row["keypoints"])]
            objects.append(item | {"bbox_mode": BoxMode.XYWH_ABS, "category_id": number_of[row["category_id"]]})
        dataset.append(
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "height": image["height"],
                "width": image["width"],
                "image_id": original,
                "annotations": objects,
            }
        )
    more = f"; {left_out} objects without a valid mask are left out" if left_out else ""
    logging.getLogger(__name__).info(f"{len(dataset)} images in {json_file}{more}")
    return dataset


class DetectionMapper(DatasetMapper):
    """Detectron2's, for images of 16 bits, too; see :func:`as_8_bits`."""

    def __call__(self, dataset_dict: dict) -> dict:
        with as_8_bits(dataset_dict["file_name"]) as path:
            return super().__call__(dataset_dict | {"file_name": path}) | {"file_name": dataset_dict["file_name"]}


class _DetectionSampler(PositionSampler, Sampler):
    """The type that Detectron2's loaders ask for."""


def build_resumable_detection_train_loader(cfg, start_iteration: int = 0):
    """Builds Detectron2's detection loader over a sampler that can start at any iteration.

    Detectron2's own sampler restarts its stream on every resume: an interrupted run sees the first images again and
    never the last ones.

    Args:
        cfg: Detectron2's keys; ``DATALOADER.SAMPLER_TRAIN`` must be "TrainingSampler" to get the resumable order.
        start_iteration: the first iteration to deliver.

    Raises:
        CocoError: the annotations have no object, other categories or no masks where the config asks for them.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        return build_detection_train_loader(cfg, mapper=DetectionMapper(cfg, True))
    names = ", ".join(cfg.DATASETS.TRAIN)
    try:
        with without_garbage_collection():
            dataset = get_detection_dataset_dicts(
                cfg.DATASETS.TRAIN,
                filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
                min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            )
    except AssertionError as error:  # Detectron2's
        raise CocoError(f"DATASETS.TRAIN {names}: {error}.") from error
    objects = [item for image in dataset for item in image.get("annotations", []) if not item.get("iscrowd")]
    classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes") or ()
    if problems := problems_with_config(cfg, classes, objects):
        raise CocoError(f"{names}: {problems[0]}")
    sampler = _DetectionSampler(
        np.ones(len(dataset)),
        seed=max(0, cfg.SEED),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
        start_iteration=start_iteration,
    )
    loader = build_detection_train_loader(cfg, dataset=dataset, sampler=sampler, mapper=DetectionMapper(cfg, True))
    inner = loader if isinstance(loader, DataLoader) else loader.dataset  # within the grouping by aspect ratio
    inner.worker_init_fn = functools.partial(_begin_worker, inner.worker_init_fn)
    if inner.num_workers:
        inner._get_iterator = functools.partial(WorkerIterator, inner)
    return loader


def _begin_worker(begin: Callable, worker: int) -> None:
    begin(worker)
    outlive_signals(worker)


def problems_with_config(cfg, classes: Sequence[str], objects: Sequence[dict]) -> list[str]:
    """Returns why a model of a config cannot learn from a dataset, a sentence for each reason.

    Args:
        cfg: of a detector.
        classes: names of the dataset's categories.
        objects: its annotations that are no crowds, with "segmentation" where they have a mask.
    """
    problems = []
    key = {"GeneralizedRCNN": "ROI_HEADS", "RetinaNet": "RETINANET"}.get(cfg.MODEL.META_ARCHITECTURE)
    if classes and key and cfg.MODEL[key].NUM_CLASSES != len(classes):
        problems.append(
            f"MODEL.{key}.NUM_CLASSES is {cfg.MODEL[key].NUM_CLASSES}, but there are {len(classes)} categories "
            f"({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}); set it to {len(classes)}."
        )
    if cfg.MODEL.MASK_ON and objects:
        without = sum(not item.get("segmentation") for item in objects)
        if without:
            problems.append(
                f"MODEL.MASK_ON is True, but {without} of the {len(objects)} objects have no mask; give them one, or "
                "train boxes alone with MODEL.MASK_ON False."
            )
        encoded = sum(isinstance(item.get("segmentation"), dict) for item in objects)
        if encoded and cfg.INPUT.MASK_FORMAT == "polygon":
            problems.append(
                f"INPUT.MASK_FORMAT is 'polygon', but {encoded} of the {len(objects)} objects have their mask as RLE; "
                "set it to 'bitmask'."
            )
    return problems
