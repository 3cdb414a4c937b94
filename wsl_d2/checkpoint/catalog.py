"""Public weights by name, wherever Detectron2 takes a path: ``MODEL.WEIGHTS: wsl://resnext101_32x8d``.

    wsl://resnext101_32x8d                                the paper's models, see WSL_WEIGHTS
    torchvision://ResNeXt101_32X8D_Weights.IMAGENET1K_V2  bottleneck ResNets and ResNeXts of torchvision
    timm://resnext101_32x4d.gluon_in1k                    those of timm, if it is installed

A file is downloaded and verified, converted once to Detectron2's names with its pixel statistics, and kept under
``$FVCORE_CACHE/wsl_d2`` (by default ~/.torch/iopath_cache/wsl_d2); from then on it needs no network. Importing this
module registers the three prefixes with detectron2's ``PathManager``.

``WSL_D2_WEIGHTS_MIRROR``, a folder or the beginning of a URL, replaces https://download.pytorch.org/models/. A file
``SHA256SUMS`` there says which files are right; without it, the first 8 hex digits in a file's name do.
"""

import functools
import glob
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch
import torchvision
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicStem
from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import file_lock, get_cache_dir

from ..modeling.resnext import RESNEXT_ARCHITECTURES, ResNeXtArchitecture, describe_resnext, make_resnext_stages
from .download import DownloadError, describe_mismatch, download, fetch_text, file_sha256, origin_of
from .files import IncompleteLoadError, read_checkpoint, read_provenance, write_weights
from .naming import convert_state_dict, is_ignored, shorten
from .pixel_statistics import TORCHVISION_STATISTICS

logger = logging.getLogger(__name__)

MIRROR_VARIABLE = "WSL_D2_WEIGHTS_MIRROR"
BASE_URL = "https://download.pytorch.org/models/"

WSL_WEIGHTS: dict[str, str] = {
    "resnext101_32x8d": "ig_resnext101_32x8-c38310e5.pth",
    "resnext101_32x16d": "ig_resnext101_32x16-c6f796b0.pth",
    "resnext101_32x32d": "ig_resnext101_32x32-e4b90b00.pth",
    "resnext101_32x48d": "ig_resnext101_32x48-3e41cc8a.pth",
}
_NEVER_RELEASED = ("resnext50_32x4d", "resnext101_32x4d")

TORCHVISION_WEIGHTS: dict[str, ResNeXtArchitecture] = {
    "ResNeXt50_32X4D_Weights": ResNeXtArchitecture(50, 32, 4),
    "ResNeXt101_32X8D_Weights": ResNeXtArchitecture(101, 32, 8),
    "ResNeXt101_64X4D_Weights": ResNeXtArchitecture(101, 64, 4),
    "ResNet50_Weights": ResNeXtArchitecture(50, 1, 64),
    "ResNet101_Weights": ResNeXtArchitecture(101, 1, 64),
    "ResNet152_Weights": ResNeXtArchitecture(152, 1, 64),
}

_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@dataclass(frozen=True)
class _PublicFile:
    """A torchvision state dict at BASE_URL.

    Attributes:
        key: what its converted file's name starts with.
        name: its file name, which ends in the start of its SHA-256.
        architecture: what it has to hold.
    """

    key: str
    name: str
    architecture: ResNeXtArchitecture

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
            FileNotFoundError: for an unknown name; the message lists the known ones.
            DownloadError: if the file cannot be had, or is not the one its digest says.
            IncompleteLoadError: if it holds anything but the network its name says.
            ImportError: if a package is needed that is not installed.
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
            raise FileNotFoundError(f"no weights {self.PREFIX}{name}; known: {', '.join(WSL_WEIGHTS)}.{never}")
        _warn_of_licence()
        return _provide(_PublicFile(f"wsl-{name}", WSL_WEIGHTS[name], RESNEXT_ARCHITECTURES[name]), force)

    def knows(self, name: str) -> bool:
        return name in WSL_WEIGHTS


class TorchvisionHandler(WeightsHandler):
    """``torchvision://<weights>``, a name as :func:`torchvision.models.get_weight` takes it."""

    PREFIX = "torchvision://"

    def provide(self, name: str, force: bool) -> str:
        known = self._names()
        if name not in known:
            raise FileNotFoundError(
                f"no weights {self.PREFIX}{name}, or not those of a ResNet of bottleneck blocks; "
                f"known: {', '.join(known)}"
            )
        weights = torchvision.models.get_weight(name)
        base, _, file_name = weights.url.rpartition("/")
        if f"{base}/" != BASE_URL or not re.fullmatch(r"[\w.-]+-[0-9a-f]{8,64}\.pth", file_name):
            raise DownloadError(f"this version of torchvision has {name} at {weights.url}, which cannot be verified")
        # str(weights) and not the name: DEFAULT is another name of one of them.
        return _provide(
            _PublicFile(f"torchvision-{weights}", file_name, TORCHVISION_WEIGHTS[type(weights).__name__]), force
        )

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
            raise FileNotFoundError(f"no weights {self.PREFIX}{name}: not the name of a model of timm")
        path = os.path.join(_cache_folder(), f"timm-{name}.pth")
        if os.path.isfile(path) and not force:
            return path
        timm = _timm()
        with file_lock(path):
            if force or not os.path.isfile(path):
                try:
                    model = timm.create_model(name, pretrained=True)
                except RuntimeError as e:  # an unknown model or tag, or one without weights
                    raise FileNotFoundError(
                        f"no weights {self.PREFIX}{name} ({e}); known: {shorten(_plain_models(timm), limit=100)}"
                    ) from e
                _convert_timm(model, self.PREFIX + name, path)
        return path

    def knows(self, name: str) -> bool:
        if os.path.isfile(os.path.join(_cache_folder(), f"timm-{name}.pth")):
            return True
        return any(f"{known}.".startswith(f"{name}.") for known in _plain_models(_timm()))


def _timm() -> Any:
    try:
        import timm
    except ImportError as e:
        raise ImportError("timm:// needs the package timm: pip install timm") from e
    return timm


def _plain_models(timm: Any) -> list[str]:
    plain = re.compile(r"(resnet(26|50|101|152)|wide_resnet\d+_2|resnext\d+_\d+x\d+d)\.")
    return [name for name in timm.list_pretrained() if plain.match(name)]


@functools.cache  # once per process
def _warn_of_licence() -> None:
    logger.warning(
        "wsl:// weights are licensed under CC-BY-NC 4.0 (not for commercial use). They are of Facebook (Meta), "
        "pretrained on hashtagged Instagram images and fine-tuned on ImageNet-1k."
    )


def _cache_folder() -> str:
    return os.path.join(get_cache_dir(), "wsl_d2")


def _provide(file: _PublicFile, force: bool) -> str:
    """The converted file, from the cache if it is there."""
    mirror = os.environ.get(MIRROR_VARIABLE, "").strip()
    folder = _cache_folder()
    path = None if force else _cached(folder, file, mirror)
    if path is None:
        with file_lock(os.path.join(folder, file.key)):  # another process of the job may be faster
            path = None if force else _cached(folder, file, mirror)
            path = path or _fetch(folder, file, mirror)
    return path


def _cached(folder: str, file: _PublicFile, mirror: str) -> str | None:
    """The converted file, if it comes from the public file, or from the mirror, whose file may be another one."""
    path = os.path.join(folder, f"{file.key}-{file.digest_start}.pth")
    if os.path.isfile(path):
        return path
    for path in sorted(glob.glob(f"{glob.escape(os.path.join(folder, file.key))}-*.pth")) if mirror else ():
        if (read_provenance(path) or {}).get("source") == _location(mirror, file.name):
            return path
    return None


def _location(mirror: str, name: str) -> str:
    """URL or path of a file."""
    if "://" in mirror:
        return f"{mirror.rstrip('/')}/{name}"
    return os.path.join(os.path.abspath(os.path.expanduser(mirror)), name) if mirror else BASE_URL + name


def _fetch(folder: str, file: _PublicFile, mirror: str) -> str:
    """Downloads, verifies and converts."""
    source = _location(mirror, file.name)
    expected = file.digest_start
    if mirror and "://" not in mirror:
        expected = _listed_digest(_read_sums(_location(mirror, "SHA256SUMS")), file) or expected
        original = source
        if not os.path.isfile(original):
            raise DownloadError(f"{MIRROR_VARIABLE} is {mirror}, and there is no file {file.name} in that folder")
        digest = file_sha256(original)
        if not digest.startswith(expected):
            raise DownloadError(f"{describe_mismatch(source, original, expected, digest)}. Copy it to the mirror again")
    else:
        origins = {_mirror_origin(mirror) if mirror else origin_of(BASE_URL)}
        if mirror:
            expected = _listed_digest(fetch_text(_location(mirror, "SHA256SUMS"), origins=origins), file) or expected
        original = os.path.join(folder, file.name)
        digest = file_sha256(original) if os.path.isfile(original) else ""  # left by a process that was killed
        if not digest.startswith(expected):
            logger.info(f"downloading {source}")
            digest = download(
                source, original, sha256=expected, max_bytes=2 * _num_bytes(file.architecture), origins=origins
            )

    path = os.path.join(folder, f"{file.key}-{digest[: len(file.digest_start)]}.pth")
    depth, num_groups, width_per_group = file.architecture
    what = f"a ResNet-{depth} of {num_groups} groups of width {width_per_group}"
    bottom_up = _make_bottom_up(file.architecture)
    try:
        tensors = _backbone_tensors(read_checkpoint(original)["model"], source)
        _check_shapes(tensors, bottom_up, what, source)
    except IncompleteLoadError:
        if original != source:
            os.remove(original)  # whole, and yet of no use
        raise
    _write(path, tensors, bottom_up, TORCHVISION_STATISTICS, source, digest)
    if original != source:
        os.remove(original)
    return path


def _mirror_origin(mirror: str) -> str:
    try:
        return origin_of(mirror)
    except ValueError as e:
        raise DownloadError(f"{MIRROR_VARIABLE} must be a folder, or start with https:// or http:// ({e})") from e


def _read_sums(path: str) -> str | None:
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


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


def _make_bottom_up(architecture: ResNeXtArchitecture) -> ResNet:
    """On the meta device: names and shapes without memory."""
    return _make_resnet(_BLOCKS[architecture.depth], architecture.groups, architecture.width_per_group, 64, 256)


def _make_resnet(
    blocks: tuple[int, ...], num_groups: int, width_per_group: int, stem_channels: int, res2_channels: int
) -> ResNet:
    with torch.device("meta"):
        stages = make_resnext_stages(
            blocks, num_groups, width_per_group, stem_channels=stem_channels, res2_channels=res2_channels
        )
        return ResNet(BasicStem(3, stem_channels, "BN"), stages, out_features=["res5"])


def _num_bytes(architecture: ResNeXtArchitecture) -> int:
    """Of the tensors in float32, with a head of 1000 classes and some room for names."""
    tensors = _make_bottom_up(architecture).state_dict().values()
    return 4 * (sum(tensor.numel() for tensor in tensors) + 1000 * 2049) + (1 << 20)


def _backbone_tensors(tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """By detectron2's names; without the head, for which detectors have no use, and without batch-norm counters."""
    try:
        converted = convert_state_dict(tensors, "d2")
    except ValueError as e:
        raise IncompleteLoadError(source, str(e)) from e
    return {name: tensor for name, tensor in converted.items() if not is_ignored(name)}


def _check_shapes(tensors: Mapping[str, torch.Tensor], bottom_up: ResNet, what: str, source: str) -> None:
    """Raises IncompleteLoadError unless these are the tensors of the model, all of them and no others."""
    targets = {name: tensor for name, tensor in bottom_up.state_dict().items() if not is_ignored(name)}
    missing = [name for name in targets if name not in tensors]
    unexpected = [name for name in tensors if name not in targets]
    mismatched = {
        name: (str(tuple(tensors[name].shape)), str(tuple(target.shape)))
        for name, target in targets.items()
        if name in tensors and tensors[name].shape != target.shape
    }
    if missing or unexpected or mismatched:
        raise IncompleteLoadError(
            source, f"it does not hold {what}", missing=missing, unexpected=unexpected, mismatched=mismatched
        )


def _write(
    path: str,
    tensors: Mapping[str, torch.Tensor],
    bottom_up: ResNet,
    statistics: Mapping[str, Any],
    source: str,
    digest: str | None,
) -> None:
    import wsl_d2  # here: it imports this module

    record = {
        **statistics,
        **describe_resnext(bottom_up),
        "version": wsl_d2.__version__,
        "source": source,
        "source_sha256": digest,
    }
    write_weights(path, tensors, record)
    logger.info(f"{len(tensors)} backbone tensors of {source} converted to {path}")


def _convert_timm(model: Any, source: str, path: str) -> None:
    tensors = _backbone_tensors(model.state_dict(), source)
    if "stem.conv1.weight" not in tensors or "res2.0.conv3.weight" not in tensors:
        raise IncompleteLoadError(source, "it has no bottleneck blocks of three convolutions")
    blocks = tuple(len({name.split(".")[1] for name in tensors if name.startswith(f"res{i}.")}) for i in range(2, 6))
    width, width_per_group = tensors["res2.0.conv2.weight"].shape[:2]
    bottom_up = _make_resnet(
        blocks,
        width // width_per_group,
        width_per_group,
        stem_channels=tensors["stem.conv1.weight"].shape[0],
        res2_channels=tensors["res2.0.conv3.weight"].shape[0],
    )
    _check_shapes(tensors, bottom_up, "a plain ResNet or ResNeXt", source)

    # Some of timm's variants, such as resnetblur50, have the plain ResNet's tensors and compute something else.
    bottom_up.load_state_dict(tensors, strict=False, assign=True)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = model.eval().forward_features(image), bottom_up.eval()(image)["res5"]
    if expected.shape != actual.shape or not (actual - expected).abs().max() <= 1e-3 * expected.abs().max():
        raise IncompleteLoadError(
            source, "it has the tensors of a plain ResNet or ResNeXt, but computes something else"
        )

    cfg = model.pretrained_cfg
    licence = cfg.get("license") or "unknown"
    logger.log(logging.WARNING if "-nc" in licence else logging.INFO, f"{source}: licence {licence}")
    statistics = {
        "input_format": "RGB",
        "pixel_mean": [round(255 * x, 4) for x in cfg["mean"]],
        "pixel_std": [round(255 * x, 4) for x in cfg["std"]],
    }
    location = f"https://huggingface.co/{cfg['hf_hub_id']}" if cfg.get("hf_hub_id") else cfg.get("url") or source
    _write(path, tensors, bottom_up, statistics, location, None)


for _handler in (WSLHandler, TorchvisionHandler, TimmHandler):
    PathManager.register_handler(_handler())
