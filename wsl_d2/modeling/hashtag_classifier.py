"""The meta-architecture of pretraining: backbone, average pool, one linear layer, hashtag loss.

Shapes: N images of H x W pixels, C classes, K (image, label) pairs of the batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import FPN, Backbone
from torch import nn

from .losses import hashtag_binary_cross_entropy, hashtag_cross_entropy

_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "softmax": hashtag_cross_entropy,
    "sigmoid": hashtag_binary_cross_entropy,
}


def is_hashtag_classifier(cfg: CfgNode) -> bool:
    """Whether a config is of a pretraining: MODEL.META_ARCHITECTURE is HashtagClassifier or a registered subclass."""
    name = cfg.MODEL.META_ARCHITECTURE
    model = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    return isinstance(model, type) and issubclass(model, HashtagClassifier)


@META_ARCH_REGISTRY.register()
class HashtagClassifier(nn.Module):
    """Image classifier over canonical hashtags; with one label per image, an ordinary softmax classifier.

    State-dict names: ``backbone.*``, ``head.weight`` (C, channels of res5), ``head.bias`` (C,).
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        loss: str = "softmax",
        head_init_std: float = 0.01,
        pixel_mean: Sequence[float] = (123.675, 116.280, 103.530),
        pixel_std: Sequence[float] = (58.395, 57.120, 57.375),
        input_format: str = "RGB",
    ):
        """
        Args:
            backbone: a bottom-up backbone that emits "res5".
            num_classes: size of the vocabulary.
            loss: "softmax" (1/k targets) or "sigmoid".
            head_init_std: the head's weights start as N(0, head_init_std), its bias as 0.
            pixel_mean: per channel, on the 0-255 scale, in the order of ``input_format``.
            pixel_std: likewise.
            input_format: channel order of the images, "RGB" or "BGR"; kept for exported weight files.

        Raises:
            ValueError: if the backbone does not emit "res5", or for an unknown loss or no classes.
        """
        super().__init__()
        if isinstance(backbone, FPN):
            raise ValueError(
                'HashtagClassifier needs a backbone that emits "res5", got an FPN; take the '
                'MODEL.BACKBONE.NAME without "_fpn", the detector adds the FPN later'
            )
        output_shape = backbone.output_shape()
        if "res5" not in output_shape:
            raise ValueError(
                f'HashtagClassifier needs a backbone that emits "res5", got {list(output_shape)}; set '
                'MODEL.RESNETS.OUT_FEATURES to ["res5"]'
            )
        if loss not in _LOSSES:
            raise ValueError(f"MODEL.HASHTAG_CLASSIFIER.LOSS must be one of {', '.join(_LOSSES)}, got {loss!r}")
        if num_classes < 1:
            raise ValueError(
                f"MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES is {num_classes}; it must be the size of the training "
                "dataset's vocabulary (wsl_d2.engine's setup fills it in when it is 0)"
            )
        self.backbone = backbone
        self.head = nn.Linear(output_shape["res5"].channels, num_classes)
        nn.init.normal_(self.head.weight, std=head_init_std)
        nn.init.zeros_(self.head.bias)
        self.num_classes = num_classes
        self.loss = loss
        self.input_format = input_format
        mean = torch.tensor(pixel_mean, dtype=torch.float32).view(-1, 1, 1)
        self.register_buffer("pixel_mean", mean, persistent=False)
        std = torch.tensor(pixel_std, dtype=torch.float32).view(-1, 1, 1)
        self.register_buffer("pixel_std", std, persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        if "HASHTAG_CLASSIFIER" not in cfg.MODEL:
            raise ValueError(
                "the config has no MODEL.HASHTAG_CLASSIFIER; call wsl_d2.add_wsl_config(cfg) before merging files"
            )
        return {
            "backbone": build_backbone(cfg),
            "num_classes": cfg.MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES,
            "loss": cfg.MODEL.HASHTAG_CLASSIFIER.LOSS,
            "head_init_std": cfg.MODEL.HASHTAG_CLASSIFIER.HEAD_INIT_STD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    ) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """
        Args:
            batch: a dict with "image", (N, 3, H, W) uint8 in the channel order of ``input_format``, and for
                training "labels" and "image_index", both (K,) int64. When evaluating, also detectron2's list
                of dicts, each with "image" (3, H, W), all of one size.

        Returns:
            Training: {"loss_hashtag": scalar}, in nats. Evaluation: for each image {"scores": (C,) float32},
            probabilities (softmax over the classes, or one sigmoid per class).

        Raises:
            ValueError: if the batch lacks a key, or its images differ in size.
        """
        if not self.training:
            logits = self.logits(batch)
            scores = logits.softmax(dim=1) if self.loss == "softmax" else logits.sigmoid()
            return [{"scores": s} for s in scores]

        if not isinstance(batch, Mapping) or not {"image", "labels", "image_index"} <= batch.keys():
            got = f"keys {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                "HashtagClassifier trains on a collated dict with image, labels and image_index, got "
                f"{got}; build the loader with wsl_d2.data"
            )
        logits = self.logits(batch)
        labels = batch["labels"].to(logits.device, non_blocking=True)
        image_index = batch["image_index"].to(logits.device, non_blocking=True)
        return {"loss_hashtag": _LOSSES[self.loss](logits, labels, image_index)}

    def logits(self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """(N, C) float32 logits of a batch as :meth:`forward` takes it; labels are not needed."""
        pooled = self.features(batch)
        # A softmax over 17,000 classes is too fine for half precision: the head always runs in float32.
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(pooled.to(self.head.weight.dtype)).float()

    def features(self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """(N, D) features of a batch as :meth:`forward` takes it: "res5" averaged over each image."""
        return F.adaptive_avg_pool2d(self.backbone(self._preprocess(batch))["res5"], 1).flatten(1)

    def _preprocess(self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """(N, 3, H, W) float32 on the model's device, normalized; keeps the batch's memory format."""
        if isinstance(batch, Mapping):
            images = batch["image"]
        else:
            images = [x["image"] for x in batch]
            if len({tuple(image.shape) for image in images}) != 1:
                sizes = sorted({tuple(image.shape) for image in images})
                raise ValueError(
                    f"the images of a batch must have one size to be classified together, got {sizes[:5]}; "
                    "crop them to INPUT.RANDOM_RESIZED_CROP.SIZE or use batches of 1"
                )
            images = torch.stack(images)
        if images.dim() != 4 or images.shape[1] != len(self.pixel_mean):
            raise ValueError(f"images must have shape (N, {len(self.pixel_mean)}, H, W), got {tuple(images.shape)}")
        # uint8 crosses to the device, a quarter of the bytes of float32.
        return (images.to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std
