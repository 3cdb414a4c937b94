"""Weight files on disk: read without running code from them, written whole or not at all."""

import collections
import json
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from .naming import convert_name, shorten

_PROVENANCE = "wsl_d2"  # key in .pth and .pkl files, and in the metadata of a .safetensors file


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
    if local_path.endswith(".safetensors"):
        payload, provenance = _read_safetensors(path, local_path)
    else:
        payload = read_pkl(path) if local_path.endswith(".pkl") else _read_pth(path, local_path)
        provenance = payload.get(_PROVENANCE)
    for key in ("model", "state_dict", "blobs"):  # detectron2 and this project; many training scripts; Caffe2
        if isinstance(payload.get(key), Mapping):
            payload = payload[key]
            break
    if local_path.endswith(".pkl"):
        payload = {
            k: torch.from_numpy(v) if isinstance(v, np.ndarray) and v.dtype.kind in "fiub" else v
            for k, v in payload.items()
        }
    other = [key for key, value in payload.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise IncompleteLoadError(
            path, f"not a checkpoint: {other[0]!r} is no tensor, but {type(payload[other[0]]).__name__}"
        )
    return {"model": dict(payload), _PROVENANCE: provenance if isinstance(provenance, dict) else None}


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
        raise IncompleteLoadError(path, f"not a .pkl file of numpy arrays ({e})") from e
    if not isinstance(payload, dict):
        raise IncompleteLoadError(path, f"not a checkpoint: it holds a {type(payload).__name__}, not a dict")
    return payload


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


def write_weights(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    record: Mapping[str, Any],
    file_format: str = "d2",
) -> None:
    """Writes tensors and where they come from; the file appears whole or not at all (flush, then rename).

    A .pth or .pkl of "d2" names asks Detectron2 for its matching heuristics; "caffe2" names are written as "blobs",
    the others as "state_dict". A .pkl holds numpy arrays, as those of Detectron2's model zoo.

    Args:
        path: ends in .pth, .pkl or .safetensors (which plain Detectron2 does not read).
        tensors: by names of ``file_format``, without prefix.
        record: provenance, of numbers, text, lists and None.
        file_format: naming scheme of the tensors.

    Raises:
        ValueError: for another file name.
    """
    path = os.fspath(path)
    if not path.endswith((".pth", ".pkl", ".safetensors")):
        raise ValueError(f"weights are written to a .pth, .pkl or .safetensors file, got {path}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    payload: dict[str, Any] = {_PROVENANCE: dict(record)}
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        if path.endswith(".safetensors"):
            _safetensors().save_file(tensors, temporary, metadata={_PROVENANCE: json.dumps(dict(record))})
        else:
            values = {k: v.numpy() for k, v in tensors.items()} if path.endswith(".pkl") else tensors
            if file_format == "d2":
                payload |= {"model": values, "matching_heuristics": True, "__author__": "wsl_d2"}
            else:
                payload["blobs" if file_format == "caffe2" else "state_dict"] = values
            if path.endswith(".pkl"):
                with open(temporary, "wb") as file:
                    pickle.dump(payload, file, protocol=2)
            else:
                torch.save(payload, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
