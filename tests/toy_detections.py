"""Random ground truth and detections in COCO's formats for the tests."""

import json
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_api
from toy_data import jpeg

NUM_IMAGES = 24


def rectangle_rle(box, size=240):
    mask = np.zeros((size, size), np.uint8, order="F")
    x, y, w, h = (int(round(v)) for v in box)
    mask[y : y + h, x : x + w] = 1
    rle = mask_api.encode(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def random_world(seed, num_images=NUM_IMAGES, num_classes=4):
    """Ground truth of random rectangles, some of them crowds; the last class never occurs."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image in range(num_images):
        for _ in range(rng.integers(0, 4)):
            w, h = rng.uniform(90, 200, 2) if rng.random() < 0.3 else rng.uniform(8, 50, 2)
            x, y = rng.uniform(0, 239 - w), rng.uniform(0, 239 - h)
            box = [float(v) for v in (x, y, w, h)]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image + 1, "category_id": int(rng.integers(1, num_classes)),
                 "bbox": box, "area": float(w * h), "iscrowd": int(rng.random() < 0.1),
                 "segmentation": rectangle_rle(box)}
            )  # fmt: skip
    return {
        "info": {},
        "images": [{"id": i + 1, "width": 240, "height": 240, "file_name": f"{i + 1}.jpg"} for i in range(num_images)],
        "categories": [{"id": k, "name": f"class{k}"} for k in range(1, num_classes + 1)],
        "annotations": annotations,
    }


def random_detections(world, seed, jitter=4.0, miss=0.2):
    rng = np.random.default_rng(seed)
    detections = []
    for annotation in world["annotations"]:
        if rng.random() < miss:
            continue
        box = np.clip(np.array(annotation["bbox"]) + rng.normal(0, jitter, 4), 1, 230)
        category = annotation["category_id"] if rng.random() < 0.85 else int(rng.integers(1, 5))
        detections.append((annotation["image_id"], category, box))
    for _ in range(30):
        detections.append(
            (int(rng.integers(1, len(world["images"]) + 1)), int(rng.integers(1, 5)), rng.uniform(5, 50, 4))
        )
    return [
        {"image_id": image, "category_id": category, "bbox": [float(v) for v in box], "score": float(rng.random()),
         "segmentation": rectangle_rle(box)}
        for image, category, box in detections
    ]  # fmt: skip


def random_keypoints(world, detections, number=17):
    """Adds keypoints to objects and detections, in place."""
    rng = np.random.default_rng(len(detections))
    for row in [*world["annotations"], *detections]:
        x, y, w, h = row["bbox"]
        points = np.stack([x + w * np.linspace(0, 1, number), y + h * np.linspace(0, 1, number)], axis=1)
        points += rng.normal(0, 0.5, points.shape)
        visible = np.full((number, 1), 2)
        row["keypoints"] = np.concatenate([points, visible], axis=1).ravel().tolist()
        if "score" not in row:
            row["num_keypoints"] = number


def write_own_data(root: Path, images: str) -> None:
    """Writes train.json and val.json of 10 images each, and the folder of the images of both."""
    (root / images).mkdir()
    for seed, part in enumerate(("train", "val")):
        world = random_world(seed, num_images=10)
        for row in world["images"]:
            row["file_name"] = f"{part}_{row['file_name']}"
            (root / images / row["file_name"]).write_bytes(jpeg(100 * seed + row["id"], (240, 240)))
        (root / f"{part}.json").write_text(json.dumps(world))
