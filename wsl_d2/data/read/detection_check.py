"""The check of a detection dataset: its annotations, its image files, and whether they fit a config.

`wsl-d2 data check` runs it alone, and every training of a detector at its start, before the model is built. The
annotations are always read whole, and every file is looked up; the files' headers and ends are read as far as the time
goes, in random order.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image

from wsl_d2.coco import CocoError, GroundTruth, read_coco
from wsl_d2.data.read.decode import exif_orientation, has_16_bits, is_truncated
from wsl_d2.data.read.detection import problems_with_config
from wsl_d2.errors import FaultsError
from wsl_d2.files import open_regular

SECONDS_AT_START = 10.0  # for the files of all datasets of a run
_EXAMPLES = 3
_TOLERANCE = 1.0  # pixels by which a box may leave its image
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr")
_TAIL = 4096  # bytes at the end of a file that tell it from others of its size


@dataclass(frozen=True)
class Finding:
    """One kind of fault.

    Args:
        what: "of the 20 images have no file"; after the count it makes a sentence.
        count: how many are so.
        examples: some of them.
        cure: what comes of it, or what to do.
        is_error: whether training or evaluation would stop or learn nonsense.
    """

    what: str
    count: int
    examples: tuple[str, ...]
    cure: str
    is_error: bool = False

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        examples = f" ({', '.join(self.examples)}{more})" if self.examples else ""
        return f"{self.count:,} {self.what}{examples}: {self.cure}."


@dataclass
class DetectionCheck:
    """What was found in a dataset.

    Attributes:
        source: its annotation file.
        classes: names of its categories, by their ids.
        facts: what there is, (what, count).
        findings: what is wrong, errors first.
        problems: errors in one sentence each, without a count: of the config.
        contents: file path -> (bytes, SHA-256 of the end), of the files that were read.
        seconds: that it took.
    """

    source: str
    classes: list[str] = field(default_factory=list)
    facts: list[tuple[str, int]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    contents: dict[str, tuple[int, str]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, what: str, examples: Sequence, cure: str, is_error: bool = False) -> None:
        """Adds a finding about ``examples``, all that are so; none if there are none."""
        if examples:
            shown = tuple(str(example) for example in examples[:_EXAMPLES])
            self.findings.append(Finding(what, len(examples), shown, cure, is_error))
            self.findings.sort(key=lambda finding: not finding.is_error)

    @property
    def errors(self) -> list[str]:
        """One line for each."""
        found = [str(finding) for finding in self.findings if finding.is_error]
        return [f"{self.source}: {line}" for line in [*self.problems, *found]]

    @property
    def warnings(self) -> list[str]:
        """One line for each."""
        return [f"{self.source}: {finding}" for finding in self.findings if not finding.is_error]


def check_detection(
    annotations: str | Path,
    images: str | Path,
    cfg: CfgNode | None = None,
    *,
    seconds: float = float("inf"),
    for_training: bool = True,
    keep: bool = False,
) -> DetectionCheck:
    """Checks a dataset in COCO's format.

    Args:
        annotations: their JSON.
        images: the folder that its file names are relative to.
        cfg: of a detector that the dataset is to fit: NUM_CLASSES, MASK_ON, MASK_FORMAT.
        seconds: after which no further image file is read.
        for_training: whether to say what training leaves out.
        keep: as of :func:`wsl_d2.coco.read_coco`, for a training that follows.

    Raises:
        CocoError: the annotations cannot be read; names the first entry.
    """
    start = time.monotonic()
    truth = read_coco(PathManager.get_local_path(str(annotations)), say=False, keep=keep)
    classes = [row["name"] for row in sorted(truth.cats.values(), key=lambda row: row["id"])]
    check = DetectionCheck(str(annotations), classes)
    rows = list(truth.imgs.values())
    objects = [row for row in truth.anns.values() if not row["iscrowd"]]
    check.facts = [
        ("images", len(rows)),
        ("categories", len(truth.cats)),
        ("objects", len(objects)),
        ("objects with polygons", sum(isinstance(row.get("segmentation"), list) for row in objects)),
        ("objects with RLE masks", sum(isinstance(row.get("segmentation"), dict) for row in objects)),
        ("objects with keypoints", sum("keypoints" in row for row in objects)),
        ("crowds", len(truth.anns) - len(objects)),
    ]
    for what, count in truth.changes.items():
        check.findings.append(Finding(f"{what}, in memory", count, (), "the file is left as it is"))
    if truth.has_annotations:
        _check_objects(check, truth, objects, for_training, cfg)
        _check_boxes(check, truth, objects)
    elif for_training:
        check.problems.append("there is no list 'annotations'; nothing can be learned from it.")
    if cfg is not None and for_training:
        check.problems += problems_with_config(cfg, classes, objects)
    _check_files(check, truth, rows, str(images), start + seconds)
    check.seconds = time.monotonic() - start
    return check


def _check_objects(
    check: DetectionCheck, truth: GroundTruth, objects: list[dict], for_training: bool, cfg: CfgNode | None
) -> None:
    with_objects = {row["image_id"] for row in objects}
    empty = [truth.imgs[i].get("file_name") for i in truth.imgs if i not in with_objects]
    if not objects:
        check.problems.append("no image has an object that is no crowd; there is nothing to learn or to evaluate.")
    elif for_training and (cfg is None or cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS):
        kept = "training leaves them out, unless DATALOADER.FILTER_EMPTY_ANNOTATIONS is False"
        check.add(f"of {len(truth.imgs):,} images have no object", empty, kept)
    seen = {row["category_id"] for row in objects}
    unseen = [row["name"] for row in truth.cats.values() if row["id"] not in seen]
    check.add(f"of {len(truth.cats):,} categories have no object", unseen, "a class is trained for each all the same")


def _check_boxes(check: DetectionCheck, truth: GroundTruth, objects: list[dict]) -> None:
    """Boxes without area, outside, as corners, or in fractions."""
    if not objects:
        return
    boxes = np.array([row["bbox"] for row in objects], float).reshape(-1, 4)
    sizes = [truth.imgs[row["image_id"]] for row in objects]
    sides = np.array([(row["width"] or np.inf, row["height"] or np.inf) for row in sizes], float)
    corner, extent = boxes[:, :2], boxes[:, 2:]
    empty = (extent <= 0).any(axis=1)
    beyond = (corner < -_TOLERANCE).any(axis=1) | (corner + extent > sides + _TOLERANCE).any(axis=1)
    outside = ~empty & ((corner >= sides) | (corner + extent <= 0)).any(axis=1)

    def named(chosen) -> list[str]:
        return [f"{objects[i]['bbox']} of {sizes[i].get('file_name')}" for i in np.flatnonzero(chosen)]

    everything = np.ones(len(boxes), bool)
    if boxes.max() <= 1:
        check.add(
            "boxes are within 0 to 1",
            named(everything),
            "they seem to be fractions of the image; COCO's are [x, y, width, height] in pixels",
            True,
        )
    elif beyond.mean() > 0.5 and (extent > corner).all() and (extent <= sides + _TOLERANCE).all():
        check.add(
            f"of {len(boxes):,} boxes leave their image",
            named(beyond),
            "they seem to be [x1, y1, x2, y2]; COCO's are [x, y, width, height]",
            True,
        )
    else:
        of = f"of {len(boxes):,} boxes"
        check.add(f"{of} have no area", named(empty), "training leaves them out, and evaluation counts them as missed")
        check.add(f"{of} lie outside their image", named(outside), "training leaves them out")
        check.add(f"{of} reach beyond their image", named(beyond & ~outside & ~empty), "training clips them to it")


def _check_files(check: DetectionCheck, truth: GroundTruth, rows: list[dict], folder: str, deadline: float) -> None:
    named, unnamed = {}, []
    for row in rows:
        if not isinstance(row.get("file_name"), str) or not row["file_name"]:
            unnamed.append(truth.images.original(row["id"]))
        else:
            named[row["id"]] = os.path.join(folder, row["file_name"])
    check.add(f"of {len(rows):,} images have no file_name", unnamed, "training and evaluation need it", True)
    unsized = [row.get("file_name") for row in rows if not (row["height"] and row["width"])]
    check.add(f"of {len(rows):,} images have no height or width", unsized, "training needs them, in pixels", True)
    repeated = [Path(path).name for path, count in Counter(named.values()).items() if count > 1]
    check.add("files have several entries in images", repeated, "each entry is an image of its own, with its objects")
    if "://" in folder:
        return
    existing = _existing(named.values())
    missing = [row["file_name"] for row in rows if row["id"] in named and named[row["id"]] not in existing]
    is_wrong = len(missing) == len(named)
    cure = "give the folder that file_name is relative to" if is_wrong else "copy them there, or remove their entries"
    check.add(f"of {len(rows):,} image files are not in {folder}", missing, cure, True)
    order = [row for row in rows if named.get(row["id"]) in existing]
    random.Random(0).shuffle(order)
    looked, faults = 0, _Faults()
    for row in order:
        if time.monotonic() > deadline:
            break
        looked += 1
        faults.look_at(row, named[row["id"]], check)
    check.facts.append(("image files looked at", looked))
    faults.report(check, looked)


@dataclass
class _Faults:
    """Of image files, by kind."""

    unreadable: list[str] = field(default_factory=list)
    turned: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    deep: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)

    def look_at(self, row: dict, path: str, check: DetectionCheck) -> None:
        name, expected = row["file_name"], (row["width"], row["height"])
        try:
            with open_regular(path) as file, Image.open(file) as image:
                size, mode, orientation = image.size, image.mode, exif_orientation(image)
                is_deep = has_16_bits(image)
                file.seek(0)
                head = file.read(16)
                num_bytes = file.seek(0, os.SEEK_END)
                file.seek(max(0, num_bytes - _TAIL))
                tail = file.read()
                if is_truncated(head, tail, num_bytes):  # or has bytes after its end, which its decoder knows
                    file.seek(0)
                    Image.open(file).load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = "no image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
            self.unreadable.append(f"{name} ({reason})")
            return
        check.contents[path] = (num_bytes, hashlib.sha256(tail).hexdigest())
        upright = size[::-1] if orientation >= 5 else size
        if None not in expected and upright != expected:
            text = f"{name} is {upright[0]} x {upright[1]}, not {expected[0]} x {expected[1]}"
            (self.turned if upright == expected[::-1] and orientation >= 5 else self.resized).append(text)
        if is_deep:
            self.deep.append(name)
        elif mode not in _PLAIN_MODES:
            self.odd.append(f"{name} ({mode})")

    def report(self, check: DetectionCheck, looked: int) -> None:
        of = f"of {looked:,} image files looked at"
        check.add(f"{of} cannot be read", self.unreadable, "copy them again, or remove their entries", True)
        check.add(
            f"{of} are turned by EXIF and annotated as stored",
            self.turned,
            "save them without the EXIF orientation, or annotate them upright",
            True,
        )
        check.add(
            f"{of} have another size than their entry",
            self.resized,
            "give the files that were annotated, or mend width and height (and the boxes, if it was resized)",
            True,
        )
        check.add(f"{of} have 16 bits a pixel", self.deep, "they are scaled to 8 bits, 65535 to 255")
        check.add(
            f"{of} are no gray, color or palette images", self.odd, "their colors may come out wrong; save as RGB"
        )


def _existing(paths: Iterable[str]) -> set[str]:
    """Those that are files, by one listing of each folder."""
    by_folder: dict[str, list[str]] = {}
    for path in paths:
        by_folder.setdefault(os.path.dirname(path), []).append(path)
    found: set[str] = set()
    for folder, members in by_folder.items():
        try:
            names = set(os.listdir(folder or "."))
        except OSError:
            continue
        found.update(path for path in members if os.path.basename(path) in names)
    return found


def compare_datasets(train: DetectionCheck, val: DetectionCheck) -> None:
    """Adds to ``val``'s check what it may not share with ``train``, and what it must.

    Images that are in both, byte for byte, are a warning; only files that were read in both are compared. Other
    categories, or another order of their ids, are an error.
    """
    known: dict[tuple[int, str], list[str]] = {}
    for path, content in train.contents.items():
        known.setdefault(content, []).append(path)
    shared = [
        os.path.basename(path)
        for path, content in val.contents.items()
        if any(_same_bytes(path, other) for other in known.get(content, ()))
    ]
    val.add(
        f"of {len(val.contents):,} image files are in {train.source}, too",
        shared,
        "AP on images that were trained on says nothing; `wsl-d2 duplicates` also finds near-duplicates",
    )
    if train.classes != val.classes:
        val.problems.append(
            f"its categories are {_listed(val.classes)}, those of {train.source} {_listed(train.classes)}; both must "
            "have the same, in the same order of ids."
        )


def _same_bytes(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(other) or Path(path).read_bytes() == Path(other).read_bytes()


_WHERE = (
    " Detectron2's own datasets lie in the folder that DETECTRON2_DATASETS names, ./datasets if it is not set; of your "
    "own data, give DATASETS.COCO_FOLDERS \"[['mine', '/path/of/train.json', '/path/of/images']]\" and the name in "
    "place of {name}, or use wsl-d2 gain."
)


def check_run(cfg: CfgNode, evaluation_alone: bool = False) -> list[str]:
    """Checks the COCO datasets of a detector's config, on one process of each machine; called by all together.

    Args:
        cfg: with its datasets registered.
        evaluation_alone: whether only DATASETS.TEST is read.

    Returns:
        One line for each dataset, and for each warning; empty on the other processes.

    Raises:
        FaultsError: on all processes, one line for each error.
    """
    lines: list[str] = []
    errors: list[str] = []
    if comm.get_local_rank() == 0:
        lines, errors = _check_datasets(cfg, () if evaluation_alone else cfg.DATASETS.TRAIN)
    if errors := list(dict.fromkeys(line for found in comm.all_gather(errors) for line in found)):
        raise FaultsError(errors)
    return lines


def _check_datasets(cfg: CfgNode, train: Sequence[str]) -> tuple[list[str], list[str]]:
    deadline = time.monotonic() + SECONDS_AT_START
    lines, errors, checks = [], [], {}
    names = list(dict.fromkeys((*train, *cfg.DATASETS.TEST)))
    for left, name in zip(range(len(names), 0, -1), names, strict=True):
        if name not in DatasetCatalog.list():
            errors.append(f"no dataset {name!r} is registered; a row of DATASETS.COCO_FOLDERS registers one.")
            continue
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type") != "coco" or not metadata.get("json_file"):
            continue
        seconds = max(0.0, deadline - time.monotonic()) / left
        try:
            check = check_detection(
                metadata.json_file,
                metadata.image_root,
                cfg,
                seconds=seconds,
                for_training=name in train,
                keep=name in train,
            )
        except CocoError as error:
            is_there = os.path.exists(metadata.json_file)
            errors.append(f"{error}{'' if is_there else _WHERE.format(name=name)}")
            continue
        checks[name] = check
        for other in train:
            if name not in train and other in checks:
                compare_datasets(checks[other], check)
        counts = ", ".join(f"{count:,} {what}" for what, count in check.facts if count)
        lines += [f"{name}: {counts}; checked in {check.seconds:.1f} s", *check.warnings]
        errors += check.errors
    return lines, errors


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} ({len(names)})"
