"""From a weight file of any scheme to one of any other, and the proof that both compute the same."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicStem
from detectron2.utils.file_io import PathManager
from torch import nn

from ..modeling.resnext import RESNEXT_ARCHITECTURES, make_resnext, make_resnext_stages
from .files import IncompleteLoadError, read_checkpoint, write_weights
from .naming import convert_state_dict, detect_format, is_ignored, strides_in_1x1
from .pixel_statistics import known_statistics

STAGES = ("res2", "res3", "res4", "res5")


class Shape(NamedTuple):
    """What a ResNet's tensors say about it."""

    blocks_per_stage: tuple[int, int, int, int]
    num_groups: int
    width_per_group: int
    stem_channels: int
    res2_channels: int


def shape_of(tensors: Mapping[str, torch.Tensor]) -> Shape:
    """Reads the shape of a bottleneck ResNet or ResNeXt from its tensors.

    Args:
        tensors: by Detectron2's names, without prefix.

    Raises:
        ValueError: the tensors are not those of one.
    """
    try:
        blocks = [len({name.split(".")[1] for name in tensors if name.startswith(f"{stage}.")}) for stage in STAGES]
        conv2 = tensors["res2.0.conv2.weight"].shape
        groups = conv2[0] // conv2[1]
        res2_channels = tensors["res2.0.conv3.weight"].shape[0]
        stem_channels = tensors["stem.conv1.weight"].shape[0]
    except (KeyError, IndexError) as e:
        raise ValueError(f"not all tensors of a bottleneck ResNet are there: {e}") from e
    if min(blocks) < 1:
        raise ValueError(f"not all tensors of a bottleneck ResNet are there: its stages have {blocks} blocks")
    return Shape(tuple(blocks), groups, conv2[0] // groups, stem_channels, res2_channels)  # type: ignore[arg-type]


def architecture_of(shape: Shape) -> str | None:
    """The name in ``RESNEXT_ARCHITECTURES`` of a network with that shape, or None."""
    for name in RESNEXT_ARCHITECTURES:
        with torch.device("meta"):
            if shape_of(make_resnext(name).state_dict()) == shape:
                return name
    return None


def build_network(tensors: Mapping[str, torch.Tensor], file_format: str, stride_in_1x1: bool = False) -> nn.Module:
    """The network that a scheme's own library makes of such tensors, in evaluation mode.

    Args:
        tensors: by names of ``file_format``, without prefix, with or without a head.
        file_format: "torchvision" and "timm" take their library's ResNet, "d2" and "caffe2" Detectron2's.
        stride_in_1x1: for Detectron2's.

    Raises:
        IncompleteLoadError: a tensor is missing, left over or of another shape.
        ValueError: the library has no network of that shape.
    """
    d2 = convert_state_dict(tensors, "d2")
    shape = shape_of(d2)
    num_classes = d2["head.weight"].shape[0] if "head.weight" in d2 else 0
    network: nn.Module
    if file_format in ("d2", "caffe2"):
        stages = make_resnext_stages(
            shape.blocks_per_stage,
            shape.num_groups,
            shape.width_per_group,
            stem_channels=shape.stem_channels,
            res2_channels=shape.res2_channels,
            norm="FrozenBN",
            stride_in_1x1=stride_in_1x1,
        )
        stem = BasicStem(d2["stem.conv1.weight"].shape[1], shape.stem_channels, "FrozenBN")
        network = ResNet(stem, stages, out_features=list(STAGES))
        if num_classes:
            network.head = nn.Linear(shape.res2_channels * 8, num_classes)
        wanted = {name: tensor for name, tensor in d2.items() if name.startswith("head.") or not is_ignored(name)}
    else:
        if (shape.stem_channels, shape.res2_channels) != (64, 256):
            raise ValueError(
                f"{file_format} has no ResNet with {shape.stem_channels} channels after its stem and "
                f"{shape.res2_channels} after its first stage; only 64 and 256"
            )
        kwargs: dict[str, Any] = {"layers": list(shape.blocks_per_stage), "num_classes": num_classes or 1000}
        if file_format == "torchvision":
            from torchvision.models import resnet

            network = resnet.ResNet(
                resnet.Bottleneck, groups=shape.num_groups, width_per_group=shape.width_per_group, **kwargs
            )
        else:
            from timm.models import resnet as timm_resnet

            network = timm_resnet.ResNet(
                timm_resnet.Bottleneck,  # type: ignore[arg-type]  # it takes the class, and is annotated with an instance
                cardinality=shape.num_groups,
                base_width=shape.width_per_group,
                **kwargs,
            )
        wanted = convert_state_dict(tensors, file_format)
        if not num_classes:
            network.fc = nn.Identity()  # type: ignore[assignment]
    own = {name: tensor.shape for name, tensor in network.state_dict().items() if "num_batches_tracked" not in name}
    wanted = {name: tensor for name, tensor in wanted.items() if "num_batches_tracked" not in name}
    missing = [name for name in own if name not in wanted]
    unexpected = [name for name in wanted if name not in own]
    mismatched = {
        name: (str(tuple(wanted[name].shape)), str(tuple(own[name])))
        for name in own
        if name in wanted and wanted[name].shape != own[name]
    }
    if missing or unexpected or mismatched:
        raise IncompleteLoadError(
            f"{file_format} tensors", missing=missing, unexpected=unexpected, mismatched=mismatched
        )
    with torch.no_grad():
        for name, target in network.state_dict().items():
            if name in wanted:
                target.copy_(wanted[name])
    return network.eval()


def stage_features(network: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs of res2 to res5 of any network of :func:`build_network`, and its logits where it has a head.

    Args:
        images: (N, 3, H, W), normalised, in the network's channel order.
    """
    with torch.no_grad():
        if isinstance(network, ResNet):
            features = network(images)
            if hasattr(network, "head"):
                features["logits"] = network.head(features["res5"].mean(dim=(2, 3)))
            return features
        features = {}
        hooks = [
            getattr(network, f"layer{i + 1}").register_forward_hook(
                lambda module, inputs, output, stage=stage: features.update({stage: output})
            )
            for i, stage in enumerate(STAGES)
        ]
        logits = network(images)
        for hook in hooks:
            hook.remove()
        return features if isinstance(network.fc, nn.Identity) else features | {"logits": logits}


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    keep_head: bool = False,
    input_format: str | None = None,
    statistics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the backbone in a weight file to another file, in another scheme.

    Weights trained on BGR images go out to torchvision and timm for RGB ones, as these libraries give them: the input
    channels of the first convolution, and the pixel statistics, are reversed.

    Args:
        source: any path and scheme that ``load_backbone`` reads, a wsl:// path for example.
        target: ends in .pth, .pkl or .safetensors.
        to: "d2", "torchvision", "timm" or "caffe2".
        keep_head: also writes the classification head.
        input_format: "RGB" or "BGR", what the written weights shall take; by default as in the source for "d2" and
            "caffe2".
        statistics: "input_format", "pixel_mean" and "pixel_std" of a source that does not say them itself.

    Returns:
        The provenance written with the weights.

    Raises:
        IncompleteLoadError: the source is no checkpoint.
        ValueError: it is no ResNet, or a whole detector, or strides where ``to`` does not, or its pixel statistics are
            unknown.
    """
    checkpoint = read_checkpoint(source)
    provenance = checkpoint["wsl_d2"] or {}
    source_format = detect_format(checkpoint["model"])
    d2 = convert_state_dict(checkpoint["model"], "d2")
    if not keep_head:
        d2 = {name: tensor for name, tensor in d2.items() if not name.startswith("head.")}
    shape = shape_of(d2)
    known = statistics or known_statistics(checkpoint)
    if known is None:
        raise ValueError(
            f"{source} does not say which pixel statistics it was trained with; give its input format, pixel mean and "
            "pixel standard deviation"
        )
    stride_in_1x1 = provenance.get("stride_in_1x1", strides_in_1x1(checkpoint["model"]))
    if stride_in_1x1 and to in ("torchvision", "timm"):
        raise ValueError(
            f"{source} strides in its 1x1 convolutions, {to} in the 3x3 ones: its network would not be the same"
        )
    known = {key: known[key] for key in ("input_format", "pixel_mean", "pixel_std")}
    input_format = input_format or ("RGB" if to in ("torchvision", "timm") else known["input_format"])
    if input_format != known["input_format"]:
        d2["stem.conv1.weight"] = d2["stem.conv1.weight"].flip(1)
        known = {
            "input_format": input_format,
            "pixel_mean": list(reversed(known["pixel_mean"])),
            "pixel_std": list(reversed(known["pixel_std"])),
        }
    tensors = convert_state_dict(d2, to)
    if to == "d2":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".num_batches_tracked")}
    import wsl_d2

    record = {
        **{key: value for key, value in provenance.items() if key in ("vocabulary_checksum", "images_seen", "source")},
        **known,
        "architecture": architecture_of(shape),
        "num_groups": shape.num_groups,
        "width_per_group": shape.width_per_group,
        "stride_in_1x1": stride_in_1x1,
        "num_classes": d2["head.weight"].shape[0] if "head.weight" in d2 else None,
        "version": wsl_d2.__version__,
        "converted_from": f"{source_format}: {os.path.basename(os.fspath(source))}",
        "converted_from_sha256": _sha256(PathManager.get_local_path(os.fspath(source))),
    }
    write_weights(target, tensors, record, to)
    return record


def compare_files(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    formats: Sequence[str | None] = (None, None),
    num_images: int = 2,
    size: int = 224,
    seed: int = 0,
) -> dict[str, float]:
    """Runs the networks of two weight files on the same random images.

    Each is built by its scheme's own library (:func:`build_network`), and gets the images in its own channel order.

    Args:
        formats: naming schemes to take instead of those found: "timm", to build timm's network for torchvision's names.

    Returns:
        Stage -> largest difference of a feature, relative to the largest feature of that stage; "logits" where both
        have a head that their library runs.

    Raises:
        IncompleteLoadError: tensors are missing, left over or of another shape.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, 3, size, size, generator=generator)
    outputs = []
    for path, file_format in zip((first, second), formats, strict=True):
        checkpoint = read_checkpoint(path)
        known = known_statistics(checkpoint) or {}
        network = build_network(
            checkpoint["model"],
            file_format or detect_format(checkpoint["model"]),
            bool((checkpoint["wsl_d2"] or {}).get("stride_in_1x1", False)),
        )
        is_bgr = known.get("input_format") == "BGR"
        outputs.append(stage_features(network, images.flip(1) if is_bgr else images))
    a, b = outputs
    return {stage: float((a[stage] - b[stage]).abs().max() / a[stage].abs().max()) for stage in a if stage in b}


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()  # Python 3.10
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
