"""Weights through real files, from and to the libraries' own networks, and the command."""

import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from command_line import wsl_d2
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from wsl_d2 import add_wsl_config
from wsl_d2.checkpoint import (
    IncompleteLoadError,
    WeightFile,
    WeightsError,
    compare_files,
    convert,
    convert_file,
    convert_state_dict,
    export_backbone,
    load_backbone,
    provenance_of,
)
from wsl_d2.checkpoint.convert import stage_features
from wsl_d2.cli.main import main
from wsl_d2.modeling import RESNEXT_ARCHITECTURES, HashtagClassifier, make_resnext

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
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("architecture", LIBRARY_NETWORKS)
def test_features_and_logits_from_and_to_a_librarys_own_network(architecture, folder):
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    theirs = randomise(empty(LIBRARY_NETWORKS[architecture]))
    theirs.fc.weight.data.normal_(std=0.02)
    theirs.fc.bias.data.normal_(std=0.02)
    expected = stage_features(theirs, images)

    torch.save(theirs.state_dict(), folder / "theirs.pth")
    assert WeightFile.read(folder / "theirs.pth").backbone().file_format == "torchvision"
    record, _ = convert_file(folder / "theirs.pth", folder / "ours.safetensors", "d2", keep_head=True)
    assert record["architecture"] == architecture and record["num_classes"] == 1000
    ours = empty(
        lambda: HashtagClassifier(
            backbone=make_resnext(architecture, out_features=("res2", "res3", "res4", "res5")), num_classes=1000
        )
    ).eval()
    load_backbone(ours, folder / "ours.safetensors")
    ours.head.load_state_dict(WeightFile.read(folder / "ours.safetensors").backbone().head)
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


def tensors_of(path):
    return dict(WeightFile.read(path).backbone().tensors)


def test_the_tool_converts_verifies_and_keeps_the_provenance(small_file, tmp_path):
    target = tmp_path / "backbone.pkl"
    printed = wsl_d2("weights", "convert", small_file, target, "--input-format", "BGR", "--verify", "--image-size", 64)
    assert [line.split()[0] for line in printed.splitlines()[-4:]] == ["res2", "res3", "res4", "res5"]
    record = WeightFile.read(target).provenance
    assert record["input_format"] == "BGR" and record["pixel_std"] == STATISTICS["pixel_std"][::-1]
    assert record["vocabulary_checksum"] == "abc" and record["images_seen"] == 12
    assert record["architecture"] == "resnext26_8x4d" and record["converted_from"] == "d2: backbone.pth"
    back = tmp_path / "back.pth"
    convert_file(target, back, "d2", input_format="RGB")
    first, second = tensors_of(small_file), tensors_of(back)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_verification_finds_another_network(small_file, tmp_path):
    """One running mean off by a little, or channels in the other order, is more than the tolerance."""
    tensors = tensors_of(small_file)
    tensors["res4.1.conv2.norm.running_mean"] = tensors["res4.1.conv2.norm.running_mean"] + 0.01
    torch.save(tensors, tmp_path / "shifted.pth")
    differences = compare_files(small_file, tmp_path / "shifted.pth", size=64).differences
    assert differences["res3"] == 0 and differences["res4"] > 1e-5
    tensors = tensors_of(small_file)
    tensors["stem.conv1.weight"] = tensors["stem.conv1.weight"].flip(1)
    torch.save(tensors, tmp_path / "flipped.pth")
    assert compare_files(small_file, tmp_path / "flipped.pth", size=64).differences["res2"] > 1e-3


def test_features_that_are_not_finite_differ():
    a, b = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert convert._difference(a, b) == convert._difference(b, a) == convert._difference(b, b) == float("inf")
    assert convert._difference(a, a) == 0 and convert._difference(torch.zeros(3), torch.zeros(3)) == 0


@pytest.mark.parametrize("layer", ["", "res5.0.conv3.norm.", "stem.conv1.norm."])
def test_weights_that_tell_no_image_from_another_are_verified_as_nothing(small_file, tmp_path, layer):
    """Zeros are finite, complete and equal to themselves; a comparison of what they give says nothing."""
    tensors = {name: t * (not name.startswith(layer)) for name, t in tensors_of(small_file).items()}
    if layer.startswith("res5"):  # the other block's and the shortcut's, too
        tensors = {name: t * ("res5" not in name or "norm" not in name) for name, t in tensors.items()}
    torch.save(tensors, tmp_path / "dead.pth")
    options = ["--source-input-format", "RGB", "--source-pixel-mean", 1, 1, 1, "--source-pixel-std", 1, 1, 1]
    words = ["weights", "convert", tmp_path / "dead.pth", tmp_path / "x.pth", *options]
    printed = wsl_d2(*words, "--verify", "--image-size", 64, code=2)
    stage = "res5" if layer.startswith("res5") else "res2"
    assert f"dead.pth gives the same {stage} for different images" in printed and printed.count("\n") == 1
    assert not (tmp_path / "x.pth").exists()
    wsl_d2(*words)


def test_nothing_is_written_unless_the_networks_agree(small_file, tmp_path, monkeypatch):
    (tmp_path / "x.pth").write_text("mine")
    monkeypatch.setattr(convert, "_difference", lambda a, b: float("nan"))
    with pytest.raises(
        WeightsError, match="differ by nan of its largest feature, more than 1e-05.*nothing was written"
    ):
        convert_file(small_file, tmp_path / "x.pth", "d2", tolerance=1e-5, image_size=64)
    assert os.listdir(tmp_path) == ["x.pth"] and (tmp_path / "x.pth").read_text() == "mine"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("suffix", ["pth", "pkl", "safetensors"])
def test_every_floating_type_converts(small_file, tmp_path, dtype, suffix):
    source = {name: tensor.to(dtype) for name, tensor in tensors_of(small_file).items()}
    torch.save(source, tmp_path / "source.pth")
    target = tmp_path / f"target.{suffix}"
    convert_file(tmp_path / "source.pth", target, "d2", statistics=STATISTICS, tolerance=1e-5, image_size=64)
    written = tensors_of(target)
    assert all(torch.equal(written[name], tensor.to(written[name].dtype)) for name, tensor in source.items())
    expected = torch.float32 if (dtype, suffix) == (torch.bfloat16, "pkl") else dtype  # numpy has no bfloat16
    assert {tensor.dtype for tensor in written.values()} == {expected}
    model = make_resnext("resnext26_8x4d")
    load_backbone(model, target)
    assert torch.equal(model.res4[0].conv2.weight, source["res4.0.conv2.weight"].float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to(torch.int8), "res4.0.conv2.weight is torch.int8 in the file"),
        (lambda tensor: tensor.to(torch.complex64), "res4.0.conv2.weight is torch.complex64 in the file"),
        (lambda tensor: tensor.to_sparse(), "res4.0.conv2.weight is torch.sparse_coo torch.float32 in the file"),
        (
            lambda tensor: tensor.where(tensor > tensor.min(), torch.nan),
            "1 of its tensors hold NaN or infinity: res4.0",
        ),
        (lambda tensor: tensor / 0, "1 of its tensors hold NaN or infinity: res4.0.conv2.weight"),
        (lambda tensor: tensor[:0], r"res4.0.conv2.weight is \(0, 16, 3, 3\) in the file and"),
    ],
    ids=["int8", "complex", "sparse", "nan", "infinity", "empty"],
)
def test_tensors_that_are_no_weights_are_refused(small_file, tmp_path, change, message):
    tensors = tensors_of(small_file)
    tensors["res4.0.conv2.weight"] = change(tensors["res4.0.conv2.weight"])
    torch.save(tensors, tmp_path / "source.pth")
    for use in (
        lambda: convert_file(tmp_path / "source.pth", tmp_path / "x.pth", "d2", statistics=STATISTICS),
        lambda: load_backbone(make_resnext("resnext26_8x4d"), tmp_path / "source.pth"),
    ):
        with pytest.raises(IncompleteLoadError, match=message):
            use()
    assert not (tmp_path / "x.pth").exists()


def test_errors_of_the_command_are_one_line_and_exit_with_2(small_file, tmp_path, capsys):
    bare = tmp_path / "bare.pth"
    torch.save(tensors_of(small_file), bare)
    broken = tmp_path / "broken.pth"
    torch.save(tensors_of(small_file) | {"stem.conv1.weight": torch.full((32, 3, 7, 7), torch.nan)}, broken)
    os_system = tmp_path / "os_system.pth"  # torch's own message has several lines and escape codes
    torch.save({"model": tensors_of(small_file), "x": os.system}, os_system)
    x = tmp_path / "x.pth"
    for arguments, message in (
        ((bare, x), "does not say which pixel statistics it was trained with; give its input format"),
        ((tmp_path / "none.pth", x), "no weight file"),
        ((small_file, tmp_path / "x.npz"), "are written to a .pth, .pkl or .safetensors file"),
        ((small_file, tmp_path), "are written to a .pth, .pkl or .safetensors file"),
        ((small_file, tmp_path / "no" / "x.pth"), "there is no folder"),
        ((small_file, small_file), "is the source itself"),
        ((small_file, tmp_path / "folder", "--to", "timm"), "timm has no ResNet with 32 channels after its stem"),
        ((broken, x, "--verify"), "1 of its tensors hold NaN or infinity: stem.conv1.weight"),
        ((os_system, x), "unsupported GLOBAL posix.system"),
        ((small_file, x, "--prefix", "teacher"), "prefix='teacher' stands for 0 of its backbones; they are at 'model'"),
        (("wsl://resnext50_32x4d", x), "This one was never released"),
    ):
        assert main(["weights", "convert", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1 and error.startswith("wsl-d2 weights convert: ") and "\x1b" not in error
    assert main(["weights", "convert", str(bare), str(x), "--source-input-format", "RGB"]) == 2
    assert "go together" in capsys.readouterr().err
    assert not x.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("architecture", ["resnext50_32x4d", pytest.param("resnext101_32x48d", marks=pytest.mark.long)])
def test_a_folder_that_timm_loads_as_it_stands(architecture, folder, monkeypatch):
    blocks = (1, 1, 1, 1)  # the width of the architecture, and few blocks
    _, groups, width = RESNEXT_ARCHITECTURES[architecture]
    theirs = randomise(
        torchvision.models.resnet.ResNet(
            torchvision.models.resnet.Bottleneck, list(blocks), groups=groups, width_per_group=width, num_classes=3
        )
    )
    torch.save({"state_dict": theirs.state_dict()}, folder / "theirs.pth")
    for keep_head in (True, False):
        target = folder / f"timm{keep_head:d}"
        _, comparison = convert_file(
            folder / "theirs.pth", target, "timm", keep_head=keep_head, tolerance=1e-5, image_size=64
        )
        assert comparison.libraries == ("torchvision", "timm") and ("logits" in comparison.differences) == keep_head
        assert sorted(path.name for path in target.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        model = timm.create_model(f"local-dir:{target}", pretrained=True).eval()
        assert model.pretrained_cfg["mean"] == [0.485, 0.456, 0.406] and model.num_classes == 3 * keep_head
        assert torch.equal(model.layer4[0].conv2.weight, theirs.layer4[0].conv2.weight)
        card = (target / "README.md").read_text()
        assert "license: unknown" in card and "fill it in" in card and "| pixel_std | [58.395, 57.12, 57.375] |" in card
        shutil.rmtree(target)


def test_the_folder_of_a_named_architecture_has_its_name_and_license(tmp_path):
    record = {"license": "CC-BY-NC-4.0", "architecture": "resnext101_32x8d", "converted_from": "d2: x", **STATISTICS}
    shape = convert.Shape(32, 8, convert.TRUNKS[101])
    convert._describe_for_timm(tmp_path, shape, record | {"num_classes": None})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "resnext101_32x8d" and config["model_args"] == {}
    card = (tmp_path / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card and "fill it in" not in card


@pytest.mark.parametrize("to", ["d2", "torchvision", "timm"])
def test_the_smallest_architecture_is_verified_by_detectron2s_network(small_file, tmp_path, to):
    _, comparison = convert_file(small_file, tmp_path / "x.safetensors", to, tolerance=1e-5, image_size=64)
    assert comparison.libraries == ("detectron2", "detectron2") and max(comparison.differences.values()) == 0


def test_a_detector_gives_its_backbone_and_strides_elsewhere_are_refused(small_file, tmp_path):
    tensors = tensors_of(small_file)
    detector = {f"backbone.bottom_up.{k}": v for k, v in tensors.items()} | {"roi_heads.x": torch.zeros(1)}
    torch.save({"model": detector}, tmp_path / "d.pth")
    convert_file(tmp_path / "d.pth", tmp_path / "x.pth", "torchvision", statistics=STATISTICS)
    assert torch.equal(tensors_of(tmp_path / "x.pth")["res3.0.conv1.weight"], tensors["res3.0.conv1.weight"])
    payload = torch.load(small_file, weights_only=True)
    payload["wsl_d2"]["stride_in_1x1"] = True
    torch.save(payload, tmp_path / "s")
    with pytest.raises(ValueError, match="strides in its 1x1 convolutions, timm in the 3x3 ones"):
        convert_file(tmp_path / "s", tmp_path / "y.pth", "timm")
    assert convert_state_dict(tensors, "timm").keys() == convert_state_dict(tensors, "torchvision").keys()


def test_a_checkpoint_in_the_middle_of_a_run_converts(tmp_path):
    """It carries what an exported backbone carries."""
    model = HashtagClassifier(backbone=randomise(make_resnext("resnext26_8x4d")), num_classes=7)
    checkpoint = {"model": model.state_dict(), "trainer": {"iteration": 3, "hooks": {}}, "iteration": 3}
    torch.save(checkpoint | {"wsl_d2": provenance_of(model)}, tmp_path / "model_0000003.pth")
    record, comparison = convert_file(
        tmp_path / "model_0000003.pth", tmp_path / "x.pth", "d2", keep_head=True, tolerance=1e-5, image_size=64
    )
    assert record["input_format"] == "RGB" and record["num_classes"] == 7 and "logits" in comparison.differences
    assert torch.equal(WeightFile.read(tmp_path / "x.pth").backbone().head["weight"], model.head.weight)
