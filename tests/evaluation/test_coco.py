"""COCO evaluation gives pycocotools' numbers, of any file."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_api
from toy_detections import random_detections, random_keypoints, random_world

from wsl_d2.coco import CocoError
from wsl_d2.data import register_coco_dataset
from wsl_d2.evaluation import FastCOCOEvaluator
from wsl_d2.evaluation import coco as coco_module

NAME = "toy_coco_evaluation"


@pytest.fixture()
def register(tmp_path):
    """Registers contents as a dataset, as a run does; returns the folder."""

    def make(contents):
        (tmp_path / "gt.json").write_text(json.dumps(contents))
        register_coco_dataset(NAME, tmp_path / "gt.json", tmp_path)
        DatasetCatalog.get(NAME)  # fills in the class numbers
        return tmp_path

    yield make
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def detect(evaluator, found: list[dict], masks: bool = True, img_ids=None):
    """Hands detections to an evaluator as a model does; the dataset's ids in the order of its images and classes."""
    evaluator.reset()
    dataset = DatasetCatalog.get(NAME)
    for place, image in enumerate(dataset):
        own = [d for d in found if d["image_id"] == place + 1]
        size = (image["height"], image["width"])
        instances = Instances(size)
        boxes = torch.tensor([d["bbox"] for d in own]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.tensor([d["score"] for d in own])
        instances.pred_classes = torch.tensor([d["category_id"] - 1 for d in own], dtype=torch.int64)
        if masks:
            decoded = [torch.from_numpy(mask_api.decode(d["segmentation"])).bool() for d in own]
            instances.pred_masks = torch.stack(decoded) if decoded else torch.zeros((0, *size), dtype=torch.bool)
        if own and "keypoints" in own[0]:
            points = torch.tensor([d["keypoints"] for d in own]).reshape(len(own), -1, 3)
            instances.pred_keypoints = points + torch.tensor([0.5, 0.5, 0.0])
        evaluator.process([{"image_id": image["image_id"]}], [{"instances": instances}])
    return evaluator.evaluate(img_ids)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for task in theirs:
        assert ours[task].keys() == theirs[task].keys()
        for name, value in theirs[task].items():
            assert ours[task][name] == pytest.approx(value, abs=1e-9, nan_ok=True), (task, name)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("fast", [True, False])
def test_the_numbers_are_those_of_detectron2_by_pycocotools(register, fast, seed):
    assert coco_module.COCOeval_faster is not None
    contents = random_world(seed, num_images=40)
    found = random_detections(contents, 5) * 2  # equal scores, duplicates
    random_keypoints(contents, found)
    folder = register(contents)
    theirs = detect(COCOEvaluator(NAME, output_dir=str(folder / "theirs"), use_fast_impl=False), found)
    ours = detect(FastCOCOEvaluator(NAME, folder / "ours", fast), found)
    assert theirs.keys() == {"bbox", "segm", "keypoints"} and 5 < theirs["bbox"]["AP"] < 95
    assert_equal(ours, theirs)
    name = "coco_instances_results.json"
    assert (folder / "ours" / name).read_text() == (folder / "theirs" / name).read_text()


def text_ids(contents):
    for row in contents["images"]:
        row["id"] = f"im{row['id']:02d}"
    for row in contents["annotations"]:
        row["image_id"] = f"im{row['image_id']:02d}"


def id_zero(contents):
    for row in contents["annotations"]:
        row["id"] -= 1


def below_zero(contents):
    for row in contents["annotations"]:
        row["id"] *= -1


def bare(contents):
    for row in contents["annotations"]:
        del row["id"], row["iscrowd"], row["area"]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("change", [text_ids, id_zero, below_zero, bare])
def test_ids_and_fields_as_people_have_them(register, tmp_path_factory, change, fast):
    contents = random_world(3, num_images=40)
    for row in contents["annotations"]:
        row |= {"iscrowd": 0, "area": int(mask_api.area(row["segmentation"]))}
    found = random_detections(contents, 5)
    changed = copy.deepcopy(contents)
    change(changed)
    folder = register(changed)
    numbers = detect(FastCOCOEvaluator(NAME, folder, fast), found)
    written = json.loads((folder / "coco_instances_results.json").read_text())
    assert {row["image_id"] for row in written} <= {row["id"] for row in changed["images"]}
    DatasetCatalog.remove(NAME), MetadataCatalog.remove(NAME)
    folder = register(contents)
    expected = detect(COCOEvaluator(NAME, output_dir=str(folder), use_fast_impl=False), found)
    assert expected["bbox"]["AP"] > 5
    assert_equal(numbers, expected)


def test_perfect_detections_of_objects_0_and_1_are_100(register):
    contents = random_world(0, num_images=1)
    boxes = [[10.0, 10.0, 40.0, 40.0], [100.0, 100.0, 40.0, 40.0]]
    row = {"image_id": 1, "category_id": 1, "area": 1600, "iscrowd": 0}
    contents["annotations"] = [row | {"id": n, "bbox": box} for n, box in enumerate(boxes)]
    folder = register(contents)
    found = [row | {"bbox": box, "score": 0.9} for box in boxes]
    results = detect(FastCOCOEvaluator(NAME, folder), found, masks=False)
    assert results.keys() == {"bbox"} and results["bbox"]["AP"] == pytest.approx(100)


def test_only_what_both_have_is_evaluated(register):
    contents = random_world(3)
    found = random_detections(contents, 5)
    folder = register(contents)
    assert detect(FastCOCOEvaluator(NAME, folder), found, masks=False).keys() == {"bbox"}
    DatasetCatalog.remove(NAME), MetadataCatalog.remove(NAME)
    for row in contents["annotations"]:
        del row["segmentation"]
    register(contents)
    assert detect(FastCOCOEvaluator(NAME, folder), found).keys() == {"bbox"}
    assert "segmentation" in (folder / "coco_instances_results.json").read_text()


def test_no_detections_and_no_annotations(register):
    contents = random_world(3)
    folder = register(contents)
    results = detect(FastCOCOEvaluator(NAME, folder), [])
    assert np.isnan(results["bbox"]["AP"]) and json.loads((folder / "coco_instances_results.json").read_text()) == []
    DatasetCatalog.remove(NAME), MetadataCatalog.remove(NAME)
    found = random_detections(contents, 5)
    del contents["annotations"]
    register(contents)
    assert detect(FastCOCOEvaluator(NAME, folder), found) == {}
    assert len(json.loads((folder / "coco_instances_results.json").read_text())) == len(found)


def test_a_class_that_the_annotations_lack_is_one_line(register):
    contents = random_world(3)
    found = random_detections(contents, 5)
    found[0]["category_id"] = 9
    folder = register(contents)
    with pytest.raises(CocoError, match="the model detects class 8, but .*gt.json has 4 categories; set"):
        detect(FastCOCOEvaluator(NAME, folder), found)


def test_without_the_library_or_where_it_fails_it_is_pycocotools(register, monkeypatch, caplog):
    contents = random_world(3)
    found = random_detections(contents, 5)
    folder = register(contents)
    expected = detect(FastCOCOEvaluator(NAME, folder, fast=False), found)

    def broken(*args):
        raise TypeError("incompatible function arguments")

    monkeypatch.setattr(coco_module, "COCOeval_faster", broken)
    monkeypatch.setattr(logging.getLogger("wsl_d2"), "propagate", True)
    assert_equal(detect(FastCOCOEvaluator(NAME, folder), found), expected)
    assert "cannot evaluate bbox (incompatible function arguments); pycocotools does" in caplog.text
    monkeypatch.setattr(coco_module, "COCOeval_faster", None)
    assert_equal(detect(FastCOCOEvaluator(NAME, folder), found), expected)


def test_some_images_alone(register):
    contents = random_world(3)
    found = random_detections(contents, 5)
    folder = register(contents)
    ours = detect(FastCOCOEvaluator(NAME, folder), found, img_ids=[1, 2, 3])
    assert_equal(ours, detect(COCOEvaluator(NAME, output_dir=str(folder)), found, img_ids=[1, 2, 3]))
    assert ours != detect(FastCOCOEvaluator(NAME, folder), found)


def test_evaluating_again_changes_nothing(register):
    contents = random_world(3)
    evaluator = FastCOCOEvaluator(NAME, register(contents))
    first = detect(evaluator, random_detections(contents, 5))
    assert_equal(evaluator.evaluate(), first)
