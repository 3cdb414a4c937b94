"""Pixel statistics travel with the weights: a detector that normalises its images otherwise stops here,
because a wrong channel order or mean costs AP without any other sign."""

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode

from .files import read_checkpoint
from .naming import detect_format, strides_in_1x1

logger = logging.getLogger(__name__)

TORCHVISION_STATISTICS: dict[str, Any] = {
    "input_format": "RGB",
    "pixel_mean": [123.675, 116.280, 103.530],
    "pixel_std": [58.395, 57.120, 57.375],
}

# The ResNeXts of Caffe2 in Detectron2's model zoo (its other Caffe2 models do not divide by a deviation).
CAFFE2_RESNEXT_STATISTICS: dict[str, Any] = {
    "input_format": "BGR",
    "pixel_mean": [103.530, 116.280, 123.675],
    "pixel_std": [57.375, 57.120, 58.395],
}

_TOLERANCE = 1e-3  # on the 0-255 scale


class PixelStatisticsError(ValueError):
    """A config normalises images otherwise than the weights it loads were trained with."""


def check_pixel_statistics(cfg: CfgNode, path: str) -> None:
    """Compares ``INPUT.FORMAT``, ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD`` with those of a weight file.

    A file of :func:`wsl_d2.checkpoint.export_backbone` says what it was trained with. One with torchvision's
    names is taken to be trained on torchvision's RGB statistics, a ResNeXt with Caffe2's names on those of Detectron2's
    model zoo (BGR). Of any other file nothing is known, which is logged as a warning.

    Args:
        cfg: config of the model that gets the weights.
        path: the weight file.

    Raises:
        PixelStatisticsError: if they disagree; the message names both and ends with the three lines to paste.
        IncompleteLoadError: if the file is no checkpoint.
        FileNotFoundError: if there is no such file.
    """
    provenance = known_statistics(read_checkpoint(path))
    if provenance is None:
        logger.warning(
            f"{path} does not say which pixel statistics it was trained with; they are not compared with "
            "INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD"
        )
        return
    absent = [key for key in TORCHVISION_STATISTICS if provenance.get(key) is None]
    if absent:
        raise PixelStatisticsError(f"the provenance in {path} lacks {', '.join(absent)}; export the backbone again")

    expected_format = provenance["input_format"]
    expected_mean, expected_std = ([float(x) for x in provenance[key]] for key in ("pixel_mean", "pixel_std"))
    rows: list[tuple[str, Any, Any]] = [
        ("INPUT.FORMAT", cfg.INPUT.FORMAT, expected_format),
        ("MODEL.PIXEL_MEAN", list(cfg.MODEL.PIXEL_MEAN), expected_mean),
        ("MODEL.PIXEL_STD", list(cfg.MODEL.PIXEL_STD), expected_std),
    ]
    different = [
        f"{key} is {actual}, the weights need {expected}"
        for key, actual, expected in rows
        if not (_close(actual, expected) if isinstance(expected, list) else actual == expected)
    ]
    if different:
        lines = "\n".join(
            f'  {key} "{expected}"' if isinstance(expected, list) else f"  {key} {expected}"
            for key, _, expected in rows
        )
        raise PixelStatisticsError(
            f"the pixel statistics of the config are not those of {path}: {'; '.join(different)}. "
            f"Set, in the config or at the end of the command line:\n{lines}"
        )


def known_statistics(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The pixel statistics of what :func:`wsl_d2.checkpoint.read_checkpoint` returned.

    Returns:
        "input_format", "pixel_mean" and "pixel_std" of its provenance, else of its naming scheme, else None.
    """
    if checkpoint["wsl_d2"] is not None:
        return checkpoint["wsl_d2"]
    try:
        file_format = detect_format(checkpoint["model"])
    except ValueError:
        return None
    if file_format in ("torchvision", "timm"):
        return TORCHVISION_STATISTICS
    is_resnext = file_format == "caffe2" and strides_in_1x1(checkpoint["model"]) is False  # grouped convolutions
    return CAFFE2_RESNEXT_STATISTICS if is_resnext else None


def _close(actual: list[float], expected: list[float]) -> bool:
    return len(actual) == len(expected) and all(abs(a - e) <= _TOLERANCE for a, e in zip(actual, expected, strict=True))
