"""How large a classifier is and what one image costs, counted without its memory or its time."""

from typing import NamedTuple

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from .resnext import make_resnext

_TRACED_SIZE = 32  # pixels: the network's largest stride


class Complexity(NamedTuple):
    """Of a network with its classification head."""

    num_parameters: int
    multiply_adds: int  # for one image, forward, as fvcore counts them: convolutions, norms and the head


def count_complexity(architecture: str, *, num_classes: int = 1000, image_size: int = 224) -> Complexity:
    """Counts a ResNeXt's parameters, and its multiply-adds by fvcore.

    The network is run once on an image of 32 x 32, with weights that nobody initialised: all operations but the head's
    are proportional to the area, so that is enough, and takes a second for the largest.

    Args:
        architecture: a key of ``RESNEXT_ARCHITECTURES``.
        num_classes: of the head.
        image_size: pixels, both sides; a multiple of 32.

    Raises:
        ValueError: for another image size or architecture.
    """
    if image_size % _TRACED_SIZE:
        raise ValueError(f"image_size must be a multiple of {_TRACED_SIZE}, got {image_size}")
    with torch.device("meta"):
        network = _Classifier(architecture, num_classes)
    network = network.to_empty(device="cpu").eval()
    counter = FlopCountAnalysis(network, torch.zeros(1, 3, _TRACED_SIZE, _TRACED_SIZE))
    counter.unsupported_ops_warnings(False)
    operations = counter.by_operator()
    head = operations.pop("linear")
    area = (image_size // _TRACED_SIZE) ** 2
    multiply_adds = int(head + area * sum(operations.values()))
    return Complexity(sum(parameter.numel() for parameter in network.parameters()), multiply_adds)


class _Classifier(nn.Module):
    def __init__(self, architecture: str, num_classes: int):
        super().__init__()
        self.backbone = make_resnext(architecture)
        channels = self.backbone.output_shape()["res5"].channels
        assert channels is not None
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images)["res5"].mean(dim=(2, 3)))
