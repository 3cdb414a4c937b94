"""Pixel statistics travel with the weights: a detector that normalizes its images otherwise stops here,
because a wrong channel order or mean costs AP without any other sign."""

import logging
import os
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig, ListConfig, OmegaConf

from .weight_file import PixelStatisticsError, WeightFile

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3  # on the 0-255 scale
# A LazyConfig's keys, wherever they stand: in the model, or in the mapper of a loader.
_LAZY_KEYS = {
    "input_format": "input_format",
    "image_format": "input_format",
    "img_format": "input_format",
    "pixel_mean": "pixel_mean",
    "pixel_std": "pixel_std",
}


def check_pixel_statistics(
    cfg: CfgNode | DictConfig, path: str | os.PathLike[str] | WeightFile, prefix: str | None = None
) -> None:
    """Compares a config's channel order, pixel mean and deviation with those of a weight file.

    A file of :func:`wsl_d2.checkpoint.export_backbone` says what it was trained with. One with torchvision's
    names is taken to be trained on torchvision's RGB statistics, a ResNeXt with Caffe2's names on those of Detectron2's
    model zoo (BGR). Of any other file nothing is known, which is logged as a warning. A config with more channels than
    the file is compared in those of the file.

    Args:
        cfg: config of the model that gets the weights: Detectron2's CfgNode (``INPUT.FORMAT``, ``MODEL.PIXEL_MEAN``,
            ``MODEL.PIXEL_STD``) or a LazyConfig (every ``pixel_mean``, ``pixel_std``, ``input_format``,
            ``image_format`` and ``img_format`` in it).
        path: the weight file.
        prefix: as of :func:`wsl_d2.checkpoint.load_backbone`.

    Raises:
        PixelStatisticsError: if they disagree; the message names both and ends with the settings to paste.
        IncompleteLoadError: if the file is no checkpoint.
        FileNotFoundError: if there is no such file.
    """
    file = WeightFile.read(path)
    expected = file.statistics(prefix)
    configured = list(_configured(cfg))
    if expected is None or not configured:
        unknown = f"{file.path} does not say which pixel statistics it was trained with"
        unknown = unknown if expected is None else "the config does not say its pixel statistics"
        logger.warning(f"{unknown}; weights and config are not compared")
        return
    different = [
        f"{key} is {actual}, the weights need {expected[name]}"
        for key, name, actual in configured
        if not _agree(actual, expected[name])
    ]
    if different:
        if isinstance(cfg, CfgNode):
            settings = " ".join(
                f'{key} "{expected[name]}"' if isinstance(expected[name], list) else f"{key} {expected[name]}"
                for key, name, _ in configured
            )
        else:
            settings = " ".join(f"{key}={str(expected[name]).replace(' ', '')}" for key, name, _ in configured)
        raise PixelStatisticsError(
            f"the pixel statistics of the config are not those of {file.path}: {'; '.join(different)}. "
            f"Set, in the config or at the end of the command line: {settings}"
        )


def _configured(cfg: CfgNode | DictConfig) -> Iterator[tuple[str, str, Any]]:
    """Yields (dotted key, which statistic, value)."""
    if isinstance(cfg, CfgNode):
        yield "INPUT.FORMAT", "input_format", cfg.INPUT.FORMAT
        yield "MODEL.PIXEL_MEAN", "pixel_mean", list(cfg.MODEL.PIXEL_MEAN)
        yield "MODEL.PIXEL_STD", "pixel_std", list(cfg.MODEL.PIXEL_STD)
        return
    yield from _lazy(cfg, "")


def _lazy(node: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    keys = node.keys() if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        if OmegaConf.is_missing(node, key):
            continue
        value = node[key]
        here = f"{path}.{key!s}".lstrip(".")
        if key in _LAZY_KEYS and value is not None:
            yield here, _LAZY_KEYS[key], list(value) if isinstance(value, ListConfig | list | tuple) else value
        elif isinstance(value, DictConfig | ListConfig):
            yield from _lazy(value, here)


def _agree(actual: Any, expected: Any) -> bool:
    if isinstance(expected, str):
        return isinstance(actual, str) and actual.startswith(expected)
    return len(actual) >= len(expected) and all(
        abs(a - e) <= _TOLERANCE for a, e in zip(actual, expected, strict=False)
    )
