"""Every kind of dataset gets its evaluator, and semantic segmentation is evaluated on any numpy."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg
from detectron2.evaluation import DatasetEvaluators, PascalVOCDetectionEvaluator, SemSegEvaluator
from PIL import Image

from wsl_d2.errors import UserError
from wsl_d2.evaluation import FastCOCOEvaluator
from wsl_d2.evaluation import detection as module
from wsl_d2.evaluation.detection import EvaluatorError, build_detection_evaluator


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


@pytest.fixture
def register(tmp_path):
    """Registers a dataset of two images with that evaluator_type."""
    names = []

    def register(evaluator_type, **metadata):
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        # Classes 0 and 1, 255 is ignored. The first image is all 0, the second half 0 and half 1.
        for i, labels in enumerate(([[0, 0], [0, 255]], [[0, 0], [1, 1]])):
            Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "images" / f"{i}.jpg")
            Image.fromarray(np.array(labels, np.uint8)).save(tmp_path / "labels" / f"{i}.png")
        json_file = tmp_path / "instances.json"
        json_file.write_text(json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}))
        names.append(f"toy_{evaluator_type}")
        DatasetCatalog.register(names[-1], lambda: load_sem_seg(str(tmp_path / "labels"), str(tmp_path / "images")))
        MetadataCatalog.get(names[-1]).set(
            evaluator_type=evaluator_type,
            json_file=str(json_file),
            image_root=str(tmp_path / "images"),
            stuff_classes=["background", "thing"],
            stuff_dataset_id_to_contiguous_id={0: 0, 1: 1},
            thing_dataset_id_to_contiguous_id={1: 0},
            thing_classes=["a"],
            ignore_label=255,
            **metadata,
        )
        return names[-1]

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_semantic_segmentation_by_hand(cfg, register, tmp_path):
    name = register("sem_seg")
    evaluator = build_detection_evaluator(cfg, name)
    assert type(evaluator) is SemSegEvaluator
    evaluator.reset()
    for i in range(2):  # predicts 1 in the lower row of both
        scores = torch.zeros(2, 2, 2)
        scores[1, 1] = 1
        evaluator.process([{"file_name": str(tmp_path / "images" / f"{i}.jpg")}], [{"sem_seg": scores}])
    results = evaluator.evaluate()["sem_seg"]
    # Pixels of class 0: 5, of which 4 are found, none wrongly. Of class 1: 2, both found, and 1 wrongly; the ignored
    # one does not count.
    assert results["IoU-background"] == pytest.approx(100 * 4 / 5)
    assert results["IoU-thing"] == pytest.approx(100 * 2 / 3)
    assert results["pACC"] == pytest.approx(100 * 6 / 7)


def test_instances(cfg, register):
    evaluator = build_detection_evaluator(cfg, register("coco"))
    assert type(evaluator) is FastCOCOEvaluator


def test_pascal_voc(cfg, register, tmp_path):
    (tmp_path / "Annotations").mkdir()
    name = register("pascal_voc", dirname=str(tmp_path), split="val", year=2012)
    assert type(build_detection_evaluator(cfg, name)) is PascalVOCDetectionEvaluator


def test_panoptic_has_three_parts(cfg, register, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    evaluator = build_detection_evaluator(cfg, register("coco_panoptic_seg"))
    assert isinstance(evaluator, DatasetEvaluators)
    kinds = [type(part).__name__ for part in evaluator._evaluators]
    assert kinds == ["SemSegEvaluator", "FastCOCOEvaluator", "COCOPanopticEvaluator"]


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("lvis", "lvis"),
        ("coco_panoptic_seg", "panopticapi"),
        ("cityscapes_instance", "cityscapesscripts"),
        ("cityscapes_sem_seg", "cityscapesscripts"),
        ("cityscapes_panoptic_seg", "panopticapi"),
    ],
)
def test_a_missing_package_is_told_before_the_training(cfg, register, kind, package, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda n: None if n == package else find_spec(n))
    with pytest.raises(EvaluatorError, match=f"evaluating 'toy_{kind}' \\({kind}\\) needs the package {package}: "):
        build_detection_evaluator(cfg, register(kind))


def test_unknown_kinds(cfg, register):
    name = register("odd")
    with pytest.raises(EvaluatorError, match="'toy_odd' has evaluator_type 'odd' in its metadata; known: coco, ") as e:
        build_detection_evaluator(cfg, name)
    assert isinstance(e.value, UserError)
    del MetadataCatalog.get(name).evaluator_type
    with pytest.raises(EvaluatorError, match="has evaluator_type None"):
        build_detection_evaluator(cfg, name)
