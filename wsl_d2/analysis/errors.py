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
from itertools import chain

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.cocoeval import COCOeval

from wsl_d2.analysis.ap_gain import mean_of_defined, resampled_ap
from wsl_d2.analysis.gain import BootstrapEstimate
from wsl_d2.analysis.matches import ClassMatches, class_matches, entries_of, order_of_scores

KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
# Of wrong detections; the first three change no true positive.
_WRONG = ("background", "duplicate", "both", "localization", "classification")
_FOREGROUND, _BACKGROUND = 0.5, 0.1


def error_dap(evaluation: COCOeval, counts: np.ndarray) -> dict[str, BootstrapEstimate]:
    """Returns kind -> dAP, in points of AP50.

    Args:
        evaluation: of :func:`wsl_d2.analysis.matches.evaluate`.
        counts: (B, I) of :func:`wsl_d2.analysis.ap_gain.draw_counts`.
    """
    weights = np.concatenate([np.ones((1, counts.shape[1])), counts]).T.astype(np.float32, order="C")

    def work(table: _Table) -> np.ndarray:
        return np.concatenate([resampled_ap(one, weights, evaluation.params.recThrs) for one in table.matches()])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(work, [table for table in _tables(evaluation) if table.plain is not None]))
    aps = np.zeros((2 + len(_WRONG), weights.shape[1]))
    for place, of_classes in enumerate(zip(*found, strict=True)):
        if defined := [row for row in of_classes if not np.isnan(row[0])]:
            aps[place] = mean_of_defined(np.array(defined), axis=(0,))
    daps = dict(zip((*_WRONG, "missed"), 100 * (aps[1:] - aps[0]), strict=True))
    return {kind: BootstrapEstimate(float(daps[kind][0]), daps[kind][1:]) for kind in KINDS}


def count_errors(evaluation: COCOeval) -> dict[str, int]:
    """Returns kind -> number of wrong detections, whatever their score, or of missed objects."""
    tables = [table for table in _tables(evaluation) if table.plain is not None]
    found = {kind: sum(int((table.kind == place).sum()) for table in tables) for place, kind in enumerate(KINDS)}
    return found | {"missed": sum(int(table.num_missed.sum()) for table in tables)}


def _tables(evaluation: COCOeval) -> list[_Table]:
    tables = [_Table(evaluation, k) for k in range(len(evaluation.params.catIds))]
    _classify(evaluation, tables)
    return tables


class _Table:
    """The detections of one class at IoU 0.5, in order of falling score, and what is wrong with each."""

    def __init__(self, evaluation: COCOeval, class_place: int):
        self.plain = next(iter(class_matches(evaluation, class_place)), None)
        self.found: list[float] = []  # ids of objects
        if self.plain is None:
            return
        entries = [entry for _, entry in entries_of(evaluation, class_place, 0)]
        scores, order = order_of_scores(entries)
        self.scores = scores[order]
        self.ids = np.fromiter(chain.from_iterable(entry["dtIds"] for entry in entries), int)[order]
        objects = np.fromiter(chain.from_iterable(entry["gtIds"] for entry in entries), int)
        self.found = objects[np.concatenate([entry["gtMatches"][0] for entry in entries]) != 0].tolist()
        self.kind = np.full(len(order), -1)  # place in KINDS
        self.is_wrong = self.plain.counted[0] & ~self.plain.true[0]
        self.would_find = np.zeros(len(order), bool)  # an object, were its box right
        self.additions: list[tuple[int, float]] = []  # (place of the image, score) of detections of another class
        self.num_missed = np.zeros(len(self.plain.images), int)

    def matches(self) -> tuple[ClassMatches, ClassMatches]:
        """The matches at IoU 0.5: as they are and without each kind of ``_WRONG``, as rows; and without missed ones."""
        plain = self.plain
        assert plain is not None
        number, more = 1 + len(_WRONG), len(self.additions)
        images = np.searchsorted(plain.images, [place for place, _ in self.additions])
        scores = np.concatenate([self.scores, [score for _, score in self.additions]])
        order = np.argsort(-scores, kind="mergesort")
        true, counted = (
            np.concatenate([np.repeat(rows[:1], number, axis=0), np.zeros((number, more), bool)], axis=1)
            for rows in (plain.true, plain.counted)
        )
        for row, kind in enumerate(_WRONG, 1):
            counted[row, : len(self.kind)][self.kind == KINDS.index(kind)] = False
        found = {"localization": np.flatnonzero(self.would_find), "classification": len(self.kind) + np.arange(more)}
        for kind, places in found.items():
            row = 1 + _WRONG.index(kind)
            true[row, places] = counted[row, places] = True
        image = np.concatenate([plain.image, images])[order]
        missed = replace(plain, num_objects=plain.num_objects - self.num_missed)
        return (
            replace(plain, image=image, true=true[:, order], counted=counted[:, order]),
            replace(missed, true=plain.true[:1], counted=plain.counted[:1]),
        )


def _classify(evaluation: COCOeval, tables: list[_Table]) -> None:
    """Finds the kind of every wrong detection, and the missed objects."""
    params = evaluation.params
    part = "segmentation" if params.iouType == "segm" else "bbox"
    used = [
        (k, table, table.plain, np.flatnonzero(table.is_wrong))
        for k, table in enumerate(tables)
        if table.plain is not None
    ]
    classes = np.concatenate([np.full(len(rows), k) for k, _, _, rows in used])
    places = np.concatenate([plain.images[plain.image[rows]] for _, _, plain, rows in used])
    scores = np.concatenate([table.scores[rows] for _, table, _, rows in used])
    ids = np.concatenate([table.ids[rows] for _, table, _, rows in used])
    order = np.lexsort((-scores, places))  # stable: by image, then by falling score
    shapes: list | np.ndarray = [evaluation.cocoDt.anns[number][part] for number in ids[order].tolist()]
    wrong_of, wrong_at = classes[order], np.searchsorted(places[order], np.arange(len(params.imgIds) + 1))
    class_place, image_place = ({n: i for i, n in enumerate(numbers)} for numbers in (params.catIds, params.imgIds))
    objects = [
        (image_place[image], class_place[category], g)
        for (image, category), rows in evaluation._gts.items()
        for g in rows
        if not g["ignore"]
    ]
    objects.sort(key=lambda row: row[:2])
    object_of = np.array([k for _, k, _ in objects], int)
    object_at = np.searchsorted([place for place, _, _ in objects], np.arange(len(params.imgIds) + 1))
    targets: list | np.ndarray = [g[part] for _, _, g in objects]
    if part == "bbox":
        shapes, targets = (np.fromiter(chain.from_iterable(boxes), float).reshape(-1, 4) for boxes in (shapes, targets))

    # Pairs of a wrong detection and an object that overlap enough to say something, by detection and then by object.
    pairs = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for place in range(len(params.imgIds)):
        wrong, ground = slice(*wrong_at[place : place + 2]), slice(*object_at[place : place + 2])
        if wrong.start < wrong.stop and ground.start < ground.stop:
            overlaps = np.asarray(mask_api.iou(shapes[wrong], targets[ground], [0] * (ground.stop - ground.start)))
            row, aim = np.nonzero(overlaps >= _BACKGROUND)
            pairs.append((wrong.start + row, ground.start + aim, overlaps[row, aim]))
    row, aim, overlap = map(np.concatenate, zip(*pairs, strict=True))
    is_own = wrong_of[row] == object_of[aim]
    own, own_aim = _best(row[is_own], aim[is_own], overlap[is_own], len(order))
    other, other_aim = _best(row[~is_own], aim[~is_own], overlap[~is_own], len(order))
    kinds = np.select(
        [(own > 0) & (own < _FOREGROUND), own > 0, other >= _FOREGROUND, other > 0],
        [KINDS.index(kind) for kind in ("localization", "duplicate", "classification", "both")],
        KINDS.index("background"),
    )

    found_ids = {number for table in tables for number in table.found}
    found = np.array([g["id"] in found_ids for _, _, g in objects], bool)
    object_image = np.array([place for place, _, _ in objects], int)
    near, would_find = found.copy(), np.zeros(len(order), bool)
    for name, aims in (("localization", own_aim), ("classification", other_aim)):
        rows = np.flatnonzero(kinds == KINDS.index(name))
        aimed_at, first = np.unique(aims[rows], return_index=True)  # the first has the highest score of its image
        near[aimed_at] = True
        is_free = ~found[aimed_at]
        rows, aimed_at = rows[first[is_free]], aimed_at[is_free]
        if name == "localization":
            would_find[rows] = True
        else:
            for k, image, score in zip(object_of[aimed_at], object_image[aimed_at], scores[order[rows]], strict=True):
                tables[k].additions.append((int(image), float(score)))

    position = np.argsort(order)  # of each wrong detection, class after class
    start = 0
    for k, table, plain, rows in used:
        here = position[start : start + len(rows)]
        table.kind[rows], table.would_find[rows] = kinds[here], would_find[here]
        start += len(rows)
        missed = np.searchsorted(plain.images, object_image[~near & (object_of == k)])
        table.num_missed += np.bincount(missed, minlength=len(plain.images))


def _best(row: np.ndarray, aim: np.ndarray, overlap: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(num_rows,) each row's largest overlap, 0 where there is none, and the first of its aims that has it."""
    order = np.lexsort((aim, -overlap, row))
    rows, first = np.unique(row[order], return_index=True)
    best, best_aim = np.zeros(num_rows), np.zeros(num_rows, int)
    best[rows], best_aim[rows] = overlap[order[first]], aim[order[first]]
    return best, best_aim
