"""Kinds of error and their dAP, on detections whose errors are known."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO

from wsl_d2.analysis.ap_gain import bootstrap_evaluation, draw_counts
from wsl_d2.analysis.errors import KINDS, count_errors, error_dap
from wsl_d2.analysis.matches import evaluate


def ground_truth(objects, num_images=1):
    """(image, class, box) -> COCO."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i + 1, "width": 400, "height": 400} for i in range(num_images)],
            "categories": [{"id": k, "name": f"c{k}"} for k in (1, 2)],
            "annotations": [
                {"id": n + 1, "image_id": i, "category_id": k, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
                for n, (i, k, b) in enumerate(objects)
            ],
        }
        coco.createIndex()
    return coco


def detection(category, box, score, image=1):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


A, B, C = [10, 10, 40, 40], [100, 100, 40, 40], [200, 200, 40, 40]
NEAR_B = [120, 100, 40, 40]  # IoU 1/3
OBJECTS = [(1, 1, A), (1, 2, B), (1, 1, C)]


def evaluated(*detections, objects=OBJECTS):
    return evaluate(ground_truth(objects), list(detections), "bbox")


@pytest.mark.parametrize(
    "wrong, kind",
    [
        (detection(1, A, 0.8), "duplicate"),
        (detection(1, B, 0.8), "classification"),
        (detection(2, NEAR_B, 0.8), "localization"),
        (detection(1, NEAR_B, 0.8), "both"),
        (detection(1, [300, 20, 30, 30], 0.8), "background"),
    ],
)
def test_each_kind_is_known(wrong, kind):
    counts = count_errors(evaluated(detection(1, A, 0.9), detection(1, C, 0.85), wrong))
    near_b = kind in (
        "classification",
        "localization",
    )  # then the object counts as that kind of error and not as missed
    assert counts == dict.fromkeys(KINDS, 0) | {kind: 1, "missed": 0 if near_b else 1}


def test_dap_is_what_ap50_gains():
    """Class 1: one of two objects found, a wrong class in front. Class 2: its object has a detection of class 1."""
    evaluation = evaluated(detection(1, B, 0.9), detection(1, A, 0.8))
    counts = draw_counts(1, 3, 0)
    # AP50 of class 1 is 51 of 101 recall levels at a precision of 1/2, of class 2 it is 0.
    as_it_is = (51 / 101 / 2 + 0) / 2
    assert bootstrap_evaluation(evaluation, counts).metrics["AP50"].point == pytest.approx(100 * as_it_is)
    daps = error_dap(evaluation, counts)
    assert daps["classification"].point == pytest.approx(100 * ((51 / 101 + 1) / 2 - as_it_is))
    assert daps["missed"].point == pytest.approx(100 * ((1 / 2 + 0) / 2 - as_it_is))
    assert all(daps[kind].point == 0 for kind in ("localization", "both", "duplicate", "background"))


def test_a_localization_error_counts_once():
    evaluation = evaluated(detection(2, NEAR_B, 0.9), detection(2, [118, 100, 40, 40], 0.8), objects=OBJECTS[1:2])
    assert count_errors(evaluation)["localization"] == 2
    assert error_dap(evaluation, draw_counts(1, 2, 0))["localization"].point == pytest.approx(100)


def test_perfect_detections_have_no_dap_in_any_resample():
    objects = [(i, 1 + i % 2, A) for i in range(1, 7)]
    evaluation = evaluate(ground_truth(objects, 6), [detection(k, b, 0.9, i) for i, k, b in objects], "bbox")
    for value in error_dap(evaluation, draw_counts(6, 20, 0)).values():
        assert value.point == 0 and np.nanmax(np.abs(value.replicates)) == 0
