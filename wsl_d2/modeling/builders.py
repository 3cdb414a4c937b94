"""The backbones registered in detectron2's ``BACKBONE_REGISTRY``.

``build_<A>_backbone``, ``build_<A>_fpn_backbone`` and ``build_<A>_fpn_p3_p7_backbone`` exist for every architecture A
of the table and fix its depth, groups, width and stride themselves, so a config of any detectron2 project needs one
line: ``MODEL.BACKBONE.NAME: build_resnext101_32x8d_fpn_backbone``. ``build_resnext_...`` follow ``MODEL.RESNETS``
instead. A key of ``MODEL.RESNETS`` is followed, or at its default, or refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicStem
from torch import nn

from .resnext import (
    RESNEXT_ARCHITECTURES,
    STAGE_NAMES,
    TRUNKS,
    ArchitectureError,
    assemble,
    make_resnext_stages,
)

logger = logging.getLogger(__name__)

_READ_FROM_CONFIG = {"OUT_FEATURES", "NORM", "RES5_DILATION", "RES4_DILATION", "RES5_MULTI_GRID"}
# Keys that a C4 detector's res5 is made of, in its head, whatever the backbone's name says.
_READ_BY_RES5_HEADS = ("NUM_GROUPS", "WIDTH_PER_GROUP", "RES2_OUT_CHANNELS", "STRIDE_IN_1X1")
_WITHOUT_ROI_HEADS = ("ProposalNetwork", "RetinaNet", "SemanticSegmentor", "HashtagClassifier")


def _make_builders(name: str, architecture: str | None) -> None:
    def build_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
        out_features = cfg.MODEL.RESNETS.OUT_FEATURES
        return _build_bottom_up(architecture, cfg, input_shape, out_features, _has_res5_head(cfg, out_features))

    def build_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
        return _build_fpn(architecture, cfg, input_shape, _levels(cfg))

    def build_fpn_p3_p7_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
        return _build_fpn(architecture, cfg, input_shape, _Levels(3, 7))

    whatever = f"{architecture}, whatever ``MODEL.RESNETS`` says at detectron2's defaults"
    what = "A ResNeXt from detectron2's own ``MODEL.RESNETS`` keys (DEPTH, NUM_GROUPS, WIDTH_PER_GROUP, ...)"
    for builder, suffix, extra in (
        (build_backbone, "backbone", ""),
        (build_fpn_backbone, "fpn_backbone", " with an FPN of the levels that the config's heads read"),
        (build_fpn_p3_p7_backbone, "fpn_p3_p7_backbone", " with an FPN of p3 to p7, p6 and p7 from p5"),
    ):
        builder.__name__ = builder.__qualname__ = f"build_{name}_{suffix}"
        builder.__doc__ = f"{whatever if architecture else what}{extra}."
        BACKBONE_REGISTRY.register(builder)


class _Levels(NamedTuple):
    """Of an FPN: the first and last level that are read, and whether those above p5 are made from res5."""

    first: int
    last: int
    from_res5: bool = False


def _levels(cfg: CfgNode) -> _Levels:
    """The levels that the config's heads read."""
    model = cfg.MODEL
    meta_arch = (
        META_ARCH_REGISTRY.get(model.META_ARCHITECTURE) if model.META_ARCHITECTURE in META_ARCH_REGISTRY else None
    )
    if isinstance(meta_arch, type) and issubclass(meta_arch, RetinaNet):
        return _range(model.RETINANET.IN_FEATURES, from_res5=True)
    return _range([name for node in _nodes_of_heads(model) for name in _in_features(node)])


def _nodes_of_heads(model: CfgNode) -> Iterator[CfgNode]:
    """The nodes of the config that the model's parts read: by convention a part X reads MODEL.X, as FCOS, CenterNet,
    SOLOv2 or TensorMask; defaults of other parts stand in the config, too, and mean nothing."""
    parts = [_letters(model.META_ARCHITECTURE), _letters(model.PROPOSAL_GENERATOR.NAME)]
    for key, node in model.items():
        if isinstance(node, CfgNode) and key not in ("RPN", "ROI_HEADS", "SEM_SEG_HEAD", "FPN", "RETINANET"):
            if any(len(key) > 2 and part.startswith(_letters(key)) for part in parts):
                yield node
    if parts[1].endswith("RPN") or parts[1] == "RRPN":
        yield model.RPN
    if parts[0] not in map(_letters, _WITHOUT_ROI_HEADS):
        yield model.ROI_HEADS
    if parts[0] in ("SEMANTICSEGMENTOR", "PANOPTICFPN"):
        yield model.SEM_SEG_HEAD


def _letters(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper())


def _in_features(node: CfgNode) -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _in_features(value)
        elif key.endswith("IN_FEATURES"):
            yield from value


def _range(names: Sequence[str], from_res5: bool = False) -> _Levels:
    levels = [int(name[1:]) for name in names if re.fullmatch(r"p\d", str(name))]
    return _Levels(min(levels, default=2), max(levels, default=5), from_res5)


def _build_fpn(architecture: str | None, cfg: CfgNode, input_shape: ShapeSpec, levels: _Levels) -> FPN:
    in_features = list(cfg.MODEL.FPN.IN_FEATURES)
    if not in_features:
        in_features = [f"res{i}" for i in range(3 if levels.last > 6 and levels.first > 2 else 2, 6)]
    problems = []
    if unknown := [name for name in in_features if name not in STAGE_NAMES]:
        problems.append(f"MODEL.FPN.IN_FEATURES has {unknown}; it names some of {', '.join(STAGE_NAMES)}")
    out_features = cfg.MODEL.RESNETS.OUT_FEATURES
    if out_features != get_cfg().MODEL.RESNETS.OUT_FEATURES and not set(in_features) <= set(out_features):
        problems.append(
            f"MODEL.RESNETS.OUT_FEATURES is {list(out_features)}, but the FPN needs {in_features} "
            "(MODEL.FPN.IN_FEATURES); remove the key from the config or make them agree"
        )
    top = 0 if unknown else max(int(name[-1]) for name in in_features)
    if not unknown and levels.last - top > 2:
        problems.append(
            f"the heads read p{levels.last}, and an FPN on {in_features} (MODEL.FPN.IN_FEATURES) ends at p{top + 2}"
        )
    if problems:
        raise ArchitectureError("; ".join(problems))
    bottom_up = _build_bottom_up(architecture, cfg, input_shape, in_features, has_res5_head=False)
    strides = [bottom_up.output_shape()[name].stride for name in in_features]
    if any(b != 2 * a for a, b in zip(strides, strides[1:], strict=False)):
        raise ArchitectureError(
            f"an FPN needs strides that double, and those of {in_features} are {strides}; set "
            "MODEL.RESNETS.RES4_DILATION and RES5_DILATION to 1, or leave a stage out of MODEL.FPN.IN_FEATURES"
        )
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    top_block: nn.Module
    if levels.last - top == 2:
        in_feature = f"res{top}" if levels.from_res5 else f"p{top}"
        channels = bottom_up.output_shape()[in_feature].channels if levels.from_res5 else out_channels
        top_block = LastLevelP6P7(channels, out_channels, in_feature)
    else:
        top_block = LastLevelMaxPool()
        top_block.in_feature = f"p{top}"
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=out_channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _build_bottom_up(
    architecture: str | None, cfg: CfgNode, input_shape: ShapeSpec, out_features: Sequence[str], has_res5_head: bool
) -> ResNet:
    resnets = cfg.MODEL.RESNETS
    # Projects that never call add_wsl_config have no such node.
    options = cfg.MODEL.get("RESNEXT", {})
    stage_blocks = tuple(options.get("STAGE_BLOCKS", ()))
    if architecture is None:
        if not stage_blocks and resnets.DEPTH not in TRUNKS:
            raise ArchitectureError(
                f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}; {cfg.MODEL.BACKBONE.NAME} knows "
                f"{', '.join(map(str, TRUNKS))}, other depths need MODEL.RESNEXT.STAGE_BLOCKS"
            )
        blocks = stage_blocks or TRUNKS[resnets.DEPTH].blocks_per_stage
        shape = {key: resnets[key] for key in ("STEM_OUT_CHANNELS", *_READ_BY_RES5_HEADS)}
        if resnets.STRIDE_IN_1X1:
            logger.warning(
                "MODEL.RESNETS.STRIDE_IN_1X1 is True (detectron2's default); ResNeXt weights of torchvision, "
                "WSL and this project need False"
            )
        fixed: dict[str, Any] = {}
    else:
        depth, num_groups, width_per_group = RESNEXT_ARCHITECTURES[architecture]
        blocks, stem_channels, res2_channels = TRUNKS[depth]
        shape = {
            "NUM_GROUPS": num_groups,
            "WIDTH_PER_GROUP": width_per_group,
            "STEM_OUT_CHANNELS": stem_channels,
            "RES2_OUT_CHANNELS": res2_channels,
            "STRIDE_IN_1X1": False,
        }
        fixed = {"DEPTH": depth, **shape}
    if problems := _contradictions(cfg, fixed, blocks, stage_blocks, has_res5_head):
        raise ArchitectureError(f"{cfg.MODEL.BACKBONE.NAME}: {'; '.join(problems)}")
    stages = make_resnext_stages(
        blocks,
        shape["NUM_GROUPS"],
        shape["WIDTH_PER_GROUP"],
        stem_channels=shape["STEM_OUT_CHANNELS"],
        res2_channels=shape["RES2_OUT_CHANNELS"],
        norm=resnets.NORM,
        stride_in_1x1=shape["STRIDE_IN_1X1"],
        res4_dilation=resnets.get("RES4_DILATION", 1),
        res5_dilation=resnets.RES5_DILATION,
        res5_multi_grid=resnets.get("RES5_MULTI_GRID", ()) if "res5" in out_features else (),
    )
    return assemble(
        BasicStem(input_shape.channels, shape["STEM_OUT_CHANNELS"], resnets.NORM),
        stages,
        out_features,
        cfg.MODEL.BACKBONE.FREEZE_AT,
        bool(options.get("ZERO_INIT_RESIDUAL", True)),
        tuple(options.get("CHECKPOINT_STAGES", ())),
    )


def _has_res5_head(cfg: CfgNode, out_features: Sequence[str]) -> bool:
    """Whether the detector is a C4 one, whose ROI heads make themselves a res5 from ``MODEL.RESNETS``. Of another
    project's meta-architecture, with these heads in the config by default, a backbone that ends before res5 tells."""
    meta_arch = cfg.MODEL.META_ARCHITECTURE
    return (
        "res5" in cfg.MODEL.ROI_HEADS.NAME.lower()
        and set(cfg.MODEL.ROI_HEADS.IN_FEATURES) <= set(out_features)
        and meta_arch not in _WITHOUT_ROI_HEADS
        and (meta_arch == "GeneralizedRCNN" or "res5" not in out_features)
    )


def _contradictions(
    cfg: CfgNode,
    fixed: dict[str, Any],
    blocks: tuple[int, ...],
    stage_blocks: tuple[int, ...],
    has_res5_head: bool,
) -> list[str]:
    """Every key of MODEL.RESNETS that says something else than what is built. A key at its default says nothing, unless
    a head is built from it, too."""
    resnets, defaults = cfg.MODEL.RESNETS, get_cfg().MODEL.RESNETS
    problems = []
    for key, value in fixed.items():
        says = (value,) if has_res5_head and key in _READ_BY_RES5_HEADS else (value, defaults[key])
        if resnets[key] not in says:
            problems.append(f"MODEL.RESNETS.{key} is {resnets[key]}, but this backbone always has {value}")
    if problems and has_res5_head:
        settings = " ".join(f"MODEL.RESNETS.{key} {fixed[key]}" for key in _READ_BY_RES5_HEADS)
        problems.append(f"{cfg.MODEL.ROI_HEADS.NAME} builds its res5 from these keys, set {settings}")
    elif problems:
        problems.append(
            "remove these keys, or take build_resnext_backbone or build_resnext_fpn_backbone, which follow them"
        )
    if fixed and stage_blocks not in ((), blocks):
        problems.append(f"MODEL.RESNEXT.STAGE_BLOCKS is {stage_blocks}, but this backbone always has {blocks}")
    if resnets.get("STEM_TYPE", "basic") != "basic":
        problems.append(
            f"MODEL.RESNETS.STEM_TYPE is {resnets.STEM_TYPE!r} (DeepLab's default), and ResNeXts have the basic one; "
            "set it to basic"
        )
    for key, value in resnets.items():
        if key in _READ_FROM_CONFIG or key in ("DEPTH", "STEM_TYPE", "STEM_OUT_CHANNELS", *_READ_BY_RES5_HEADS):
            continue
        values = list(value) if isinstance(value, list | tuple) else [value]
        # Of a key that another project added the default is not known; these values leave a feature out.
        is_default = value == defaults[key] if key in defaults else all(map(_is_neutral, values))
        if not is_default:
            neutral = defaults[key] if key in defaults else "0, 1, False or empty"
            problems.append(f"MODEL.RESNETS.{key} is {value}, which ResNeXt backbones do not have; set it to {neutral}")
    return problems


def _is_neutral(value: Any) -> bool:
    return value in (False, "", None) or (value == 1 and not isinstance(value, bool))


_make_builders("resnext", None)
for _architecture in RESNEXT_ARCHITECTURES:
    _make_builders(_architecture, _architecture)
