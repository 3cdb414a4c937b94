"""TIDE's kinds of error (arXiv 2008.08115) and their dAP, what AP50 would gain without them, with intervals.

A detection that is a false positive at IoU 0.5 is, by its overlap with objects of its own class and of others:

    classification  0.5 or more with an object of another class
    localization    0.1 to 0.5 with one of its own class
    both            0.1 to 0.5 with one of another class
    duplicate       0.5 or more with one of its own class, which a detection of a higher score has found
    background      below 0.1 with every object

An object that no detection finds, nor would find were its class or its box right, is "missed". The dAP of a kind is the
AP50 without it, minus AP50: classification and localization errors become true positives where the object is not found
otherwise, other false positives are left out, missed objects do not count. dAPs do not add up to 100 - AP50.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.cocoeval import COCOeval

from wsl_d2.analysis.ap_gain import mean_of_defined, resampled_ap
from wsl_d2.analysis.gain import BootstrapEstimate
from wsl_d2.analysis.matches import ClassMatches, class_matches, entries_of

KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
_FOREGROUND, _BACKGROUND = 0.5, 0.1


def error_dap(evaluation: COCOeval, counts: np.ndarray) -> dict[str, BootstrapEstimate]:
    """Returns kind -> dAP, in points of AP50.

    Args:
        evaluation: of :func:`wsl_d2.analysis.matches.evaluate`.
        counts: (B, I) of :func:`wsl_d2.analysis.ap_gain.draw_counts`.
    """
    weights = np.concatenate([np.ones((1, counts.shape[1])), counts]).T.astype(np.float32, order="C")
    tables = _tables(evaluation)
    as_it_is = _mean_ap([table.matches() for table in tables], evaluation, weights)
    daps = {}
    for kind in KINDS:
        without = _mean_ap([table.matches(without=kind) for table in tables], evaluation, weights)
        difference = 100 * (without - as_it_is)
        daps[kind] = BootstrapEstimate(float(difference[0]), difference[1:])
    return daps


def count_errors(evaluation: COCOeval) -> dict[str, int]:
    """Returns kind -> number of wrong detections, whatever their score, or of missed objects."""
    tables = [table for table in _tables(evaluation) if table.plain is not None]
    found = {kind: sum(int((table.kind == place).sum()) for table in tables) for place, kind in enumerate(KINDS)}
    return found | {"missed": sum(int(table.num_missed.sum()) for table in tables)}


def _tables(evaluation: COCOeval) -> list[_Table]:
    tables = [_Table(evaluation, k) for k in range(len(evaluation.params.catIds))]
    for place, image in enumerate(evaluation.params.imgIds):
        _classify(evaluation, tables, place, image)
    return tables


def _mean_ap(matches: list[ClassMatches | None], evaluation: COCOeval, weights: np.ndarray) -> np.ndarray:
    def work(one: ClassMatches) -> np.ndarray:
        return resampled_ap(one, weights, evaluation.params.recThrs)[0]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(work, [one for one in matches if one is not None]))
    values = np.array([row for row in found if not np.isnan(row[0])])
    return mean_of_defined(values, axis=(0,)) if len(values) else np.zeros(weights.shape[1])


class _Table:
    """The detections of one class at IoU 0.5, in order of falling score, and what is wrong with each."""

    def __init__(self, evaluation: COCOeval, class_place: int):
        self.plain = class_matches(evaluation, class_place, 0)
        self.row_of: dict[int, int] = {}  # detection id -> its row
        self.scores = np.zeros(0)
        self.found: set[int] = set()  # ids of objects
        if self.plain is None:
            return
        entries = [entry for _, entry in entries_of(evaluation, class_place, 0)]
        scores = np.concatenate([entry["dtScores"] for entry in entries])
        order = np.argsort(-scores, kind="mergesort")
        self.scores = scores[order]
        ids = [identifier for entry in entries for identifier in entry["dtIds"]]
        self.row_of = {ids[place]: row for row, place in enumerate(order)}
        for entry in entries:
            self.found |= {g for g, d in zip(entry["gtIds"], entry["gtMatches"][0], strict=True) if d}
        self.kind = np.full(len(order), -1)  # place in KINDS
        self.is_wrong = self.plain.counted[0] & ~self.plain.true[0]
        self.would_find = np.zeros(len(order), bool)  # an object, were its box right
        self.additions: list[tuple[int, float]] = []  # (place of the image, score) of detections of another class
        self.num_missed = np.zeros(len(self.plain.images), int)

    def matches(self, without: str = "") -> ClassMatches | None:
        """The matches at IoU 0.5 alone, without the errors of a kind."""
        if self.plain is None:
            return None
        plain = self.plain
        one = replace(plain, true=plain.true[:1], counted=plain.counted[:1])
        if not without:
            return one
        if without == "missed":
            return replace(one, num_objects=plain.num_objects - self.num_missed)
        wrong = self.kind == KINDS.index(without)
        true, counted = one.true.copy(), one.counted.copy()
        counted[0, wrong] = False
        if without == "localization":
            true[0, self.would_find], counted[0, self.would_find] = True, True
        if without != "classification" or not self.additions:
            return replace(one, true=true, counted=counted)
        place_of = {place: row for row, place in enumerate(plain.images.tolist())}
        images = np.array([place_of[place] for place, _ in self.additions])
        order = np.argsort(-np.concatenate([self.scores, [score for _, score in self.additions]]), kind="mergesort")
        ones = np.ones((1, len(images)), bool)
        return replace(
            one,
            image=np.concatenate([plain.image, images])[order],
            true=np.concatenate([true, ones], axis=1)[:, order],
            counted=np.concatenate([counted, ones], axis=1)[:, order],
        )


def _classify(evaluation: COCOeval, tables: list[_Table], place: int, image: int) -> None:
    """Finds the kind of every wrong detection of an image, and its missed objects."""
    classes = evaluation.params.catIds
    detections, objects = [], []
    for k, category in enumerate(classes):
        rows = tables[k].row_of
        detections += [(k, d, rows[d["id"]]) for d in evaluation._dts[image, category] if d["id"] in rows]
        objects += [(k, g) for g in evaluation._gts[image, category] if not g["ignore"]]
    wrong = [item for item in detections if tables[item[0]].is_wrong[item[2]]]
    part = "segmentation" if evaluation.params.iouType == "segm" else "bbox"
    wrong.sort(key=lambda item: -item[1]["score"])
    overlaps = np.zeros((len(wrong), len(objects)))
    if wrong and objects:
        overlaps = np.asarray(
            mask_api.iou([d[part] for _, d, _ in wrong], [g[part] for _, g in objects], [0] * len(objects))
        )
    same = np.array([k for k, _, _ in wrong], int)[:, None] == np.array([k for k, _ in objects], int)
    own, other = np.where(same, overlaps, 0.0), np.where(same, 0.0, overlaps)
    best_own, best_other = own.max(axis=1, initial=0.0), other.max(axis=1, initial=0.0)
    near_own = best_own >= _BACKGROUND
    kinds = np.select(
        [near_own & (best_own < _FOREGROUND), near_own, best_other >= _FOREGROUND, best_other >= _BACKGROUND],
        [KINDS.index(kind) for kind in ("localization", "duplicate", "classification", "both")],
        KINDS.index("background"),
    )
    for (k, _, row), kind in zip(wrong, kinds, strict=True):
        tables[k].kind[row] = kind
    found = {g["id"] for k, g in objects if g["id"] in tables[k].found}
    near = set(found)
    for name, overlap in (("localization", own), ("classification", other)):
        taken = set(found)
        for number in np.flatnonzero(kinds == KINDS.index(name)):
            k, detection, row = wrong[number]
            target, ground = objects[int(overlap[number].argmax())]
            near.add(ground["id"])
            if ground["id"] in taken:
                continue
            taken.add(ground["id"])
            if name == "localization":
                tables[k].would_find[row] = True
            else:
                tables[target].additions.append((place, detection["score"]))
    for k, ground in objects:
        if ground["id"] not in near:
            plain = tables[k].plain
            assert plain is not None
            tables[k].num_missed[np.searchsorted(plain.images, place)] += 1
