"""Parameters and multiply-adds of a classifier, counted without allocating its weights."""

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

    The network is run once on an image of 32 x 32, with uninitialized weights. All operations but the head's are
    proportional to the area, so this is enough; it takes a second for the largest network.

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
        network = make_resnext(architecture)
        channels = network.output_shape()["res5"].channels
        assert channels is not None
        head = nn.Linear(channels, num_classes)
    network = network.to_empty(device="cpu")
    multiply_adds = round(head.weight.numel() + multiply_adds_per_image(network, image_size))
    num_parameters = sum(parameter.numel() for module in (network, head) for parameter in module.parameters())
    return Complexity(num_parameters, multiply_adds)


def multiply_adds_per_image(backbone: nn.Module, image_size: int) -> float:
    """Counts the multiply-adds of one image's forward pass, by fvcore.

    Args:
        backbone: emits "res5"; run once in evaluation mode on an image of 32 x 32.
        image_size: pixels, both sides.
    """
    was_training = backbone.training
    image = torch.zeros(1, 3, _TRACED_SIZE, _TRACED_SIZE, device=next(backbone.parameters()).device)
    try:
        counter = FlopCountAnalysis(_Pooled(backbone).eval(), image)
        counter.unsupported_ops_warnings(False)
        counter.uncalled_modules_warnings(False)
        return counter.total() * (image_size / _TRACED_SIZE) ** 2
    finally:
        backbone.train(was_training)


class _Pooled(nn.Module):
    """Gives one tensor, as tracing needs it."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images)["res5"].mean(dim=(2, 3))
