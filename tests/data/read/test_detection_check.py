"""The check of a detection dataset: each fault is one line, and a good dataset has none."""

import json
import os
import re
import shutil
import zlib

import numpy as np
import pytest
from command_line import wsl_d2
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from odd_images import exif_bytes
from PIL import Image
from toy_data import jpeg

from wsl_d2 import add_wsl_config
from wsl_d2.coco import CocoError
from wsl_d2.data import register_coco_dataset
from wsl_d2.data.read.detection_check import check_detection, check_run, compare_datasets
from wsl_d2.errors import FaultsError

WIDTH, HEIGHT = 64, 48


def good_world():
    """Four images of three objects each, with polygons."""
    images = [{"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(1, 5)]
    annotations = []
    for image in images:
        for category in (1, 2, 3):
            x, y = 4 + 10 * category, 2 + image["id"]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category, "iscrowd": 0,
                 "bbox": [x, y, 12, 30], "area": 360, "segmentation": [[x, y, x + 12, y, x + 12, y + 30, x, y + 30]]}
            )  # fmt: skip
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(("ant", "bee", "cat"), 1)],
    }


def write(folder, world):
    folder.mkdir(exist_ok=True)
    for row in world["images"]:
        (folder / row["file_name"]).write_bytes(jpeg(zlib.crc32(folder.name.encode()) + row["id"], (WIDTH, HEIGHT)))
    path = folder / "objects.json"
    path.write_text(json.dumps(world))
    return path


def config(**changes):
    cfg = get_cfg()
    add_wsl_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.MASK_ON = True
    cfg.merge_from_list([item for key, value in changes.items() for item in (key.replace("__", "."), value)])
    return cfg


def all_boxes(make):
    def change(world):
        for row in world["annotations"]:
            row["bbox"] = make(*row["bbox"])

    return change


def first_annotation(**fields):
    return lambda world: world["annotations"][0].update(fields)


def drop(key, rows="annotations", number=1):
    def change(world):
        for row in world[rows][:number]:
            del row[key]

    return change


def add_category(world):
    world["categories"].append({"id": 9, "name": "dog"})


def text_ids(world):
    for row in world["images"]:
        row["id"] = f"im{row['id']}"
    for row in world["annotations"]:
        row["image_id"] = f"im{row['image_id']}"


def crowd_of_first_image(world):
    for row in world["annotations"][:3]:
        row["iscrowd"] = 1


def save(image, name="1.jpg", **options):
    return lambda folder: image.save(folder / name, **options)


RLE = {"size": [HEIGHT, WIDTH], "counts": [0, WIDTH * HEIGHT]}
TURNED = Image.fromarray(np.zeros((WIDTH, HEIGHT, 3), np.uint8))
DEEP = Image.fromarray(np.full((HEIGHT, WIDTH), 30_000, np.uint16))

# name -> (change of the annotations, of the folder, of the config; whether it is an error; what its line says)
FAULTS = {
    "missing file": (None, lambda d: (d / "2.jpg").unlink(), {}, True, r"are not in .*data \(2.jpg\): copy"),
    "pipe": (
        None, lambda d: ((d / "2.jpg").unlink(), os.mkfifo(d / "2.jpg")), {}, True, "1 of 4 .* be read .*a regular"),
    "no image": (None, lambda d: (d / "2.jpg").write_text("<html>"), {}, True, r"1 of 4 .* be read \(2.jpg \(no image"),
    "cut off": (None, lambda d: (d / "2.jpg").write_bytes(jpeg(2, (64, 48))[:-99]), {}, True, r"2.jpg \(image file is"),
    "turned by EXIF": (
        None, save(Image.new("RGB", (WIDTH, HEIGHT)), exif=exif_bytes(6)), {}, True,
        r"1 of 4 .* turned by EXIF and annotated as stored \(1.jpg is 48 x 64, not 64 x 48\): save them without"),
    "other size": (None, save(TURNED), {}, True, r"another size than their entry \(1.jpg is 48 x 64, not 64 x 48\)"),
    "16 bits": (None, save(DEEP, format="PNG"), {}, False, r"1 of 4 .* 16 bits a pixel \(1.jpg\): .* scaled to 8"),
    "CMYK": (None, save(Image.new("CMYK", (WIDTH, HEIGHT))), {}, False, r"1 of 4 .* \(1.jpg \(CMYK\)\): .* as RGB"),
    "box without area": (first_annotation(bbox=[5, 5, 0, 9]), None, {}, False, r"1 of 12 boxes have no area .*missed"),
    "NaN in a box": (first_annotation(bbox=[5, float("nan"), 3, 3]), None, {}, True, r"1 .*\[5, nan, 3, 3\]"),
    "boxes without a number": (
        all_boxes(lambda x, y, w, h: [x, y, None, h]), None, {}, True, "annotation 1 .* And 11 more annotations"),
    "box outside": (first_annotation(bbox=[70, 5, 9, 9]), None, {}, False, r"1 of 12 boxes lie outside their image"),
    "box beyond": (first_annotation(bbox=[50, 5, 20, 9]), None, {}, False, r"1 of 12 boxes reach beyond their image"),
    "corners": (all_boxes(lambda x, y, w, h: [x, y, x + w + 8, y + h]), None, {}, True, r"to be \[x1, y1, x2, y2\];"),
    "fractions": (
        all_boxes(lambda x, y, w, h: [x / 64, y / 48, w / 64, h / 48]), None, {}, True, "12 boxes are within 0 to 1 "),
    "no masks": (drop("segmentation", number=2), None, {}, True, "MASK_ON is True, but 2 of the 12 .* no mask"),
    "RLE as polygons": (first_annotation(segmentation=RLE), None, {}, True, "'polygon', but 1 of the 12 .*'bitmask'"),
    "too few classes": (None, None, {"MODEL__ROI_HEADS__NUM_CLASSES": 2}, True, r"NUM_CLASSES is 2, .*; set it to 3"),
    "too many classes": (None, None, {"MODEL__ROI_HEADS__NUM_CLASSES": 80}, True, r"80, but .* 3 categories \(ant"),
    "RetinaNet's": (None, None, {"MODEL__META_ARCHITECTURE": "RetinaNet"}, True, "RETINANET.NUM_CLASSES is 80"),
    "no such category": (first_annotation(category_id=7), None, {}, True, "category_id 7, which categories lack"),
    "unused category": (add_category, None, {"MODEL__ROI_HEADS__NUM_CLASSES": 4}, False, r"1 of 4 .*\(dog\)"),
    "text ids": (text_ids, None, {}, False, "4 image ids are no whole numbers and are numbered"),
    "image id twice": (lambda w: w["images"][1].update(id=1), None, {}, True, "different entries have the image id 1"),
    "annotation id 0": (first_annotation(id=0), None, {}, False, r"12 annotations are numbered anew \(id 0"),
    "annotation id twice": (first_annotation(id=2), None, {}, False, r"12 annotations are numbered anew \(some repeat"),
    "no iscrowd": (drop("iscrowd", number=12), None, {}, False, "12 annotations without iscrowd are no crowds"),
    "crowds alone": (crowd_of_first_image, None, {}, False, r"1 of 4 images have no object \(1.jpg\): training leaves"),
    "empty image": (lambda w: w["annotations"].__delitem__(slice(3)), None, {}, False, "1 of 4 images have no object"),
    "no object": (lambda w: w["annotations"].clear(), None, {}, True, "no image has an object"),
    "no annotations": (lambda w: w.pop("annotations"), None, {}, True, "there is no list 'annotations'"),
    "no size": (drop("height", "images"), None, {}, True, r"1 of 4 images have no height or width \(1.jpg\)"),
    "no file_name": (drop("file_name", "images"), None, {}, True, r"1 of 4 images have no file_name \(1\)"),
    "file twice": (lambda w: w["images"][1].update(file_name="1.jpg"), None, {}, False, "1 files have several entr"),
    "no JSON": (None, lambda d: (d / "objects.json").write_text("{"), {}, True, "objects.json is no JSON"),
    "no file": (None, lambda d: (d / "objects.json").unlink(), {}, True, "objects.json cannot be read: No such file"),
}  # fmt: skip


def inject(folder, fault):
    """Writes a good dataset with one fault; returns (annotations, config)."""
    world = good_world()
    path = write(folder, world)
    change, spoil, keys, _, _ = FAULTS[fault]
    if change:
        change(world)
        path.write_text(json.dumps(world))
    if spoil:
        spoil(folder)
    return path, config(**keys)


def lines_of(path, cfg):
    """(errors, warnings)."""
    try:
        check = check_detection(path, path.parent, cfg)
    except CocoError as error:
        return [str(error)], []
    return check.errors, check.warnings


def test_a_good_dataset_has_no_fault(tmp_path):
    path = write(tmp_path / "data", good_world())
    check = check_detection(path, path.parent, config())
    assert check.errors == check.warnings == [] and check.classes == ["ant", "bee", "cat"]
    facts = dict(check.facts)
    assert facts["images"] == facts["image files looked at"] == 4 and facts["objects with polygons"] == 12


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_line(tmp_path, fault):
    path, cfg = inject(tmp_path / "data", fault)
    *_, is_error, message = FAULTS[fault]
    errors, warnings = lines_of(path, cfg)
    assert len(errors) == is_error and (is_error or len(warnings) == 1), (errors, warnings)
    (line,) = errors or warnings
    assert str(path) in line and "\n" not in line
    assert re.search(message, line)


def test_images_of_both_sets_are_found_under_any_name(tmp_path):
    train, val = (write(tmp_path / name, good_world()) for name in ("train", "val"))
    checks = [check_detection(path, path.parent) for path in (train, val)]
    compare_datasets(*checks)
    assert not [*checks[1].errors, *checks[1].warnings]
    shutil.copy(train.parent / "3.jpg", val.parent / "1.jpg")
    found = check_detection(val, val.parent)
    compare_datasets(checks[0], found)
    assert [(finding.count, finding.examples) for finding in found.findings] == [(1, ("1.jpg",))]
    unread = check_detection(train, train.parent, seconds=0)
    compare_datasets(checks[0], unread)
    assert not unread.findings


@pytest.fixture()
def registered(tmp_path):
    names = [f"check_{tmp_path.name}_{part}" for part in ("train", "val")]
    for name, part in zip(names, ("train", "val"), strict=True):
        register_coco_dataset(name, write(tmp_path / part, good_world()), tmp_path / part)
    yield config(DATASETS__TRAIN=(names[0],), DATASETS__TEST=(names[1],))
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_run_has_all_its_datasets_checked(registered, tmp_path, monkeypatch):
    lines = check_run(registered)
    monkeypatch.setattr("wsl_d2.coco._read_json", lambda path: pytest.fail(f"{path} is read again"))
    assert len(DatasetCatalog.get(registered.DATASETS.TRAIN[0])) == 4  # from what the check has read
    monkeypatch.undo()
    assert len(lines) == 2 and all("4 images, 3 categories, 12 objects" in line for line in lines)
    (tmp_path / "train" / "1.jpg").unlink()
    world = good_world()
    world["categories"].reverse()
    world["categories"][0]["id"], world["categories"][2]["id"] = 1, 3
    (tmp_path / "val" / "objects.json").write_text(json.dumps(world))
    with pytest.raises(FaultsError) as caught:
        check_run(registered)
    missing, classes = caught.value.lines
    assert "1 of 4 image files are not in" in missing
    assert "its categories are cat, bee, ant (3), those of" in classes and "ant, bee, cat (3); both must" in classes
    with pytest.raises(FaultsError, match="no dataset 'absent' is registered"):
        check_run(config(DATASETS__TRAIN=("absent",)))
    assert len(check_run(registered, evaluation_alone=True)) == 1
    (tmp_path / "val" / "objects.json").unlink()
    with pytest.raises(FaultsError, match="cannot be read: No such file .* folder that DETECTRON2_DATASETS names"):
        check_run(registered)


def test_the_command_prints_a_table_and_exits_with_2_on_errors(tmp_path):
    path, _ = inject(tmp_path / "train", "missing file")
    output = wsl_d2("data", "check", path, path.parent, "--train", path, code=2)
    assert "       12  objects with polygons\n" in output and "    error  1 of 4 image files are not in" in output
    assert f"wsl-d2 data check: {path}: 1 of 4 image files are not in" in output
    assert "  warning  3 of 3 image files are in" in output
    keys = ["--config-file", "Base-RCNN-FPN.yaml", "--set", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    good = write(tmp_path / "good", good_world())
    output = wsl_d2("data", "check", good, good.parent, *keys)
    assert output.count("error") == 1 and output.splitlines()[-1] == "no errors, no warnings"
    output = wsl_d2("data", "check", good, good.parent, "--train", good)
    assert output.splitlines()[-1].startswith("no errors, 1 warning")


def train(*opts, code=2):
    base = "Base-Miniworld-Mask-RCNN-FPN.yaml"
    return wsl_d2("train", "--config-file", base, *opts, code=code)


def test_a_training_stops_before_its_first_iteration_with_a_line_for_each_error(tmp_path):
    path, _ = inject(tmp_path / "train", "missing file")
    rows = f"[['t_train', '{path}', '{path.parent}']]"
    opts = ["DATASETS.COCO_FOLDERS", rows, "DATASETS.TRAIN", "('t_train',)", "DATASETS.TEST", "('t_train',)"]
    output = train(*opts, "OUTPUT_DIR", tmp_path / "run")
    assert [line[:14] for line in output.splitlines()] == ["wsl-d2 train: "] * 2
    assert "NUM_CLASSES is 12" in output and "1 of 4 image files are not in" in output
    assert not (tmp_path / "run").exists()
    output = train(*opts, "MODEL.WEIGHTS", tmp_path / "absent.pth")
    assert output.startswith(f"wsl-d2 train: no weight file {tmp_path}/absent.pth; give a file, wsl://..., ")


def test_a_page_draws_the_annotations(tmp_path):
    path, _ = inject(tmp_path / "train", "16 bits")
    rows = f"[['t_train', '{path}', '{path.parent}']]"
    wsl_d2(
        *("data", "show", "--config-file", "Base-RCNN-FPN.yaml", "--output", tmp_path / "page.html", "--images", 3),
        *("DATASETS.COCO_FOLDERS", rows, "DATASETS.TRAIN", "('t_train',)", "MODEL.ROI_HEADS.NUM_CLASSES", 3),
    )
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 3 and "<td>bee</td><td>4</td>" in page
    answer, found = (
        page.index('class="headline">4 images with '),
        page.index("1 of 4 image files looked at have 16 bits"),
    )
    assert answer < found < page.index("<table")  # the answer first
