"""The evaluators of detection and segmentation datasets, by the kind that each dataset's metadata names."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.utils.file_io import PathManager
from PIL import Image

from wsl_d2.errors import UserError
from wsl_d2.evaluation.coco import FastCOCOEvaluator

# evaluator_type -> the parts of the evaluation
_PARTS = {
    "coco": ("instances",),
    "coco_panoptic_seg": ("semantic", "instances", "panoptic"),
    "sem_seg": ("semantic",),
    "lvis": ("lvis",),
    "pascal_voc": ("voc",),
    "cityscapes_instance": ("cityscapes instances",),
    "cityscapes_sem_seg": ("cityscapes semantic",),
    "cityscapes_panoptic_seg": ("panoptic", "cityscapes semantic", "cityscapes instances"),
}
# Imported by Detectron2 only when the first image is evaluated, which is after the training.
_PACKAGES = {
    "lvis": ("lvis", "pip install lvis"),
    "panoptic": ("panopticapi", "install it from https://github.com/cocodataset/panopticapi"),
    "cityscapes instances": ("cityscapesscripts", "pip install cityscapesscripts"),
    "cityscapes semantic": ("cityscapesscripts", "pip install cityscapesscripts"),
}


class EvaluatorError(UserError, ValueError):
    """A dataset cannot be evaluated: of unknown kind, or a package is missing."""


def build_detection_evaluator(cfg: CfgNode, name: str) -> DatasetEvaluator:
    """Detectron2's evaluator for a dataset; of COCO instances, a faster one with the same numbers.

    Args:
        cfg: ``OUTPUT_DIR`` gets a folder inference with the predictions; ``TEST.FAST_EVAL`` as in wsl_d2's config.
        name: of a registered dataset, whose metadata has an ``evaluator_type``: one of coco, coco_panoptic_seg,
            sem_seg, lvis, pascal_voc, cityscapes_instance, cityscapes_sem_seg, cityscapes_panoptic_seg.

    Raises:
        EvaluatorError: for another kind of dataset, or if a package is not installed that its evaluation needs.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type", None)
    if kind not in _PARTS:
        raise EvaluatorError(
            f"dataset {name!r} has evaluator_type {kind!r} in its metadata; known: {', '.join(_PARTS)}"
        )
    for part in _PARTS[kind]:
        package, cure = _PACKAGES.get(part, ("", ""))
        if package and importlib.util.find_spec(package) is None:
            raise EvaluatorError(f"evaluating {name!r} ({kind}) needs the package {package}: {cure}")
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    make = {
        "instances": lambda: FastCOCOEvaluator(
            name, folder, cfg.TEST.get("FAST_EVAL", True), cfg.TEST.KEYPOINT_OKS_SIGMAS
        ),
        "semantic": lambda: SemSegEvaluator(name, output_dir=folder, sem_seg_loading_fn=_read_labels),
        "panoptic": lambda: COCOPanopticEvaluator(name, folder),
        "lvis": lambda: LVISEvaluator(name, output_dir=folder),
        "voc": lambda: PascalVOCDetectionEvaluator(name),
        "cityscapes instances": lambda: CityscapesInstanceEvaluator(name),
        "cityscapes semantic": lambda: CityscapesSemSegEvaluator(name),
    }
    evaluators = [make[part]() for part in _PARTS[kind]]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _read_labels(filename: str, copy: bool = True, dtype: type | None = None) -> np.ndarray:
    """Detectron2's own reader of label images says np.array(image, copy=False) in its older versions, the pinned wheel
    among them, which numpy 2 refuses."""
    with PathManager.open(filename, "rb") as file:
        return np.array(Image.open(file), dtype=dtype)
