"""The AP gain with its interval on synthetic results of val2017's size: seconds, and equality with pycocotools.

Ground truth and detections are random boxes, their masks octagons; the baseline's detections are
less exact than the candidate's.
"""

import argparse
import contextlib
import io
import os
import time
from collections.abc import Iterator

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from wsl_d2.analysis.ap_gain import METRICS, bootstrap_evaluation, draw_counts, gain_between, gains_by
from wsl_d2.analysis.errors import error_dap
from wsl_d2.analysis.matches import as_ground_truth, evaluate

_WIDTH, _HEIGHT = 640, 480


def rles(boxes: np.ndarray) -> list[dict]:
    """Octagons inside (n, 4) boxes."""
    angles = np.arange(8) * np.pi / 4 + 0.3
    x = boxes[:, :1] + boxes[:, 2:3] * (0.5 + 0.5 * np.cos(angles))
    y = boxes[:, 1:2] + boxes[:, 3:4] * (0.5 + 0.5 * np.sin(angles))
    return mask_api.frPyObjects(np.stack([x, y], 2).reshape(len(boxes), -1).tolist(), _HEIGHT, _WIDTH)


def random_boxes(rng: np.random.Generator, number: int) -> np.ndarray:
    size = np.exp(rng.normal(4.2, 0.9, (number, 2))).clip(6, 400)
    corner = rng.random((number, 2)) * (np.array([_WIDTH, _HEIGHT]) - size).clip(1)
    return np.concatenate([corner, size], axis=1)


def make_ground_truth(args, rng: np.random.Generator) -> COCO:
    boxes = random_boxes(rng, args.objects)
    share = 1 / np.arange(1, args.classes + 1)
    categories = rng.choice(args.classes, args.objects, p=share / share.sum()) + 1
    images = rng.integers(1, args.images + 1, args.objects)
    annotations = [
        {"id": n + 1, "image_id": int(i), "category_id": int(k), "bbox": b.tolist(), "area": float(b[2] * b[3]),
         "iscrowd": 0, "segmentation": m}
        for n, (i, k, b, m) in enumerate(zip(images, categories, boxes, rles(boxes), strict=True))
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i + 1, "width": _WIDTH, "height": _HEIGHT} for i in range(args.images)],
            "categories": [{"id": k + 1, "name": f"class {k + 1}"} for k in range(args.classes)],
            "annotations": annotations,
        }
        coco.createIndex()
    return coco


def make_detections(args, coco: COCO, rng: np.random.Generator, jitter: float) -> list[dict]:
    """About ``args.detections`` an image: each object with probability 0.8, the rest anywhere."""
    found = [a for a in coco.dataset["annotations"] if rng.random() < 0.8]
    boxes = np.array([a["bbox"] for a in found])
    boxes = boxes + rng.normal(0, jitter, boxes.shape) * boxes[:, [2, 3, 2, 3]]
    boxes[:, 2:] = boxes[:, 2:].clip(2)
    others = args.images * args.detections - len(found)
    boxes = np.concatenate([boxes, random_boxes(rng, others)])
    images = [a["image_id"] for a in found] + rng.integers(1, args.images + 1, others).tolist()
    categories = [a["category_id"] for a in found] + rng.integers(1, args.classes + 1, others).tolist()
    scores = np.concatenate([rng.beta(5, 3, len(found)), rng.beta(1.2, 8, others)])
    return [
        {"image_id": i, "category_id": k, "bbox": b.tolist(), "score": float(s), "segmentation": m}
        for i, k, b, s, m in zip(images, categories, boxes, scores, rles(boxes), strict=True)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmark.py ap_gain", description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--objects", type=int, default=36_000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--detections", type=int, default=100, help="of an image")
    parser.add_argument("--resamples", type=int, default=1000)
    args = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    coco = as_ground_truth(make_ground_truth(args, rng))
    sides = [make_detections(args, coco, rng, jitter) for jitter in (0.10, 0.08)]
    counts = draw_counts(args.images, args.resamples, 0)
    seconds: dict[str, np.ndarray] = {}

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        start = np.array([time.perf_counter(), time.process_time()])
        yield
        spent = np.array([time.perf_counter(), time.process_time()]) - start
        seconds[name] = seconds.get(name, np.zeros(2)) + spent

    for iou_type in ("bbox", "segm"):
        found = []
        for detections in sides:
            with timed("evaluation by pycocotools"):
                evaluation = evaluate(coco, detections, iou_type)
            with timed("resampling"):
                found.append(bootstrap_evaluation(evaluation, counts))
            with timed("dAP of errors, resampled"):
                error_dap(evaluation, counts)
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation.summarize()
            theirs = 100 * evaluation.stats[:6]
            differences = [abs(found[-1].metrics[m].point - v) for m, v in zip(METRICS, theirs, strict=True)]
            print(
                f"{iou_type}: AP {theirs[0]:.3f}, at most {max(differences):.1e} points from pycocotools in 6 metrics"
            )
        with timed("resampling"):
            gain = gain_between(found[:1], found[1:])["AP"]
            gains_by("classes", found[:1], found[1:])
        same = gain_between(found[:1], found[:1])["AP"]
        low, high = gain["interval"]
        print(f"{iou_type}: gain {gain['gain']:+.2f} [{low:+.2f}, {high:+.2f}]; identical runs {same['gain']:g}")
    times = ", ".join(f"{name} {wall:.1f} ({of_cpu:.1f})" for name, (wall, of_cpu) in seconds.items())
    print(
        f"two runs of {args.images:,} images, {args.objects:,} objects, {args.images * args.detections:,} detections, "
        f"box and mask, {args.resamples:,} resamples, seconds on {os.cpu_count()} cores (of CPU): {times}"
    )


if __name__ == "__main__":
    main()
