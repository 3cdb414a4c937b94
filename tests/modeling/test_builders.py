"""What the registered backbones follow, and what they refuse."""

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.export import scripting_with_instances
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet, build_backbone, build_model
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.structures import Boxes
from torch import nn

from wsl_d2.modeling import RESNEXT_ARCHITECTURES, ArchitectureError, checkpoint_stages, make_resnext
from wsl_d2.modeling.resnext import CheckpointedStage

SMALL = "resnext26_8x4d"
IMAGE = torch.zeros(1, 3, 128, 128)


def cfg_of(builder, device="meta", **resnets):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = device
    cfg.MODEL.BACKBONE.NAME = builder
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


def refusal(cfg):
    with torch.device("meta"), pytest.raises(ArchitectureError) as error:
        build_backbone(cfg)
    assert "\n" not in str(error.value) and cfg.MODEL.BACKBONE.NAME in str(error.value)
    return str(error.value)


def levels_of(cfg):
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    return list(backbone.output_shape()), backbone


# ---- every key of MODEL.RESNETS is followed, at its default, or refused


def test_all_contradictions_are_told_at_once():
    cfg = cfg_of(f"build_{SMALL}_backbone", DEPTH=101, NUM_GROUPS=32, OUT_FEATURES=["res5"])
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, True, True, True]
    cfg.MODEL.RESNETS.DEFORM_NUM_GROUPS = 2
    cfg.MODEL.RESNETS.STEM_TYPE = "deeplab"
    cfg.MODEL.RESNETS.RADIX = 2  # ResNeSt's
    message = refusal(cfg)
    for part in (
        "MODEL.RESNETS.DEPTH is 101, but this backbone always has 26",
        "MODEL.RESNETS.NUM_GROUPS is 32, but this backbone always has 8",
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE is [False, True, True, True], which ResNeXt backbones do not have; set it",
        "MODEL.RESNETS.DEFORM_NUM_GROUPS is 2, which ResNeXt backbones do not have; set it to 1",
        "MODEL.RESNETS.STEM_TYPE is 'deeplab' (DeepLab's default), and ResNeXts have the basic one; set it to basic",
        "MODEL.RESNETS.RADIX is 2, which ResNeXt backbones do not have; set it to 0, 1, False or empty",
    ):
        assert part in message


@pytest.mark.parametrize("builder", ["build_resnext_backbone", f"build_{SMALL}_backbone"])
@pytest.mark.parametrize(
    ("key", "value", "neutral"),
    [
        ("DEFORM_ON_PER_STAGE", [False, False, False, True], [False] * 4),
        ("DEFORM_MODULATED", True, False),
        ("DEFORM_NUM_GROUPS", 4, 1),
        ("STEM_TYPE", "deeplab", "basic"),
        ("RADIX", 2, 1),
        ("AVG_DOWN", True, False),
        ("DEFORM_INTERVAL", 3, 1),  # AdelaiDet's
    ],
)
def test_keys_that_no_resnext_has(builder, key, value, neutral):
    cfg = cfg_of(builder, OUT_FEATURES=["res5"])
    cfg.MODEL.RESNETS[key] = value
    assert f"MODEL.RESNETS.{key} is " in refusal(cfg)
    cfg.MODEL.RESNETS[key] = neutral
    with torch.device("meta"):
        build_backbone(cfg)


def test_a_c4_head_needs_the_backbones_own_values():
    """Its res5 is made from MODEL.RESNETS, whatever the backbone's name says."""
    cfg = cfg_of(f"build_{SMALL}_backbone")  # get_cfg() is a C4 detector
    message = refusal(cfg)
    for part in (
        "NUM_GROUPS is 1, but this backbone always has 8",
        "WIDTH_PER_GROUP is 64, but this backbone always has 4",
        "RES2_OUT_CHANNELS is 256, but this backbone always has 64",
        "STRIDE_IN_1X1 is True, but this backbone always has False",
        "Res5ROIHeads builds its res5 from these keys, set MODEL.RESNETS.NUM_GROUPS 8 MODEL.RESNETS.WIDTH_PER_GROUP 4 "
        "MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.RESNETS.STRIDE_IN_1X1 False",
    ):
        assert part in message
    cfg.merge_from_list(message.partition(", set ")[2].split())
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True
    assert "STRIDE_IN_1X1 is True" in refusal(cfg) and "NUM_GROUPS is" not in refusal(cfg)
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    with torch.device("meta"):
        model = build_model(cfg)
    assert model.roi_heads.res5[0].conv2.groups == 8 and model.roi_heads.res5[0].conv2.stride == (2, 2)
    cfg = cfg_of(f"build_{SMALL}_backbone")
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"  # has no such head
    with torch.device("meta"):
        assert not hasattr(build_model(cfg).backbone, "res5")


# ---- dilation


@pytest.mark.parametrize(
    ("keys", "strides", "dilations"),
    [
        ({}, {"res4": 16, "res5": 32}, [1, 1]),
        ({"RES5_DILATION": 2}, {"res4": 16, "res5": 16}, [2, 2]),
        ({"RES5_DILATION": 4}, {"res4": 16, "res5": 16}, [4, 4]),
        ({"RES4_DILATION": 2, "RES5_DILATION": 4}, {"res4": 8, "res5": 8}, [4, 4]),
        ({"RES4_DILATION": 2, "RES5_DILATION": 4, "RES5_MULTI_GRID": [1, 2]}, {"res4": 8, "res5": 8}, [4, 8]),
        ({"RES5_DILATION": 2, "RES5_MULTI_GRID": [1, 2]}, {"res4": 16, "res5": 16}, [2, 4]),
    ],
)
@pytest.mark.parametrize("generic", [False, True])
def test_dilations_and_multi_grid(keys, strides, dilations, generic):
    cfg = cfg_of(f"build_{SMALL}_backbone", OUT_FEATURES=["res4", "res5"])
    if generic:
        cfg = cfg_of("build_resnext_backbone", OUT_FEATURES=["res4", "res5"], STRIDE_IN_1X1=False)
        cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 26, 8, 4
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32, 64
    cfg.MODEL.RESNETS.update(CfgNode(keys))
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    backbone = build_backbone(cfg).eval()
    assert {name: spec.stride for name, spec in backbone.output_shape().items()} == strides
    assert [block.conv2.dilation[0] for block in backbone.res5] == dilations
    with torch.no_grad():
        features = backbone(IMAGE)
    assert {name: 128 // feature.shape[-1] for name, feature in features.items()} == strides


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"RES5_DILATION": 3}, "RES5_DILATION must be 1 or 2 or 4, got 3"),
        ({"RES4_DILATION": 2}, "RES5_DILATION must be 4 with RES4_DILATION 2, got 1"),
        ({"RES4_DILATION": 4, "RES5_DILATION": 4}, "RES4_DILATION must be 1 or 2, got 4"),
        ({"RES5_MULTI_GRID": [1, 2, 4]}, r"a factor for each of the 2 blocks of res5, got \[1, 2, 4\]"),
    ],
)
def test_dilations_that_do_not_fit(keys, message):
    cfg = cfg_of(f"build_{SMALL}_backbone", OUT_FEATURES=["res5"])
    cfg.MODEL.RESNETS.update(CfgNode(keys))
    with pytest.raises(ArchitectureError, match=message):
        build_backbone(cfg)


def test_deeplab_gets_the_network_that_its_own_builder_makes():
    cfg = cfg_of("build_resnet_deeplab_backbone")
    add_deeplab_config(cfg)
    cfg.MODEL.RESNETS.update(
        CfgNode({"OUT_FEATURES": ["res2", "res5"], "STEM_TYPE": "basic", "RES4_DILATION": 2, "RES5_DILATION": 4})
    )
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = 32, 4, False
    with torch.device("meta"):
        theirs = build_backbone(cfg)
        cfg.MODEL.BACKBONE.NAME = "build_resnext50_32x4d_backbone"
        ours = build_backbone(cfg)
    convolutions = [
        [
            (n, m.stride, m.dilation, m.groups, m.weight.shape)
            for n, m in net.named_modules()
            if isinstance(m, nn.Conv2d)
        ]
        for net in (theirs, ours)
    ]
    assert convolutions[0] == convolutions[1] and len(convolutions[0]) == 53


# ---- levels of the FPN


@META_ARCH_REGISTRY.register()
class MyRetinaNet(RetinaNet):
    pass


@META_ARCH_REGISTRY.register()
class OneStageDetector(nn.Module):  # AdelaiDet's name
    pass


def foreign_cfg(meta_arch="GeneralizedRCNN", proposal_generator="RPN", **nodes):
    cfg = cfg_of(f"build_{SMALL}_fpn_backbone")
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PROPOSAL_GENERATOR.NAME = meta_arch, proposal_generator
    for name, keys in nodes.items():
        cfg.MODEL[name] = CfgNode(keys)
    return cfg


def p(first, last):
    return [f"p{level}" for level in range(first, last + 1)]


@pytest.mark.parametrize(
    ("cfg", "expected", "top"),
    [
        (foreign_cfg(), p(2, 6), "p5"),
        (foreign_cfg("RetinaNet"), p(3, 7), "res5"),
        (foreign_cfg("MyRetinaNet"), p(3, 7), "res5"),
        (foreign_cfg("OneStageDetector", "FCOS", FCOS={"IN_FEATURES": p(3, 7)}), p(3, 7), "p5"),
        (foreign_cfg("CenterNetDetector", "CenterNet", CENTERNET={"IN_FEATURES": p(3, 7)}), p(3, 7), "p5"),
        (foreign_cfg("GeneralizedRCNN", "CenterNet", CENTERNET={"IN_FEATURES": p(3, 7)}), p(3, 7), "p5"),
        (foreign_cfg("CondInst", "FCOS", FCOS={"IN_FEATURES": p(3, 7)}, CONDINST={"MASK": CfgNode({})}), p(3, 7), "p5"),
        (foreign_cfg("SOLOv2", SOLOV2={"INSTANCE_IN_FEATURES": p(2, 6), "MASK_IN_FEATURES": p(2, 5)}), p(2, 6), "p5"),
        (foreign_cfg("TensorMask", TENSOR_MASK={"IN_FEATURES": p(2, 7)}), p(2, 7), "p5"),
        # nodes of models that this config does not use mean nothing
        (foreign_cfg(FCOS={"IN_FEATURES": p(3, 7)}, CENTERNET={"IN_FEATURES": p(3, 7)}), p(2, 6), "p5"),
        (foreign_cfg("SemanticSegmentor"), p(2, 6), "p5"),
    ],
    ids=lambda value: value.MODEL.META_ARCHITECTURE if isinstance(value, CfgNode) else "",
)
def test_an_fpn_has_the_levels_that_the_heads_read(cfg, expected, top):
    levels, backbone = levels_of(cfg)
    assert levels == expected and backbone.top_block.in_feature == top
    assert backbone.size_divisibility == 32


def test_levels_may_be_asked_for_by_the_builders_name():
    for architecture in (*RESNEXT_ARCHITECTURES, "resnext"):
        levels, backbone = levels_of(cfg_of(f"build_{architecture}_fpn_p3_p7_backbone"))
        assert levels == p(3, 7) and backbone.top_block.in_feature == "p5"
        assert list(backbone.bottom_up.output_shape()) == ["res3", "res4", "res5"]


def test_an_fpn_on_the_first_stages():
    cfg = foreign_cfg()
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4"]
    with torch.no_grad():
        features = build_backbone(cfg).eval()(IMAGE)
    assert {name: 128 // feature.shape[-1] for name, feature in features.items()} == {
        "p2": 4,
        "p3": 8,
        "p4": 16,
        "p5": 32,
    }
    cfg = foreign_cfg("RetinaNet")
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4"]
    with pytest.raises(
        ArchitectureError, match=r"the heads read p7, and an FPN on \['res2', 'res3', 'res4'\].* ends at p6"
    ):
        build_backbone(cfg)


@pytest.mark.parametrize("keys", [{"RES5_DILATION": 2}, {"RES5_DILATION": 4}, {"RES4_DILATION": 2, "RES5_DILATION": 4}])
def test_an_fpn_on_a_dilated_stage_is_refused(keys):
    cfg = foreign_cfg()
    cfg.MODEL.RESNETS.update(CfgNode(keys))
    with pytest.raises(ArchitectureError, match="an FPN needs strides that double, .* set MODEL.RESNETS.RES4_DILATION"):
        build_backbone(cfg)


def test_wrong_names_of_features():
    cfg = foreign_cfg()
    cfg.MODEL.FPN.IN_FEATURES = ["stem", "res3"]
    with pytest.raises(ArchitectureError, match=r"MODEL.FPN.IN_FEATURES has \['stem'\]; it names some of res2"):
        build_backbone(cfg)


# ---- activation checkpointing in any project


def test_stages_are_checkpointed_without_a_key_of_ours():
    model = build_model(retinanet())
    checkpoint_stages(model.backbone.bottom_up, ["res3", "res5"])
    kinds = [type(getattr(model.backbone.bottom_up, f"res{i}")) for i in (2, 3, 4, 5)]
    assert kinds == [nn.Sequential, CheckpointedStage, nn.Sequential, CheckpointedStage]
    assert model.backbone.bottom_up.stages[1] is model.backbone.bottom_up.res3
    with pytest.raises(ArchitectureError, match=r"CHECKPOINT_STAGES has \['layer3'\]"):
        checkpoint_stages(model.backbone.bottom_up, ["layer3"])


def retinanet():
    cfg = cfg_of(f"build_{SMALL}_fpn_backbone", "cpu")
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 2, 0.0
    cfg.MODEL.RETINANET.NUM_CONVS, cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST = 1, 10
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    return cfg


def test_a_checkpointed_model_can_be_scripted():
    torch.manual_seed(0)
    model = build_model(retinanet()).eval()
    checkpoint_stages(model.backbone.bottom_up, ["res2", "res3", "res4", "res5"])
    fields = {"pred_boxes": Boxes, "scores": torch.Tensor, "pred_classes": torch.Tensor}
    scripted = scripting_with_instances(model, fields)
    image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.no_grad():
        expected = model([{"image": image, "height": 64, "width": 64}])[0]["instances"]
        actual = scripted([{"image": image}])[0]
    assert len(expected) > 0  # without the empty boxes, which a scripted model leaves in
    assert set(expected.scores.tolist()) <= set(actual.scores.tolist())


def test_input_shapes_of_lazy_configs():
    model = make_resnext(SMALL, in_channels=ShapeSpec(channels=4).channels, res4_dilation=2, res5_dilation=4)
    assert model.output_shape()["res5"].stride == 8 and model.stem.conv1.in_channels == 4
