"""Fast COCO evaluation gives pycocotools' numbers."""

import copy
import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_api
from toy_detections import random_detections, random_world

from wsl_d2.evaluation import FastCOCOEvaluator
from wsl_d2.evaluation import coco as coco_module


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    contents = random_world(3, num_images=40)
    (folder / "gt.json").write_text(json.dumps(contents))
    register_coco_instances("toy_coco_fast", {}, str(folder / "gt.json"), str(folder))
    DatasetCatalog.get("toy_coco_fast")  # fills in the class numbers
    yield folder, contents
    DatasetCatalog.remove("toy_coco_fast")
    MetadataCatalog.remove("toy_coco_fast")


def evaluate(dataset, fast: bool) -> dict:
    folder, contents = dataset
    evaluator = FastCOCOEvaluator("toy_coco_fast", str(folder / f"fast{fast}"), fast)
    evaluator.reset()
    numbers = MetadataCatalog.get("toy_coco_fast").thing_dataset_id_to_contiguous_id
    found = random_detections(contents, 5)
    for image in contents["images"]:
        own = [d for d in found if d["image_id"] == image["id"]]
        size = (image["height"], image["width"])
        instances = Instances(size)
        boxes = torch.tensor([d["bbox"] for d in own]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.tensor([d["score"] for d in own])
        instances.pred_classes = torch.tensor([numbers[d["category_id"]] for d in own], dtype=torch.int64)
        masks = [torch.from_numpy(mask_api.decode(d["segmentation"])).bool() for d in own]
        instances.pred_masks = torch.stack(masks) if masks else torch.zeros((0, *size), dtype=torch.bool)
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return copy.deepcopy(evaluator.evaluate())


def test_the_numbers_are_pycocotools(dataset):
    assert coco_module.COCOeval_faster is not None
    fast, slow = evaluate(dataset, True), evaluate(dataset, False)
    assert fast.keys() == slow.keys() == {"bbox", "segm"}
    for task in slow:
        assert fast[task].keys() == slow[task].keys()
        for name, value in slow[task].items():
            assert fast[task][name] == pytest.approx(value, abs=1e-9, nan_ok=True), (task, name)
    assert 5 < slow["bbox"]["AP"] < 95


def test_without_the_library_it_is_pycocotools(dataset, monkeypatch):
    monkeypatch.setattr(coco_module, "COCOeval_faster", None)
    assert evaluate(dataset, True)["bbox"]["AP"] > 5
