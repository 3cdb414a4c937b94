"""COCO evaluation of any file that wsl_d2.coco reads, by faster-coco-eval where it is installed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager
from pycocotools.cocoeval import COCOeval

from wsl_d2.coco import CocoError, Results, match, read_coco, read_results, shared_iou_types

try:
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster
except ImportError:
    COCOeval_faster = None


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's COCOEvaluator for annotations as people have them; what it writes and returns is the same.

    Evaluated are boxes, masks and keypoints, as both the predictions and the annotations have them. The detections are
    written with the ids of the annotation file.

    Args:
        dataset_name: registered.
        output_dir: for the detections.
        fast: use faster-coco-eval if it is installed: pycocotools' numbers in a fraction of the time.
        kpt_oks_sigmas: TEST.KEYPOINT_OKS_SIGMAS.

    Raises:
        CocoError: see :func:`wsl_d2.coco.read_coco`.
    """

    def __init__(
        self, dataset_name: str, output_dir: str | Path, fast: bool = True, kpt_oks_sigmas: Sequence[float] = ()
    ):
        # In place of COCOEvaluator's own, which reads the file with pycocotools and stops at what read_coco mends.
        self._logger = logging.getLogger(__name__)
        self._distributed = True
        self._cpu_device = torch.device("cpu")
        self._output_dir = str(output_dir)
        self._fast = fast and COCOeval_faster is not None
        self._kpt_oks_sigmas = kpt_oks_sigmas
        self._metadata = MetadataCatalog.get(dataset_name)
        if not hasattr(self._metadata, "json_file"):  # no COCO dataset: Detectron2 writes it as one
            self._metadata.json_file = os.path.join(self._output_dir, f"{dataset_name}_coco_format.json")
            convert_to_coco_json(dataset_name, self._metadata.json_file)
        self._coco_api = read_coco(PathManager.get_local_path(self._metadata.json_file))
        self._do_evaluation = self._coco_api.has_annotations

    def _eval_predictions(self, predictions: list[dict], img_ids: Sequence | None = None) -> None:
        """Writes all detections and fills ``self._results``: task -> metric -> value, as Detectron2 names them."""
        detections = self._with_category_ids([row for image in predictions for row in image["instances"]])
        path = os.path.join(self._output_dir, "coco_instances_results.json")
        with PathManager.open(path, "w") as file:
            file.write(json.dumps(detections))
        self._logger.info(f"{len(detections)} detections are in {path}.")
        if not self._do_evaluation:
            self._logger.info("There are no annotations to evaluate them with.")
            return
        class_names = self._metadata.get("thing_classes")
        if not detections:
            self._results["bbox"] = self._derive_coco_results(None, "bbox", class_names)
            return
        results = read_results(self._coco_api, detections)
        tasks, left_out = shared_iou_types(self._coco_api, [results], self._kpt_oks_sigmas)
        for task, reason in left_out.items():
            self._logger.warning(f"{task} is not evaluated: {reason}.")
        numbers = None
        if img_ids is not None:
            numbers = [n for n in map(self._coco_api.images.number, img_ids) if n is not None]
        for task in tasks:
            evaluation = self._match(results, task, numbers)
            evaluation.summarize()
            self._results[task] = self._derive_coco_results(evaluation, task, class_names)

    def _with_category_ids(self, detections: list[dict]) -> list[dict]:
        """The class numbers of the model as the category ids of the file."""
        if (numbers := self._metadata.get("thing_dataset_id_to_contiguous_id")) is None:
            return detections
        ids = {number: identifier for identifier, number in numbers.items()}
        for row in detections:
            if row["category_id"] not in ids:
                raise CocoError(
                    f"the model detects class {row['category_id']}, but {self._metadata.json_file} has {len(ids)} "
                    f"categories; set the model's NUM_CLASSES to {len(ids)} and train it so."
                )
        return [row | {"category_id": ids[row["category_id"]]} for row in detections]

    def _match(self, results: Results, task: str, image_ids: list[int] | None):
        def by(kind: type):
            return match(self._coco_api, results, task, kind, self._kpt_oks_sigmas, image_ids)

        if not self._fast or task == "keypoints":  # faster-coco-eval wants an index of its own for keypoints
            return by(COCOeval)
        try:
            return by(COCOeval_faster)
        except Exception as error:  # whatever its C++ does not take
            self._logger.warning(f"faster-coco-eval cannot evaluate {task} ({error}); pycocotools does.")
            return by(COCOeval)
