"""COCO annotations as Detectron2's dataset dicts."""

import copy
import json

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from odd_images import exif_bytes
from PIL import Image
from toy_data import jpeg
from toy_detections import random_detections, random_keypoints, random_world

from wsl_d2 import add_wsl_config
from wsl_d2.coco import CocoError
from wsl_d2.data import register_coco_dataset
from wsl_d2.data.read.detection import build_resumable_detection_train_loader, load_coco_dataset
from wsl_d2.data.read.detection_image import as_8_bits, read_detection_image


@pytest.fixture()
def register(tmp_path):
    """Writes and registers contents; returns the name."""
    names = []

    def make(contents, name="toy_train"):
        (tmp_path / f"{name}.json").write_text(json.dumps(contents))
        register_coco_dataset(name, tmp_path / f"{name}.json", tmp_path)
        names.append(name)
        return name

    yield make
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def odd_but_readable_world():
    """All that Detectron2's own reader takes."""
    world = random_world(5)
    random_keypoints(world, random_detections(world, 0))
    for n, category in enumerate(world["categories"]):
        category["id"] = 90 - 10 * n
    for n, row in enumerate(world["annotations"]):
        x, y, w, h = row["bbox"]
        row["category_id"] = 100 - 10 * row["category_id"]
        if n % 3 == 0:
            row["segmentation"] = [[x, y, x + w, y, x + w, y + h], [x, y, x + 1, y + 1]]
        elif n % 3 == 1:
            row["segmentation"] = {"size": [240, 240], "counts": [100, 50, 240 * 240 - 150]}
    world["annotations"][4]["segmentation"] = [[1, 2, 3, 4]]
    world["annotations"][5]["segmentation"] = []
    del world["annotations"][6]["segmentation"]
    world["images"].reverse()
    return world


def test_the_dataset_dicts_are_detectron2s(tmp_path, register):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(odd_but_readable_world()))
    try:
        ours = load_coco_dataset(path, "images", "ours")
        theirs = load_coco_json(str(path), "images", "theirs")
        assert ours == theirs
        for name in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
            assert MetadataCatalog.get("ours").get(name) == MetadataCatalog.get("theirs").get(name)
    finally:
        for name in ("ours", "theirs"):
            MetadataCatalog.remove(name)


def test_text_ids_are_those_of_the_file(register):
    world = random_world(1)
    for row in world["images"]:
        row["id"] = f"im{row['id']:02d}"
    for row in world["annotations"]:
        row["image_id"] = f"im{row['image_id']:02d}"
        row["category_id"] = f"class{row['category_id']}"
        del row["id"], row["iscrowd"], row["area"]
    for row in world["categories"]:
        row["id"] = row["name"]
    name = register(world)
    dataset = DatasetCatalog.get(name)
    assert [image["image_id"] for image in dataset] == [row["id"] for row in world["images"]]
    assert sum(len(image["annotations"]) for image in dataset) == len(world["annotations"])
    assert MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id == {f"class{n + 1}": n for n in range(4)}
    assert MetadataCatalog.get(name).evaluator_type == "coco"


@pytest.mark.parametrize("key", ["file_name", "height", "width"])
def test_what_training_needs_is_named(register, key):
    world = random_world(1)
    del world["images"][2][key]
    name = register(world)
    with pytest.raises(CocoError, match=f"toy_train.json: image 3 has the {key} None; training needs it"):
        DatasetCatalog.get(name)


def config(name, **changes):
    cfg = get_cfg()
    add_wsl_config(cfg)
    cfg.DATASETS.TRAIN = (name,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.merge_from_list([item for key, value in changes.items() for item in (key.replace("__", "."), value)])
    return cfg


def without_masks(world, number):
    for row in [row for row in world["annotations"] if not row["iscrowd"]][:number]:
        row["segmentation"] = []
    return world


@pytest.mark.parametrize(
    "change, changes, message",
    [
        (None, {"MODEL__ROI_HEADS__NUM_CLASSES": 3}, "toy_train: MODEL.ROI_HEADS.NUM_CLASSES is 3, but .* 4 cat"),
        (None, {"MODEL__ROI_HEADS__NUM_CLASSES": 80}, r"\(class1, class2, class3, class4\); set it to 4"),
        (None, {"MODEL__META_ARCHITECTURE": "RetinaNet"}, "RETINANET.NUM_CLASSES is 80"),
        (lambda w: without_masks(w, 2), {"MODEL__MASK_ON": True}, "MODEL.MASK_ON is True, but 2 of the .* no mask"),
        (None, {"MODEL__MASK_ON": True, "INPUT__MASK_FORMAT": "polygon"}, "mask as RLE; set it to 'bitmask'"),
        (lambda w: w["annotations"].clear(), {}, "DATASETS.TRAIN toy_train: No valid data found"),
    ],
)  # fmt: skip
def test_a_dataset_that_does_not_fit_the_config_is_one_line(register, change, changes, message):
    world = random_world(1)
    if change:
        change(world)
    name = register(world)
    with pytest.raises(CocoError, match=message):
        build_resumable_detection_train_loader(config(name, **changes))


def test_boxes_alone_train_without_masks(tmp_path, register):
    world = without_masks(random_world(1, num_images=4), 100)
    for row in world["images"]:
        (tmp_path / row["file_name"]).write_bytes(jpeg(row["id"], (row["width"], row["height"])))
    batch = next(iter(build_resumable_detection_train_loader(config(register(copy.deepcopy(world))))))
    assert len(batch) == 2 and not batch[0]["instances"].has("gt_masks") and len(batch[0]["instances"])


def test_16_bits_are_scaled_as_in_pretraining(tmp_path, register):
    world = random_world(1, num_images=2)
    values = np.linspace(0, 65535, 240 * 240).round().astype(np.uint16).reshape(240, 240)
    for row in world["images"]:
        row["file_name"] = f"{row['id']}.png"
        Image.fromarray(values).save(tmp_path / row["file_name"], exif=exif_bytes(3))
    upright = values[::-1, ::-1]
    assert (read_detection_image(tmp_path / "1.png") == np.round(upright / 257).astype(np.uint8)[:, :, None]).all()
    (tmp_path / "toy.jpg").write_bytes(jpeg(0))
    with as_8_bits(tmp_path / "toy.jpg") as path:
        assert path == str(tmp_path / "toy.jpg")
    cfg = config(register(world), INPUT__MIN_SIZE_TRAIN=(240,), INPUT__RANDOM_FLIP="none", SOLVER__IMS_PER_BATCH=1)
    (image,) = next(iter(build_resumable_detection_train_loader(cfg)))
    assert image["file_name"].endswith(".png")
    assert (np.abs(image["image"].numpy().astype(int) - upright / 257) <= 1).all()
