"""Loads and exports the bottom-up backbone of any model: all of its tensors, or an error.

This is the hand-over from pretraining to detection. (detectron2's own checkpointer only warns about weights
that do not fit, and goes on from random ones.)
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone import FPN, ResNet
from torch import nn

from ..modeling.resnext import RESNEXT_ARCHITECTURES, TRUNKS, describe_resnext, strides_in_1x1
from ..version import __version__
from .convert import shape_of
from .naming import is_counter, unwrap_name
from .pixel_statistics import check_pixel_statistics
from .weight_file import Backbone, IncompleteLoadError, WeightFile, WeightsError, check_tensors, write_weights

logger = logging.getLogger(__name__)

_PROVENANCE_KEYS = (
    "architecture",
    "num_groups",
    "width_per_group",
    "vocabulary_checksum",
    "images_seen",
    "version",
)
_EXTRA_CHANNELS = ("zeros", "mean", "keep")


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_backbone` did.

    Attributes:
        path: the weight file.
        file_format: its naming scheme, one of ``wsl_d2.checkpoint.FORMATS``.
        num_tensors: parameters and buffers of the backbone that were filled: all of them.
        ignored: names in the file that belong to no backbone, as they stand there.
        unused: names (detectron2's) of stages that this model does not have, such as res5 in an RPN on res4.
        prefix: where in the file the backbone was.
    """

    path: str
    file_format: str
    num_tensors: int
    ignored: tuple[str, ...]
    unused: tuple[str, ...] = ()
    prefix: str = ""


def find_bottom_up(model: nn.Module, target: str | nn.Module | None = None) -> ResNet:
    """The bottom-up ResNet of a HashtagClassifier, a detector, an FPN, any wrapper of these, or the ResNet itself.

    Args:
        model: holds it at any depth.
        target: where there are several, the part of the model to look in: the module, or its name
            ("modelTeacher").

    Raises:
        WeightsError: if there is none, or several; the message names them.
    """
    return _locate(model, target)[2]


def _locate(model: nn.Module, target: str | nn.Module | None) -> tuple[nn.Module, str, ResNet]:
    """Returns (the part of the model that was searched, the name of the ResNet in it, the ResNet)."""
    part = model
    found = {name: module for name, module in model.named_modules() if isinstance(module, ResNet)}
    if target is not None:
        try:
            part = model.get_submodule(target) if isinstance(target, str) else target
        except AttributeError as e:
            raise WeightsError(f"no part {target!r} in {type(model).__name__}; {_describe(found)}") from e
        found = {name: module for name, module in part.named_modules() if isinstance(module, ResNet)}
    if len(found) != 1:
        asked = "" if target is None else f" under target {target if isinstance(target, str) else type(target)}"
        raise WeightsError(
            f"{f'{len(found)} bottom-up ResNets' if found else 'no bottom-up ResNet'} of detectron2 in "
            f"{type(model).__name__}{asked}"
            f"{f'; {_describe(found)}' if found else ''}"
        )
    (name, bottom_up) = next(iter(found.items()))
    return part, name, bottom_up


def _describe(found: dict[str, ResNet]) -> str:
    return f"pass one of these as target=: {', '.join(map(repr, found))}" if found else "it has no ResNet of detectron2"


def _targets(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by detectron2's names; they share memory with the model."""
    tensors = {unwrap_name(name): tensor for name, tensor in module.state_dict().items()}
    return {name: tensor for name, tensor in tensors.items() if not is_counter(name)}


def _res5_of_heads(part: nn.Module, name: str) -> list[nn.Module]:
    """The last stages that a C4 detector has in its heads, beside the backbone of that name."""
    owner = name.split(".")
    while owner and owner[-1] in ("bottom_up", "backbone", "module", "_orig_mod", ""):
        owner.pop()
    root = ".".join([*owner, ""]).lstrip(".")
    return [
        module
        for where, module in part.named_modules()
        if where.startswith(root)
        and where.rpartition(".")[2] == "res5"
        and any(isinstance(block, CNNBlockBase) for block in module.children())
    ]


def load_backbone(
    model: nn.Module,
    path: str | os.PathLike[str] | WeightFile,
    cfg: CfgNode | Any | None = None,
    target: str | nn.Module | None = None,
    prefix: str | None = None,
    *,
    extra_channels: str | None = None,
    allow_missing: Sequence[str] = (),
) -> LoadReport:
    """Fills the bottom-up backbone of a model from a weight file, bit by bit, batch-norm statistics included.

    Every parameter and buffer of the backbone must be in the file and the other way round. The res5 that a C4 detector
    has in its head belongs to it. What else the file holds (heads, FPN, optimizer) is ignored; stages that the model
    does not have are named in the report. Nothing is changed unless everything fits.

    Args:
        model: anything :func:`find_bottom_up` knows.
        path: .pth (read with ``weights_only=True``), .safetensors, or a .pkl of numpy arrays (no other type is
            executed); any path that detectron2's ``PathManager`` knows, wsl://resnext101_32x8d among them. Names of
            detectron2, torchvision, timm or Caffe2, with any prefix: a backbone, a classifier, or a detector.
        cfg: if given, its pixel statistics are checked, too (:func:`check_pixel_statistics`).
        target: the part of the model to fill, where it has several backbones; its name or the module.
        prefix: the backbone in the file to take, where it has several: "modelTeacher", "model_ema".
        extra_channels: for a model whose images have more channels than the file's, in the file's order and then the
            others: weights of the others are "zeros", the "mean" of the file's channels, or "keep" (the model's own).
        allow_missing: parts of names of modules that the model has beyond a plain ResNet and that keep their
            initialization, such as "conv2_offset".

    Returns:
        A short report; the same is logged in one line.

    Raises:
        IncompleteLoadError: if a backbone tensor is missing, left over, of another shape or not finite, if the file
            holds no backbone or several, or if model and weights stride in other convolutions (such weights fit, and
            compute something else).
        PixelStatisticsError: if ``cfg`` normalizes images otherwise than the weights were trained with.
        WeightsError: if the model has no backbone or several, or is on the meta device.
        FileNotFoundError: if there is no such file.
    """
    part, name, bottom_up = _locate(model, target)
    targets = _targets(bottom_up)
    heads = [] if "res5" in bottom_up.stage_names else _res5_of_heads(part, name)
    copies = [targets | {f"res5.{k}": v for k, v in _targets(head).items()} for head in heads] or [targets]
    if any(tensor.is_meta for copy in copies for tensor in copy.values()):
        raise WeightsError("the model is on the meta device and has no memory to load weights into")
    file = WeightFile.read(path)
    backbone = file.backbone(prefix)
    tensors = backbone.tensors
    last = max(key.partition(".")[0] for key in copies[0] if key.startswith("res"))
    unused = [key for key in tensors if key.startswith("res") and key.partition(".")[0] > last]
    tensors = {key: tensor for key, tensor in tensors.items() if key not in unused}
    tensors = _with_extra_channels(file.path, tensors, targets["stem.conv1.weight"], extra_channels)
    for copy in copies:
        check_tensors(
            file.path,
            tensors,
            copy,
            unexpected=backbone.unexpected,
            may_lack=allow_missing,
            names=backbone.names,
            reason=_reason_of_norms(bottom_up, copy) or _reason_of_shape(part, tensors, copy),
            file_format=backbone.file_format,
        )
    _check_meaning(bottom_up, heads, backbone, file.path)
    if cfg is not None:
        check_pixel_statistics(cfg, file, prefix)

    with torch.no_grad():
        for copy in copies:
            for key, tensor in copy.items():
                if key in tensors:
                    tensor.copy_(tensors[key])
    total = len(copies[0])
    of_stages = ", ".join(sorted({key.partition(".")[0] for key in unused}))
    logger.info(
        f"{len(tensors)} of {total} backbone tensors loaded from {file.path}"
        + (f"; {len(unused)} of {of_stages} not used: this model has none" if unused else "")
    )
    return LoadReport(
        file.path, backbone.file_format, len(tensors), backbone.ignored, tuple(unused), backbone.prefix.rstrip(".")
    )


def _with_extra_channels(
    path: str, tensors: dict[str, torch.Tensor], stem: torch.Tensor, extra_channels: str | None
) -> dict[str, torch.Tensor]:
    """The file's tensors with a first convolution for the model's number of channels."""
    if extra_channels is not None and extra_channels not in _EXTRA_CHANNELS:
        raise WeightsError(f"extra_channels must be one of {', '.join(_EXTRA_CHANNELS)}, got {extra_channels!r}")
    weight = tensors.get("stem.conv1.weight")
    if weight is None or weight.dim() != 4 or weight.shape[1] >= stem.shape[1]:
        return tensors
    number = stem.shape[1] - weight.shape[1]
    if extra_channels is None:
        raise IncompleteLoadError(
            path,
            f"the model's images have {stem.shape[1]} channels, the file's {weight.shape[1]}; say how the weights of "
            "the others start with extra_channels= 'zeros', 'mean' (of the file's) or 'keep' (the model's own)",
        )
    more = {
        "zeros": torch.zeros_like(weight[:, :1]).expand(-1, number, -1, -1),
        "mean": weight.mean(dim=1, keepdim=True).expand(-1, number, -1, -1),
        "keep": stem[:, -number:].detach().to(weight.device, weight.dtype),
    }[extra_channels]
    return tensors | {"stem.conv1.weight": torch.cat([weight, more], dim=1)}


def _reason_of_norms(bottom_up: ResNet, targets: dict[str, torch.Tensor]) -> str:
    if any(name.endswith(".norm.running_mean") for name in targets):
        return ""
    norm = type(bottom_up.stem.conv1.norm).__name__
    return (
        f"the model's norms are {norm} and the file's are batch norms, which it cannot take over; set "
        "MODEL.RESNETS.NORM to FrozenBN, BN or SyncBN"
    )


def _reason_of_shape(part: nn.Module, tensors: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> str:
    try:
        file, model = shape_of("", tensors), shape_of("", targets)
    except IncompleteLoadError:
        return ""
    if file == model or not file.name:
        return ""
    fpn = "_fpn" if any(isinstance(module, FPN) for module in part.modules()) else ""
    depth = next(depth for depth, trunk in TRUNKS.items() if trunk == file.trunk)
    keys = f"_backbone, MODEL.RESNETS.DEPTH {depth}, NUM_GROUPS {file.num_groups}, WIDTH_PER_GROUP"
    return (
        f"it is a {file.name}, the model {f'a {model.name}' if model.name else 'another'}; set MODEL.BACKBONE.NAME to "
        + (
            f"build_{file.name}{fpn}_backbone"
            if file.architecture
            else f"build_resnext{fpn}{keys} {file.width_per_group}"
        )
        + ", or take other weights"
    )


def _check_meaning(bottom_up: ResNet, heads: list[nn.Module], backbone: Backbone, path: str) -> None:
    """Refuses weights that fit and compute something else."""
    strides = {"the model has": describe_resnext(bottom_up)["stride_in_1x1"]}
    for head in heads:
        strides["its head's res5 has"] = strides_in_1x1(head[0])
    wanted = backbone.stride_in_1x1
    if wanted is None:  # then at least backbone and head must agree
        wanted = strides["the model has"]
    for who, stride in strides.items():
        if None not in (stride, wanted) and stride != wanted:
            raise IncompleteLoadError(
                path,
                f"they were trained with stride_in_1x1 {wanted} and {who} {stride}, so they would fit and compute "
                f"something else; set MODEL.RESNETS.STRIDE_IN_1X1 {wanted}",
            )
    if backbone.is_affine_only and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in bottom_up.modules()):
        raise IncompleteLoadError(
            path,
            "it holds affine layers without batch-norm statistics, and the model has batch norms that train; set "
            "MODEL.RESNETS.NORM FrozenBN",
        )


def load_pretrained(
    trainer: Any,
    cfg: CfgNode | Any | None = None,
    start_iter: int | None = None,
    *,
    path: str | os.PathLike[str] | WeightFile | None = None,
    **options: Any,
) -> LoadReport | None:
    """:func:`load_backbone` for a training script: checks the pixel statistics, too, and leaves a resumed run alone.

    Call it after the script's own ``resume_or_load``, whatever that did::

        trainer.resume_or_load(resume=args.resume)
        wsl_d2.load_pretrained(trainer)

        resumed = resume and checkpointer.has_checkpoint()  # plain_train_net.py, and LazyConfig's training script
        wsl_d2.load_pretrained(model, cfg, start_iter if resumed else 0)

    Args:
        trainer: detectron2's ``DefaultTrainer``, or a model.
        cfg: CfgNode or LazyConfig; by default the trainer's. Its ``MODEL.WEIGHTS`` or ``train.init_checkpoint`` is
            loaded; nothing, if that is empty.
        start_iter: the iteration that a resumed run starts at, 0 in one that was not resumed (although the weights may
            be a checkpoint with an iteration in it); by default the trainer's.
        path: loaded in place of the config's.
        options: of :func:`load_backbone`: target, prefix, extra_channels, allow_missing.

    Returns:
        The report, or None where nothing was loaded.

    Raises:
        WeightsError: without ``cfg`` or ``start_iter`` where the trainer does not have them.
    """
    model = trainer if isinstance(trainer, nn.Module) else trainer.model
    if cfg is None:
        cfg = getattr(trainer, "cfg", None)
    if start_iter is None and hasattr(trainer, "cfg"):  # a bare SimpleTrainer does not know that it was resumed
        start_iter = getattr(trainer, "start_iter", None)
    if cfg is None or start_iter is None:
        raise WeightsError(
            f"load_pretrained cannot tell from a {type(trainer).__name__} alone; pass cfg, and start_iter: the "
            "iteration that training starts at, 0 unless the run was resumed"
        )
    log = logging.getLogger("detectron2.wsl_d2")  # which any project of detectron2 shows
    if start_iter > 0:
        log.info(f"resumed at iteration {start_iter}: the weights are the checkpoint's, no pretrained ones are loaded")
        return None
    path = path or (cfg.MODEL.WEIGHTS if isinstance(cfg, CfgNode) else cfg.train.init_checkpoint)
    if not path:
        return None
    report = load_backbone(model, path, cfg, **options)
    log.info(f"{report.num_tensors} backbone tensors loaded from {report.path}, all that the backbone has")
    return report


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
        WeightsError: for unknown provenance, provenance that contradicts the model, pixel statistics neither
            given nor known to the model, or another file name.
    """
    path = os.fspath(path)
    unknown = sorted(set(provenance) - set(_PROVENANCE_KEYS))
    if unknown:
        raise WeightsError(f"unknown provenance {', '.join(unknown)}; known: {', '.join(_PROVENANCE_KEYS)}")
    record = provenance_of(model)
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
            raise WeightsError(f"{key} {value} contradicts the model, which has {own}; nothing was written to {path}")
        record[key] = value
    lacking = [key for key in given if record.get(key) is None]
    if lacking:
        raise WeightsError(f"the model does not know its {', '.join(lacking)}; pass them to export_backbone")

    tensors = _targets(find_bottom_up(model))
    write_weights(path, tensors, record)
    logger.info(f"{len(tensors)} backbone tensors exported to {path}")


def provenance_of(model: nn.Module) -> dict[str, Any]:
    """All that a model knows of where its weights come from: channel order and pixel statistics (None where it does not
    know), architecture, where it strides, and this package's version. Stored as "wsl_d2" in a checkpoint, it makes that
    a file that every function here reads as it reads an exported one."""
    bottom_up = find_bottom_up(model)
    model = getattr(model, "module", model)
    record: dict[str, Any] = {"input_format": getattr(model, "input_format", None)}
    for key in ("pixel_mean", "pixel_std"):
        # float32 buffers: rounded, 123.675 is written as such and not as 123.6750030517578.
        buffer = getattr(model, key, None)
        record[key] = None if buffer is None else [round(x, 4) for x in buffer.flatten().tolist()]
    return {**record, **describe_resnext(bottom_up), "version": __version__}


def _same(value: Any, own: Any) -> bool:
    if isinstance(own, list):
        return len(value) == len(own) and all(abs(a - b) <= 1e-3 for a, b in zip(value, own, strict=True))
    return value == own
