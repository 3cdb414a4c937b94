"""ResNeXt backbones: the table of architectures, and builders registered in detectron2's
``BACKBONE_REGISTRY``.

``build_<A>_backbone`` and ``build_<A>_fpn_backbone`` exist for every architecture A of the table and fix its
depth, groups, width and stride themselves, so a config of any detectron2 project needs one line:
``MODEL.BACKBONE.NAME: build_resnext101_32x8d_fpn_backbone``. Blocks, stem and FPN are detectron2's own.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from torch import nn
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger(__name__)


class ResNeXtArchitecture(NamedTuple):
    """A row of the table: 32x8d means 32 groups of 8 channels in the 3x3 convolutions of res2."""

    depth: int
    groups: int
    width_per_group: int


class _Trunk(NamedTuple):
    blocks_per_stage: tuple[int, ...]
    stem_channels: int
    res2_channels: int


RESNEXT_ARCHITECTURES: dict[str, ResNeXtArchitecture] = {
    "resnext50_32x4d": ResNeXtArchitecture(50, 32, 4),
    "resnext101_32x4d": ResNeXtArchitecture(101, 32, 4),
    "resnext101_32x8d": ResNeXtArchitecture(101, 32, 8),
    "resnext101_32x16d": ResNeXtArchitecture(101, 32, 16),
    "resnext101_32x32d": ResNeXtArchitecture(101, 32, 32),
    "resnext101_32x48d": ResNeXtArchitecture(101, 32, 48),
    "resnext26_8x4d": ResNeXtArchitecture(26, 8, 4),  # 1.2M parameters: for small worlds and tests
}

_TRUNKS = {  # by depth; the blocks have 3 convolutions each
    26: _Trunk((2, 2, 2, 2), 32, 64),
    50: _Trunk((3, 4, 6, 3), 64, 256),
    101: _Trunk((3, 4, 23, 3), 64, 256),
    152: _Trunk((3, 8, 36, 3), 64, 256),
}

_STAGE_NAMES = ("res2", "res3", "res4", "res5")


class CheckpointedStage(nn.Sequential):
    """A stage that keeps only the inputs of its blocks for the backward pass, and computes the rest again there.

    Outputs, gradients and batch-norm statistics are those of the plain stage.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self:
            if torch.is_grad_enabled() and self.training:
                x = checkpoint(
                    block,
                    x,
                    use_reentrant=False,
                    context_fn=lambda block=block: (contextlib.nullcontext(), _unchanged_statistics(block)),
                )
            else:
                x = block(x)
        return x


@contextlib.contextmanager
def _unchanged_statistics(block: nn.Module) -> Iterator[None]:
    """Within it, batch norms normalise by their batch as ever, but do not count it a second time."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracked = [norm.num_batches_tracked for norm in norms]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, momentum, counter in zip(norms, momenta, tracked, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter


def make_resnext_stages(
    blocks_per_stage: Sequence[int],
    num_groups: int,
    width_per_group: int,
    *,
    stem_channels: int = 64,
    res2_channels: int = 256,
    norm: str | Callable[[int], nn.Module] = "BN",
    stride_in_1x1: bool = False,
    res5_dilation: int = 1,
) -> list[list[BottleneckBlock]]:
    """Blocks of res2 to res5 for :class:`detectron2.modeling.ResNet`.

    (``ResNet.make_default_stages`` cannot make a ResNeXt: it overwrites the bottleneck's width.)

    Args:
        blocks_per_stage: number of blocks of res2, res3, res4 and res5.
        num_groups: groups of the 3x3 convolutions.
        width_per_group: channels per group in res2; doubled from stage to stage.
        stem_channels: channels that enter res2.
        res2_channels: channels that leave res2; doubled from stage to stage.
        norm: any norm :func:`detectron2.layers.get_norm` knows.
        stride_in_1x1: where the stride-2 step of a stage is; False for all ResNeXt weights known to be
            public.
        res5_dilation: 1, or 2 to keep res5 at stride 16.

    Returns:
        Four lists of blocks.

    Raises:
        ValueError: for another number of stages or another dilation.
    """
    if len(blocks_per_stage) != 4 or any(n < 1 for n in blocks_per_stage):
        raise ValueError(
            f"blocks_per_stage must be four positive numbers (res2, res3, res4, res5), got {tuple(blocks_per_stage)}"
        )
    if res5_dilation not in (1, 2):
        raise ValueError(f"MODEL.RESNETS.RES5_DILATION must be 1 or 2, got {res5_dilation}")
    stages = []
    in_channels = stem_channels
    for i, num_blocks in enumerate(blocks_per_stage):
        dilation = res5_dilation if i == 3 else 1
        first_stride = 1 if i == 0 or dilation == 2 else 2
        stages.append(
            ResNet.make_stage(
                BottleneckBlock,
                num_blocks,
                stride_per_block=[first_stride] + [1] * (num_blocks - 1),
                in_channels=in_channels,
                out_channels=res2_channels * 2**i,
                bottleneck_channels=num_groups * width_per_group * 2**i,
                num_groups=num_groups,
                norm=norm,
                stride_in_1x1=stride_in_1x1,
                dilation=dilation,
            )
        )
        in_channels = res2_channels * 2**i
    return stages


def make_resnext(
    architecture: str,
    *,
    norm: str | Callable[[int], nn.Module] = "BN",
    freeze_at: int = 0,
    out_features: Sequence[str] = ("res5",),
    zero_init_residual: bool = True,
    in_channels: int = 3,
    res5_dilation: int = 1,
    checkpoint_stages: Sequence[str] = (),
) -> ResNet:
    """A ResNeXt of :data:`RESNEXT_ARCHITECTURES`, with the stride in the 3x3 convolutions as in torchvision.

    Args:
        architecture: a key of :data:`RESNEXT_ARCHITECTURES`.
        norm: any norm :func:`detectron2.layers.get_norm` knows.
        freeze_at: number of leading stages to freeze, as in :meth:`ResNet.freeze`; 0 trains everything.
        out_features: any of "stem", "res2", "res3", "res4", "res5"; stages after the last one are not built.
        zero_init_residual: start with gamma = 0 in the last norm of each block, where that gamma is trained.
        in_channels: channels of the image.
        res5_dilation: 1, or 2 to keep res5 at stride 16.
        checkpoint_stages: any of "res2" to "res5": those stages save memory (:class:`CheckpointedStage`).

    Returns:
        The backbone, randomly initialised.

    Raises:
        ValueError: for an unknown architecture, output feature, stage or dilation.
    """
    if architecture not in RESNEXT_ARCHITECTURES:
        raise ValueError(f"unknown ResNeXt architecture {architecture!r}; known: {', '.join(RESNEXT_ARCHITECTURES)}")
    depth, num_groups, width_per_group = RESNEXT_ARCHITECTURES[architecture]
    trunk = _TRUNKS[depth]
    stages = make_resnext_stages(
        trunk.blocks_per_stage,
        num_groups,
        width_per_group,
        stem_channels=trunk.stem_channels,
        res2_channels=trunk.res2_channels,
        norm=norm,
        res5_dilation=res5_dilation,
    )
    stem = BasicStem(in_channels, trunk.stem_channels, norm)
    return _assemble(stem, stages, out_features, freeze_at, zero_init_residual, checkpoint_stages)


def describe_resnext(bottom_up: ResNet) -> dict[str, Any]:
    """Reads the architecture back from a model, for checks and for the provenance of weight files.

    Returns:
        "architecture" (a key of :data:`RESNEXT_ARCHITECTURES`, or None), "num_groups", "width_per_group", and
        "stride_in_1x1" (None if the model has no strided stage).
    """
    stages = [getattr(bottom_up, name) for name in bottom_up.stage_names]
    conv2 = stages[0][0].conv2
    stride_in_1x1 = None
    for stage in stages[1:]:
        conv1 = stage[0].conv1
        if stage[0].stride == 2:
            stride_in_1x1 = conv1.stride == (2, 2) and conv1.kernel_size == (1, 1)
            break
    num_groups, width_per_group = conv2.groups, conv2.in_channels // conv2.groups
    trunk = _Trunk(tuple(len(stage) for stage in stages), bottom_up.stem.out_channels, stages[0][-1].out_channels)
    architecture = None
    if not stride_in_1x1 and hasattr(stages[0][0], "conv3"):
        for name, (depth, *groups_and_width) in RESNEXT_ARCHITECTURES.items():
            if _TRUNKS[depth] == trunk and groups_and_width == [num_groups, width_per_group]:
                architecture = name
    return {
        "architecture": architecture,
        "num_groups": num_groups,
        "width_per_group": width_per_group,
        "stride_in_1x1": stride_in_1x1,
    }


@BACKBONE_REGISTRY.register()
def build_resnext_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A ResNeXt from detectron2's own ``MODEL.RESNETS`` keys (DEPTH, NUM_GROUPS, WIDTH_PER_GROUP, ...).

    ``MODEL.RESNEXT.STAGE_BLOCKS``, if the config has it and it is not empty, replaces the blocks of DEPTH.
    """
    return _build_from_config(cfg, input_shape, cfg.MODEL.RESNETS.OUT_FEATURES)


@BACKBONE_REGISTRY.register()
def build_resnext_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """An FPN on :func:`build_resnext_backbone`, made as the detector of the config needs it.

    If ``MODEL.FPN.IN_FEATURES`` is empty it takes res2 to res5, or res3 to res5 for a RetinaNet. On top come p6 by
    max-pooling, or p6 and p7 by convolutions for a RetinaNet that reads p7, as in detectron2's own builders.
    """
    return _build_fpn(cfg, _build_from_config(cfg, input_shape, _fpn_in_features(cfg)))


def _register_builders(architecture: str) -> None:
    def build_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
        return _build_architecture(architecture, cfg, input_shape, cfg.MODEL.RESNETS.OUT_FEATURES)

    def build_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
        return _build_fpn(cfg, _build_architecture(architecture, cfg, input_shape, _fpn_in_features(cfg)))

    for builder, suffix in ((build_backbone, "backbone"), (build_fpn_backbone, "fpn_backbone")):
        builder.__name__ = builder.__qualname__ = f"build_{architecture}_{suffix}"
        builder.__doc__ = f"{architecture}, whatever ``MODEL.RESNETS`` says at detectron2's defaults."
        BACKBONE_REGISTRY.register(builder)


for _architecture in RESNEXT_ARCHITECTURES:
    _register_builders(_architecture)


def _assemble(
    stem: BasicStem,
    stages: list[list[BottleneckBlock]],
    out_features: Sequence[str],
    freeze_at: int,
    zero_init_residual: bool,
    checkpoint_stages: Sequence[str],
) -> ResNet:
    if unknown := [name for name in checkpoint_stages if name not in _STAGE_NAMES]:
        raise ValueError(f"MODEL.RESNEXT.CHECKPOINT_STAGES has {unknown}; stages are {', '.join(_STAGE_NAMES)}")
    unknown = [name for name in out_features if name not in ("stem", *_STAGE_NAMES)]
    if unknown or not out_features:
        raise ValueError(
            f"out_features (MODEL.RESNETS.OUT_FEATURES) must name some of stem, {', '.join(_STAGE_NAMES)}; "
            f"got {list(out_features)}"
        )
    resnet = ResNet(stem, stages, out_features=list(out_features), freeze_at=freeze_at)
    if zero_init_residual:
        # Only where gamma is trained (arXiv 1706.02677): in FrozenBN or a frozen stage a 0 would stay.
        for stage in resnet.stages:
            for block in stage:
                gamma = getattr(block.conv3.norm, "weight", None)
                if gamma is not None and gamma.requires_grad:
                    nn.init.zeros_(gamma)
    for i, name in enumerate(resnet.stage_names):
        if name in checkpoint_stages:
            resnet.stages[i] = CheckpointedStage(*resnet.stages[i])
            setattr(resnet, name, resnet.stages[i])
    return resnet


class _Options(NamedTuple):
    zero_init_residual: bool
    stage_blocks: tuple[int, ...]
    checkpoint_stages: tuple[str, ...]


def _resnext_options(cfg: CfgNode) -> _Options:
    """``MODEL.RESNEXT``, or its defaults in projects that never call add_wsl_config and have no such node."""
    node = cfg.MODEL.get("RESNEXT", {})
    return _Options(
        bool(node.get("ZERO_INIT_RESIDUAL", True)),
        tuple(node.get("STAGE_BLOCKS", ())),
        tuple(node.get("CHECKPOINT_STAGES", ())),
    )


def _refuse_deformable(cfg: CfgNode) -> None:
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        raise ValueError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE: the ResNeXt builders have no deformable convolutions; use "
            f"MODEL.BACKBONE.NAME build_resnet_backbone instead of {cfg.MODEL.BACKBONE.NAME}"
        )


def _build_from_config(cfg: CfgNode, input_shape: ShapeSpec, out_features: Sequence[str]) -> ResNet:
    _refuse_deformable(cfg)
    resnets = cfg.MODEL.RESNETS
    options = _resnext_options(cfg)
    blocks_per_stage = options.stage_blocks
    if not blocks_per_stage:
        if resnets.DEPTH not in _TRUNKS:
            raise ValueError(
                f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}; {cfg.MODEL.BACKBONE.NAME} knows "
                f"{', '.join(map(str, _TRUNKS))}, other depths need MODEL.RESNEXT.STAGE_BLOCKS"
            )
        blocks_per_stage = _TRUNKS[resnets.DEPTH].blocks_per_stage
    if resnets.STRIDE_IN_1X1:
        logger.warning(
            "MODEL.RESNETS.STRIDE_IN_1X1 is True (detectron2's default); ResNeXt weights of torchvision, "
            "WSL and this project need False"
        )
    stages = make_resnext_stages(
        blocks_per_stage,
        resnets.NUM_GROUPS,
        resnets.WIDTH_PER_GROUP,
        stem_channels=resnets.STEM_OUT_CHANNELS,
        res2_channels=resnets.RES2_OUT_CHANNELS,
        norm=resnets.NORM,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        res5_dilation=resnets.RES5_DILATION,
    )
    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, resnets.NORM)
    return _assemble(
        stem,
        stages,
        out_features,
        cfg.MODEL.BACKBONE.FREEZE_AT,
        options.zero_init_residual,
        options.checkpoint_stages,
    )


def _build_architecture(architecture: str, cfg: CfgNode, input_shape: ShapeSpec, out_features: Sequence[str]) -> ResNet:
    _refuse_deformable(cfg)
    _refuse_contradictions(architecture, cfg)
    options = _resnext_options(cfg)
    return make_resnext(
        architecture,
        norm=cfg.MODEL.RESNETS.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        out_features=out_features,
        zero_init_residual=options.zero_init_residual,
        in_channels=input_shape.channels,
        res5_dilation=cfg.MODEL.RESNETS.RES5_DILATION,
        checkpoint_stages=options.checkpoint_stages,
    )


def _refuse_contradictions(architecture: str, cfg: CfgNode) -> None:
    """A key at detectron2's default says nothing; one set to another value than the table's is a mistake."""
    depth, num_groups, width_per_group = RESNEXT_ARCHITECTURES[architecture]
    trunk = _TRUNKS[depth]
    fixed = {
        "DEPTH": depth,
        "NUM_GROUPS": num_groups,
        "WIDTH_PER_GROUP": width_per_group,
        "STEM_OUT_CHANNELS": trunk.stem_channels,
        "RES2_OUT_CHANNELS": trunk.res2_channels,
        "STRIDE_IN_1X1": False,
    }
    defaults = get_cfg().MODEL.RESNETS
    for key, value in fixed.items():
        if cfg.MODEL.RESNETS[key] not in (value, defaults[key]):
            raise ValueError(
                f"MODEL.RESNETS.{key} is {cfg.MODEL.RESNETS[key]}, but {cfg.MODEL.BACKBONE.NAME} always has "
                f"{value}; remove the key from the config, or take another MODEL.BACKBONE.NAME "
                "(build_resnext_backbone and build_resnext_fpn_backbone follow MODEL.RESNETS)"
            )
    stage_blocks = _resnext_options(cfg).stage_blocks
    if stage_blocks not in ((), trunk.blocks_per_stage):
        raise ValueError(
            f"MODEL.RESNEXT.STAGE_BLOCKS is {stage_blocks}, but {cfg.MODEL.BACKBONE.NAME} always has "
            f"{trunk.blocks_per_stage}; only build_resnext_backbone and build_resnext_fpn_backbone follow "
            f"that key"
        )


def _is_retinanet(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE == "RetinaNet" and "p7" in cfg.MODEL.RETINANET.IN_FEATURES


def _fpn_in_features(cfg: CfgNode) -> list[str]:
    in_features = list(cfg.MODEL.FPN.IN_FEATURES) or list(_STAGE_NAMES[1:] if _is_retinanet(cfg) else _STAGE_NAMES)
    if "res5" not in in_features:  # the levels on top are made from it or from p5
        raise ValueError(f"MODEL.FPN.IN_FEATURES must include res5, got {in_features}")
    out_features = cfg.MODEL.RESNETS.OUT_FEATURES
    if out_features != get_cfg().MODEL.RESNETS.OUT_FEATURES and not set(in_features) <= set(out_features):
        raise ValueError(
            f"MODEL.RESNETS.OUT_FEATURES is {list(out_features)}, but the FPN needs {in_features} "
            "(MODEL.FPN.IN_FEATURES); remove the key from the config or make them agree"
        )
    return in_features


def _build_fpn(cfg: CfgNode, bottom_up: ResNet) -> FPN:
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    top_block: nn.Module = LastLevelMaxPool()
    if _is_retinanet(cfg):
        top_block = LastLevelP6P7(bottom_up.output_shape()["res5"].channels, out_channels)
    return FPN(
        bottom_up=bottom_up,
        in_features=_fpn_in_features(cfg),
        out_channels=out_channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
