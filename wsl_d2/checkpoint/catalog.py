"""Public weights by name, wherever Detectron2 takes a path: ``MODEL.WEIGHTS: wsl://resnext101_32x8d``.

    wsl://resnext101_32x8d                                the paper's models, see WSL_WEIGHTS
    torchvision://ResNeXt101_32X8D_Weights.IMAGENET1K_V2  bottleneck ResNets and ResNeXts of torchvision
    timm://resnext101_32x4d.gluon_in1k                    those of timm, if it is installed

A file is downloaded and verified, converted once to Detectron2's names with its pixel statistics, and kept under
``$WSL_D2_CACHE/weights`` (by default ~/.cache/wsl_d2/weights); from then on it needs no network. Importing this module
registers the three prefixes with detectron2's ``PathManager``.

``WSL_D2_WEIGHTS_MIRROR``, a folder or the beginning of a URL, replaces https://download.pytorch.org/models/. A file
``SHA256SUMS`` there says which files are right; without it, the first 8 hex digits in a file's name do.
"""

import contextlib
import functools
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torchvision
from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import file_lock

from ..errors import MissingPackageError, suggest
from ..files import cache_folder, sha256_of
from ..modeling.resnext import RESNEXT_ARCHITECTURES, TRUNKS, ResNeXtArchitecture, describe_resnext
from ..version import __version__
from .convert import Shape, make_network
from .download import DownloadError, describe_failure, describe_mismatch, download, fetch_text
from .naming import shorten
from .weight_file import (
    TORCHVISION_STATISTICS,
    Backbone,
    IncompleteLoadError,
    MissingFileError,
    WeightFile,
    write_weights,
)

logger = logging.getLogger(__name__)

MIRROR_VARIABLE = "WSL_D2_WEIGHTS_MIRROR"
BASE_URL = "https://download.pytorch.org/models/"

WSL_WEIGHTS: dict[str, str] = {
    "resnext101_32x8d": "ig_resnext101_32x8-c38310e5.pth",
    "resnext101_32x16d": "ig_resnext101_32x16-c6f796b0.pth",
    "resnext101_32x32d": "ig_resnext101_32x32-e4b90b00.pth",
    "resnext101_32x48d": "ig_resnext101_32x48-3e41cc8a.pth",
}
_REGISTERED = {architecture: name for name, architecture in RESNEXT_ARCHITECTURES.items()}
_NEVER_RELEASED = ("resnext50_32x4d", "resnext101_32x4d")

TORCHVISION_WEIGHTS: dict[str, ResNeXtArchitecture] = {
    "ResNeXt50_32X4D_Weights": ResNeXtArchitecture(50, 32, 4),
    "ResNeXt101_32X8D_Weights": ResNeXtArchitecture(101, 32, 8),
    "ResNeXt101_64X4D_Weights": ResNeXtArchitecture(101, 64, 4),
    "ResNet50_Weights": ResNeXtArchitecture(50, 1, 64),
    "ResNet101_Weights": ResNeXtArchitecture(101, 1, 64),
    "ResNet152_Weights": ResNeXtArchitecture(152, 1, 64),
}


@dataclass(frozen=True)
class _PublicFile:
    """A torchvision state dict at BASE_URL.

    Attributes:
        key: what its converted file's name starts with.
        name: its file name, which ends in the start of its SHA-256.
        architecture: what it has to hold.
        license: SPDX name.
    """

    key: str
    name: str
    architecture: ResNeXtArchitecture
    license: str

    @property
    def digest_start(self) -> str:
        return self.name.removesuffix(".pth").rpartition("-")[2]


class WeightsHandler(PathHandler):
    """Resolves ``<prefix><name>`` to a converted weight file on the local disk. Read-only."""

    PREFIX = ""

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        return self.provide(path[len(self.PREFIX) :].rstrip("/"), force)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if set(mode) & set("wax+"):
            raise OSError(f"{path} can only be read, not opened with mode {mode!r}")
        return open(self._get_local_path(path), mode, buffering=buffering, **kwargs)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        self._check_kwargs(kwargs)
        return self.knows(path[len(self.PREFIX) :].rstrip("/"))

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._isfile(path, **kwargs)

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        self._check_kwargs(kwargs)
        return False

    def provide(self, name: str, force: bool) -> str:
        """The path of the converted file.

        Args:
            name: the path without the prefix.
            force: download and convert again what the cache has.

        Raises:
            MissingFileError: for an unknown name; the message lists the known ones.
            DownloadError: if the file cannot be had, or is not the one its digest says.
            IncompleteLoadError: if it holds anything but the network its name says.
            MissingPackageError: if a package is needed that is not installed.
        """
        raise NotImplementedError

    def knows(self, name: str) -> bool:
        """Whether there are such weights; nothing is downloaded."""
        raise NotImplementedError


class WSLHandler(WeightsHandler):
    """``wsl://<name>``, see :data:`WSL_WEIGHTS`."""

    PREFIX = "wsl://"

    def provide(self, name: str, force: bool) -> str:
        if not self.knows(name):
            never = " This one was never released." if name in _NEVER_RELEASED else ""
            raise MissingFileError(
                f"no weights {self.PREFIX}{name}; known: {', '.join(WSL_WEIGHTS)}.{never}{suggest(name, WSL_WEIGHTS)}"
            )
        _warn_of_license()
        return _provide(_wsl_file(name), force)

    def knows(self, name: str) -> bool:
        return name in WSL_WEIGHTS


class TorchvisionHandler(WeightsHandler):
    """``torchvision://<weights>``, a name as :func:`torchvision.models.get_weight` takes it."""

    PREFIX = "torchvision://"

    def provide(self, name: str, force: bool) -> str:
        known = self._names()
        if name not in known:
            raise MissingFileError(
                f"no weights {self.PREFIX}{name}, or not those of a ResNet of bottleneck blocks; "
                f"known: {', '.join(known)}{suggest(name, known)}"
            )
        return _provide(_torchvision_file(name), force)

    def knows(self, name: str) -> bool:
        return name in self._names()

    @staticmethod
    def _names() -> list[str]:
        return [
            f"{enum}.{member}"
            for enum in TORCHVISION_WEIGHTS
            if hasattr(torchvision.models, enum)  # not all of them are in older versions
            for member in getattr(torchvision.models, enum).__members__
        ]


class TimmHandler(WeightsHandler):
    """``timm://<model>``, a name as ``timm.create_model`` takes it, with or without tag.

    timm and huggingface_hub download and verify the file and keep it in their own cache.
    """

    PREFIX = "timm://"

    def provide(self, name: str, force: bool) -> str:
        if not re.fullmatch(r"\w[\w.-]*", name):  # it becomes a file name; and no "hf-hub:" or "local-dir:"
            raise MissingFileError(f"no weights {self.PREFIX}{name}: not the name of a model of timm")
        path = str(cache_folder("weights") / f"timm-{name}.pth")
        if os.path.isfile(path) and not force:
            return path
        timm = _timm()
        os.makedirs(cache_folder("weights"), exist_ok=True)
        with file_lock(path):
            if force or not os.path.isfile(path):
                try:
                    model = timm.create_model(name, pretrained=True)
                except RuntimeError as e:  # an unknown model or tag, or one without weights
                    raise MissingFileError(
                        f"no weights {self.PREFIX}{name} ({e}); known: {shorten(_plain_models(timm), limit=100)}"
                    ) from e
                except OSError as e:  # of the libraries that timm downloads by
                    raise DownloadError(describe_failure(self.PREFIX + name, e)) from e
                _convert_timm(model, self.PREFIX + name, path)
        return path

    def knows(self, name: str) -> bool:
        if (cache_folder("weights") / f"timm-{name}.pth").is_file():
            return True
        return any(f"{known}.".startswith(f"{name}.") for known in _plain_models(_timm()))


def _timm() -> Any:
    try:
        import timm
    except ImportError as e:
        raise MissingPackageError("timm:// needs the package timm: pip install timm") from e
    return timm


def _plain_models(timm: Any) -> list[str]:
    plain = re.compile(r"(resnet(26|50|101|152)|wide_resnet\d+_2|resnext\d+_\d+x\d+d)\.")
    return [name for name in timm.list_pretrained() if plain.match(name)]


def public_weights() -> list[dict[str, Any]]:
    """What MODEL.WEIGHTS takes by name; nothing is downloaded.

    Returns:
        One dict each with "name"; "backbone", the registered architecture that it fills, None where it needs its
        MODEL.RESNETS; "license", None where timm's page tells it; "is_cached", whether it is on this machine.
    """
    folder, mirror = cache_folder("weights"), os.environ.get(MIRROR_VARIABLE, "").strip()
    files = {f"{WSLHandler.PREFIX}{name}": _wsl_file(name) for name in WSL_WEIGHTS}
    files |= {f"{TorchvisionHandler.PREFIX}{name}": _torchvision_file(name) for name in TorchvisionHandler._names()}
    rows = [
        {
            "name": name,
            "backbone": _REGISTERED.get(file.architecture),
            "license": file.license,
            "is_cached": _cached(folder, file, mirror) is not None,
        }
        for name, file in files.items()
        if not name.endswith(".DEFAULT")
    ]
    with contextlib.suppress(ImportError):
        for name in _plain_models(_timm()):
            backbone = name.partition(".")[0]
            rows.append(
                {
                    "name": f"{TimmHandler.PREFIX}{name}",
                    "backbone": backbone if backbone in RESNEXT_ARCHITECTURES else None,
                    "license": None,
                    "is_cached": (folder / f"timm-{name}.pth").is_file(),
                }
            )
    return rows


def describe_public(path: str) -> tuple[str | None, dict[str, Any]] | None:
    """What public weights will be, by their name alone; nothing is downloaded.

    Args:
        path: as MODEL.WEIGHTS takes it.

    Returns:
        (registered architecture, or None; pixel statistics); None for what is no such name.
    """
    scheme, _, name = path.partition("://")
    if scheme == "timm" and any(f"{known}.".startswith(f"{name}.") for known in _plain_models(_timm())):
        architecture = name.partition(".")[0]
        statistics = _timm_statistics(vars(_timm().get_pretrained_cfg(name)))
        return architecture if architecture in RESNEXT_ARCHITECTURES else None, statistics
    if scheme == "wsl" and name in WSL_WEIGHTS:
        file = _wsl_file(name)
    elif scheme == "torchvision" and name in TorchvisionHandler._names():
        file = _torchvision_file(name)
    else:
        return None
    return _REGISTERED.get(file.architecture), TORCHVISION_STATISTICS


def _timm_statistics(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input_format": "RGB",
        "pixel_mean": [round(255 * x, 4) for x in cfg["mean"]],
        "pixel_std": [round(255 * x, 4) for x in cfg["std"]],
    }


def _wsl_file(name: str) -> _PublicFile:
    return _PublicFile(f"wsl-{name}", WSL_WEIGHTS[name], RESNEXT_ARCHITECTURES[name], "CC-BY-NC-4.0")


def _torchvision_file(name: str) -> _PublicFile:
    weights = torchvision.models.get_weight(name)
    base, _, file_name = weights.url.rpartition("/")
    if f"{base}/" != BASE_URL or not re.fullmatch(r"[\w.-]+-[0-9a-f]{8,64}\.pth", file_name):
        raise DownloadError(f"this version of torchvision has {name} at {weights.url}, which cannot be verified")
    # str(weights) and not the name: DEFAULT is another name of one of them.
    architecture = TORCHVISION_WEIGHTS[type(weights).__name__]
    return _PublicFile(f"torchvision-{weights}", file_name, architecture, "BSD-3-Clause")


@functools.cache  # once per process
def _warn_of_license() -> None:
    logger.warning(
        "wsl:// weights are licensed under CC-BY-NC 4.0 (not for commercial use). They were made by Facebook (Meta), "
        "pretrained on hashtagged Instagram images and fine-tuned on ImageNet-1k."
    )


def _provide(file: _PublicFile, force: bool) -> str:
    """The converted file, from the cache if it is there."""
    mirror = os.environ.get(MIRROR_VARIABLE, "").strip()
    folder = cache_folder("weights")
    path = None if force else _cached(folder, file, mirror)
    if path is None:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(str(folder / file.key)):  # another process of the job may be faster
            path = None if force else _cached(folder, file, mirror)
            path = path or _fetch(folder, file, mirror)
    return str(path)


def _cached(folder: Path, file: _PublicFile, mirror: str) -> Path | None:
    """The converted file, if it comes from the public file, or from the mirror, whose file may be another one."""
    path = folder / f"{file.key}-{file.digest_start}.pth"
    if path.is_file():
        return path
    for path in sorted(folder.glob(f"{file.key}-*.pth")) if mirror else ():
        if (WeightFile.read(path).provenance or {}).get("source") == _location(mirror, file.name):
            return path
    return None


def _location(mirror: str, name: str) -> str:
    """URL or path of a file."""
    if "://" in mirror:
        return f"{mirror.rstrip('/')}/{name}"
    return os.path.join(os.path.abspath(os.path.expanduser(mirror)), name) if mirror else BASE_URL + name


def _fetch(folder: Path, file: _PublicFile, mirror: str) -> Path:
    """Downloads, verifies and converts."""
    if "://" in mirror and (not mirror.startswith(("https://", "http://")) or "@" in mirror):
        raise DownloadError(
            f"{MIRROR_VARIABLE} must be a folder, or start with https:// or http://, without user name and password"
        )
    source = _location(mirror, file.name)
    expected = file.digest_start
    if mirror and "://" not in mirror:
        original = Path(source)
        sums = original.with_name("SHA256SUMS")
        expected = _listed_digest(sums.read_text(errors="replace") if sums.is_file() else None, file) or expected
        if not original.is_file():
            raise DownloadError(f"{MIRROR_VARIABLE} is {mirror}, and there is no file {file.name} in that folder")
        digest = sha256_of(original)
        if not digest.startswith(expected):
            raise DownloadError(f"{describe_mismatch(source, original, expected, digest)}. Copy it to the mirror again")
    else:
        original = folder / file.name
        if mirror:
            try:
                expected = _listed_digest(fetch_text(_location(mirror, "SHA256SUMS")), file) or expected
            except DownloadError as e:
                raise DownloadError(describe_failure(source, f"its {e}", original)) from e
        digest = sha256_of(original) if original.is_file() else ""  # left by a process that was killed
        if not digest.startswith(expected):
            logger.info(f"downloading {source}")
            digest = download(source, original, expected)

    path = folder / f"{file.key}-{digest[: len(file.digest_start)]}.pth"
    depth, groups, width = file.architecture
    try:
        backbone = WeightFile(source, WeightFile.read(original).containers).backbone()
        reason = f"it does not hold a ResNet-{depth} of {groups} groups of width {width}"
        network = make_network(source, backbone, Shape(groups, width, TRUNKS[depth]), reason)
        record = {**TORCHVISION_STATISTICS, "license": file.license, "source": source, "source_sha256": digest}
        _write(path, backbone, network, record)
    except IncompleteLoadError:
        if str(original) != source:
            original.unlink()  # whole, and yet of no use
        raise
    if str(original) != source:
        original.unlink()
    return path


def _listed_digest(sums: str | None, file: _PublicFile) -> str | None:
    """The digest of a file in the output of ``sha256sum``, if it is there."""
    for line in (sums or "").splitlines():
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line.strip())
        if match and match[2] == file.name:
            digest = match[1].lower()
            if not digest.startswith(file.digest_start):
                logger.warning(
                    f"the mirror's SHA256SUMS gives {file.name} the digest {digest[:8]}...: "
                    "it is not the public file of that name"
                )
            return digest
    return None


def _write(
    path: str | os.PathLike[str], backbone: Backbone, network: torch.nn.Module, record: Mapping[str, Any]
) -> None:
    record = {**record, **describe_resnext(network), "version": __version__}
    write_weights(path, backbone.tensors, record)
    logger.info(f"{len(backbone.tensors)} backbone tensors of {record['source']} converted to {path}")


def _convert_timm(model: Any, source: str, path: str) -> None:
    backbone = WeightFile(source, {"": model.state_dict()}).backbone()
    network = make_network(source, backbone, reason="it is not a plain ResNet or ResNeXt")
    # Some of timm's variants, such as resnetblur50, have the plain ResNet's tensors and compute something else.
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = model.eval().forward_features(image), network(image)["res5"]
    if expected.shape != actual.shape or not (actual - expected).abs().max() <= 1e-3 * expected.abs().max():
        raise IncompleteLoadError(
            source, "it has the tensors of a plain ResNet or ResNeXt, but computes something else"
        )
    cfg = model.pretrained_cfg
    license = cfg.get("license") or "unknown"
    logger.log(logging.WARNING if "-nc" in license else logging.INFO, f"{source}: license {license}")
    location = f"https://huggingface.co/{cfg['hf_hub_id']}" if cfg.get("hf_hub_id") else cfg.get("url") or source
    record = {
        **_timm_statistics(cfg),
        "license": cfg.get("license"),
        "source": location,
        "source_sha256": None,
    }
    _write(path, backbone, network, record)


for _handler in (WSLHandler, TorchvisionHandler, TimmHandler):
    PathManager.register_handler(_handler())
