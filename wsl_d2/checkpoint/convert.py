"""From a weight file of any scheme to one of any other, and the proof that both compute the same."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicStem
from detectron2.utils.file_io import PathManager
from torch import nn

from ..files import sha256_of
from ..modeling.resnext import RESNEXT_ARCHITECTURES, STAGE_NAMES, TRUNKS, Trunk, make_resnext_stages
from ..version import __version__
from .naming import convert_state_dict, is_counter
from .weight_file import SUFFIXES, Backbone, IncompleteLoadError, WeightFile, WeightsError, check_tensors, write_weights

TARGET_FORMATS = ("d2", "torchvision", "timm")
_LIBRARIES = {"d2": "detectron2", "caffe2": "detectron2", "torchvision": "torchvision", "timm": "timm"}


class Shape(NamedTuple):
    """Of a bottleneck ResNet or ResNeXt."""

    num_groups: int
    width_per_group: int
    trunk: Trunk

    @property
    def architecture(self) -> str | None:
        """Its name in ``RESNEXT_ARCHITECTURES``, or None."""
        for name, (depth, groups, width) in RESNEXT_ARCHITECTURES.items():
            if (groups, width, TRUNKS[depth]) == self:
                return name
        return None

    @property
    def name(self) -> str | None:
        """The same, or "resnet50", "resnext101_64x4d" of those that are not in the table; None for other depths."""
        for depth, trunk in TRUNKS.items():
            if trunk == self.trunk:
                is_plain = (self.num_groups, self.width_per_group) == (1, 64)
                return f"resnet{depth}" if is_plain else f"resnext{depth}_{self.num_groups}x{self.width_per_group}d"
        return None


def shape_of(path: str, tensors: Mapping[str, torch.Tensor]) -> Shape:
    """Reads the shape of a bottleneck ResNet or ResNeXt from its tensors.

    Args:
        path: for the message.
        tensors: by Detectron2's names, without prefix.

    Raises:
        IncompleteLoadError: the tensors are not those of one.
    """
    try:
        blocks = tuple(len({n.split(".")[1] for n in tensors if n.startswith(f"{stage}.")}) for stage in STAGE_NAMES)
        width, per_group = tensors["res2.0.conv2.weight"].shape[:2]
        trunk = Trunk(blocks, tensors["stem.conv1.weight"].shape[0], tensors["res2.0.conv3.weight"].shape[0])
        if min(blocks) < 1 or width % per_group:
            raise KeyError(f"blocks {blocks}, width {width}")
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as e:
        raise IncompleteLoadError(
            path, f"it has no bottleneck blocks of three convolutions in four stages ({e})"
        ) from e
    return Shape(width // per_group, per_group, trunk)


def make_network(
    path: str, backbone: Backbone, shape: Shape | None = None, reason: str = "", norm: str = "FrozenBN"
) -> ResNet:
    """Detectron2's network of a backbone's tensors, in float32 and evaluation mode, which emits res2 to res5.

    Args:
        path: for the message.
        shape: that it must have; by default its own.
        reason: what is wrong if it does not.

    Raises:
        IncompleteLoadError: a tensor is missing, left over, of another shape or type, or not finite.
    """
    shape = shape or shape_of(path, backbone.tensors)
    stem = backbone.tensors.get("stem.conv1.weight")
    in_channels = stem.shape[1] if stem is not None and stem.dim() == 4 else 3
    with torch.device("meta"):
        stages = make_resnext_stages(
            shape.trunk.blocks_per_stage,
            shape.num_groups,
            shape.width_per_group,
            stem_channels=shape.trunk.stem_channels,
            res2_channels=shape.trunk.res2_channels,
            norm=norm,
            stride_in_1x1=bool(backbone.stride_in_1x1),
        )
        stem = BasicStem(in_channels, shape.trunk.stem_channels, norm)
        network = ResNet(stem, stages, out_features=list(STAGE_NAMES))
    check_tensors(
        path,
        backbone.tensors,
        {name: tensor for name, tensor in network.state_dict().items() if not is_counter(name)},
        unexpected=backbone.unexpected,
        names=backbone.names,
        reason=reason,
        file_format=backbone.file_format,
    )
    network.load_state_dict({name: t.float() for name, t in backbone.tensors.items()}, strict=False, assign=True)
    return network.eval()


def make_library_network(library: str, shape: Shape, state_dict: Mapping[str, torch.Tensor]) -> nn.Module | None:
    """torchvision's or timm's own network of such tensors, in evaluation mode; None where the library has none.

    Args:
        library: "torchvision" or "timm".
        state_dict: by the library's names, with or without "fc".
    """
    if shape.trunk[1:] != (64, 256) or state_dict["conv1.weight"].shape[1] != 3:
        return None
    options: dict[str, Any] = {"layers": list(shape.trunk.blocks_per_stage)}
    if "fc.weight" in state_dict:
        options["num_classes"] = state_dict["fc.weight"].shape[0]
    network: nn.Module
    if library == "torchvision":
        from torchvision.models.resnet import Bottleneck, ResNet

        network = ResNet(Bottleneck, groups=shape.num_groups, width_per_group=shape.width_per_group, **options)
    else:
        try:
            from timm.models import resnet as timm_resnet
        except ImportError:
            return None
        network = timm_resnet.ResNet(
            timm_resnet.Bottleneck,  # type: ignore[arg-type]  # it takes the class, and is annotated with an instance
            cardinality=shape.num_groups,
            base_width=shape.width_per_group,
            **options,
        )
    if "fc.weight" not in state_dict:
        network.fc = nn.Identity()  # type: ignore[assignment]
    network.load_state_dict({name: tensor.float() for name, tensor in state_dict.items()})
    return network.eval()


def stage_features(network: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs of res2 to res5 of a network of detectron2, torchvision or timm, and "logits" of its "fc".

    Args:
        images: (N, 3, H, W), normalized, in the network's channel order.
    """
    with torch.no_grad():
        if isinstance(network, ResNet):
            return network(images)
        features = {}
        hooks = [
            getattr(network, f"layer{i + 1}").register_forward_hook(
                lambda module, inputs, output, stage=stage: features.update({stage: output})
            )
            for i, stage in enumerate(STAGE_NAMES)
        ]
        logits = network(images)
        for hook in hooks:
            hook.remove()
        return features if isinstance(network.fc, nn.Identity) else features | {"logits": logits}


class Comparison(NamedTuple):
    """Of two networks on the same images.

    Attributes:
        libraries: whose networks they were.
        differences: stage -> largest difference of a feature, relative to the largest feature of that stage; infinite
            where one is not finite. "logits" where both have a head.
    """

    libraries: tuple[str, str]
    differences: dict[str, float]


def compare_files(
    first: str | os.PathLike[str] | WeightFile,
    second: str | os.PathLike[str] | WeightFile,
    *,
    prefixes: tuple[str | None, str | None] = (None, None),
    libraries: tuple[str | None, str | None] = (None, None),
    input_formats: tuple[str | None, str | None] = (None, None),
    num_images: int = 2,
    size: int = 224,
    seed: int = 0,
) -> Comparison:
    """Runs the networks of two weight files on the same random images, each in its own channel order.

    Each is built by its scheme's own library, or by detectron2 where that library has no such network.

    Args:
        prefixes: as of :func:`wsl_d2.checkpoint.load_backbone`, of the two files.
        libraries: "timm", to build timm's network for torchvision's names.
        input_formats: "RGB" or "BGR" of files that do not say it.

    Raises:
        IncompleteLoadError: tensors are missing, left over, of another shape, or not finite.
        WeightsError: a stage gives the same features for all images.
    """
    images = torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(seed))
    outputs, used = [], []
    for path, prefix, library, order in zip((first, second), prefixes, libraries, input_formats, strict=True):
        file = WeightFile.read(path)
        backbone = file.backbone(prefix)
        network: nn.Module | None = make_network(file.path, backbone)
        library = library or _LIBRARIES[backbone.file_format]
        head = {f"head.{name}": tensor for name, tensor in backbone.head.items()}
        if library != "detectron2":
            state_dict = convert_state_dict(backbone.tensors | head, library)
            own = make_library_network(library, shape_of(file.path, backbone.tensors), state_dict)
            network, library = (network, "detectron2") if own is None else (own, library)
        is_bgr = (order or (file.statistics(prefix) or {}).get("input_format")) == "BGR"
        assert network is not None
        features = stage_features(network, images.flip(1) if is_bgr else images)
        if dead := [stage for stage, values in features.items() if num_images > 1 and (values == values[:1]).all()]:
            raise WeightsError(
                f"{file.path} gives the same {dead[0]} for different images, as weights of zeros do: nothing can be "
                "compared; give the file of a trained network"
            )
        if head and "logits" not in features:
            pooled = features["res5"].mean(dim=(2, 3))
            features["logits"] = nn.functional.linear(pooled, *(backbone.head[n].float() for n in ("weight", "bias")))
        outputs.append(features)
        used.append(library)
    a, b = outputs
    return Comparison((used[0], used[1]), {stage: _difference(a[stage], b[stage]) for stage in a if stage in b})


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    return float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny))


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    prefix: str | None = None,
    keep_head: bool = False,
    input_format: str | None = None,
    statistics: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    image_size: int = 224,
) -> tuple[dict[str, Any], Comparison | None]:
    """Writes the backbone in a weight file to another file, in another scheme; all of it, or nothing.

    Weights trained on BGR images go out to torchvision and timm for RGB ones, as these libraries give them: the input
    channels of the first convolution, and the pixel statistics, are reversed.

    Args:
        source: any path and scheme that ``load_backbone`` reads: a wsl:// path, a checkpoint in the middle of a run, a
            detector.
        target: ends in .pth, .pkl or .safetensors; for "timm" also a folder, which
            ``timm.create_model("local-dir:...", pretrained=True)`` takes.
        to: "d2", "torchvision" or "timm".
        prefix: as of :func:`wsl_d2.checkpoint.load_backbone`.
        keep_head: also writes the classification head.
        input_format: "RGB" or "BGR", what the written weights shall take; by default as in the source for "d2".
        statistics: "input_format", "pixel_mean" and "pixel_std" of a source that does not say them itself.
        tolerance: if given, the networks of both files are compared on images of ``image_size`` pixels, and the target
            is not written where a relative difference is larger.

    Returns:
        The provenance written with the weights, and the comparison.

    Raises:
        IncompleteLoadError: the source is no checkpoint, or its backbone is not whole and finite.
        WeightsError: it strides where ``to`` does not, its pixel statistics are unknown, the target cannot be written,
            the networks differ, or they give the same for all images.
    """
    if to not in TARGET_FORMATS:
        raise WeightsError(f"weights are written for {', '.join(TARGET_FORMATS)}, not for {to!r}")
    target = Path(target)
    is_folder = to == "timm" and not target.suffix
    if not is_folder and (target.suffix not in SUFFIXES or target.is_dir()):
        raise WeightsError(
            f"weights are written to a .pth, .pkl or .safetensors file, or for timm to a folder; got {target}"
        )
    if is_folder and target.exists() and not target.is_dir():
        raise WeightsError(f"{target} is a file, and the target a folder for timm; remove it or take another name")
    if not target.parent.is_dir():
        raise WeightsError(f"there is no folder {target.parent} to write {target.name} to")
    file = WeightFile.read(source)
    if target.exists() and target.samefile(file.path):
        raise WeightsError(f"{target} is the source itself; take another name")
    backbone = file.backbone(prefix)
    shape = shape_of(file.path, backbone.tensors)
    make_network(file.path, backbone)  # whole and finite
    if is_folder and shape.trunk[1:] != (64, 256):
        raise WeightsError(
            f"timm has no ResNet with {shape.trunk.stem_channels} channels after its stem and "
            f"{shape.trunk.res2_channels} after its first stage, only 64 and 256; write a .safetensors file instead"
        )
    known = statistics or file.statistics(prefix)
    if known is None:
        raise WeightsError(
            f"{file.path} does not say which pixel statistics it was trained with; give its input format, pixel mean "
            "and pixel standard deviation"
        )
    if backbone.stride_in_1x1 and to != "d2":
        raise WeightsError(
            f"{file.path} strides in its 1x1 convolutions, {to} in the 3x3 ones: its network would not be the same"
        )
    tensors = dict(backbone.tensors)
    if keep_head:
        tensors |= {f"head.{name}": tensor for name, tensor in backbone.head.items()}
    input_format = input_format or ("RGB" if to != "d2" else known["input_format"])
    order = 1 if input_format == known["input_format"] else -1
    if order == -1:
        tensors["stem.conv1.weight"] = tensors["stem.conv1.weight"].flip(1)
    record = {
        **{k: v for k, v in (file.provenance or {}).items() if k in ("vocabulary_checksum", "images_seen", "source")},
        "license": (file.provenance or {}).get("license"),
        "input_format": input_format,
        "pixel_mean": list(known["pixel_mean"])[::order],
        "pixel_std": list(known["pixel_std"])[::order],
        "architecture": shape.architecture,
        "num_groups": shape.num_groups,
        "width_per_group": shape.width_per_group,
        "stride_in_1x1": backbone.stride_in_1x1,
        "num_classes": tensors["head.weight"].shape[0] if "head.weight" in tensors else None,
        "version": __version__,
        "converted_from": f"{backbone.file_format}: {os.path.basename(file.path)}",
        "converted_from_sha256": sha256_of(PathManager.get_local_path(file.path)),
    }
    comparison = None
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        written = Path(folder) / ("model.safetensors" if is_folder else target.name)
        write_weights(written, convert_state_dict(tensors, to), record, to)
        if is_folder:
            _describe_for_timm(written.parent, shape, record)
        if tolerance is not None:
            comparison = compare_files(
                file,
                written,
                prefixes=(prefix, None),
                libraries=(None, "timm" if to == "timm" else None),
                input_formats=(known["input_format"], None),
                size=image_size,
            )
            worst = max(comparison.differences, key=lambda stage: comparison.differences[stage])
            if not comparison.differences[worst] <= tolerance:
                raise WeightsError(
                    f"{worst} of {file.path} and of what would be written to {target} differ by "
                    f"{comparison.differences[worst]:.1e} of its largest feature, more than {tolerance:g}: not the "
                    "same network; nothing was written"
                )
        if is_folder:
            target.mkdir(exist_ok=True)
            for path in written.parent.iterdir():
                os.replace(path, target / path.name)
        else:
            os.replace(written, target)
    return record, comparison


_TIMM_NAMES = {"resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_32x16d", "resnext101_32x32d"}


def _describe_for_timm(folder: Path, shape: Shape, record: Mapping[str, Any]) -> None:
    """Writes config.json and the model card beside model.safetensors."""
    name = shape.architecture if shape.architecture in _TIMM_NAMES else "resnet50"
    arguments = {}
    if name == "resnet50":  # of this entry point all dimensions can be chosen
        arguments = {
            "layers": list(shape.trunk.blocks_per_stage),
            "cardinality": shape.num_groups,
            "base_width": shape.width_per_group,
        }
    mean, std = ([round(x / 255, 6) for x in record[key]] for key in ("pixel_mean", "pixel_std"))
    num_classes = record["num_classes"] or 0
    config = {
        "architecture": name,
        "num_classes": num_classes,
        "num_features": 2048,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": num_classes,
            "input_size": [3, 224, 224],
            "pool_size": [7, 7],
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": mean,
            "std": std,
            "first_conv": "conv1",
            "classifier": "fc",
            "license": record["license"],
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    rows = "\n".join(f"| {key} | {value} |" for key, value in record.items() if value is not None)
    license = record["license"] or "unknown"
    note = "" if record["license"] else " The source does not say its license: fill it in before you publish this."
    (folder / "README.md").write_text(
        f"""---
library_name: timm
license: {license.lower()}
tags:
- image-feature-extraction
- timm
---
# {record["architecture"] or name}

A backbone written by wsl_d2 from `{record["converted_from"]}`.

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True)
```

Images: RGB in [0, 1], then minus {mean} and divided by {std}.

License: {license}.{note}

| provenance | |
|---|---|
{rows}
"""
    )
