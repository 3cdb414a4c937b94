import pytest
import torch
import torchvision
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from detectron2.layers import FrozenBatchNorm2d

from wsl_d2.checkpoint import WeightFile, convert_state_dict, detect_format
from wsl_d2.modeling import HashtagClassifier, make_resnext

PARTS = ("weight", "bias", "running_mean", "running_var")


@pytest.fixture(scope="module")
def torchvision_names():
    with torch.device("meta"):
        return torchvision.models.resnext50_32x4d().state_dict()


def test_there_and_back_again(torchvision_names):
    assert detect_format(torchvision_names) == "torchvision"
    d2 = convert_state_dict(torchvision_names, "d2")
    assert detect_format(d2) == "d2"
    back = convert_state_dict(d2, "torchvision")
    assert list(back) == list(torchvision_names)
    assert all(back[key] is torchvision_names[key] for key in back)
    assert convert_state_dict(d2, "timm").keys() == torchvision_names.keys()


def test_d2_names_are_those_of_the_model(torchvision_names):
    with torch.device("meta"):
        model = HashtagClassifier(backbone=make_resnext("resnext50_32x4d"), num_classes=1000)
    d2 = convert_state_dict(torchvision_names, "d2")
    expected = {name.removeprefix("backbone."): x.shape for name, x in model.state_dict().items()}
    assert {name: x.shape for name, x in d2.items()} == expected


def test_examples():
    names = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_var": "stem.conv1.norm.running_var",
        "layer3.22.conv2.weight": "res4.22.conv2.weight",
        "layer4.0.bn3.bias": "res5.0.conv3.norm.bias",
        "layer1.0.downsample.0.weight": "res2.0.shortcut.weight",
        "layer1.0.downsample.1.num_batches_tracked": "res2.0.shortcut.norm.num_batches_tracked",
        "fc.bias": "head.bias",
    }
    numbered = {key: i for i, key in enumerate(names)}
    assert convert_state_dict(numbered, "d2") == {name: i for i, name in enumerate(names.values())}


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "backbone.bottom_up.", "module.backbone.bottom_up."])
def test_prefixes_are_stripped(torchvision_names, prefix):
    d2 = convert_state_dict(torchvision_names, "d2")
    prefixed = {prefix + key: value for key, value in d2.items()}
    assert detect_format(prefixed) == "d2"
    assert convert_state_dict(prefixed, "d2") == d2
    assert convert_state_dict(prefixed, "torchvision").keys() == torchvision_names.keys()


def test_head_of_detectron2s_resnet_is_read():
    assert convert_state_dict({"stem.conv1.weight": 0, "linear.bias": 1}, "torchvision") == {
        "conv1.weight": 0,
        "fc.bias": 1,
    }
    assert convert_state_dict({"stem.conv1.weight": 0, "linear.bias": 1}, "d2")["head.bias"] == 1


def test_caffe2_names_are_those_that_detectron2_reads(torchvision_names):
    caffe2 = convert_state_dict(torchvision_names, "caffe2")
    assert detect_format(caffe2) == "caffe2"
    d2 = {name: x for name, x in convert_state_dict(torchvision_names, "d2").items() if "num_batches" not in name}
    as_read = [name.replace("linear.", "head.") for name in convert_basic_c2_names(list(caffe2))]
    assert as_read == list(d2)
    back = convert_state_dict(caffe2, "d2")
    assert list(back) == list(d2) and all(back[name] is d2[name] for name in d2)


def test_caffe2_affine_layers_get_the_statistics_that_change_nothing():
    scale = torch.tensor([2.0, 3.0])
    caffe2 = {"res2_0_branch2b_w": torch.zeros(2, 1, 3, 3), "res2_0_branch2b_bn_s": scale}
    caffe2 |= {"res2_0_branch2b_bn_b": torch.ones(2), "conv1_b": torch.ones(2), "conv1_w_momentum": torch.ones(2)}
    d2 = convert_state_dict(caffe2, "d2")
    assert set(d2) == {f"res2.0.conv2.{n}" for n in ["weight"] + [f"norm.{p}" for p in PARTS]}
    norm = FrozenBatchNorm2d(2)
    norm.load_state_dict({part: d2[f"res2.0.conv2.norm.{part}"] for part in PARTS})
    x = torch.randn(1, 2, 3, 3)
    torch.testing.assert_close(norm(x), x * scale[:, None, None] + 1, rtol=1e-6, atol=1e-6)
    with_statistics = caffe2 | {"res2_0_branch2b_bn_rm": torch.ones(2)}  # and no variance: nothing is made up
    assert "res2.0.conv2.norm.running_var" not in convert_state_dict(with_statistics, "d2")


def test_timm_only_names():
    deep_stem = {"conv1.0.weight": 0, "layer1.0.conv1.weight": 1}
    assert detect_format(deep_stem) == "timm"
    with pytest.raises(ValueError, match="1 name\\(s\\) of this timm .* no counterpart in d2: conv1.0.weight"):
        convert_state_dict(deep_stem, "d2")


@pytest.mark.parametrize(
    ("names", "is_detector"),
    [
        (["backbone.bottom_up.res2.0.conv1.weight", "roi_heads.box_head.fc1.weight"], True),
        (["module.backbone.bottom_up.res2.0.conv1.weight", "module.proposal_generator.rpn_head.conv.weight"], True),
        (["backbone.bottom_up.res2.0.conv1.weight", "head.cls_subnet.0.weight"], True),  # RetinaNet
        (["res2_0_branch2a_w", "conv_rpn_w"], True),
        (["backbone.stem.conv1.weight", "head.weight", "pixel_mean"], False),
        (["layer1.0.conv1.weight", "fc.weight", "layer1.0.bn1.num_batches_tracked"], False),
        (["conv1.weight"], False),
    ],
)
def test_detectors_are_told_from_backbones(names, is_detector):
    assert WeightFile("", {"": dict.fromkeys(names, torch.zeros(1))}).is_detector == is_detector


@pytest.mark.parametrize(
    ("names", "to", "message"),
    [
        (["stem.conv1.weight"], "keras", "unknown naming scheme to='keras'; known: d2, torchvision, timm, caffe2"),
        ([], "d2", "none of its 0 names is like 'res2.0.conv1.weight'"),
        (["features.0.weight"], "d2", "none of its 1 names, such as 'features.0.weight', is like"),
        (["stem.conv1.weight", "layer1.0.conv1.weight"], "d2", "names of two schemes"),
        (["conv1.weight", "layer1.0.conv9b.weight"], "d2", "no counterpart in d2: layer1.0.conv9b.weight"),
        (
            ["stem.conv1.weight", "backbone.stem.conv1.weight"],
            "d2",
            "2 backbones in one state dict, at '', 'backbone.'",
        ),
        (
            ["backbone.bottom_up.stem.conv1.weight", "roi_heads.mask_head.predictor.bias"],
            "torchvision",
            "no counterpart in torchvision: roi_heads.mask_head.predictor.bias",
        ),
    ],
)
def test_errors(names, to, message):
    with pytest.raises(ValueError, match=message):
        convert_state_dict(dict.fromkeys(names, 0), to)
