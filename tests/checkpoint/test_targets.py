"""Models as other projects make them, as the target of a backbone; and what their images may be."""

import copy
import logging

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn
from toy_backbones import RGB_STATISTICS, SMALL, fpn_detector_cfg, small_classifier

from wsl_d2.checkpoint import (
    IncompleteLoadError,
    PixelStatisticsError,
    WeightsError,
    convert_state_dict,
    export_backbone,
    find_bottom_up,
    load_backbone,
)
from wsl_d2.modeling import make_resnext


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("targets") / "backbone.pth"
    export_backbone(small_classifier(), path)
    return path


EXPECTED = small_classifier().backbone.state_dict()["res4.0.conv2.weight"]


class Holder(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def detector():
    return build_model(fpn_detector_cfg())


def test_wrapped_models_are_filled(path):
    for wrap in (
        lambda model: Holder(detector=model),
        lambda model: Holder(model=Holder(detector=model)),
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
        lambda model: Holder(net=nn.ModuleList([model])),
    ):
        model = small_classifier(seed=1)
        assert load_backbone(wrap(model), path).num_tensors == 145
        assert torch.equal(model.backbone.res4[0].conv2.weight, EXPECTED)


def test_a_backbone_with_compiled_parts_is_filled(path):
    model = small_classifier(seed=1)
    model.backbone.res4 = torch.compile(model.backbone.res4, backend="eager")
    assert any("_orig_mod" in name for name in model.backbone.state_dict())
    assert load_backbone(model, path).num_tensors == 145
    assert torch.equal(model.backbone.res4._orig_mod[0].conv2.weight, EXPECTED)


def test_teacher_and_student(path):
    model = Holder(modelTeacher=small_classifier(1), modelStudent=small_classifier(2))
    with pytest.raises(WeightsError) as error:
        load_backbone(model, path)
    assert "2 bottom-up ResNets of detectron2 in Holder; pass one of these as target=: " in str(error.value)
    assert "'modelTeacher.backbone', 'modelStudent.backbone'" in str(error.value)
    with pytest.raises(WeightsError, match="no part 'teacher' in Holder; pass one of these"):
        load_backbone(model, path, target="teacher")
    before = copy.deepcopy(model.modelStudent.state_dict())
    load_backbone(model, path, target="modelTeacher")
    assert torch.equal(model.modelTeacher.backbone.res4[0].conv2.weight, EXPECTED)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.modelStudent.state_dict().items())
    load_backbone(model, path, target=model.modelStudent)
    assert torch.equal(model.modelStudent.backbone.res4[0].conv2.weight, EXPECTED)
    assert find_bottom_up(model, "modelTeacher.backbone") is model.modelTeacher.backbone
    with pytest.raises(
        WeightsError, match="no bottom-up ResNet of detectron2 in Holder under target modelTeacher.head"
    ):
        load_backbone(model, path, target="modelTeacher.head")


# ---- C4


def c4_cfg(builder=f"build_{SMALL}_backbone"):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8, 4
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = 64, False
    return cfg


def three_blocks(tmp_path, **change):
    """Detectron2's C4 heads have three blocks in res5, and our smallest network two."""
    tensors = small_classifier().backbone.state_dict()
    tensors |= {
        name.replace("res5.1.", "res5.2."): tensor + 1 for name, tensor in tensors.items() if name.startswith("res5.1.")
    }
    path = tmp_path / "c4.pth"
    torch.save(convert_state_dict(tensors, "torchvision"), path)
    return path, tensors


def test_the_res5_in_the_head_of_a_c4_detector_is_filled(tmp_path):
    path, tensors = three_blocks(tmp_path)
    model = build_model(c4_cfg())
    report = load_backbone(model, path)
    assert report.num_tensors == 160 and report.unused == ()
    own = model.roi_heads.res5.state_dict()
    assert len(own) == 50 and all(torch.equal(own[name], tensors[f"res5.{name}"]) for name in own)
    both = Holder(teacher=model, student=build_model(c4_cfg()))
    before = copy.deepcopy(both.student.roi_heads.res5.state_dict())
    load_backbone(both, path, target="teacher")
    assert all(torch.equal(before[name], tensor) for name, tensor in both.student.roi_heads.res5.state_dict().items())
    # and out of it again
    torch.save({"model": model.state_dict()}, tmp_path / "detector.pth")
    second = build_model(c4_cfg())
    assert load_backbone(second, tmp_path / "detector.pth").num_tensors == 160
    assert torch.equal(second.roi_heads.res5[2].conv3.weight, tensors["res5.2.conv3.weight"])


def test_a_c4_head_that_strides_elsewhere_is_refused(tmp_path):
    path, tensors = three_blocks(tmp_path)
    model = build_model(c4_cfg())
    block = model.roi_heads.res5[0]
    block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    with pytest.raises(IncompleteLoadError, match="stride_in_1x1 False and its head's res5 has True"):
        load_backbone(model, path)
    torch.save(tensors, path)  # detectron2's names do not tell
    with pytest.raises(IncompleteLoadError, match="stride_in_1x1 False and its head's res5 has True"):
        load_backbone(model, path)


def test_an_rpn_on_res4_says_what_it_does_not_use(path, caplog):
    cfg = c4_cfg()
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    with caplog.at_level(logging.INFO):
        report = load_backbone(build_model(cfg), path)
    assert report.num_tensors == 110 and len(report.unused) == 35
    assert "35 of res5 not used: this model has none" in caplog.text


# ---- images of more channels, other norms, more modules


def test_more_channels_than_the_file_has(path):
    three = small_classifier().backbone.stem.conv1.weight
    model = make_resnext(SMALL, in_channels=5)
    own = model.stem.conv1.weight.detach().clone()
    with pytest.raises(
        IncompleteLoadError, match="the model's images have 5 channels, the file's 3; say how the weights"
    ):
        load_backbone(model, path)
    with pytest.raises(WeightsError, match="extra_channels must be one of zeros, mean, keep, got 'random'"):
        load_backbone(model, path, extra_channels="random")
    for choice, expected in (
        ("zeros", torch.zeros_like(own[:, 3:])),
        ("mean", three.mean(dim=1, keepdim=True).expand(-1, 2, -1, -1)),
        ("keep", own[:, 3:]),
    ):
        model.stem.conv1.weight.data.copy_(own)
        assert load_backbone(model, path, extra_channels=choice).num_tensors == 145
        assert torch.equal(model.stem.conv1.weight[:, :3], three)
        assert torch.equal(model.stem.conv1.weight[:, 3:], expected)


def test_a_detector_of_four_channels(path):
    cfg = fpn_detector_cfg()
    cfg.INPUT.FORMAT = "RGBD"
    cfg.MODEL.PIXEL_MEAN = [*RGB_STATISTICS["pixel_mean"], 10.0]
    cfg.MODEL.PIXEL_STD = [*RGB_STATISTICS["pixel_std"], 2.0]
    model = build_model(cfg)
    assert load_backbone(model, path, cfg, extra_channels="zeros").num_tensors == 145
    cfg.MODEL.PIXEL_MEAN[0] = 1.0
    with pytest.raises(PixelStatisticsError, match="MODEL.PIXEL_MEAN is"):
        load_backbone(model, path, cfg, extra_channels="zeros")


@pytest.mark.parametrize("norm", ["GN", "LN", ""])
def test_other_norms_are_refused_with_the_reason(path, norm):
    model = make_resnext(SMALL, norm=norm if norm != "GN" else lambda channels: nn.GroupNorm(4, channels))
    with pytest.raises(IncompleteLoadError, match="the model's norms are .* and the file's are batch norms"):
        load_backbone(model, path)


def test_modules_beyond_a_plain_resnet_need_an_opt_in(path):
    model = make_resnext(SMALL)
    model.res5[1].conv2_offset = nn.Conv2d(256, 18, 3)  # as in Detectron2's DeformBottleneckBlock
    with pytest.raises(IncompleteLoadError) as error:
        load_backbone(model, path)
    assert error.value.missing == ("res5.1.conv2_offset.weight", "res5.1.conv2_offset.bias")
    before = model.res5[1].conv2_offset.weight.clone()
    assert load_backbone(model, path, allow_missing=["conv2_offset"]).num_tensors == 145
    assert torch.equal(model.res5[1].conv2_offset.weight, before)
    assert torch.equal(model.res4[0].conv2.weight, EXPECTED)


def test_the_config_is_checked_before_anything_changes(path):
    cfg = fpn_detector_cfg()  # BGR, as Detectron2's default
    model = build_model(cfg)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PixelStatisticsError, match="INPUT.FORMAT is BGR, the weights need RGB"):
        load_backbone(model, path, cfg)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
