import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from toy_detections import NUM_IMAGES, random_detections, random_keypoints, random_world

from wsl_d2.analysis import METRICS, BootstrapEstimate, bootstrap_ap, gain_between, gain_of, paired_bootstrap
from wsl_d2.analysis.ap_gain import _last_threshold_reached, draw_counts, gains_by, resampled_ap
from wsl_d2.analysis.matches import ClassMatches
from wsl_d2.coco import CocoError, read_coco


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    contents = random_world(0)
    path = tmp_path_factory.mktemp("gt") / "gt.json"
    path.write_text(json.dumps(contents))
    return path, contents


def coco_stats(ground_truth, detections, iou_type, image_ids=None):
    """As Detectron2 has them: the area of a detected mask is its own, not that of its box."""
    detections = [{k: v for k, v in d.items() if k != "bbox" or iou_type != "segm"} for d in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(detections), iou_type)
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = [m for m in METRICS if m != "APs" or iou_type != "keypoints"]
    return dict(zip(names, 100 * evaluation.stats[: len(names)], strict=True))


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_point_values_equal_pycocotools(tmp_path, iou_type, seed):
    contents = random_world(0)
    detections = random_detections(contents, seed)
    random_keypoints(contents, detections)
    (tmp_path / "gt.json").write_text(json.dumps(contents))
    ground_truth = read_coco(tmp_path / "gt.json")
    ours = bootstrap_ap(ground_truth, detections, iou_type, draw_counts(NUM_IMAGES, 2, 0)).metrics
    expected = coco_stats(ground_truth, detections, iou_type)
    assert 5 < expected["AP"] < 95 and ours.keys() == expected.keys()
    for metric, value in expected.items():
        assert ours[metric].point == pytest.approx(value, abs=1e-10), metric


def resampled_world(contents, detections, counts):
    """The same data with each image written out as often as it was drawn."""
    images, annotations, copies = [], [], []
    for image, number in zip(contents["images"], counts, strict=True):
        for _ in range(number):
            new_id = len(images) + 1
            images.append(image | {"id": new_id})
            for a in contents["annotations"]:
                if a["image_id"] == image["id"]:
                    annotations.append(a | {"id": len(annotations) + 1, "image_id": new_id})
            copies += [d | {"image_id": new_id} for d in detections if d["image_id"] == image["id"]]
    return contents | {"images": images, "annotations": annotations}, copies


def test_replicates_equal_pycocotools_on_the_written_out_resample(world):
    path, contents = world
    detections = random_detections(contents, 5)
    counts = draw_counts(NUM_IMAGES, 6, seed=3)
    ours = bootstrap_ap(str(path), detections, "bbox", counts).metrics
    for row, drawn in enumerate(counts):
        resampled, copies = resampled_world(contents, detections, drawn)
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = resampled
            coco.createIndex()
        expected = coco_stats(coco, copies, "bbox")
        for metric in METRICS:
            value = np.nan if expected[metric] == -100 else expected[metric]
            np.testing.assert_allclose(ours[metric].replicates[row], value, atol=1e-4, err_msg=f"{metric} {row}")


def test_identical_runs_gain_exactly_nothing(world):
    path, contents = world
    detections = random_detections(contents, 1)
    for row in paired_bootstrap(path, detections, detections, "segm", num_resamples=50).values():
        assert row["gain"] == 0 and row["interval"] == [0, 0] and row["probability_of_gain"] == 0


def test_a_better_run_shows_a_gain_and_the_reverse_is_its_mirror(world):
    path, contents = world
    good, bad = random_detections(contents, 1, jitter=1.0, miss=0.0), random_detections(contents, 2, jitter=9.0)
    forward = paired_bootstrap(path, bad, good, "bbox", num_resamples=200)["AP"]
    backward = paired_bootstrap(path, good, bad, "bbox", num_resamples=200)["AP"]
    assert forward["gain"] > 10 and forward["interval"][0] > 0 and forward["probability_of_gain"] == 1
    assert forward["gain"] == pytest.approx(-backward["gain"])
    np.testing.assert_allclose(forward["interval"], [-v for v in reversed(backward["interval"])], atol=1e-9)


def test_a_run_without_detections_has_no_ap(world):
    path, contents = world
    row = paired_bootstrap(path, [], random_detections(contents, 1), "bbox", num_resamples=20)["AP"]
    assert row["baseline"] == 0 and row["gain"] == row["candidate"] > 0


def test_several_seeds_give_an_interval_of_the_method(world):
    path, contents = world
    counts = draw_counts(NUM_IMAGES, 300, 0)
    runs = [
        bootstrap_ap(str(path), random_detections(contents, s, jitter=j), "bbox", counts)
        for s, j in ((1, 2.0), (2, 5.0), (3, 9.0))
    ]
    assert gain_between([runs[0]], runs)["AP"]["method_interval"] is None
    gain = gain_between(runs[:2], runs)["AP"]
    assert gain["candidate"] == pytest.approx(np.mean([run.metrics["AP"].point for run in runs]))
    (low, high), (least, most) = gain["interval"], gain["method_interval"]
    assert least < low < high < most


def test_errors_name_the_cause(world):
    path, contents = world
    with pytest.raises(ValueError, match="iou_type must be one of bbox, segm, keypoints, got 'masks'"):
        paired_bootstrap(path, [], [], "masks")
    boxes = [{k: v for k, v in d.items() if k != "segmentation"} for d in random_detections(contents, 1)]
    with pytest.raises(CocoError, match="segm cannot be evaluated: no masks in the results"):
        paired_bootstrap(path, boxes, boxes, "segm")
    with pytest.raises(CocoError, match="keypoints cannot be evaluated: no keypoints in .*gt.json"):
        paired_bootstrap(path, [], [], "keypoints")
    (path.parent / "none.json").write_text(json.dumps(contents | {"annotations": []}))
    with pytest.raises(CocoError, match="none.json has no annotations; there is nothing to compare"):
        paired_bootstrap(path.parent / "none.json", [], [], "bbox")
    stray = [random_detections(contents, 1)[0] | {"image_id": 999}]
    with pytest.raises(ValueError, match="1 images that the ground truth lacks, such as image_id 999"):
        paired_bootstrap(path, stray, [], "bbox")


def simulated_matches(rng, num_images, quality):
    """One object and some wrong detections on each image; both detectors see the same difficulty of an image."""
    difficulty = np.random.default_rng(rng.integers(1 << 60)).normal(size=num_images)
    runs = []
    for skill in quality:
        found = difficulty + rng.normal(size=num_images) < skill
        wrong = rng.poisson(0.8, num_images)
        image = np.concatenate([np.flatnonzero(found), np.repeat(np.arange(num_images), wrong)])
        true = np.arange(len(image)) < found.sum()
        order = np.argsort(-(rng.normal(size=len(image)) + 1.2 * true), kind="stable")
        shape = np.ones((1, len(image)), bool)
        ones = np.ones(num_images, int)
        runs.append(ClassMatches(np.arange(num_images), ones, image[order], true[None, order], shape))
    return runs


def simulated_gain(runs, weights):
    worse, better = (resampled_ap(run, weights, np.linspace(0, 1, 101))[0] for run in runs)
    return tuple(BootstrapEstimate(100 * side[0], 100 * side[1:]) for side in (worse, better))


@pytest.mark.slow
def test_the_interval_covers_a_known_gain_as_often_as_it_says():
    quality, num_images, trials = (0.0, 0.25), 400, 500
    rng = np.random.default_rng(7)
    large = [simulated_gain(simulated_matches(rng, 400_000, quality), np.ones((400_000, 1))) for _ in range(4)]
    known = float(np.mean([better.point - worse.point for worse, better in large]))
    assert 4 < known < 12
    covered = 0
    for trial in range(trials):
        counts = draw_counts(num_images, 500, trial)
        weights = np.concatenate([np.ones((1, num_images)), counts]).T.copy()
        worse, better = simulated_gain(simulated_matches(rng, num_images, quality), weights)
        low, high = gain_of([worse], [better])["interval"]
        covered += low <= known <= high
    assert 0.93 <= covered / trials <= 0.97, covered / trials


def test_gains_by_supercategory_are_of_the_mean_of_its_classes(tmp_path):
    contents = random_world(0)
    for category, name in zip(contents["categories"], ("animal", "animal", "vehicle", "animal"), strict=True):
        category["supercategory"] = name
    contents["annotations"] = [a for a in contents["annotations"] if a["category_id"] != 4]  # without an object
    (tmp_path / "gt.json").write_text(json.dumps(contents))
    ground_truth, counts = read_coco(tmp_path / "gt.json"), draw_counts(NUM_IMAGES, 50, 0)
    sides = [[bootstrap_ap(ground_truth, random_detections(contents, 1, jitter=j), "bbox", counts)] for j in (9, 2)]
    of_class, of_super = (gains_by(kind, *sides) for kind in ("classes", "supercategories"))
    assert list(of_class) == ["class1", "class2", "class3"] and list(of_super) == ["animal", "vehicle"]
    animals = [of_class[name] for name in ("class1", "class2")]
    assert of_super["animal"]["gain"] == pytest.approx(np.mean([row["gain"] for row in animals]))
    assert of_super["animal"]["num_objects"] == sum(row["num_objects"] for row in animals)
    assert of_super["vehicle"] | {"p_value_holm": 0} == of_class["class3"] | {"p_value_holm": 0}


def test_groups_that_are_all_classes_or_one_are_left_out(world):
    path, contents = world
    ap = bootstrap_ap(read_coco(path), random_detections(contents, 1), "bbox", draw_counts(NUM_IMAGES, 2, 0))
    assert list(ap.groups) == ["classes"]


@pytest.mark.parametrize("most", [1, 20, 100, 2400, 19_990, 30_000])
def test_recall_thresholds_are_reached_as_floating_point_numbers_reach_them(most):
    thresholds = np.linspace(0.0, 1.0, 101)
    objects = np.arange(most, most + 12, dtype=np.float32)
    found = np.minimum(np.arange(most + 12)[:, None], objects).astype(np.float32)
    expected = np.searchsorted(thresholds, found.astype(float) / objects.astype(float), side="right") - 1
    np.testing.assert_array_equal(_last_threshold_reached(found, objects, thresholds), expected)
