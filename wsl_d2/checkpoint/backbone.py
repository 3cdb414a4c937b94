"""Loads and exports the bottom-up backbone of any model: all of its tensors, or an error.

This is the hand-over from pretraining to detection. (detectron2's own checkpointer only warns about weights
that do not fit, and goes on from random ones.)
"""

import json
import logging
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling.backbone import ResNet
from detectron2.utils.file_io import PathManager
from torch import nn

from ..modeling.resnext import RESNEXT_ARCHITECTURES, describe_resnext
from .naming import convert_name, detect_format, is_ignored, shorten, strip_prefix

logger = logging.getLogger(__name__)

_PROVENANCE = "wsl_d2"  # key in a .pth file, and in the metadata of a .safetensors file
_PROVENANCE_KEYS = (
    "architecture",
    "num_groups",
    "width_per_group",
    "vocabulary_checksum",
    "images_seen",
    "version",
)


class IncompleteLoadError(ValueError):
    """A weight file does not fill a backbone exactly. The model is unchanged.

    Attributes:
        path: the weight file.
        reason: what is wrong with the file as a whole, or "".
        missing: names (detectron2's) that the backbone has and the file lacks.
        unexpected: names, as they stand in the file, that the backbone has no tensor for.
        mismatched: name -> (in the file, in the model), of tensors with another shape or type.
    """

    def __init__(
        self,
        path: str,
        reason: str = "",
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Mapping[str, tuple[str, str]] | None = None,
        file_format: str = "d2",
    ):
        self.path = path
        self.reason = reason
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = dict(mismatched or {})
        shown_missing = [
            k if file_format == "d2" else f"{k} ({convert_name(k, 'd2', file_format)})" for k in self.missing
        ]
        shown_mismatched = [
            f"{k} is {in_file} in the file and {in_model} in the model"
            for k, (in_file, in_model) in self.mismatched.items()
        ]
        lines = [f"no backbone weights loaded from {path}" + (f": {reason}" if reason else "")]
        for title, keys in (
            ("missing in the file", shown_missing),
            ("left over in the file", self.unexpected),
            ("of another shape or type", shown_mismatched),
        ):
            if keys:
                lines.append(f"  {len(keys)} {title}: {shorten(keys)}")
        if len(lines) > 1 and not reason:
            lines.append("  Do MODEL.BACKBONE.NAME and MODEL.RESNETS describe the model this file comes from?")
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_backbone` did.

    Attributes:
        path: the weight file.
        file_format: its naming scheme, "d2", "torchvision" or "timm".
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
    ``num_batches_tracked`` are ignored. Nothing is changed unless everything fits.

    Args:
        model: anything :func:`find_bottom_up` knows.
        path: .pth (read with ``weights_only=True``) or .safetensors; any path that detectron2's
            ``PathManager`` knows. Names of detectron2, torchvision or timm, with or without prefixes.

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

    sources: dict[str, torch.Tensor] = {}
    ignored, unexpected = [], []
    mismatched: dict[str, tuple[str, str]] = {}
    for key, tensor in state_dict.items():
        stripped = strip_prefix(key)
        name = convert_name(stripped, file_format, "d2")
        if is_ignored(stripped):
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
    _check_stride(bottom_up, file_format, checkpoint[_PROVENANCE], path)

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
        path: ends in .pth, or in .safetensors (which plain detectron2 does not read).
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
    if not path.endswith((".pth", ".safetensors")):
        raise ValueError(f"a backbone is exported to a .pth or .safetensors file, got {path}")
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

    tensors = {k: v.detach().cpu().contiguous() for k, v in bottom_up.state_dict().items() if not is_ignored(k)}
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        if path.endswith(".safetensors"):
            _safetensors().save_file(tensors, temporary, metadata={_PROVENANCE: json.dumps(record)})
        else:
            payload = {
                "model": tensors,
                "matching_heuristics": True,
                "__author__": "wsl_d2",
                _PROVENANCE: record,
            }
            torch.save(payload, temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    logger.info(f"{len(tensors)} backbone tensors exported to {path}")


def read_provenance(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Where a file of :func:`export_backbone` comes from; None for a file of another origin.

    Raises:
        IncompleteLoadError: if the file is no checkpoint.
        FileNotFoundError: if there is no such file.
    """
    return read_checkpoint(path)[_PROVENANCE]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A weight file of any origin, read without running code from it.

    Returns:
        "model": tensors by their names in the file, on the CPU (mapped from the disk where possible);
        "wsl_d2": the provenance :func:`export_backbone` wrote, or None.

    Raises:
        IncompleteLoadError: if the file is no checkpoint.
        FileNotFoundError: if there is no such file.
    """
    path = os.fspath(path)
    local_path = PathManager.get_local_path(path)
    if not os.path.isfile(local_path):
        raise FileNotFoundError(f"no weight file {path}")
    if os.path.getsize(local_path) == 0:
        raise IncompleteLoadError(path, "the file is empty")
    if local_path.endswith(".pkl"):
        raise IncompleteLoadError(
            path, "a .pkl file can run any code when it is read; convert it to .pth or .safetensors first"
        )
    if local_path.endswith(".safetensors"):
        payload, provenance = _read_safetensors(path, local_path)
    else:
        payload = _read_pth(path, local_path)
        provenance = payload.get(_PROVENANCE)
    for key in ("model", "state_dict"):  # detectron2 and this project; many training scripts
        if isinstance(payload.get(key), Mapping):
            payload = payload[key]
            break
    other = [key for key, value in payload.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise IncompleteLoadError(
            path, f"not a checkpoint: {other[0]!r} is no tensor, but {type(payload[other[0]]).__name__}"
        )
    return {"model": dict(payload), _PROVENANCE: provenance if isinstance(provenance, dict) else None}


def _read_pth(path: str, local_path: str) -> Mapping[str, Any]:
    try:
        payload = torch.load(local_path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(local_path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, OSError, ValueError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise IncompleteLoadError(
            path, f"not a checkpoint that torch.load(weights_only=True) can read ({reason})"
        ) from e
    if not isinstance(payload, Mapping):
        raise IncompleteLoadError(path, f"not a checkpoint: it holds a {type(payload).__name__}, not a dict")
    return payload


def _read_safetensors(path: str, local_path: str) -> tuple[Mapping[str, Any], Any]:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(local_path, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118, f is no dict
        return tensors, json.loads(metadata[_PROVENANCE]) if _PROVENANCE in metadata else None
    except Exception as e:  # the library has an error class of its own, which not all versions export
        raise IncompleteLoadError(path, f"not a .safetensors file ({e})") from e


def _safetensors() -> Any:
    try:
        import safetensors.torch as safetensors
    except ImportError as e:
        raise ImportError(".safetensors files need the package safetensors: pip install safetensors") from e
    return safetensors


def _check_stride(bottom_up: ResNet, file_format: str, provenance: Mapping[str, Any] | None, path: str) -> None:
    in_model = describe_resnext(bottom_up)["stride_in_1x1"]
    in_file = False if file_format != "d2" else (provenance or {}).get("stride_in_1x1")
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
