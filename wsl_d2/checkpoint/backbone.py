"""Loads and exports the bottom-up backbone of any model: all of its tensors, or an error.

This is the hand-over from pretraining to detection. (detectron2's own checkpointer only warns about weights
that do not fit, and goes on from random ones.)
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling.backbone import ResNet
from torch import nn

from ..modeling.resnext import RESNEXT_ARCHITECTURES, describe_resnext
from .files import IncompleteLoadError, read_checkpoint, write_weights
from .naming import (
    convert_name,
    detect_format,
    fill_affine_statistics,
    is_affine_only,
    is_ignored,
    strides_in_1x1,
    strip_prefix,
)

logger = logging.getLogger(__name__)

_PROVENANCE_KEYS = (
    "architecture",
    "num_groups",
    "width_per_group",
    "vocabulary_checksum",
    "images_seen",
    "version",
)


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_backbone` did.

    Attributes:
        path: the weight file.
        file_format: its naming scheme, one of ``wsl_d2.checkpoint.FORMATS``.
        num_tensors: parameters and buffers of the backbone that were filled: all of them.
        ignored: names in the file that belong to no backbone, as they stand there.
    """

    path: str
    file_format: str
    num_tensors: int
    ignored: tuple[str, ...]


def find_bottom_up(model: nn.Module) -> ResNet:
    """The bottom-up ResNet of a HashtagClassifier, a detector, an FPN, or the ResNet itself.

    Raises:
        ValueError: if there is none.
    """
    module = model
    while not isinstance(module, ResNet):
        for name in ("module", "backbone", "bottom_up"):  # "module": DistributedDataParallel
            if isinstance(getattr(module, name, None), nn.Module):
                module = getattr(module, name)
                break
        else:
            raise ValueError(
                f"no bottom-up ResNet in {type(model).__name__}: looked for .backbone, .backbone.bottom_up "
                f"and .bottom_up, ended at {type(module).__name__}"
            )
    return module


def load_backbone(model: nn.Module, path: str | os.PathLike[str]) -> LoadReport:
    """Fills the bottom-up backbone of a model from a weight file, bit by bit, batch-norm statistics included.

    Every parameter and buffer of the backbone must be in the file and the other way round; heads, FPN and
    ``num_batches_tracked`` are ignored, but a head in a file whose provenance says that it holds none is an error.
    Nothing is changed unless everything fits.

    Args:
        model: anything :func:`find_bottom_up` knows.
        path: .pth (read with ``weights_only=True``), .safetensors, or a .pkl of numpy arrays (no other type is
            executed); any path that detectron2's ``PathManager`` knows, wsl://resnext101_32x8d among them. Names of
            detectron2, torchvision, timm or Caffe2, with or without prefixes.

    Returns:
        A short report; the same is logged in one line.

    Raises:
        IncompleteLoadError: if a backbone tensor is missing, left over, or of another shape, if the file is
            no checkpoint, or if the model strides in its 1x1 convolutions and the weights in the 3x3 ones or
            the other way round (such weights fit, and compute something else).
        FileNotFoundError: if there is no such file.
        ValueError: if the model has no backbone, or is on the meta device.
    """
    path = os.fspath(path)
    bottom_up = find_bottom_up(model)
    targets = {k: v for k, v in bottom_up.state_dict().items() if not is_ignored(k)}
    if any(tensor.is_meta for tensor in targets.values()):
        raise ValueError("the model is on the meta device and has no memory to load weights into")
    try:
        checkpoint = read_checkpoint(path)
    except IncompleteLoadError as e:
        raise IncompleteLoadError(path, e.reason, missing=list(targets)) from e
    state_dict = checkpoint["model"]
    try:
        file_format = detect_format(state_dict)
    except ValueError as e:
        unexpected = [k for k in state_dict if not is_ignored(strip_prefix(k))]
        raise IncompleteLoadError(path, str(e), missing=list(targets), unexpected=unexpected) from e

    affine_only = file_format == "caffe2" and is_affine_only(state_dict)
    if file_format == "caffe2":
        state_dict = fill_affine_statistics(state_dict)

    sources: dict[str, torch.Tensor] = {}
    ignored, unexpected = [], []
    provenance = checkpoint["wsl_d2"]
    backbone_alone = provenance is not None and provenance.get("num_classes") is None
    mismatched: dict[str, tuple[str, str]] = {}
    for key, tensor in state_dict.items():
        stripped = strip_prefix(key)
        name = convert_name(stripped, file_format, "d2")
        if is_ignored(stripped, file_format) and (stripped.endswith("num_batches_tracked") or not backbone_alone):
            ignored.append(key)
        elif name is None or name not in targets or name in sources:
            unexpected.append(key)
        else:
            sources[name] = tensor
            target = targets[name]
            if tensor.shape != target.shape:
                mismatched[name] = (str(tuple(tensor.shape)), str(tuple(target.shape)))
            elif tensor.is_floating_point() != target.is_floating_point():
                mismatched[name] = (str(tensor.dtype), str(target.dtype))
    missing = [name for name in targets if name not in sources]
    if missing or unexpected or mismatched:
        raise IncompleteLoadError(
            path, missing=missing, unexpected=unexpected, mismatched=mismatched, file_format=file_format
        )
    _check_stride(bottom_up, state_dict, provenance, path)
    if affine_only and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in bottom_up.modules()):
        raise IncompleteLoadError(
            path,
            "it holds affine layers without batch-norm statistics, and the model has batch norms that train; set "
            "MODEL.RESNETS.NORM FrozenBN",
        )

    with torch.no_grad():
        for name, target in targets.items():  # state_dict() shares memory with the model
            target.copy_(sources[name])
    logger.info(f"{len(sources)} of {len(targets)} backbone tensors loaded from {path}")
    return LoadReport(path, file_format, len(sources), tuple(ignored))


def export_backbone(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    input_format: str | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    **provenance: Any,
) -> None:
    """Writes the bottom-up backbone of a model, and where it comes from, for any detectron2 project to load.

    The file appears whole or not at all (temporary name, flush, rename). Tensors have detectron2's names
    without a prefix ("res2.0.conv1.weight") and lie on the CPU; a .pth file asks detectron2 for its matching
    heuristics, and loads with ``weights_only=True``.

    Args:
        model: anything :func:`find_bottom_up` knows.
        path: ends in .pth, .pkl, or .safetensors (which plain detectron2 does not read).
        input_format: "RGB" or "BGR", the channel order the backbone was trained on; by default the model's
            own.
        pixel_mean: per channel in that order, on the 0-255 scale; by default the model's own.
        pixel_std: likewise.
        provenance: any of "architecture", "num_groups", "width_per_group", "version" (by default as the model
            and the package have them), "vocabulary_checksum", "images_seen".

    Raises:
        ValueError: for unknown provenance, provenance that contradicts the model, pixel statistics neither
            given nor known to the model, or another file name.
    """
    path = os.fspath(path)
    unknown = sorted(set(provenance) - set(_PROVENANCE_KEYS))
    if unknown:
        raise ValueError(f"unknown provenance {', '.join(unknown)}; known: {', '.join(_PROVENANCE_KEYS)}")
    bottom_up = find_bottom_up(model)
    record = _provenance_of(model, bottom_up)
    given = {
        "input_format": input_format,
        "pixel_mean": None if pixel_mean is None else [float(x) for x in pixel_mean],
        "pixel_std": None if pixel_std is None else [float(x) for x in pixel_std],
    }
    for key, value in {**given, **provenance}.items():
        own = record.get(key)
        if value is None or (key == "architecture" and own is not None and value not in RESNEXT_ARCHITECTURES):
            continue  # what the model says of itself stands, such as resnext50_32x4d for a generic builder
        if own is not None and key != "version" and not _same(value, own):
            raise ValueError(f"{key} {value} contradicts the model, which has {own}; nothing was written to {path}")
        record[key] = value
    lacking = [key for key in given if record.get(key) is None]
    if lacking:
        raise ValueError(f"the model does not know its {', '.join(lacking)}; pass them to export_backbone")

    tensors = {k: v for k, v in bottom_up.state_dict().items() if not is_ignored(k)}
    write_weights(path, tensors, record)
    logger.info(f"{len(tensors)} backbone tensors exported to {path}")


def _check_stride(
    bottom_up: ResNet, state_dict: Mapping[str, Any], provenance: Mapping[str, Any] | None, path: str
) -> None:
    in_model = describe_resnext(bottom_up)["stride_in_1x1"]
    in_file = (provenance or {}).get("stride_in_1x1", strides_in_1x1(state_dict))
    if None not in (in_model, in_file) and in_model != in_file:
        raise IncompleteLoadError(
            path,
            f"they were trained with stride_in_1x1 {in_file} and the model has {in_model}, so they would fit and "
            f"compute something else; set MODEL.RESNETS.STRIDE_IN_1X1 {in_file}",
        )


def _provenance_of(model: nn.Module, bottom_up: ResNet) -> dict[str, Any]:
    """All that the model itself knows."""
    import wsl_d2  # here: it imports this module

    if isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    record: dict[str, Any] = {"input_format": getattr(model, "input_format", None)}
    for key in ("pixel_mean", "pixel_std"):
        # float32 buffers: rounded, 123.675 is written as such and not as 123.6750030517578.
        buffer = getattr(model, key, None)
        record[key] = None if buffer is None else [round(x, 4) for x in buffer.flatten().tolist()]
    return {
        **record,
        **describe_resnext(bottom_up),
        "version": getattr(wsl_d2, "__version__", None),
    }


def _same(value: Any, own: Any) -> bool:
    if isinstance(own, list):
        return len(value) == len(own) and all(abs(a - b) <= 1e-3 for a, b in zip(value, own, strict=True))
    return value == own
