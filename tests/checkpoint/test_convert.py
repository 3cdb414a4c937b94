"""Weights through real files, from and to the libraries' own networks, and tools/convert_weights.py."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from wsl_d2 import add_wsl_config
from wsl_d2.checkpoint import (
    compare_files,
    convert_file,
    convert_state_dict,
    detect_format,
    export_backbone,
    load_backbone,
    read_checkpoint,
    read_provenance,
)
from wsl_d2.checkpoint.convert import stage_features
from wsl_d2.modeling import HashtagClassifier, make_resnext

ROOT = Path(__file__).parents[2]
LIBRARY_NETWORKS = {
    "resnext50_32x4d": torchvision.models.resnext50_32x4d,
    "resnext101_32x8d": torchvision.models.resnext101_32x8d,
    "resnext101_32x4d": lambda: timm.create_model("resnext101_32x4d", pretrained=False),
    "resnext101_32x16d": lambda: timm.create_model("resnext101_32x16d", pretrained=False),
}
STATISTICS = {
    "input_format": "RGB",
    "pixel_mean": [123.675, 116.280, 103.530],
    "pixel_std": [58.395, 57.120, 57.375],
}


def randomise(network: nn.Module) -> nn.Module:
    """Values that neither vanish nor grow through a hundred layers, and statistics that matter."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.data.uniform_(-1, 1).mul_((3 / fan_in) ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.3, 0.7)
            module.bias.data.uniform_(-0.2, 0.2)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def empty(make) -> nn.Module:
    """A network whose weights nobody has spent time on yet."""
    with torch.device("meta"):
        network = make()
    return network.to_empty(device="cpu")


def assert_close(actual, expected):
    """res2 to res5 (and logits) agree to 1e-5 of their largest value."""
    assert actual.keys() == expected.keys() and "res5" in expected
    for stage, feature in expected.items():
        assert feature.abs().max() > 1e-3 and feature.std() > 1e-4, f"{stage} carries no signal"
        assert (actual[stage] - feature).abs().max() <= 1e-5 * feature.abs().max(), stage


def classifier_outputs(model: HashtagClassifier, images):
    with torch.no_grad():
        features = model.backbone(images)
        return {**features, "logits": model.head(features["res5"].mean(dim=(2, 3)))}


@pytest.fixture
def folder(tmp_path):
    """Files of a gigabyte do not stay until the end of the session."""
    yield tmp_path
    for path in tmp_path.iterdir():
        path.unlink()


@pytest.mark.parametrize("architecture", LIBRARY_NETWORKS)
def test_features_and_logits_from_and_to_a_librarys_own_network(architecture, folder):
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    theirs = randomise(empty(LIBRARY_NETWORKS[architecture]))
    theirs.fc.weight.data.normal_(std=0.02)
    theirs.fc.bias.data.normal_(std=0.02)
    expected = stage_features(theirs, images)

    torch.save(theirs.state_dict(), folder / "theirs.pth")
    assert detect_format(read_checkpoint(folder / "theirs.pth")["model"]) == "torchvision"
    record = convert_file(folder / "theirs.pth", folder / "ours.safetensors", "d2", keep_head=True)
    assert record["architecture"] == architecture and record["num_classes"] == 1000
    ours = empty(
        lambda: HashtagClassifier(
            backbone=make_resnext(architecture, out_features=("res2", "res3", "res4", "res5")), num_classes=1000
        )
    ).eval()
    load_backbone(ours, folder / "ours.safetensors")
    head = {
        name: tensor for name, tensor in read_checkpoint(folder / "ours.safetensors")["model"].items() if "head" in name
    }
    ours.head.load_state_dict({name.removeprefix("head."): tensor for name, tensor in head.items()})
    assert_close(classifier_outputs(ours, images), expected)
    os.remove(folder / "ours.safetensors")

    with torch.no_grad():  # other weights, back out, into the library's class, which is strict itself
        for parameter in ours.parameters():
            parameter.mul_(0.9)
    torch.save({"model": ours.state_dict()}, folder / "ours.pth")
    library = "timm" if "timm" in type(theirs).__module__ else "torchvision"
    convert_file(folder / "ours.pth", folder / "back.pth", library, keep_head=True, statistics=STATISTICS)
    state = torch.load(folder / "back.pth", weights_only=True)["state_dict"]
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all("num_batches_tracked" in key for key in missing.missing_keys)
    assert_close(stage_features(theirs, images), classifier_outputs(ours, images))


def test_frozen_bn_in_a_whole_mask_rcnn(folder):
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    theirs = randomise(empty(torchvision.models.resnext50_32x4d))
    theirs.fc = nn.Identity()
    torch.save(theirs.state_dict(), folder / "theirs.pth")
    cfg = get_cfg()
    add_wsl_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_X_50_32x4d_FPN_1x_wsl.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    detector = build_model(cfg).eval()
    load_backbone(detector, folder / "theirs.pth")
    assert_close(stage_features(detector.backbone.bottom_up, images), stage_features(theirs, images))


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("convert") / "backbone.pth"
    model = HashtagClassifier(backbone=randomise(make_resnext("resnext26_8x4d")), num_classes=7)
    export_backbone(model, path, **STATISTICS, vocabulary_checksum="abc", images_seen=12)
    return path


def convert_tool(*arguments):
    command = [sys.executable, "tools/convert_weights.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_tool_converts_verifies_and_keeps_the_provenance(small_file, tmp_path):
    target = tmp_path / "backbone.pkl"
    result = convert_tool(small_file, target, "--to", "caffe2", "--input-format", "BGR", "--verify", "--image-size", 64)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()[-4:]] == ["res2", "res3", "res4", "res5"]
    record = read_provenance(target)
    assert record["input_format"] == "BGR" and record["pixel_std"] == STATISTICS["pixel_std"][::-1]
    assert record["vocabulary_checksum"] == "abc" and record["images_seen"] == 12
    assert record["architecture"] == "resnext26_8x4d" and record["converted_from"] == "d2: backbone.pth"
    back = tmp_path / "back.pth"
    convert_file(target, back, "d2", input_format="RGB")
    first, second = read_checkpoint(small_file)["model"], read_checkpoint(back)["model"]
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_verification_finds_another_network(small_file, tmp_path):
    """One running mean off by a little, or channels in the other order, is more than the tolerance."""
    tensors = dict(read_checkpoint(small_file)["model"])
    tensors["res4.1.conv2.norm.running_mean"] = tensors["res4.1.conv2.norm.running_mean"] + 0.01
    torch.save(tensors, tmp_path / "shifted.pth")
    differences = compare_files(small_file, tmp_path / "shifted.pth", size=64)
    assert differences["res3"] == 0 and differences["res4"] > 1e-5
    tensors = dict(read_checkpoint(small_file)["model"])
    tensors["stem.conv1.weight"] = tensors["stem.conv1.weight"].flip(1)
    torch.save(tensors, tmp_path / "flipped.pth")
    assert compare_files(small_file, tmp_path / "flipped.pth", size=64)["res2"] > 1e-3


def test_errors_of_the_tool(small_file, tmp_path, monkeypatch, capsys):
    bare = tmp_path / "bare.pth"
    torch.save(dict(read_checkpoint(small_file)["model"]), bare)
    for arguments, message in (
        ((bare, tmp_path / "x.pth"), "does not say which pixel statistics it was trained with; give its input format"),
        ((bare, tmp_path / "x.pth", "--source-input-format", "RGB"), "go together"),
        ((tmp_path / "none.pth", tmp_path / "x.pth"), "error: no weight file"),
        ((small_file, tmp_path / "x.npz"), "are written to a .pth, .pkl or .safetensors file"),
        ((small_file, tmp_path / "t.pth", "--to", "timm", "--verify"), "no ResNet with 32 channels after its stem"),
    ):
        monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "tools" / "convert_weights.py"), run_name="__main__")
        assert message in f"{stopped.value} {capsys.readouterr().err}"
    assert not (tmp_path / "x.pth").exists()


def test_a_detector_and_strides_elsewhere_are_refused(small_file, tmp_path):
    tensors = read_checkpoint(small_file)["model"]
    torch.save(
        {f"backbone.bottom_up.{k}": v for k, v in tensors.items()} | {"roi_heads.x": torch.zeros(1)}, tmp_path / "d"
    )
    with pytest.raises(ValueError, match="roi_heads.x. It holds a whole detector: only backbones can be converted"):
        convert_file(tmp_path / "d", tmp_path / "x.pth", "torchvision")
    payload = torch.load(small_file, weights_only=True)
    payload["wsl_d2"]["stride_in_1x1"] = True
    torch.save(payload, tmp_path / "s")
    with pytest.raises(ValueError, match="strides in its 1x1 convolutions, timm in the 3x3 ones"):
        convert_file(tmp_path / "s", tmp_path / "x.pth", "timm")
    assert convert_state_dict(tensors, "timm").keys() == convert_state_dict(tensors, "torchvision").keys()
