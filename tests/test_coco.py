"""COCO files as people have them, read once for all uses."""

import contextlib
import copy
import io
import json
import logging

import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from toy_detections import random_detections, random_keypoints, random_world

from wsl_d2 import coco as coco_module
from wsl_d2.coco import CocoError, match, read_coco, read_results, shared_iou_types
from wsl_d2.errors import UserError


@pytest.fixture()
def world():
    """Without crowds, so that iscrowd can be left out."""
    contents = random_world(0)
    for annotation in contents["annotations"]:
        annotation["iscrowd"] = 0
    return contents, random_detections(contents, 1)


@pytest.fixture()
def lines(monkeypatch, caplog):
    monkeypatch.setattr(coco_module, "_said", set())
    monkeypatch.setattr(logging.getLogger("wsl_d2"), "propagate", True)  # Detectron2's logging may have stopped it
    return lambda: [record.getMessage() for record in caplog.records]


def write(folder, contents, name="gt.json"):
    path = folder / name
    path.write_text(json.dumps(contents))
    return path


def stats(evaluation):
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    return evaluation.stats


def pycocotools_stats(path, detections, iou_type):
    """As Detectron2 calls it."""
    detections = [{k: v for k, v in d.items() if k != "bbox" or iou_type != "segm"} for d in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
    return stats(evaluation)


def our_stats(path, detections, iou_type):
    truth = read_coco(path)
    return stats(match(truth, read_results(truth, detections), iou_type))


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_an_ordinary_file_gives_pycocotools_numbers_and_no_word(tmp_path, lines, iou_type):
    contents = random_world(3)
    detections = random_detections(contents, 1)
    random_keypoints(contents, detections)
    path = write(tmp_path, contents)
    expected = pycocotools_stats(path, detections, iou_type)
    assert expected[0] > 0.05
    np.testing.assert_array_equal(our_stats(path, detections, iou_type), expected)
    assert lines() == []
    assert read_coco(path).iou_types == ("bbox", "segm", "keypoints")


def text_image_ids(contents, detections):
    for image in contents["images"]:
        image["id"] = f"photo {image['id']:03d}"
    for row in [*contents["annotations"], *detections]:
        row["image_id"] = f"photo {row['image_id']:03d}"


def text_category_ids(contents, detections):
    for category in contents["categories"]:
        category["id"] = f"c{category['id']}"
    for row in [*contents["annotations"], *detections]:
        row["category_id"] = f"c{row['category_id']}"


def ids_that_are_text_here_and_numbers_there(contents, detections):
    for image in contents["images"]:
        image["id"] = str(image["id"])
    for row in contents["annotations"]:
        row["category_id"] = str(row["category_id"])


def whole_fractions(contents, detections):
    for row in [*contents["images"], *contents["categories"], *contents["annotations"]]:
        row["id"] = float(row["id"])
    for row in contents["annotations"]:
        row["image_id"], row["iscrowd"] = float(row["image_id"]), 0.0
    for image in contents["images"]:
        image["width"], image["height"] = float(image["width"]), float(image["height"])


def ids_from_0(contents, detections):
    for row in contents["annotations"]:
        row["id"] -= 1


def ids_below_0(contents, detections):
    for row in contents["annotations"]:
        row["id"] *= -1


def without(key):
    def change(contents, detections):
        for row in contents["annotations"]:
            del row[key]

    return change


def equal_ids(contents, detections):
    for row in contents["annotations"]:
        row["id"] = 7


def huge_ids(contents, detections):
    """Such as times in nanoseconds, beyond what numpy and C++ can hold."""
    for row in [*contents["images"], *contents["annotations"]]:
        row["id"] += 10**20
    for row in [*contents["annotations"], *detections]:
        row["image_id"] += 10**20


def truth_values(contents, detections):
    for row in contents["annotations"]:
        row["iscrowd"] = False


def polygons(contents, detections):
    """Flat for half of the objects; detections as polygons, too, and as RLE that is not compressed."""
    for n, row in enumerate(contents["annotations"]):
        x, y, w, h = (round(v) for v in row["bbox"])
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        row["segmentation"] = polygon if n % 2 else [polygon]
    for n, row in enumerate(detections):
        if n % 2:
            mask = mask_api.decode(row["segmentation"]).ravel(order="F")
            ends = np.flatnonzero(np.diff(np.concatenate([[0], mask, [1 - mask[-1]]])))
            row["segmentation"] = {"size": [240, 240], "counts": np.diff(ends, prepend=0).tolist()}


def repeated_entries(contents, detections):
    contents["images"] += copy.deepcopy(contents["images"][:2])
    contents["categories"] += copy.deepcopy(contents["categories"][:1])


def strays(contents, detections):
    contents["annotations"].append(dict(contents["annotations"][0], id=10_000, image_id=777))


def only_boxes_missing(contents, detections):
    for row in contents["annotations"]:
        row["bbox"] = []


MENDED = {
    text_image_ids: "image ids are no whole numbers",
    text_category_ids: "category ids are no whole numbers",
    ids_that_are_text_here_and_numbers_there: "image ids are no whole numbers",
    whole_fractions: "",
    ids_from_0: "pycocotools takes a match with it for no match",
    ids_below_0: "faster-coco-eval takes a match with them for no match",
    without("id"): "some are missing",
    equal_ids: "some repeat",
    huge_ids: "image ids are no whole numbers",
    without("iscrowd"): "without iscrowd are no crowds",
    truth_values: "",
    polygons: "",
    repeated_entries: "2 image entries that repeat another",
    strays: "1 annotations of images that are not in the file",
    without("area"): "areas are worked out from masks or boxes",
    only_boxes_missing: "boxes are worked out from masks",
}


@pytest.mark.parametrize("change", MENDED, ids=lambda change: change.__qualname__)
def test_what_is_mended_gives_the_numbers_of_the_ordinary_file(tmp_path, world, lines, change):
    contents, detections = world
    for row in contents["annotations"]:  # the area and box of the mask, as those that are worked out
        row["area"] = int(mask_api.area(row["segmentation"]))
        row["bbox"] = mask_api.toBbox(row["segmentation"]).tolist()
    if change is polygons:
        for row in contents["annotations"]:
            x, y, w, h = (round(v) for v in row["bbox"])
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            row["segmentation"] = mask_api.merge(mask_api.frPyObjects(polygon, 240, 240))
            row["segmentation"]["counts"] = row["segmentation"]["counts"].decode()
    path = write(tmp_path, contents)
    expected = {t: our_stats(path, detections, t) for t in ("bbox", "segm")}
    assert expected["bbox"][0] > 0.05 and lines() == []
    changed, found = copy.deepcopy(contents), copy.deepcopy(detections)
    change(changed, found)
    path = write(tmp_path, changed, "changed.json")
    before = path.read_bytes()
    for iou_type, values in expected.items():
        np.testing.assert_array_equal(our_stats(path, found, iou_type), values, err_msg=iou_type)
    assert path.read_bytes() == before
    assert len(lines()) == (1 if MENDED[change] else 0) and all(MENDED[change] in line for line in lines())


def test_the_area_of_an_object_without_a_mask_is_that_of_its_box(tmp_path, world):
    contents, _ = world
    for row in contents["annotations"]:
        del row["segmentation"], row["area"]
    truth = read_coco(write(tmp_path, contents))
    assert truth.iou_types == ("bbox",)
    for row in truth.dataset["annotations"]:
        assert row["area"] == pytest.approx(row["bbox"][2] * row["bbox"][3])


def test_ids_in_the_file_are_kept(tmp_path, world):
    contents, detections = world
    text_image_ids(contents, detections)
    truth = read_coco(write(tmp_path, contents))
    assert [truth.images.original(image["id"]) for image in truth.dataset["images"]] == [
        image["id"] for image in contents["images"]
    ]
    assert truth.images.number("photo 003") == 3 and truth.images.number("photo 999") is None
    assert truth.images.number(["photo 003"]) is None


def test_categories_of_one_name_are_told_apart(tmp_path, world):
    contents, _ = world
    for category in contents["categories"][:2]:
        category["name"] = "dog"
    del contents["categories"][2]["name"]
    truth = read_coco(write(tmp_path, contents))
    assert [row["name"] for row in truth.dataset["categories"]] == ["dog (1)", "dog (2)", "3", "class4"]


def test_ignored_objects_are_crowds_and_crowds_need_no_mask(tmp_path, world):
    contents, detections = world
    path = write(tmp_path, contents)
    crowd = copy.deepcopy(contents)
    crowd["annotations"][0]["iscrowd"] = 1
    contents["annotations"][0] |= {"ignore": 1, "segmentation": None}
    ignored = write(tmp_path, contents, "ignored.json")
    crowd = write(tmp_path, crowd, "crowd.json")
    assert read_coco(ignored).iou_types == ("bbox", "segm")
    assert (our_stats(ignored, detections, "bbox") == our_stats(crowd, detections, "bbox")).all()
    assert our_stats(ignored, detections, "bbox")[0] != our_stats(path, detections, "bbox")[0]
    our_stats(ignored, detections, "segm")


def test_what_some_objects_lack_is_left_out_with_a_reason(tmp_path, world):
    contents, detections = world
    contents["annotations"][4]["segmentation"] = [[1, 2, 3, 4]]
    truth = read_coco(write(tmp_path, contents))
    types, left_out = shared_iou_types(truth, [read_results(truth, detections)])
    assert types == ["bbox"]
    total = len(contents["annotations"])
    assert f"1 of {total} objects of {tmp_path / 'gt.json'} have no masks, such as annotation 5" in left_out["segm"]


def test_metrics_are_those_that_objects_and_all_results_have(tmp_path, world):
    contents, detections = world
    truth = read_coco(write(tmp_path, contents))
    boxes = [{k: v for k, v in row.items() if k != "segmentation"} for row in detections]
    some = [detections[0], *boxes[1:]]
    masks = [{k: v for k, v in row.items() if k != "bbox"} for row in detections]

    def types(*results, truth=truth):
        return shared_iou_types(truth, [read_results(truth, one) for one in results])

    assert types(detections, masks) == (["bbox", "segm"], {})
    assert types(boxes, boxes) == (["bbox"], {})  # no mask AP of box-shaped masks
    assert types(detections, boxes) == (["bbox"], {"segm": "no masks in the results"})
    assert types(detections, some)[0] == ["bbox"]
    assert types(detections, []) == (["bbox", "segm"], {})
    assert types([], []) == (["bbox"], {})
    for row in contents["annotations"]:
        del row["segmentation"]
    no_masks = read_coco(write(tmp_path, contents, "boxes.json"))
    assert types(detections, truth=no_masks) == (["bbox"], {"segm": f"{tmp_path / 'boxes.json'} has no masks"})


def test_keypoints_of_other_numbers_than_the_sigmas_are_left_out(tmp_path, world):
    contents, detections = world
    random_keypoints(contents, detections, number=5)
    truth = read_coco(write(tmp_path, contents))
    results = read_results(truth, detections)
    types, left_out = shared_iou_types(truth, [results])
    assert types == ["bbox", "segm"]
    assert "5 keypoints and TEST.KEYPOINT_OKS_SIGMAS has 17 values" in left_out["keypoints"]
    assert shared_iou_types(truth, [results], [0.05] * 5)[0] == ["bbox", "segm", "keypoints"]
    evaluation = match(truth, results, "keypoints", oks_sigmas=[0.05] * 5)
    assert stats(evaluation)[0] > 0.05


def change_annotation(**values):
    return lambda contents: contents["annotations"][2].update(values)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["images"][1].update(id=None), "the image .* has no id"),
        (lambda c: c["images"][1].update(id=[3]), "the image .* has no id"),
        (lambda c: c["images"][1].update(id=1), "two different entries have the image id 1"),
        (lambda c: c.update(categories=[]), "has no categories"),
        (lambda c: c.pop("categories"), "has no list 'categories'"),
        (lambda c: c.update(annotations=[3]), "has no list 'annotations'"),
        (lambda c: c["images"][0].update(neg_category_ids=[]), "LVIS's format"),
        (lambda c: [a.update(image_id=-5) for a in c["annotations"]], "no annotation is of an image .* -5"),
        (change_annotation(category_id=99), "annotation 3 of image .* category_id 99, which categories lack"),
        (change_annotation(bbox=[1, 2, 3]), r"annotation 3 of image .* has the box \[1, 2, 3\]; it must be"),
        (change_annotation(bbox=[1, 2, -3, 4]), "has the box"),
        (change_annotation(bbox=[1, 2, float("nan"), 4]), "has the box"),
        (change_annotation(bbox=["1", "2", "3", "4"]), "has the box"),
        (change_annotation(bbox=None, segmentation=None), "has neither a box nor a mask"),
        (change_annotation(iscrowd="yes"), "has iscrowd 'yes'; it must be 0 or 1"),
        (change_annotation(segmentation="mask.png"), "has the segmentation mask.png; it must be polygons or RLE"),
        (change_annotation(segmentation={"size": [240, 240]}), "has the segmentation .* it must be polygons or RLE"),
        (change_annotation(segmentation={"size": [9, 8], "counts": [72]}), r"mask of \[9, 8\] pixels .* \[240, 240\]"),
        (change_annotation(segmentation={"size": [240, 240], "counts": [9]}), "must be polygons or RLE of all pixels"),
        (change_annotation(segmentation={"size": [240, 240], "counts": ["a"]}), "be polygons or RLE of all pixels"),
        (change_annotation(segmentation={"size": [240, 240], "counts": "PPYo0"}), "be polygons or RLE of all pixels"),
        (change_annotation(segmentation={"size": [240, 240], "counts": "\x00zz"}), "be polygons or RLE of all pixels"),
        (change_annotation(segmentation={"size": [240, 240], "counts": ""}), "be polygons or RLE of all pixels"),
        (change_annotation(keypoints=[1, 2]), r"they must be \[x, y, visibility"),
        (change_annotation(keypoints=3), r"has the keypoints 3; they must be"),
        (change_annotation(ignore=float("inf")), "has ignore inf; it must be 0 or 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line_that_names_it(tmp_path, world, change, message):
    contents, _ = world
    change(contents)
    path = write(tmp_path, contents)
    with pytest.raises(CocoError, match=message) as caught:
        read_coco(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is no JSON"),
        ("[1, 2]", "holds a list"),
        ("3", "holds"),
        ('{"images": []}', "has no list 'categories'"),
        (b"\xff\xfe", "is no JSON"),
    ],
)
def test_what_is_no_annotation_file_is_said(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CocoError, match=message):
        read_coco(path)
    with pytest.raises(CocoError, match="absent.json cannot be read: No such file"):
        read_coco(tmp_path / "absent.json")


def test_detections_in_memory_may_hold_arrays_and_bytes(tmp_path, world):
    contents, detections = world
    path = write(tmp_path, contents)
    found = copy.deepcopy(detections)
    for row in found:
        row["image_id"], row["score"] = np.int64(row["image_id"]), np.float64(row["score"])
        row["bbox"] = np.array(row["bbox"])
        row["segmentation"]["counts"] = row["segmentation"]["counts"].encode()
    for iou_type in ("bbox", "segm"):
        assert (our_stats(path, found, iou_type) == our_stats(path, detections, iou_type)).all()


def test_a_byte_order_mark_is_no_hindrance(tmp_path, world):
    contents, _ = world
    path = tmp_path / "bom.json"
    path.write_text(json.dumps(contents), encoding="utf-8-sig")
    assert len(read_coco(path).dataset["images"]) == len(contents["images"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"score": None}, "detection 3 on image .* has the score None"),
        ({"score": float("nan")}, "has the score nan"),
        ({"bbox": [1, 2, 3]}, "has the box"),
        ({"bbox": None, "segmentation": None}, "has no bbox, segmentation or keypoints"),
        ({"image_id": 999}, "hold detections on 1 images that the ground truth lacks, such as image_id 999"),
        ({"category_id": None}, "hold detections on 1 categories that the ground truth lacks, .* None"),
        ({"segmentation": {"size": [9, 8], "counts": "abc"}}, "has a mask of"),
        ({"keypoints": True}, "has the keypoints True"),
    ],
)
def test_detections_that_cannot_be_read_are_named(tmp_path, world, change, message):
    contents, detections = world
    truth = read_coco(write(tmp_path, contents))
    detections[2].update(change)
    with pytest.raises(CocoError, match=message):
        read_results(truth, detections)
    path = write(tmp_path, {"annotations": detections}, "dict.json")
    with pytest.raises(CocoError, match="dict.json hold no list of detections"):
        read_results(truth, path)


def test_what_was_kept_is_handed_on_once_and_only_of_the_same_file(tmp_path, world):
    contents, _ = world
    path = write(tmp_path, contents)
    kept = read_coco(path, keep=True)
    assert read_coco(path) is kept and read_coco(path) is not kept
    kept = read_coco(path, keep=True)
    contents["images"].pop()
    contents["annotations"] = []
    write(tmp_path, contents)
    assert len(read_coco(path).imgs) == len(kept.imgs) - 1


def test_compressed_masks_are_read_as_pycocotools_writes_them():
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 300, 2).tolist()
        runs = np.diff(np.sort(rng.integers(0, height * width, rng.integers(0, 40))), prepend=0, append=height * width)
        mask = mask_api.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)
        read = coco_module._decoded_runs
        assert read(mask["counts"]).tolist() == read(mask["counts"].decode()).tolist() == runs.tolist()
