"""COCO evaluation by faster-coco-eval where it is installed: pycocotools' numbers in a fraction of the time."""

from __future__ import annotations

from unittest import mock

from detectron2.evaluation import COCOEvaluator, coco_evaluation

try:
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster
except ImportError:
    COCOeval_faster = None


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's COCOEvaluator with another implementation of the matching; what it writes and returns is the same.

    Args:
        dataset_name: registered.
        output_dir: for the detections.
        fast: use faster-coco-eval if it is installed; pycocotools otherwise.
    """

    def __init__(self, dataset_name: str, output_dir: str, fast: bool = True):
        super().__init__(dataset_name, output_dir=output_dir, use_fast_impl=False)
        self._use_fast_impl = fast and COCOeval_faster is not None

    def _eval_predictions(self, predictions, img_ids=None):
        with mock.patch.object(coco_evaluation, "COCOeval_opt", COCOeval_faster):
            return super()._eval_predictions(predictions, img_ids=img_ids)
