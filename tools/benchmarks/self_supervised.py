"""Pretrains on photos without their hashtags, by SimCLR with lightly's loss: the peer that needs no labels.

    pip install --no-deps lightly
    tools/benchmark.py self_supervised --config-file configs/Hashtag-Pretraining/miniworld_wsl.yaml DATASETS.TEST '()'

The arguments are those of `wsl-d2 train`, and so are the trainer, its schedule, checkpoints, records and exported
backbone; only MODEL.META_ARCHITECTURE is another. Each image gives two views.
`wsl-d2 demo --axis arm=wsl,self_supervised` compares the two at as many views.
"""

import math

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY

from wsl_d2.cli.main import main as wsl_d2
from wsl_d2.modeling import HashtagClassifier

_GRAY = (0.299, 0.587, 0.114)  # of R, G and B, as ITU-R BT.601 has it


def random_views(images: torch.Tensor) -> torch.Tensor:
    """SimCLR's crops, flips, colors and gray images (Chen et al., 2020, appendix A), without its blur and hue.

    Args:
        images: (N, 3, H, W), 0 to 255, RGB.

    Returns:
        (N, 3, H, W) float32, each image changed by random numbers of its own.
    """
    n = len(images)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(n, device=images.device).uniform_(low, high)

    area, aspect = uniform(0.2, 1).sqrt(), uniform(math.log(3 / 4), math.log(4 / 3)).mul(0.5).exp()
    width, height = (area * aspect).clamp(max=1), (area / aspect).clamp(max=1)
    x, y = (1 - width) * uniform(-1, 1), (1 - height) * uniform(-1, 1)
    zero, flip = torch.zeros_like(x), uniform(-1, 1).sign()
    boxes = torch.stack([torch.stack([width * flip, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(boxes, list(images.shape), align_corners=False)
    views = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)

    def factor(strength: float) -> torch.Tensor:
        changed = uniform(0, 1) < 0.8
        return torch.where(changed, uniform(1 - strength, 1 + strength), 1.0).view(-1, 1, 1, 1)

    def gray(values: torch.Tensor) -> torch.Tensor:
        return (values * values.new_tensor(_GRAY).view(3, 1, 1)).sum(1, keepdim=True)

    views = (views * factor(0.4)).clamp(0, 255)
    mean = gray(views).mean((2, 3), keepdim=True)
    views = (mean + (views - mean) * factor(0.4)).clamp(0, 255)
    views = (gray(views) + (views - gray(views)) * factor(0.4)).clamp(0, 255)
    return torch.where((uniform(0, 1) < 0.2).view(-1, 1, 1, 1), gray(views), views)


@META_ARCH_REGISTRY.register()
class SimCLR(HashtagClassifier):
    """The contrastive pretraining of Chen et al., 2020, on the images of a hashtag dataset; labels are not read."""

    @configurable
    def __init__(self, **kwargs):
        """Args: those of :class:`HashtagClassifier`."""
        from lightly.loss.ntx_ent_loss import NTXentLoss
        from lightly.models.modules.heads import SimCLRProjectionHead

        super().__init__(**kwargs)
        channels = self.head.in_features
        self.projection = SimCLRProjectionHead(channels, channels, 128)
        self.contrast = NTXentLoss()

    def forward(self, batch):
        """Returns {"loss_contrast": scalar} of a batch in training; see :class:`HashtagClassifier` for the rest."""
        if not self.training:
            return super().forward(batch)
        images = batch["image"].to(self.device, non_blocking=True)
        views = torch.cat([random_views(images), random_views(images)])
        views = views.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, enabled=False):
            first, second = self.projection(self.features({"image": views}).float()).chunk(2)
            return {"loss_contrast": self.contrast(first, second)}


def main(arguments: list[str]) -> None:
    raise SystemExit(wsl_d2(["train", *arguments, "MODEL.META_ARCHITECTURE", "SimCLR"]))
