"""COCO's files as people have them: one reader for training, evaluation and comparison.

Files keep the ids that their makers gave them. In memory all ids are whole numbers and no field is missing; what had to
be filled in is said in one line of the log. What cannot be read is one error.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from wsl_d2.errors import UserError

IOU_TYPES = ("bbox", "segm", "keypoints")
PLURALS = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}
MAX_DETECTIONS = 100
_FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
_COCO_KEYPOINTS = 17
_said: set[str] = set()
_kept: dict[tuple, GroundTruth] = {}  # see read_coco


class CocoError(UserError, ValueError):
    """A file of annotations or of detections cannot be read as COCO's format."""


class Ids:
    """The whole numbers that stand for the ids of a file; ids that are whole numbers stand for themselves.

    Args:
        originals: the ids as the file has them, without repetition.

    Attributes:
        are_numbers: whether the file's ids are whole numbers.
    """

    def __init__(self, originals: Sequence):
        numbers: list = [_whole(value) for value in originals]
        self.are_numbers = None not in numbers
        if self.are_numbers:
            originals = numbers
        else:
            originals, numbers = sorted(originals, key=str), list(range(1, len(numbers) + 1))
        self._numbers = dict(zip(originals, numbers, strict=True))
        self._originals = dict(zip(numbers, originals, strict=True))

    def number(self, original) -> int | None:
        """Returns the number of an id, also of one that was written as text here and as a number there; or None."""
        try:
            found = self._numbers.get(original)
        except TypeError:  # a list or a mapping
            return None
        return self._by_text.get(_as_text(original)) if found is None else found

    def original(self, number: int):
        """Returns the id as the file has it."""
        return self._originals[number]

    @cached_property
    def _by_text(self) -> dict[str, int]:
        return {_as_text(original): number for original, number in self._numbers.items()}


class GroundTruth(COCO):
    """Annotations as pycocotools indexes them.

    Attributes:
        source: their file.
        images, categories: between the ids of the file and those in memory.
        has_annotations: False for the images of a test server.
        iou_types: those of :data:`IOU_TYPES` that all objects can be evaluated by.
        left_out: those that only some objects have, with the reason.
        changes: what had to be filled in or left out -> how often.
        num_keypoints: of an object; 0 where there are none.
    """

    def __init__(self, contents: dict, source: str):
        super().__init__()
        self.source = source
        self.changes: Counter[str] = Counter()
        images = self._rows(contents, "images")
        if any("neg_category_ids" in row or "not_exhaustive_category_ids" in row for row in images):
            raise CocoError(
                f"{source} is in LVIS's format, whose AP leaves out what was not looked for in an image; it is not "
                "supported. Evaluate with the lvis package."
            )
        images, self.images = self._distinct(images, "image")
        for row in images:
            row["height"], row["width"] = _whole(row.get("height")), _whole(row.get("width"))
        categories, self.categories = self._distinct(self._rows(contents, "categories"), "category")
        if not categories:
            raise CocoError(f"{source} has no categories.")
        names = [str(row["id"] if row.get("name") is None else row["name"]) for row in categories]
        occurrences = Counter(names)
        for row, name in zip(categories, names, strict=True):
            row["name"] = name
            if occurrences[name] > 1:
                row["name"] += f" ({row['id']})"
                self.changes["categories of the same name are told apart by their ids"] += 1
        self.has_annotations = "annotations" in contents
        annotations = self._rows(contents, "annotations") if self.has_annotations else []
        sizes = {row["id"]: (row["height"], row["width"]) for row in images}
        self.left_out: dict[str, str] = {}
        annotations = self._annotations(annotations, sizes)
        self.num_keypoints = max((len(row["keypoints"]) // 3 for row in annotations if "keypoints" in row), default=0)
        self.iou_types = self._iou_types(annotations, sizes)
        self.dataset = contents | {"images": images, "categories": categories, "annotations": annotations}
        with contextlib.redirect_stdout(io.StringIO()):
            self.createIndex()

    def _rows(self, contents: dict, key: str) -> list[dict]:
        rows = contents.get(key)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise CocoError(
                f"{self.source} has no list {key!r}; COCO annotations are a mapping with the lists images, categories "
                "and annotations."
            )
        return rows

    def _distinct(self, rows: list[dict], what: str) -> tuple[list[dict], Ids]:
        """Rows without repetition, numbered; and their ids."""
        found: dict = {}
        for row in rows:
            identifier = row.get("id")
            if not isinstance(identifier, str | int | float) or identifier != identifier:
                raise CocoError(f"{self.source}: the {what} {_short(row)} has no id; an id is a number or a text.")
            if found.setdefault(identifier, row) != row:
                raise CocoError(f"{self.source}: two different entries have the {what} id {identifier!r}.")
        if len(found) < len(rows):
            self.changes[f"{what} entries that repeat another are left out"] += len(rows) - len(found)
        ids = Ids(list(found))
        if not ids.are_numbers:
            self.changes[f"{what} ids are no whole numbers and are numbered in their order"] += len(found)
        return [row | {"id": ids.number(identifier)} for identifier, row in found.items()], ids

    def _annotations(self, rows: list[dict], sizes: dict) -> list[dict]:
        kept: list[dict] = []
        bad: list[CocoError] = []
        for place, row in enumerate(rows):
            try:
                self._read_annotation(row, place, sizes, kept)
            except CocoError as error:
                bad.append(error)
        if bad:
            more = f" And {len(bad) - 1} more annotations cannot be read." if len(bad) > 1 else ""
            raise CocoError(f"{bad[0]}{more}")
        if rows and not kept:
            raise CocoError(
                f"{self.source}: no annotation is of an image in the file; image_id {rows[0].get('image_id')!r} is "
                f"none of the images' ids, such as {next(iter(self.images._numbers), None)!r}."
            )
        self._number_annotations(kept)
        return kept

    def _read_annotation(self, row: dict, place: int, sizes: dict, kept: list[dict]) -> None:
        image = self.images.number(row.get("image_id"))
        if image is None:
            self.changes["annotations of images that are not in the file are left out"] += 1
            return
        where = f"{self.source}: annotation {row.get('id', f'number {place + 1}')!r} of image {row['image_id']!r}"
        row["image_id"] = image
        category = self.categories.number(row.get("category_id"))
        if category is None:
            raise CocoError(f"{where} has the category_id {row.get('category_id')!r}, which categories lack.")
        row["category_id"] = category
        row["iscrowd"] = self._crowd(row, where)
        self._geometry(row, sizes[image], where)
        kept.append(row)

    def _crowd(self, row: dict, where: str) -> int:
        flags = {}
        for key in ("iscrowd", "ignore"):
            value = row.pop(key, None)
            if value is None and key == "iscrowd":
                self.changes["annotations without iscrowd are no crowds"] += 1
            try:
                flags[key] = int(value or 0)
            except (TypeError, ValueError, OverflowError):
                flags[key] = -1
            if flags[key] not in (0, 1):
                raise CocoError(f"{where} has {key} {value!r}; it must be 0 or 1.")
        if flags["ignore"] and not flags["iscrowd"]:
            self.changes["annotations marked as ignore count as crowds"] += 1
        return max(flags.values())

    def _geometry(self, row: dict, size: tuple, where: str) -> None:
        """Box, mask, keypoints and area of an annotation, in place."""
        mask = _checked_mask(row.pop("segmentation", None), size, where)
        if mask is not None:
            row["segmentation"] = mask
            if not mask:  # which Detectron2 leaves out of training
                self.changes["annotations have polygons of fewer than 3 points alone, and so no mask"] += 1
        is_measurable = mask and (isinstance(mask, dict) or None not in size)
        box = _as_list(row.get("bbox"))
        if not box and is_measurable:
            box = mask_api.toBbox(_rle(mask, size)).tolist()
            self.changes["boxes are worked out from masks"] += 1
        if not box:
            raise CocoError(f"{where} has neither a box nor a mask.")
        if not _are_numbers(box, 4) or box[2] < 0 or box[3] < 0:
            raise CocoError(f"{where} has the box {_short(box)}; it must be [x, y, width, height] in pixels.")
        row["bbox"] = box
        if keypoints := _checked_keypoints(row.pop("keypoints", None), where):
            row["keypoints"] = keypoints
            if not isinstance(row.get("num_keypoints"), int):
                row["num_keypoints"] = sum(visible > 0 for visible in keypoints[2::3])
        if not _are_numbers([row.get("area")], 1) or row["area"] < 0:
            row["area"] = float(mask_api.area(_rle(mask, size))) if is_measurable else float(box[2] * box[3])
            self.changes["areas are worked out from masks or boxes"] += 1

    def _number_annotations(self, rows: list[dict]) -> None:
        ids: list = [_whole(row.get("id")) for row in rows]
        if None in ids:
            reason = "some are missing or no whole numbers"
        elif 0 in ids:
            reason = "id 0 is among them, and pycocotools takes a match with it for no match"
        elif min(ids, default=1) < 0:
            reason = "some are below 0, and faster-coco-eval takes a match with them for no match"
        elif len(set(ids)) < len(ids):
            reason = "some repeat"
        else:
            reason = ""
        if reason:
            self.changes[f"annotations are numbered anew ({reason})"] += len(ids)
            ids = list(range(1, len(rows) + 1))
        for number, row in zip(ids, rows, strict=True):
            row["id"] = number

    def _iou_types(self, rows: list[dict], sizes: dict) -> tuple[str, ...]:
        """What all objects have; crowds without a mask or keypoints get those of their box, as they are only areas
        in which detections are not counted."""
        found = ["bbox"]
        objects = [row for row in rows if not row["iscrowd"]]
        for iou_type in ("segm", "keypoints"):
            key = _FIELDS[iou_type]
            lacking = [row for row in objects if not row.get(key)]
            if len(lacking) == len(objects):
                continue
            if lacking:
                self.left_out[iou_type] = (
                    f"{len(lacking)} of {len(objects)} objects of {self.source} have no {PLURALS[iou_type]}, such as "
                    f"annotation {lacking[0]['id']}"
                )
            elif iou_type == "segm" and any(None in size for size in sizes.values()):
                self.left_out[iou_type] = f"{self.source} has images without height and width"
            elif iou_type == "keypoints" and len({len(row[key]) for row in objects}) > 1:
                self.left_out[iou_type] = f"objects of {self.source} have different numbers of keypoints"
            else:
                found.append(iou_type)
                for row in rows:
                    if not row.get(key) and iou_type == "segm":
                        x, y, width, height = row["bbox"]
                        row[key] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
                    elif not row.get(key):
                        row.update(keypoints=[0] * 3 * self.num_keypoints, num_keypoints=0)
        return tuple(found)


def read_coco(path: str | Path, say: bool = True, keep: bool = False) -> GroundTruth:
    """Reads COCO annotations, whatever ids they have and which fields they lack; the file stays as it is.

    - Text ids of images and categories are numbered in their order; fractions that are whole are whole numbers.
    - Annotations are numbered anew where an id is missing or repeated, 0 (pycocotools takes a match with annotation 0
      for no match) or below (faster-coco-eval does so).
    - Missing: ``iscrowd`` is 0; ``area`` is that of the mask, or of the box; a box is that around the mask.
    - ``ignore`` counts as ``iscrowd``. Annotations of unknown images are left out.

    What was done is in the result's ``changes``, and, with ``say``, one line of the log, the first time.

    Args:
        path: of the JSON.
        say: see above.
        keep: hand the result on to the next call for the same file, which then reads nothing.

    Raises:
        CocoError: the file is missing, is no JSON, is in LVIS's format, or has an entry that cannot be used; the
            message names the entry.
    """
    identity = _identity(path)
    ground_truth = _kept.pop(identity, None) or _read_ground_truth(path)
    if keep:
        _kept[identity] = ground_truth
    if say and ground_truth.changes:
        changes = "; ".join(f"{number} {what}" for what, number in ground_truth.changes.items())
        line = f"{path}, in memory: {changes}. The file is left as it is."
        if line not in _said:
            _said.add(line)
            logging.getLogger(__name__).warning(line)
    return ground_truth


def _identity(path: str | Path) -> tuple:
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns


def _read_ground_truth(path: str | Path) -> GroundTruth:
    contents = _read_json(path)
    if not isinstance(contents, dict):
        raise CocoError(
            f"{path} holds a list; COCO annotations are a mapping with the lists images, categories and annotations "
            "(is it a file of detections?)."
        )
    return GroundTruth(contents, str(path))


@dataclass(frozen=True)
class Results:
    """Detections of one run.

    Args:
        source: their file.
        detections: each with image_id and category_id as in memory, score, and of bbox, segmentation (compressed RLE)
            and keypoints those that it has.
        iou_types: those of :data:`IOU_TYPES` that all detections have; all of them where there is no detection.
    """

    source: str
    detections: list[dict] = field(repr=False)
    iou_types: tuple[str, ...]


def read_results(ground_truth: GroundTruth, results: Sequence[dict] | str | Path) -> Results:
    """Reads detections in COCO's result format, with the ids of the ground truth's file.

    Args:
        results: the detections, or the path of their JSON.

    Raises:
        CocoError: no JSON, no list of detections, a detection without a score or a place, or one on an image or of a
            category that the ground truth lacks.
    """
    source, rows = "the results", results
    if isinstance(results, str | Path):
        source, rows = str(results), _read_json(results)
    if not isinstance(rows, list | tuple) or not all(isinstance(row, dict) for row in rows):
        raise CocoError(f"{source} hold no list of detections in COCO's result format.")
    detections: list[dict] = []
    unknown: dict[str, dict] = {"image": {}, "category": {}}
    for place, row in enumerate(rows, 1):
        ids = {}
        for what, known in (("image", ground_truth.images), ("category", ground_truth.categories)):
            ids[what] = known.number(row.get(f"{what}_id"))
            if ids[what] is None:
                unknown[what].setdefault(str(row.get(f"{what}_id")), None)
        if None in ids.values():
            continue
        found = {"image_id": ids["image"], "category_id": ids["category"], "score": row.get("score")}
        image = ground_truth.imgs[found["image_id"]]
        size = (image["height"], image["width"])
        where = f"{source}: detection {place} on image {row['image_id']!r}"
        if not _are_numbers([found["score"]], 1):
            raise CocoError(f"{where} has the score {found['score']!r}; it must be a number.")
        if box := _as_list(row.get("bbox")):
            if not _are_numbers(box, 4):
                raise CocoError(f"{where} has the box {_short(box)}; it must be [x, y, width, height].")
            found["bbox"] = box
        if mask := _checked_mask(row.get("segmentation"), size, where, is_written_by_a_model=True):
            if isinstance(mask, list) and None in size:
                raise CocoError(f"{where} has polygons, but the image has no height and width in the ground truth.")
            found["segmentation"] = _rle(mask, size)
            if "bbox" not in found:
                found["bbox"] = mask_api.toBbox(found["segmentation"]).tolist()
        if keypoints := _checked_keypoints(row.get("keypoints"), where):
            found["keypoints"] = keypoints
        if not found.keys() & _FIELDS.values():
            raise CocoError(f"{where} has no bbox, segmentation or keypoints.")
        detections.append(found)
    for what, plural in (("image", "images"), ("category", "categories")):
        if unknown[what]:
            raise CocoError(
                f"{source} hold detections on {len(unknown[what])} {plural} that the ground truth lacks, such as "
                f"{what}_id {next(iter(unknown[what]))}; compare runs on the dataset they were evaluated on."
            )
    shared = tuple(t for t in IOU_TYPES if all(_FIELDS[t] in detection for detection in detections))
    return Results(source, detections, shared)


def shared_iou_types(
    ground_truth: GroundTruth, results: Sequence[Results], oks_sigmas: Sequence[float] = ()
) -> tuple[list[str], dict[str, str]]:
    """Returns what the ground truth and all results can be evaluated by, and what else some of them have, with the
    reason why it is left out.

    Args:
        oks_sigmas: of the keypoints (TEST.KEYPOINT_OKS_SIGMAS); COCO's 17 by default.
    """
    with_detections = [one for one in results if one.detections]
    if not with_detections:
        return ["bbox"], {}
    shared, left_out = [], {}
    for iou_type in IOU_TYPES:
        lacking = [one.source for one in with_detections if iou_type not in one.iou_types]
        plural = PLURALS[iou_type]
        if len(lacking) == len(with_detections):
            continue
        if iou_type not in ground_truth.iou_types:
            reason = f"{ground_truth.source} has no {plural}"
            left_out[iou_type] = ground_truth.left_out.get(iou_type, reason)
        elif lacking:
            left_out[iou_type] = f"no {plural} in {', '.join(lacking)}"
        elif iou_type == "keypoints" and (problem := _keypoints_problem(ground_truth, with_detections, oks_sigmas)):
            left_out[iou_type] = problem
        else:
            shared.append(iou_type)
    if not shared:
        raise CocoError(
            f"{ground_truth.source} and the detections have nothing in common to be evaluated by: "
            + "; ".join(left_out.values())
        )
    return shared, left_out


def _keypoints_problem(ground_truth: GroundTruth, results: list[Results], oks_sigmas: Sequence[float]) -> str:
    numbers = {len(row["keypoints"]) // 3 for one in results for row in one.detections} | {ground_truth.num_keypoints}
    expected = len(oks_sigmas) or _COCO_KEYPOINTS
    if numbers == {expected}:
        return ""
    return (
        f"objects or detections have {' or '.join(map(str, sorted(numbers)))} keypoints and TEST.KEYPOINT_OKS_SIGMAS "
        f"has {expected} values"
    )


def match(
    ground_truth: GroundTruth,
    results: Results,
    iou_type: str,
    cocoeval: type = COCOeval,
    oks_sigmas: Sequence[float] = (),
    image_ids: Sequence[int] | None = None,
):
    """Matches detections with objects and accumulates them, as Detectron2 does; returns the ``cocoeval``.

    Args:
        iou_type: one of :func:`shared_iou_types`.
        cocoeval: pycocotools' class, or one made alike.
        oks_sigmas: of the keypoints; COCO's by default.
        image_ids: in memory, of the images to evaluate on; all by default.
    """
    rows = [dict(row, id=number, iscrowd=0) for number, row in enumerate(results.detections, 1)]
    for row in rows:
        if iou_type == "segm":  # Detectron2's choice: the area of a detection is that of its mask, not of its box
            row["area"] = int(mask_api.area(row["segmentation"]))
        else:
            if "bbox" not in row:
                x, y = np.asarray(row["keypoints"][0::3]), np.asarray(row["keypoints"][1::3])
                row["bbox"] = [float(v) for v in (x.min(), y.min(), np.ptp(x), np.ptp(y))]
            row["area"] = row["bbox"][2] * row["bbox"][3]
    with contextlib.redirect_stdout(io.StringIO()):
        detections = COCO()
        detections.dataset = ground_truth.dataset | {"annotations": rows}
        detections.createIndex()
        evaluation = cocoeval(ground_truth, detections, iou_type)
        if iou_type == "keypoints":
            if oks_sigmas:
                evaluation.params.kpt_oks_sigmas = np.asarray(oks_sigmas, float)
        else:
            evaluation.params.maxDets = [1, 10, MAX_DETECTIONS]
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _read_json(path: str | Path):
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except OSError as error:
        raise CocoError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CocoError(f"{path} is no JSON: {error}.") from error


def _whole(value) -> int | None:
    """An int for numbers without a fraction that a float can hold exactly."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**53:
        return None
    return int(value) if value == int(value) else None


def _as_text(value) -> str:
    return str(value if (number := _whole(value)) is None else number)


def _as_list(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


def _are_numbers(values, length: int) -> bool:
    try:
        return isinstance(values, list | tuple) and len(values) == length and math.isfinite(sum(values))
    except TypeError:
        return False


def _short(value) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:76]} ..."


def _checked_keypoints(keypoints, where: str) -> list | None:
    keypoints = _as_list(keypoints)
    if not keypoints:
        return None
    if not isinstance(keypoints, list) or not _are_numbers(keypoints, len(keypoints)) or len(keypoints) % 3:
        raise CocoError(f"{where} has the keypoints {_short(keypoints)}; they must be [x, y, visibility, x, ...].")
    return keypoints


def _checked_mask(mask, size: tuple, where: str, is_written_by_a_model: bool = False):
    """Returns RLE as a mapping, polygons of 3 points and more as a list of lists, None where there is nothing.

    The compressed RLE that a model writes is taken for sound: a set has hundreds of thousands of them.
    """
    if not mask:
        return None
    if (
        isinstance(mask, dict)
        and isinstance(mask.get("counts"), str | bytes | list)
        and _are_numbers(mask.get("size"), 2)
    ):
        if None not in size and tuple(mask["size"]) != size:
            raise CocoError(f"{where} has a mask of {mask['size']} pixels (height, width) on an image of {list(size)}.")
        runs = mask["counts"]
        if isinstance(runs, str | bytes):
            if is_written_by_a_model:
                return mask
            runs = _decoded_runs(runs)
            is_whole = len(runs) and runs.min() >= 0 and runs.sum() == mask["size"][0] * mask["size"][1]
        else:
            is_whole = runs and _are_numbers(runs, len(runs)) and min(runs) >= 0
            is_whole = is_whole and sum(runs) == mask["size"][0] * mask["size"][1]
        if is_whole:
            return mask
    if isinstance(mask, list):
        polygons = [mask] if _are_numbers(mask, len(mask)) else mask
        if all(isinstance(polygon, list) and _are_numbers(polygon, len(polygon)) for polygon in polygons):
            return [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
    raise CocoError(f"{where} has the segmentation {_short(mask)}; it must be polygons or RLE of all pixels.")


def _decoded_runs(text: str | bytes) -> np.ndarray:
    """The lengths of runs that compressed RLE stands for; empty if it is none. pycocotools checks nothing of it."""
    try:
        digits = np.frombuffer(text.encode("ascii") if isinstance(text, str) else text, np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(digits & 32 == 0)  # of each number, in groups of 5 bits, the lowest first
    lengths = np.diff(ends, prepend=-1)
    if not len(ends) or ends[-1] != len(digits) - 1 or digits.min() < 0 or digits.max() > 63 or lengths.max() > 8:
        return np.zeros(0, np.int64)
    starts = ends + 1 - lengths
    place = np.arange(len(digits)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 31) << (5 * place), starts)
    runs -= np.where(digits[ends] & 16, 1 << (5 * lengths), 0)
    runs[1::2] = runs[1::2].cumsum()  # from the fourth on, what is added to the last but one
    runs[2::2] = runs[2::2].cumsum()
    return runs


def _rle(mask, size: tuple) -> dict:
    if isinstance(mask, list):
        return mask_api.merge(mask_api.frPyObjects(mask, *size))
    return mask_api.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask
