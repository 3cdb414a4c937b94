import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone
from torch import nn

from wsl_d2 import add_wsl_config
from wsl_d2.modeling import RESNEXT_ARCHITECTURES, HashtagClassifier, make_resnext, make_resnext_stages
from wsl_d2.modeling.resnext import CheckpointedStage, describe_resnext

# Parameters with a 1000-way head, in millions: torchvision's, timm's and the WSL-Images tables.
PUBLISHED_MILLIONS = {
    "resnext50_32x4d": 25.03,
    "resnext101_32x4d": 44.18,
    "resnext101_32x8d": 88.79,
    "resnext101_32x16d": 194.03,
    "resnext101_32x32d": 468.53,
    "resnext101_32x48d": 828.41,
}


def small_cfg(**resnets):
    cfg = get_cfg()
    add_wsl_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_resnext26_8x4d_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


@pytest.mark.parametrize("architecture", PUBLISHED_MILLIONS)
def test_parameter_counts_are_the_published_ones(architecture):
    with torch.device("meta"):
        model = HashtagClassifier(backbone=make_resnext(architecture), num_classes=1000)
    num_parameters = sum(p.numel() for p in model.parameters())
    assert round(num_parameters / 1e6, 2) == PUBLISHED_MILLIONS[architecture]
    assert describe_resnext(model.backbone) == {
        "architecture": architecture,
        "num_groups": 32,
        "width_per_group": int(architecture.split("x")[-1].removesuffix("d")),
        "stride_in_1x1": False,
    }


def test_table():
    assert RESNEXT_ARCHITECTURES["resnext101_32x8d"] == (101, 32, 8)
    assert RESNEXT_ARCHITECTURES["resnext101_32x8d"].width_per_group == 8
    assert set(PUBLISHED_MILLIONS) | {"resnext26_8x4d"} == set(RESNEXT_ARCHITECTURES)
    for architecture in RESNEXT_ARCHITECTURES:
        assert f"build_{architecture}_backbone" in BACKBONE_REGISTRY
        assert f"build_{architecture}_fpn_backbone" in BACKBONE_REGISTRY


def test_unknown_architecture():
    with pytest.raises(ValueError, match="unknown ResNeXt architecture 'resnext101_64x4d'; known: resnext50"):
        make_resnext("resnext101_64x4d")


@pytest.mark.parametrize("architecture", RESNEXT_ARCHITECTURES)
def test_named_builder_ignores_defaults_of_detectron2(architecture):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = f"build_{architecture}_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    assert describe_resnext(backbone)["architecture"] == architecture
    assert backbone.res3[0].conv2.stride == (2, 2)
    assert isinstance(backbone.res5[0].conv2.norm, FrozenBatchNorm2d)
    assert not any(p.requires_grad for p in backbone.stem.parameters())  # FREEZE_AT is 2 by default


@pytest.mark.parametrize(
    ("key", "value", "own"),
    [
        ("DEPTH", 101, 26),
        ("NUM_GROUPS", 32, 8),
        ("WIDTH_PER_GROUP", 8, 4),
        ("STEM_OUT_CHANNELS", 16, 32),
        ("RES2_OUT_CHANNELS", 128, 64),
    ],
)
def test_named_builder_refuses_other_values(key, value, own):
    with pytest.raises(ValueError, match=f"MODEL.RESNETS.{key} is {value}, but .* always has {own}"):
        build_backbone(small_cfg(**{key: value}))


def test_named_builder_accepts_its_own_values():
    build_backbone(
        small_cfg(
            DEPTH=26,
            NUM_GROUPS=8,
            WIDTH_PER_GROUP=4,
            STEM_OUT_CHANNELS=32,
            RES2_OUT_CHANNELS=64,
            STRIDE_IN_1X1=False,
        )
    )


def test_named_builder_refuses_other_stage_blocks_and_deformable_convolutions():
    cfg = small_cfg()
    cfg.MODEL.RESNEXT.STAGE_BLOCKS = (2, 2, 2, 2)
    build_backbone(cfg)
    cfg.MODEL.RESNEXT.STAGE_BLOCKS = (3, 4, 6, 3)
    with pytest.raises(ValueError, match="MODEL.RESNEXT.STAGE_BLOCKS is \\(3, 4, 6, 3\\)"):
        build_backbone(cfg)
    with pytest.raises(ValueError, match="DEFORM_ON_PER_STAGE"):
        build_backbone(small_cfg(DEFORM_ON_PER_STAGE=[False, True, True, True]))


def test_generic_builder_follows_config(caplog):
    cfg = small_cfg(NUM_GROUPS=8, WIDTH_PER_GROUP=4, STEM_OUT_CHANNELS=32, RES2_OUT_CHANNELS=64)
    cfg.MODEL.BACKBONE.NAME = "build_resnext_backbone"
    cfg.MODEL.RESNEXT.STAGE_BLOCKS = (2, 2, 2, 2)
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    assert describe_resnext(build_backbone(cfg))["architecture"] == "resnext26_8x4d"
    assert "STRIDE_IN_1X1" not in caplog.text
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True
    backbone = build_backbone(cfg)
    assert describe_resnext(backbone)["stride_in_1x1"] is True
    assert "MODEL.RESNETS.STRIDE_IN_1X1 is True" in caplog.text
    cfg.MODEL.RESNEXT.STAGE_BLOCKS = ()
    cfg.MODEL.RESNETS.DEPTH = 18
    with pytest.raises(ValueError, match="MODEL.RESNETS.DEPTH is 18; .* knows 26, 50, 101, 152"):
        build_backbone(cfg)


def test_one_line_in_a_foreign_project():
    """No add_wsl_config, nothing but the name."""
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnext26_8x4d_fpn_backbone"
    backbone = build_backbone(cfg).eval()
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, 64, 64))
    assert {name: tuple(x.shape[1:]) for name, x in features.items()} == {
        "p2": (256, 16, 16),
        "p3": (256, 8, 8),
        "p4": (256, 4, 4),
        "p5": (256, 2, 2),
        "p6": (256, 1, 1),
    }
    assert backbone.size_divisibility == 32


def test_generic_fpn_builder_takes_the_features_it_is_told():
    cfg = small_cfg(NUM_GROUPS=8, WIDTH_PER_GROUP=4, STRIDE_IN_1X1=False, OUT_FEATURES=["res4"])
    cfg.MODEL.BACKBONE.NAME = "build_resnext_fpn_backbone"
    cfg.MODEL.RESNEXT.STAGE_BLOCKS = (1, 1, 1, 1)
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    features = build_backbone(cfg)(torch.zeros(1, 3, 64, 64))
    assert list(features) == ["p3", "p4", "p5", "p6"]
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res5"]
    with pytest.raises(ValueError, match="MODEL.RESNETS.OUT_FEATURES is \\['res3', 'res5'\\], but the FPN needs"):
        build_backbone(cfg)
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4"]
    features = build_backbone(cfg)(torch.zeros(1, 3, 64, 64))
    assert [(name, x.shape[-1]) for name, x in features.items()] == [("p2", 16), ("p3", 8), ("p4", 4), ("p5", 2)]


def test_input_channels_come_from_the_input_shape():
    backbone = build_backbone(small_cfg(), ShapeSpec(channels=4))
    assert backbone.stem.conv1.in_channels == 4


def test_zero_init_residual_only_where_gamma_is_trained():
    backbone = make_resnext("resnext26_8x4d", freeze_at=2)
    assert isinstance(backbone.res2[0].conv3.norm, FrozenBatchNorm2d)
    assert backbone.res2[0].conv3.norm.weight.eq(1).all()
    assert isinstance(backbone.res3[1].conv3.norm, nn.BatchNorm2d)
    assert backbone.res3[1].conv3.norm.weight.eq(0).all()
    assert backbone.res3[1].conv2.norm.weight.eq(1).all()
    for other in (
        make_resnext("resnext26_8x4d", norm="FrozenBN"),
        make_resnext("resnext26_8x4d", zero_init_residual=False),
    ):
        assert other.res5[1].conv3.norm.weight.eq(1).all()
    cfg = small_cfg(NORM="BN")
    cfg.MODEL.RESNEXT.ZERO_INIT_RESIDUAL = False
    assert build_backbone(cfg).res5[1].conv3.norm.weight.eq(1).all()


def test_dilated_res5_keeps_stride_16():
    backbone = build_backbone(small_cfg(RES5_DILATION=2))
    assert backbone.output_shape()["res5"].stride == 16
    with pytest.raises(ValueError, match="RES5_DILATION must be 1 or 2 or 4, got 3"):
        build_backbone(small_cfg(RES5_DILATION=3))


def test_wrong_stages_and_features():
    with pytest.raises(ValueError, match="four positive numbers .* got \\(2, 2\\)"):
        make_resnext_stages((2, 2), 8, 4)
    with pytest.raises(ValueError, match="got \\['p5'\\]"):
        make_resnext("resnext26_8x4d", out_features=["p5"])


def test_checkpointed_stages_compute_the_same_with_less_memory():
    """Outputs, gradients, batch-norm statistics and names are bit-equal over several steps."""

    def train(checkpoint_stages, freeze_at):
        torch.manual_seed(0)
        model = make_resnext(
            "resnext26_8x4d", checkpoint_stages=checkpoint_stages, freeze_at=freeze_at, zero_init_residual=False
        ).train()
        saved_bytes = 0

        def pack(tensor):
            nonlocal saved_bytes
            saved_bytes += tensor.numel() * tensor.element_size()
            return tensor

        for step in range(3):
            x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(step))
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = model(x)["res5"]
            model.zero_grad()
            output.square().mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
        return output, model.state_dict(), saved_bytes

    for freeze_at in (0, 2):
        plain, plain_state, plain_bytes = train((), freeze_at)
        output, state, saved_bytes = train(("res2", "res3", "res4", "res5"), freeze_at)
        assert torch.equal(plain, output)
        assert list(state) == list(plain_state)
        assert all(torch.equal(state[name], plain_state[name]) for name in state)
        assert int(state["res5.0.conv1.norm.num_batches_tracked"]) == 3
        assert saved_bytes < plain_bytes / 2


def test_checkpointed_stages_come_from_the_config():
    cfg = small_cfg()
    cfg.MODEL.RESNEXT.CHECKPOINT_STAGES = ("res3",)
    model = build_backbone(cfg)
    assert [type(getattr(model, name)) for name in ("res2", "res3")] == [nn.Sequential, CheckpointedStage]
    cfg.MODEL.RESNEXT.CHECKPOINT_STAGES = ("layer3",)
    with pytest.raises(ValueError, match=r"CHECKPOINT_STAGES has \['layer3'\]; stages are res2, res3, res4, res5"):
        build_backbone(cfg)
