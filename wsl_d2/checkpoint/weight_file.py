"""A weight file, read once and without running code from it: the tensors, where a backbone is among them, what its
images looked like, and where it comes from. Everything else in this room asks :class:`WeightFile`."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from ..errors import MissingPackageError, UserError, suggest
from ..files import open_atomically
from .download import DownloadError, describe_failure
from .naming import (
    convert_name,
    describe_unknown,
    fill_affine_statistics,
    find_backbones,
    is_affine_only,
    shorten,
    tails,
    unwrap_name,
)

PROVENANCE = "wsl_d2"  # key in .pth and .pkl files, and in the metadata of a .safetensors file
SUFFIXES = (".pth", ".pkl", ".safetensors")

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


class WeightsError(UserError, ValueError):
    """Weights, or the model or file that is to get them, cannot be used as asked."""


class MissingFileError(UserError, FileNotFoundError):
    """There is no such weight file, or there are no public weights of that name."""


def missing_file(path: str, *words: str) -> MissingFileError:
    """Returns the error of a weight file that is not there, which names what may stand in its place.

    Args:
        words: that the caller takes beside files and names.
    """
    known = [*words, *(f"{scheme}://" for scheme in ("wsl", "torchvision", "timm"))]
    scheme, is_name, _ = path.partition("://")
    folder = Path(path).parent
    files = [file.name for file in folder.iterdir() if file.suffix in SUFFIXES] if folder.is_dir() else []
    near = suggest(f"{scheme}://" if is_name else Path(path).name, known if is_name else [*words, *files])
    allowed = f"{', '.join([*words, 'a file'])}, {'..., '.join(known[len(words) :])}..."
    return MissingFileError(f"no weight file {path}; give {allowed} (see wsl-d2 weights list){near}")


class PixelStatisticsError(WeightsError):
    """A config normalizes images otherwise than the weights it loads were trained with."""


class IncompleteLoadError(WeightsError):
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
        parts = [reason] if reason else []
        for title, names in (
            (
                "missing in the file",
                [k if file_format == "d2" else f"{k} ({convert_name(k, 'd2', file_format)})" for k in self.missing],
            ),
            ("left over in the file", list(self.unexpected)),
            (
                "of another shape or type",
                [f"{k} is {file} in the file and {model} in the model" for k, (file, model) in self.mismatched.items()],
            ),
        ):
            if names:
                parts.append(f"{len(names)} {title}: {shorten(names)}")
        if not reason:
            parts.append("do MODEL.BACKBONE.NAME and MODEL.RESNETS describe the model this file comes from?")
        super().__init__(f"no backbone weights loaded from {path}: {'; '.join(parts)}")


def check_tensors(
    path: str,
    tensors: Mapping[str, torch.Tensor],
    targets: Mapping[str, torch.Tensor],
    *,
    unexpected: Iterable[str] = (),
    may_lack: Iterable[str] = (),
    names: Mapping[str, str] | None = None,
    reason: str = "",
    file_format: str = "d2",
) -> None:
    """The one comparison of tensors that are there with tensors that are needed.

    Args:
        path: for the message.
        tensors: of a file, by Detectron2's names.
        targets: of a model, likewise; may be on the meta device.
        unexpected: names in the file that have no name of Detectron2's at all.
        may_lack: parts of names ("conv2_offset"); targets that have one need not be in the file.
        names: Detectron2's name -> name in the file.
        reason: what is wrong if anything is.

    Raises:
        IncompleteLoadError: a tensor is missing, left over, of another shape, no number with a fraction, or not finite.
    """
    may_lack = set(may_lack)
    missing = [name for name in targets if name not in tensors and not may_lack & set(name.split("."))]
    left_over = [*unexpected, *((names or {}).get(name, name) for name in tensors if name not in targets)]
    mismatched = {}
    for name, target in targets.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tensor.shape != target.shape:
            mismatched[name] = (str(tuple(tensor.shape)), str(tuple(target.shape)))
        elif not tensor.is_floating_point() or tensor.layout != torch.strided:
            kind = str(tensor.dtype) if tensor.layout == torch.strided else f"{tensor.layout} {tensor.dtype}"
            mismatched[name] = (kind, str(target.dtype))
    if missing or left_over or mismatched:
        raise IncompleteLoadError(
            path, reason, missing=missing, unexpected=left_over, mismatched=mismatched, file_format=file_format
        )
    if broken := [name for name in targets if name in tensors and not _is_finite(tensors[name])]:
        raise IncompleteLoadError(path, f"{len(broken)} of its tensors hold NaN or infinity: {shorten(broken)}")


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.is_meta:  # it has no values
        return False
    if tensor.itemsize == 1:  # float8 has no test of its own
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The backbone inside a weight file.

    Attributes:
        prefix: where it is, as ``prefix=`` of :func:`wsl_d2.checkpoint.load_backbone` takes it.
        file_format: its naming scheme, one of ``wsl_d2.checkpoint.FORMATS``.
        tensors: by detectron2's names without prefix, "res2.0.conv1.weight"; without batch-norm counters.
        names: the same names -> those in the file.
        head: "weight" and "bias" of the classification head, where there is one.
        unexpected: names inside the backbone that no ResNet of detectron2 has.
        outside: names of other parts of a model, such as a detector's heads.
        ignored: names of everything that is not in ``tensors`` or ``unexpected``.
        is_affine_only: whether it has affine layers in place of batch norms.
        stride_in_1x1: where its stages stride; None where nothing tells.
    """

    prefix: str
    file_format: str
    tensors: dict[str, torch.Tensor]
    names: dict[str, str]
    head: dict[str, torch.Tensor]
    unexpected: tuple[str, ...]
    outside: tuple[str, ...]
    ignored: tuple[str, ...]
    is_affine_only: bool
    stride_in_1x1: bool | None


class WeightFile:
    """The tensors and the provenance of a weight file of any origin.

    Args:
        path: for messages.
        containers: name of a dict in the file, "" for the file's own -> its tensors by their names, on the CPU.
        provenance: what :func:`wsl_d2.checkpoint.export_backbone` wrote, or None.
    """

    def __init__(
        self, path: str, containers: Mapping[str, Mapping[str, Any]], provenance: Mapping[str, Any] | None = None
    ):
        self.path = path
        self.containers = containers
        self.provenance = provenance

    @classmethod
    def read(cls, path: str | os.PathLike[str] | WeightFile) -> WeightFile:
        """Reads .pth (with ``weights_only=True``), .safetensors, or a .pkl of numpy arrays; no code in it is executed.

        Args:
            path: any path that detectron2's ``PathManager`` knows; a WeightFile is returned as it is.

        Raises:
            IncompleteLoadError: if the file is no checkpoint.
            FileNotFoundError: if there is no such file.
        """
        if isinstance(path, WeightFile):
            return path
        path = os.fspath(path)
        local_path = cls.locate(path)
        if os.path.getsize(local_path) == 0:
            raise IncompleteLoadError(path, "the file is empty")
        if local_path.endswith(".safetensors"):
            payload, provenance = _read_safetensors(path, local_path)
        else:
            is_pkl = local_path.endswith(".pkl")
            payload = _as_tensors(read_pkl(path)) if is_pkl else _read_pth(path, local_path)
            provenance = payload.get(PROVENANCE)
        containers = {name: tensors for name, tensors in _containers(payload) if tensors}
        return cls(path, containers, provenance if isinstance(provenance, dict) else None)

    @staticmethod
    def locate(path: str) -> str:
        """Returns where a weight file lies on this machine; one that is named by a URL is downloaded first.

        Raises:
            MissingFileError: there is no such file.
            DownloadError: it cannot be had.
        """
        try:
            local_path = PathManager.get_local_path(path)
        except OSError as e:
            if isinstance(e, UserError) or "://" not in path:
                raise
            raise DownloadError(describe_failure(path, getattr(e, "reason", e))) from e
        if not os.path.isfile(local_path):
            raise missing_file(path)
        return local_path

    def backbone(self, prefix: str | None = None) -> Backbone:
        """The one backbone in the file, or the one at a prefix.

        Args:
            prefix: any whole parts of the names before "res2", with or without the dict they are in: "modelTeacher",
                "model_ema", "encoder_q.backbone".

        Raises:
            IncompleteLoadError: if there is none, or several; the message names them.
        """
        found = self._backbones
        chosen = list(found)
        if prefix is not None:
            wanted = unwrap_name(f"{prefix.strip('.')}.").lstrip(".")
            exact = [key for key in found if wanted in (key, key.partition(":")[2], _spelled(key))]
            chosen = exact or [key for key in found if f".{wanted}" in f".{_spelled(key)}"]
        if len(chosen) == 1:
            return found[chosen[0]]
        candidates = ", ".join(repr(_spelled(key).rstrip(".")) for key in found)
        if not found:
            names = [name for tensors in self.containers.values() for name in tensors]
            raise IncompleteLoadError(self.path, describe_unknown(names))
        if prefix is None:
            raise IncompleteLoadError(self.path, f"it holds {len(found)} backbones; choose with prefix= {candidates}")
        raise IncompleteLoadError(
            self.path, f"prefix={prefix!r} stands for {len(chosen)} of its backbones; they are at {candidates}"
        )

    @cached_property
    def _backbones(self) -> dict[str, Backbone]:
        """By "<container>:<prefix>"."""
        found = {}
        for container, tensors in self.containers.items():
            try:
                prefixes = find_backbones(tensors)
            except ValueError as e:
                raise IncompleteLoadError(self.path, str(e)) from e
            for prefix, scheme in prefixes.items():
                found[f"{container}:{prefix}"] = self._make_backbone(container, prefix, scheme)
        return found

    def _make_backbone(self, container: str, prefix: str, scheme: str) -> Backbone:
        state_dict = self.containers[container]
        affine_only = scheme == "caffe2" and is_affine_only(state_dict)
        state_dict = fill_affine_statistics(state_dict) if affine_only else state_dict
        tensors: dict[str, torch.Tensor] = {}
        names: dict[str, str] = {}
        head: dict[str, torch.Tensor] = {}
        unexpected, outside, ignored = [], [], []
        # A file that says that it holds a backbone alone holds nothing else.
        alone = self.provenance is not None and not prefix and self.provenance.get("num_classes") is None
        for key, (kind, tail) in tails(state_dict, prefix, scheme).items():
            name = convert_name(tail, scheme, "d2")
            if kind == "part" and name is not None and name not in tensors:
                tensors[name], names[name] = state_dict[key], key
            elif kind == "part" or (alone and kind != "unread"):
                unexpected.append(key)
            else:
                ignored.append(key)
                if kind == "outside":
                    outside.append(key)
                elif kind == "head" and name is not None:
                    head[name.removeprefix("head.")] = state_dict[key]
        stride = None if scheme == "d2" else False
        if scheme == "caffe2":  # the grouped ones stride in the 3x3, as all public ResNeXts; the plain ones do either
            conv2 = next((v for k, v in tensors.items() if k.endswith(".conv2.weight")), None)
            stride = False if conv2 is not None and conv2.shape[0] != conv2.shape[1] else None
        return Backbone(
            _spelled(f"{container}:{prefix}"),
            scheme,
            tensors,
            names,
            head,
            tuple(unexpected),
            tuple(outside),
            tuple(ignored),
            affine_only,
            (self.provenance or {}).get("stride_in_1x1", stride),
        )

    @property
    def is_detector(self) -> bool:
        """Whether there is more in it than backbones and classification heads."""
        try:
            return any(backbone.outside for backbone in self._backbones.values())
        except IncompleteLoadError:
            return False

    def statistics(self, prefix: str | None = None) -> dict[str, Any] | None:
        """The pixel statistics of the images that its backbone was trained on.

        Returns:
            "input_format", "pixel_mean" and "pixel_std" of its provenance, else of its naming scheme, else None.

        Raises:
            PixelStatisticsError: if the provenance lacks one of them.
        """
        known: Mapping[str, Any] | None = self.provenance
        if known is None:
            try:
                backbone = self.backbone(prefix)
            except IncompleteLoadError:
                return None
            if backbone.file_format in ("torchvision", "timm"):
                known = TORCHVISION_STATISTICS
            elif backbone.file_format == "caffe2" and backbone.stride_in_1x1 is False:
                known = CAFFE2_RESNEXT_STATISTICS
            else:
                return None
        if absent := [key for key in TORCHVISION_STATISTICS if known.get(key) is None]:
            raise PixelStatisticsError(
                f"the provenance in {self.path} lacks {', '.join(absent)}; export the backbone again"
            )
        return {key: known[key] for key in TORCHVISION_STATISTICS}


def _spelled(key: str) -> str:
    container, _, prefix = key.partition(":")
    return f"{container}.{prefix}" if container else prefix


def _containers(payload: Mapping[Any, Any], path: str = "", depth: int = 2) -> Iterable[tuple[str, dict[str, Any]]]:
    """The dicts of tensors in a checkpoint: the payload itself, "model", "state_dict_ema", "ema.module", ..."""
    yield path, {key: value for key, value in payload.items() if isinstance(value, torch.Tensor)}
    if depth:
        for key, value in payload.items():
            if isinstance(key, str) and isinstance(value, Mapping):
                yield from _containers(value, f"{path}.{key}" if path else key, depth - 1)


def _latin1(text: str, encoding: str) -> bytes:
    """Python 2's and protocol 2's way to write bytes; nothing else is looked up in the codec registry."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


def _dtype(*args: Any) -> np.dtype:
    """A dtype of numbers: an array of objects could hold anything."""
    dtype = np.dtype(*args)
    if dtype.hasobject:
        raise pickle.UnpicklingError("it holds an array of Python objects")
    return dtype


_reconstruct = np.zeros(0).__reduce__()[0]  # its module's name differs between numpy 1 and 2
_scalar = np.float32(0).__reduce__()[0]


class _ArrayUnpickler(pickle.Unpickler):
    """Builds dicts, lists, numbers, text and numpy arrays of numbers, and refuses every other type."""

    _ALLOWED = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("_codecs", "encode"): _latin1,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): _dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy._core.multiarray", "scalar"): _scalar,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it holds {module}.{name}, which is no numpy array; it was not executed"
            ) from None


def read_pkl(path: str) -> dict[str, Any]:
    """The dict in a .pkl of Detectron2's or Caffe2's model zoo, whose only objects are numpy arrays.

    Args:
        path: any path that detectron2's ``PathManager`` knows.

    Raises:
        IncompleteLoadError: if the file is no pickle of a dict, or holds any other type, which is not executed.
    """
    try:
        with PathManager.open(path, "rb") as file:
            payload = _ArrayUnpickler(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError, ImportError) as e:
        raise IncompleteLoadError(path, f"not a .pkl file of numpy arrays ({_one_line(e)})") from e
    if not isinstance(payload, dict):
        raise IncompleteLoadError(path, f"not a checkpoint: it holds a {type(payload).__name__}, not a dict")
    return payload


def _as_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_tensors(item) for key, item in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    return value


class _Inert:
    """What stands for an object of a checkpoint that is neither tensor nor number, such as the arguments of its
    training script: an empty dict. Nothing of the object's own class is run."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return collections.OrderedDict()


def _read_pth(path: str, local_path: str) -> Mapping[str, Any]:
    is_zip = zipfile.is_zipfile(local_path)

    def load() -> Any:
        return torch.load(local_path, map_location="cpu", weights_only=True, mmap=is_zip)

    try:
        try:
            payload = load()
        except pickle.UnpicklingError:  # of a type that is neither tensor nor number
            others = torch.serialization.get_unsafe_globals_in_checkpoint(local_path) if is_zip else []
            if not others:
                raise
            with torch.serialization.safe_globals([(_Inert, name) for name in others]):
                payload = load()
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, OSError, ValueError, TypeError) as e:
        raise IncompleteLoadError(
            path, f"not a checkpoint that torch.load(weights_only=True) can read ({_one_line(e)})"
        ) from e
    except AttributeError as e:  # an object whose state is no dict
        raise IncompleteLoadError(path, f"not a checkpoint that can be read without running its code ({e})") from e
    if not isinstance(payload, Mapping):
        raise IncompleteLoadError(path, f"not a checkpoint: it holds a {type(payload).__name__}, not a dict")
    return payload


def _one_line(error: Exception) -> str:
    """The message of a library without its advice to load unsafely, its escape codes and its line breaks."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).rpartition("WeightsUnpickler error: ")[2]
    advice = ("Weights only load failed", "Check the documentation")
    lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith(advice)]
    return " ".join(lines[0].split()) if lines else type(error).__name__


def _read_safetensors(path: str, local_path: str) -> tuple[Mapping[str, Any], Any]:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(local_path, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118, f is no dict
        return tensors, json.loads(metadata[PROVENANCE]) if PROVENANCE in metadata else None
    except Exception as e:  # the library has an error class of its own, which not all versions export
        raise IncompleteLoadError(path, f"not a .safetensors file ({_one_line(e)})") from e


def _safetensors() -> Any:
    try:
        import safetensors.torch as safetensors
    except ImportError as e:
        raise MissingPackageError(".safetensors files need the package safetensors: pip install safetensors") from e
    return safetensors


def write_weights(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    record: Mapping[str, Any],
    file_format: str = "d2",
) -> None:
    """Writes tensors and where they come from; the file appears whole or not at all.

    A .pth or .pkl of "d2" names asks Detectron2 for its matching heuristics, the others are a "state_dict". A .pkl
    holds numpy arrays, as those of Detectron2's model zoo, and bfloat16 in it becomes float32, which numpy has.

    Args:
        path: ends in .pth, .pkl or .safetensors (which plain Detectron2 does not read).
        tensors: by names of ``file_format``, without prefix.
        record: provenance, of numbers, text, lists and None.
        file_format: naming scheme of the tensors.

    Raises:
        WeightsError: for another file name, or a folder that does not exist.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"weights are written to a .pth, .pkl or .safetensors file, got {path}")
    if not path.parent.is_dir():
        raise WeightsError(f"there is no folder {path.parent} to write {path.name} to")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    values: Mapping[str, Any] = tensors
    if path.suffix == ".pkl":
        values = {k: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for k, v in tensors.items()}
    payload: dict[str, Any] = {PROVENANCE: dict(record)}
    if file_format == "d2":
        payload |= {"model": values, "matching_heuristics": True, "__author__": "wsl_d2"}
    else:
        payload["state_dict"] = values
    with open_atomically(path) as file:
        if path.suffix == ".safetensors":
            mode = os.fstat(file.fileno()).st_mode
            _safetensors().save_file(tensors, file.name, metadata={PROVENANCE: json.dumps(dict(record))})
            with open(file.name, "rb+") as written:  # the library puts a file of its own in place
                os.chmod(written.fileno(), mode & 0o777)
                os.fsync(written.fileno())
        elif path.suffix == ".pkl":
            pickle.dump(payload, file, protocol=2)
        else:
            torch.save(payload, file)
