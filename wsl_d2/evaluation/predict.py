"""What a trained detector sees in images: drawn, and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from torchvision.io import write_jpeg
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from wsl_d2.config import load_config
from wsl_d2.data.format.folders import is_left_by_a_system, walk_once
from wsl_d2.data.format.tar import IMAGE_EXTENSIONS
from wsl_d2.data.read.catalog import register_datasets
from wsl_d2.data.read.detection_image import read_detection_image
from wsl_d2.errors import UserError
from wsl_d2.files import write_atomically
from wsl_d2.modeling import is_hashtag_classifier


def open_run(run: str | Path, device: str | None = None, opts: Sequence[str] = ()) -> DefaultPredictor:
    """Loads the detector of a run folder.

    Args:
        run: OUTPUT_DIR of a training, with config.yaml and a checkpoint.
        device: "cpu", "cuda"; that of the run if None.
        opts: config keys to override.

    Raises:
        UserError: there is no run, no checkpoint, or no detector.
    """
    run = Path(run)
    config = run / "config.yaml"
    if not config.is_file():
        inner = [str(path.parent) for path in sorted(run.glob("*/*/config.yaml"))][:3]
        example = f", such as {', '.join(inner)}" if inner else ""
        raise UserError(f"{config} does not exist; give the OUTPUT_DIR of a training{example}.")
    cfg = load_config(str(config), list(opts))
    weights = run / "model_final.pth"
    if not weights.is_file():
        checkpoints = sorted(run.glob("model_*.pth"))
        if not checkpoints:
            raise UserError(f"{run} holds no checkpoint model_*.pth; has the training saved one?")
        weights = checkpoints[-1]
    if is_hashtag_classifier(cfg):
        raise UserError(f"{run} is a pretraining; predict draws the objects that a detector finds.")
    cfg.MODEL.WEIGHTS = str(weights)
    if device:
        cfg.MODEL.DEVICE = device
    register_datasets(cfg)
    return DefaultPredictor(cfg)


def class_names(predictor: DefaultPredictor, names: Sequence[str] = ()) -> list[str]:
    """The names of a detector's classes: those given, or those of its datasets, or numbers where these are not here.

    Raises:
        UserError: their number is not that of the detector's classes.
    """
    number = predictor.cfg.MODEL.ROI_HEADS.NUM_CLASSES
    known = list(names)
    for dataset in (*predictor.cfg.DATASETS.TEST, *predictor.cfg.DATASETS.TRAIN):
        metadata = MetadataCatalog.get(dataset)
        if not known and Path(metadata.get("json_file", "")).is_file():
            categories = json.loads(Path(metadata.json_file).read_text(encoding="utf-8"))["categories"]
            known = [row["name"] for row in sorted(categories, key=lambda row: row["id"])]
        known = known or list(metadata.get("thing_classes", []))
    if known and len(known) != number:
        raise UserError(
            f"{len(known)} class names ({', '.join(known[:3])}, ...), and the detector has {number} classes."
        )
    return known or [f"class {i}" for i in range(number)]


def images_of(paths: Iterable[str | Path]) -> list[Path]:
    """Image files, and those in folders, sorted.

    Raises:
        UserError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(path)
            continue
        if not path.is_dir():
            raise UserError(f"{path} does not exist.")
        inside = sorted(_images_below(path))
        if not inside:
            raise UserError(f"{path} holds no image ({', '.join(IMAGE_EXTENSIONS)}).")
        found += inside
    return found


def _images_below(root: Path) -> Iterator[Path]:
    for folder, _, files in walk_once(root, Counter()):
        for path in (Path(folder) / name for name in files if not is_left_by_a_system(name)):
            if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and path.is_file():
                yield path


def predict(
    predictor: DefaultPredictor, paths: Sequence[Path], names: list[str], output: str | Path, threshold: float
) -> Iterator[tuple[Path, int]]:
    """Draws what the detector finds into ``output``, and writes predictions.json there, a list of objects in COCO's
    format with "file_name" and "category".

    Args:
        predictor: see :func:`open_run`.
        paths: image files.
        names: of the classes.
        output: folder.
        threshold: lowest score of an object that is drawn and written, 0 to 1.

    Yields:
        (path, number of objects), an image each; predictions.json is there after the last.

    Raises:
        UserError: a file is no image.
    """
    output = Path(output)
    rows = []
    for number, path in enumerate(paths):
        try:
            image = read_detection_image(path, "BGR")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: no image that can be read ({error}).") from error
        instances = predictor(image)["instances"].to("cpu")
        instances = instances[instances.scores >= threshold]
        for row in instances_to_coco_json(instances, number):
            rows.append({"file_name": str(path), **row, "category": names[row["category_id"]]})
        output.mkdir(parents=True, exist_ok=True)
        drawn = _draw(image, instances, names)
        write_jpeg(drawn, str(output / f"{number:06d}_{path.stem}.jpg"), quality=92)
        yield path, len(instances)
    write_atomically(output / "predictions.json", json.dumps(rows, indent=1))


def _draw(image: np.ndarray, instances: Instances, names: list[str], short_side: int = 480) -> torch.Tensor:
    """(H, W, 3) BGR to (3, h, w) RGB, small images enlarged so that names can be read."""
    scale = max(1, round(short_side / min(image.shape[:2])))
    drawn = torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1)))
    drawn = drawn.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    if not len(instances):
        return drawn
    classes = instances.pred_classes.tolist()
    colors = [tuple(round(255 * c) for c in matplotlib.colormaps["tab20"](i % 20)[:3]) for i in classes]
    if instances.has("pred_masks"):
        masks = instances.pred_masks.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        drawn = draw_segmentation_masks(drawn, masks, alpha=0.35, colors=colors)
    labels = [f"{names[i]} {score:.2f}" for i, score in zip(classes, instances.scores.tolist(), strict=True)]
    font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    boxes = instances.pred_boxes.tensor * scale
    return draw_bounding_boxes(drawn, boxes, labels, colors, width=3, font=font, font_size=16)
