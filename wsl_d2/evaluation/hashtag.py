"""Top-k accuracy of hashtag prediction: a prediction counts when it is one of the image's hashtags."""

from __future__ import annotations

from collections import OrderedDict

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm


class HashtagEvaluator(DatasetEvaluator):
    """Counts, over all processes, images with at least one of their hashtags among the k highest scores.

    With one hashtag per image this is the usual top-k accuracy.

    Args:
        ks: the values of k.
    """

    def __init__(self, ks: tuple[int, ...] = (1, 5)):
        self.ks = ks
        self.reset()

    def reset(self) -> None:
        self._hits = dict.fromkeys(self.ks, 0)
        self._num_images = 0

    def process(self, inputs: dict, outputs: list[dict]) -> None:
        """Adds one batch: ``inputs`` as made by the hashtag loader, ``outputs`` with "scores" (C,) each."""
        scores = torch.stack([output["scores"] for output in outputs])
        is_label = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        is_label[inputs["image_index"].to(scores.device), inputs["labels"].to(scores.device)] = True
        for k in self.ks:
            top = scores.topk(min(k, scores.shape[1]), dim=1).indices
            self._hits[k] += int(is_label.gather(1, top).any(dim=1).sum())
        self._num_images += len(scores)

    def evaluate(self) -> OrderedDict | None:
        """Returns {"hashtag": {"top1": percent, "top5": percent, "num_images": n}} on the main process."""
        parts = comm.all_gather((self._hits, self._num_images))
        if not comm.is_main_process():
            return None
        num_images = sum(part[1] for part in parts)
        if num_images == 0:
            raise ValueError("the evaluation dataset has no images.")
        result = {f"top{k}": 100.0 * sum(part[0][k] for part in parts) / num_images for k in self.ks}
        return OrderedDict(hashtag=result | {"num_images": num_images})
