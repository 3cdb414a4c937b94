"""ResNeXt backbones: the table of architectures, and how to make one; see builders.py for what is registered.
Blocks and stem are detectron2's own."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError


class ArchitectureError(UserError, ValueError):
    """A backbone that was asked for cannot be built; the message names every key at fault."""


class ResNeXtArchitecture(NamedTuple):
    """A row of the table: 32x8d means 32 groups of 8 channels in the 3x3 convolutions of res2."""

    depth: int
    groups: int
    width_per_group: int


class Trunk(NamedTuple):
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

TRUNKS = {  # by depth; the blocks have 3 convolutions each
    26: Trunk((2, 2, 2, 2), 32, 64),
    50: Trunk((3, 4, 6, 3), 64, 256),
    101: Trunk((3, 4, 23, 3), 64, 256),
    152: Trunk((3, 8, 36, 3), 64, 256),
}

STAGE_NAMES = ("res2", "res3", "res4", "res5")


class CheckpointedStage(nn.Sequential):
    """A stage that keeps only the inputs of its blocks for the backward pass, and computes the rest again there.

    Outputs, gradients and batch-norm statistics are those of the plain stage.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if torch.is_grad_enabled() and self.training:
                return self._forward_checkpointed(x)
        for block in self:
            x = block(x)
        return x

    @torch.jit.unused
    def _forward_checkpointed(self, x: torch.Tensor) -> torch.Tensor:
        for block in self:
            x = checkpoint(
                block,
                x,
                use_reentrant=False,
                context_fn=lambda block=block: (contextlib.nullcontext(), _unchanged_statistics(block)),
            )
        return x


def checkpoint_stages(backbone: ResNet, stages: Sequence[str]) -> None:
    """Makes stages of a ResNet :class:`CheckpointedStage`, in place. Call it before an optimizer is built.

    Args:
        backbone: any ResNet of detectron2: a model's ``backbone``, or an FPN's ``bottom_up``.
        stages: any of "res2" to "res5"; those that it does not have are ignored.

    Raises:
        ArchitectureError: for another name.
    """
    if unknown := [name for name in stages if name not in STAGE_NAMES]:
        raise ArchitectureError(f"MODEL.RESNEXT.CHECKPOINT_STAGES has {unknown}; stages are {', '.join(STAGE_NAMES)}")
    for i, name in enumerate(backbone.stage_names):
        if name in stages:
            backbone.stages[i] = CheckpointedStage(*backbone.stages[i])
            setattr(backbone, name, backbone.stages[i])


@contextlib.contextmanager
def _unchanged_statistics(block: nn.Module) -> Iterator[None]:
    """Within it, batch norms normalize by their batch as usual, but leave the running statistics alone."""
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
    res4_dilation: int = 1,
    res5_dilation: int = 1,
    res5_multi_grid: Sequence[int] = (),
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
        res4_dilation: 1, or 2 to keep res4 at stride 8.
        res5_dilation: 1, 2 to keep res5 at stride 16, or with res4_dilation 2 4 to keep it at stride 8.
        res5_multi_grid: factors of the dilation of each block of res5, as in DeepLab; empty for 1.

    Returns:
        Four lists of blocks.

    Raises:
        ArchitectureError: for another number of stages, or a dilation that does not fit.
    """
    problems = []
    if len(blocks_per_stage) != 4 or any(n < 1 for n in blocks_per_stage):
        problems.append(
            f"blocks_per_stage must be four positive numbers (res2, res3, res4, res5), got {tuple(blocks_per_stage)}"
        )
    if res4_dilation not in (1, 2):
        problems.append(f"MODEL.RESNETS.RES4_DILATION must be 1 or 2, got {res4_dilation}")
    allowed = (4,) if res4_dilation == 2 else (1, 2, 4)
    if res5_dilation not in allowed:
        with_res4 = " with RES4_DILATION 2" if res4_dilation == 2 else ""
        problems.append(
            f"MODEL.RESNETS.RES5_DILATION must be {' or '.join(map(str, allowed))}{with_res4}, got {res5_dilation}"
        )
    multi_grid = list(res5_multi_grid) or [1] * blocks_per_stage[-1]
    if multi_grid != [1] * len(multi_grid) and len(multi_grid) != blocks_per_stage[-1]:
        problems.append(
            f"MODEL.RESNETS.RES5_MULTI_GRID must have a factor for each of the {blocks_per_stage[-1]} blocks of res5, "
            f"got {multi_grid}"
        )
    if problems:
        raise ArchitectureError("; ".join(problems))
    dilations = [[1] * n for n in blocks_per_stage]
    dilations[2] = [res4_dilation] * blocks_per_stage[2]
    if set(multi_grid) != {1}:
        dilations[3] = [res5_dilation * factor for factor in multi_grid]
    else:
        dilations[3] = [res5_dilation] * blocks_per_stage[3]
    stages = []
    in_channels = stem_channels
    for i, num_blocks in enumerate(blocks_per_stage):
        keeps_stride = i == 0 or (1, 1, res4_dilation, res5_dilation)[i] > 1
        stages.append(
            ResNet.make_stage(
                BottleneckBlock,
                num_blocks,
                stride_per_block=[1 if keeps_stride else 2] + [1] * (num_blocks - 1),
                in_channels=in_channels,
                out_channels=res2_channels * 2**i,
                bottleneck_channels=num_groups * width_per_group * 2**i,
                num_groups=num_groups,
                norm=norm,
                stride_in_1x1=stride_in_1x1,
                dilation_per_block=dilations[i],
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
    res4_dilation: int = 1,
    res5_dilation: int = 1,
    res5_multi_grid: Sequence[int] = (),
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
        res4_dilation, res5_dilation, res5_multi_grid: as of :func:`make_resnext_stages`.
        checkpoint_stages: any of "res2" to "res5": those stages save memory (:class:`CheckpointedStage`).

    Returns:
        The backbone, randomly initialized.

    Raises:
        ArchitectureError: for an unknown architecture, output feature, stage or dilation.
    """
    if architecture not in RESNEXT_ARCHITECTURES:
        raise ArchitectureError(
            f"unknown ResNeXt architecture {architecture!r}; known: {', '.join(RESNEXT_ARCHITECTURES)}"
        )
    depth, num_groups, width_per_group = RESNEXT_ARCHITECTURES[architecture]
    trunk = TRUNKS[depth]
    stages = make_resnext_stages(
        trunk.blocks_per_stage,
        num_groups,
        width_per_group,
        stem_channels=trunk.stem_channels,
        res2_channels=trunk.res2_channels,
        norm=norm,
        res4_dilation=res4_dilation,
        res5_dilation=res5_dilation,
        res5_multi_grid=res5_multi_grid,
    )
    stem = BasicStem(in_channels, trunk.stem_channels, norm)
    return assemble(stem, stages, out_features, freeze_at, zero_init_residual, checkpoint_stages)


def describe_resnext(bottom_up: ResNet) -> dict[str, Any]:
    """Reads the architecture back from a model, for checks and for the provenance of weight files.

    Returns:
        "architecture" (a key of :data:`RESNEXT_ARCHITECTURES`, or None), "num_groups", "width_per_group", and
        "stride_in_1x1" (None if the model has no strided stage).
    """
    stages = [getattr(bottom_up, name) for name in bottom_up.stage_names]
    first = stages[0][0]
    conv2 = first.conv2
    num_groups, width_per_group = conv2.groups, conv2.in_channels // conv2.groups
    stride_in_1x1 = next((strides_in_1x1(s[0]) for s in stages[1:] if strides_in_1x1(s[0]) is not None), None)
    trunk = Trunk(tuple(len(stage) for stage in stages), bottom_up.stem.out_channels, stages[0][-1].out_channels)
    architecture = None
    if not stride_in_1x1 and hasattr(first, "conv3"):
        for name, (depth, *groups_and_width) in RESNEXT_ARCHITECTURES.items():
            if TRUNKS[depth] == trunk and groups_and_width == [num_groups, width_per_group]:
                architecture = name
    return {
        "architecture": architecture,
        "num_groups": num_groups,
        "width_per_group": width_per_group,
        "stride_in_1x1": stride_in_1x1,
    }


def strides_in_1x1(block: nn.Module) -> bool | None:
    """Whether a block of stride 2 has it in its first, 1x1 convolution; None for a block of stride 1."""
    conv1 = block.conv1
    return None if block.stride == 1 else tuple(conv1.stride) == (2, 2) and tuple(conv1.kernel_size) == (1, 1)


def assemble(
    stem: BasicStem,
    stages: list[list[BottleneckBlock]],
    out_features: Sequence[str],
    freeze_at: int,
    zero_init_residual: bool,
    stages_to_checkpoint: Sequence[str],
) -> ResNet:
    """A ResNet of these parts, with the stages after the last output left out; arguments as of :func:`make_resnext`."""
    unknown = [name for name in out_features if name not in ("stem", *STAGE_NAMES)]
    if unknown or not out_features:
        raise ArchitectureError(
            f"out_features (MODEL.RESNETS.OUT_FEATURES) must name some of stem, {', '.join(STAGE_NAMES)}; "
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
    checkpoint_stages(resnet, stages_to_checkpoint)
    return resnet
