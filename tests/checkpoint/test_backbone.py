import logging
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from torch import nn
from toy_backbones import RGB_STATISTICS, SMALL, fpn_detector_cfg, randomise, small_classifier

from wsl_d2 import add_wsl_config
from wsl_d2.checkpoint import (
    IncompleteLoadError,
    WeightFile,
    WeightsError,
    convert_state_dict,
    export_backbone,
    find_bottom_up,
    load_backbone,
    write_weights,
)
from wsl_d2.modeling import HashtagClassifier, make_resnext, make_resnext_stages


def tensors_of(path):
    return dict(WeightFile.read(path).backbone().tensors)


def provenance_in(path):
    return WeightFile.read(path).provenance


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.fixture
def backbone_file(tmp_path):
    path = tmp_path / "backbone.pth"
    export_backbone(small_classifier(), path)
    return str(path)


@pytest.fixture
def broken(tmp_path, backbone_file):
    """Saves a changed copy of the backbone's tensors."""

    def save(change):
        tensors = tensors_of(backbone_file)
        change(tensors)
        path = str(tmp_path / "broken.pth")
        torch.save({"model": tensors}, path)
        return path

    return save


def load_fails(path, model=None):
    """The error of loading a file into a small classifier, which must not change."""
    model = model or small_classifier(seed=1)
    before = snapshot(model)
    with pytest.raises(IncompleteLoadError) as caught:
        load_backbone(model, path)
    assert_equal(model.state_dict(), before)
    assert str(path) in str(caught.value)
    return caught.value


# ---- torchvision's networks


@pytest.mark.parametrize("architecture", ["resnext50_32x4d", "resnext101_32x8d"])
def test_torchvision_weights_give_torchvision_outputs(architecture, tmp_path, caplog):
    torch.manual_seed(0)
    reference = randomise(getattr(torchvision.models, architecture)(num_classes=10))
    path = str(tmp_path / "torchvision.pth")
    torch.save(reference.state_dict(), path)
    model = HashtagClassifier(backbone=make_resnext(architecture), num_classes=10).eval()
    with caplog.at_level(logging.INFO):
        report = load_backbone(model, path)
    num_tensors = {"resnext50_32x4d": 265, "resnext101_32x8d": 520}[architecture]
    assert f"{num_tensors} of {num_tensors} backbone tensors loaded from {path}" in caplog.text
    assert (report.num_tensors, report.file_format) == (num_tensors, "torchvision")
    assert "fc.weight" in report.ignored

    head = convert_state_dict(reference.state_dict(), "d2")
    model.head.load_state_dict({"weight": head["head.weight"], "bias": head["head.bias"]})
    image = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    normalized = (image / 255 - mean) / std
    features = {}
    reference.layer4.register_forward_hook(lambda module, args, output: features.update(res5=output))
    with torch.no_grad():
        expected = reference(normalized)
        res5 = model.backbone(normalized)["res5"]
        logits = model.logits({"image": image})
    assert features["res5"].std() > 1e-3  # or equality would mean little
    scale = features["res5"].abs().max()
    assert (res5 - features["res5"]).abs().max() <= 1e-5 * scale
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("wrap", ["state_dict", "module", "safetensors"])
def test_other_containers(wrap, tmp_path):
    reference = small_classifier()
    tensors = convert_state_dict(reference.backbone.state_dict(), "timm")
    path = str(tmp_path / "w.pth")
    if wrap == "state_dict":
        torch.save({"state_dict": tensors, "epoch": 3, "arch": "resnext"}, path)
    elif wrap == "module":
        torch.save({f"module.{key}": value for key, value in tensors.items()}, path)
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        path = str(tmp_path / "w.safetensors")
        safetensors.save_file(tensors, path)
    model = make_resnext(SMALL)
    load_backbone(model, path)
    expected = snapshot(reference.backbone)
    actual = {name: x for name, x in model.state_dict().items() if "num_batches" not in name}
    assert_equal(actual, {name: expected[name] for name in actual})


# ---- hand-over to a detector


def test_detector_gets_the_bits_of_the_pretrained_backbone(backbone_file):
    cfg = fpn_detector_cfg()
    detector = build_model(cfg)
    heads_before = {name: x for name, x in snapshot(detector).items() if ".bottom_up." not in name}
    assert load_backbone(detector, backbone_file).num_tensors == 145  # 29 convolutions, 4 tensors of norm each
    expected = small_classifier().backbone.state_dict()
    actual = detector.backbone.bottom_up.state_dict()
    assert all("num_batches" in name for name in expected.keys() - actual.keys())
    assert_equal(actual, {name: expected[name] for name in actual})
    assert_equal({name: x for name, x in detector.state_dict().items() if ".bottom_up." not in name}, heads_before)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            detector.eval().backbone.bottom_up(image)["res5"], small_classifier().backbone(image)["res5"]
        )


def test_checkpoints_of_a_classifier_and_of_a_detector_are_read(tmp_path, backbone_file):
    expected = small_classifier().backbone.state_dict()
    checkpoint = str(tmp_path / "model_final.pth")
    torch.save({"model": small_classifier().state_dict(), "iteration": 5}, checkpoint)
    model = small_classifier(seed=1)
    head = model.head.weight.clone()
    report = load_backbone(model, checkpoint)
    assert torch.equal(model.head.weight, head)
    assert {"head.weight", "head.bias"} <= set(report.ignored)
    assert torch.equal(model.backbone.res3[0].conv2.weight, expected["res3.0.conv2.weight"])

    detector = build_model(fpn_detector_cfg())
    load_backbone(detector, backbone_file)
    torch.save({"model": detector.state_dict()}, checkpoint)
    model = small_classifier(seed=1)
    load_backbone(model, checkpoint)
    assert torch.equal(model.backbone.res5[1].conv3.weight, expected["res5.1.conv3.weight"])


def test_plain_detectron2_reads_an_exported_file(backbone_file):
    detector = build_model(fpn_detector_cfg())
    DetectionCheckpointer(detector).load(backbone_file)
    expected = small_classifier().backbone.state_dict()
    actual = detector.backbone.bottom_up.state_dict()
    assert_equal(actual, {name: expected[name] for name in actual})


def test_find_bottom_up():
    model = small_classifier()
    assert find_bottom_up(nn.DataParallel(model)) is model.backbone
    assert find_bottom_up(model.backbone) is model.backbone
    with pytest.raises(WeightsError, match="no bottom-up ResNet of detectron2 in Linear"):
        find_bottom_up(nn.Linear(1, 1))


# ---- export and provenance


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_export(tmp_path, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = str(tmp_path / f"backbone{suffix}")
    model = small_classifier().to(memory_format=torch.channels_last)
    export_backbone(model, path, **RGB_STATISTICS, vocabulary_checksum="abc", images_seen=640, architecture=SMALL)
    provenance = provenance_in(path)
    version = provenance.pop("version")
    assert version is None or isinstance(version, str)
    assert provenance == {
        **RGB_STATISTICS,
        "architecture": SMALL,
        "num_groups": 8,
        "width_per_group": 4,
        "stride_in_1x1": False,
        "vocabulary_checksum": "abc",
        "images_seen": 640,
    }
    assert os.listdir(tmp_path) == [f"backbone{suffix}"]
    target = make_resnext(SMALL)
    load_backbone(target, path)
    assert torch.equal(target.res4[0].conv2.weight, model.backbone.res4[0].conv2.weight)


def test_exported_pth_layout(backbone_file):
    payload = torch.load(backbone_file, weights_only=True)
    assert payload.keys() == {"model", "matching_heuristics", "__author__", "wsl_d2"}
    assert payload["matching_heuristics"] is True
    assert "res2.0.conv1.norm.running_var" in payload["model"]
    assert not any(key.startswith(("backbone.", "head.")) or "num_batches" in key for key in payload["model"])
    assert {key: payload["wsl_d2"][key] for key in RGB_STATISTICS} == RGB_STATISTICS  # the model's own


def test_export_of_a_generic_builder_is_named_after_what_it_is(tmp_path):
    path = str(tmp_path / "b.pth")
    export_backbone(small_classifier(), path, architecture="resnext")
    assert provenance_in(path)["architecture"] == SMALL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "resnext50_32x4d"}, f"architecture resnext50_32x4d contradicts .* has {SMALL}"),
        ({"pixel_mean": [103.53, 116.28, 123.675]}, "pixel_mean \\[103.53, .* contradicts the model"),
        ({"num_groups": 32}, "num_groups 32 contradicts the model, which has 8"),
        ({"learning_rate": 0.1}, "unknown provenance learning_rate; known: architecture, num_groups"),
    ],
)
def test_export_refuses_wrong_provenance(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_backbone(small_classifier(), tmp_path / "b.pth", **arguments)
    assert os.listdir(tmp_path) == []


def test_export_needs_pixel_statistics_and_a_known_suffix(tmp_path):
    with pytest.raises(ValueError, match="does not know its input_format, pixel_mean, pixel_std; pass them"):
        export_backbone(make_resnext(SMALL), tmp_path / "b.pth")
    export_backbone(make_resnext(SMALL), tmp_path / "b.pth", **RGB_STATISTICS)
    with pytest.raises(ValueError, match="a .pth, .pkl or .safetensors file, got .*b.npz"):
        export_backbone(make_resnext(SMALL), tmp_path / "b.npz", **RGB_STATISTICS)


def test_failed_export_leaves_the_previous_file(backbone_file, monkeypatch):
    before = open(backbone_file, "rb").read()

    def torn_save(payload, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", torn_save)
    with pytest.raises(OSError, match="no space left"):
        export_backbone(small_classifier(seed=1), backbone_file)
    assert open(backbone_file, "rb").read() == before
    assert os.listdir(os.path.dirname(backbone_file)) == ["backbone.pth"]


# ---- loads that must fail


def test_wrong_width(backbone_file):
    stages = make_resnext_stages((2, 2, 2, 2), 8, 8, stem_channels=32, res2_channels=64)
    wide = make_resnext(SMALL)
    for name, stage in zip(wide.stage_names, stages, strict=True):
        setattr(wide, name, nn.Sequential(*stage))
    assert "\n" not in str(load_fails(backbone_file, wide))
    error = load_fails(backbone_file, wide)
    assert error.mismatched["res2.0.conv2.weight"] == ("(32, 4, 3, 3)", "(64, 8, 3, 3)")
    assert "res2.0.conv1.weight is (32, 32, 1, 1) in the file and (64, 32, 1, 1) in the model" in str(error)
    assert "it is a resnext26_8x4d, the model a resnext26_8x8d" in str(error)


def test_missing_tensor(broken):
    error = load_fails(broken(lambda tensors: tensors.pop("res4.1.conv3.norm.running_mean")))
    assert error.missing == ("res4.1.conv3.norm.running_mean",)
    assert "1 missing in the file: res4.1.conv3.norm.running_mean" in str(error)
    assert error.unexpected == () and error.mismatched == {}


def test_missing_tensor_in_torchvision_names(tmp_path, backbone_file):
    tensors = convert_state_dict(tensors_of(backbone_file), "torchvision")
    del tensors["layer2.0.downsample.0.weight"]
    path = str(tmp_path / "t.pth")
    torch.save(tensors, path)
    error = load_fails(path)
    assert error.missing == ("res3.0.shortcut.weight",)
    assert "res3.0.shortcut.weight (layer2.0.downsample.0.weight)" in str(error)


def test_renamed_tensor(broken):
    error = load_fails(broken(lambda x: x.update({"res3.1.convolution": x.pop("res3.1.conv2.weight")})))
    assert error.missing == ("res3.1.conv2.weight",)
    assert error.unexpected == ("res3.1.convolution",)
    assert "1 left over in the file: res3.1.convolution" in str(error)


def test_left_over_blocks(broken):
    error = load_fails(broken(lambda x: x.update({"res5.2.conv1.weight": torch.zeros(1)})))
    assert error.unexpected == ("res5.2.conv1.weight",)


def test_same_tensor_twice(broken):
    error = load_fails(broken(lambda x: x.update({"res3.0._orig_mod.conv1.weight": x["res3.0.conv1.weight"]})))
    assert error.unexpected == ("res3.0._orig_mod.conv1.weight",)


def test_integer_tensor(broken):
    error = load_fails(broken(lambda x: x.update({"stem.conv1.weight": x["stem.conv1.weight"].to(torch.int8)})))
    assert error.mismatched == {"stem.conv1.weight": ("torch.int8", "torch.float32")}


def test_stages_that_the_model_does_not_have_are_said(backbone_file, caplog):
    """An RPN on res4, for example."""
    model = make_resnext(SMALL, out_features=["res4"])
    with caplog.at_level(logging.INFO):
        report = load_backbone(model, backbone_file)
    assert report.num_tensors == 110 and len(report.unused) == 35
    assert report.unused[0] == "res5.0.shortcut.weight"
    assert (
        "110 of 110 backbone tensors loaded" in caplog.text
        and "35 of res5 not used: this model has none" in caplog.text
    )


def test_long_lists_are_shortened(broken):
    error = load_fails(broken(lambda x: [x.pop(k) for k in list(x) if k.startswith("res2.")]))
    assert len(error.missing) == 35
    assert "35 missing in the file: " in str(error) and " and 32 more" in str(error)


@pytest.mark.parametrize("is_detector", [False, True])
def test_weights_of_another_architecture_are_told_as_such(tmp_path, is_detector):
    path = tmp_path / "b.pth"
    export_backbone(make_resnext("resnext50_32x4d"), path, input_format="RGB", pixel_mean=[1] * 3, pixel_std=[1] * 3)
    fpn = "_fpn" if is_detector else ""
    cfg = get_cfg()
    add_wsl_config(cfg)
    cfg.MODEL.BACKBONE.NAME = f"build_resnext26_8x4d{fpn}_backbone"
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES
    error = load_fails(path, build_backbone(cfg))
    assert str(error).startswith(
        f"no backbone weights loaded from {path}: it is a resnext50_32x4d, the model a resnext26_8x4d; set "
        f"MODEL.BACKBONE.NAME to build_resnext50_32x4d{fpn}_backbone, or take other weights; "
    )
    assert len(str(error)) < 700 + len(str(path)) and "describe the model" not in str(error)


def test_plain_resnets_are_told_as_such(tmp_path):
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "r.pth")
    error = str(load_fails(tmp_path / "r.pth", make_resnext("resnext50_32x4d")))
    assert "r.pth: it is a resnet50, the model a resnext50_32x4d; set MODEL.BACKBONE.NAME" in error


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html> not found", "not a checkpoint that torch.load\\(weights_only=True\\) can read"),
        (
            pickle.dumps({"model": {}})[:-4],
            "not a checkpoint that torch.load\\(weights_only=True\\) can read",
        ),
        ([1, 2], "not a checkpoint: it holds a list, not a dict"),
        ({"model": {}}, "none of its 0 names is like 'res2.0.conv1.weight'"),
        ({"model": {"features.0.weight": torch.zeros(1)}}, "such as 'features.0.weight', is like"),
        ({"stem.conv1.weight": 3, "epoch": 3}, "none of its 0 names is like 'res2.0.conv1.weight'"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, content, reason):
    path = tmp_path / "model.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    error = load_fails(path)
    with pytest.raises(IncompleteLoadError, match=reason):
        raise error
    assert "\n" not in str(error)


def test_truncated_file(tmp_path, backbone_file):
    path = tmp_path / "half.pth"
    content = open(backbone_file, "rb").read()
    path.write_bytes(content[: len(content) // 2])
    assert "not a checkpoint that torch.load(weights_only=True) can read" in str(load_fails(path))


def test_bad_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"nonsense")
    assert "not a .safetensors file" in str(load_fails(path))


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path, function=os.mkdir):
        self.path, self.function = str(path), function

    def __reduce__(self):
        return self.function, (self.path,)


@pytest.mark.parametrize("name", ["w.pkl", "w.pth", "w.pyth", "w.pt", "w.ckpt"])
@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, torch.load, np.load])
def test_pickles_with_a_payload_are_refused_and_never_run(tmp_path, name, function):
    canary = tmp_path / "boom"
    argument = {os.mkdir: canary, os.system: f"touch {canary}", eval: f"open({str(canary)!r}, 'w')"}.get(
        function, canary
    )
    path = tmp_path / name
    for payload in (Bomb(argument, function), {"model": {"stem.conv1.weight": Bomb(argument, function)}}):
        for protocol in (0, 2, 4):
            path.write_bytes(pickle.dumps(payload, protocol=protocol))
            error = load_fails(path)
            if name.endswith(".pkl"):
                assert f".{function.__name__}, which is no numpy array; it was not executed" in error.reason
    torch.save({"model": {"stem.conv1.weight": Bomb(argument, function)}}, path)  # a zip archive
    load_fails(path)
    assert not canary.exists()


def test_payloads_inside_numpy_arrays_are_refused(tmp_path):
    path = tmp_path / "w.pkl"
    for array in (
        np.array([Bomb(tmp_path / "boom")], dtype=object),
        np.array([(1, None)], dtype=[("a", int), ("b", "O")]),
    ):
        path.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": array}}))
        assert "no" in load_fails(path).reason
    path.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": np.array(["text"])}}))
    assert "none of its 0 names is like" in load_fails(path).reason
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("to", ["d2", "caffe2", "torchvision"])
@pytest.mark.parametrize("suffix", ["pkl", "pth", "safetensors"])
def test_every_scheme_in_every_kind_of_file(tmp_path, backbone_file, to, suffix):
    source = tensors_of(backbone_file)
    path = tmp_path / f"w.{suffix}"
    write_weights(path, convert_state_dict(source, to), {"input_format": "RGB"}, to)
    model = small_classifier()
    assert load_backbone(model, path).file_format == to
    loaded = model.backbone.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in source.items())
    assert provenance_in(path) == {"input_format": "RGB"}


def test_affine_layers_need_a_frozen_norm(tmp_path, backbone_file):
    caffe2 = convert_state_dict(tensors_of(backbone_file), "caffe2")
    affine = {name: tensor for name, tensor in caffe2.items() if not name.endswith(("_rm", "_riv"))}
    path = tmp_path / "affine.pkl"
    write_weights(path, affine, {}, "caffe2")
    assert "set MODEL.RESNETS.NORM FrozenBN" in load_fails(path).reason
    frozen = make_resnext(SMALL, norm="FrozenBN")
    load_backbone(frozen, path)
    assert torch.equal(frozen.res3[0].conv2.norm.weight, affine["res3_0_branch2b_bn_s"])


def test_a_head_left_in_a_backbone_file_is_an_error(tmp_path, backbone_file):
    checkpoint = torch.load(backbone_file, weights_only=True)
    for head in ("head.weight", "linear.weight", "fc.weight", "stem.fc.weight"):
        broken = checkpoint | {"model": checkpoint["model"] | {head: torch.zeros(3, 256)}}
        torch.save(broken, tmp_path / "w.pth")
        assert load_fails(tmp_path / "w.pth").unexpected == (head,)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weight file .*nothing.pth"):
        load_backbone(small_classifier(), tmp_path / "nothing.pth")


@pytest.mark.parametrize("to", ["d2", "torchvision"])
def test_stride_in_the_wrong_convolution(tmp_path, backbone_file, to):
    """Such weights fit without a warning and compute something else."""
    path = backbone_file
    if to == "torchvision":
        path = str(tmp_path / "t.pth")
        torch.save(convert_state_dict(tensors_of(backbone_file), "torchvision"), path)
    model = make_resnext(SMALL)
    stages = make_resnext_stages((2, 2, 2, 2), 8, 4, stem_channels=32, res2_channels=64, stride_in_1x1=True)
    for name, stage in zip(model.stage_names, stages, strict=True):
        setattr(model, name, nn.Sequential(*stage))
    assert "set MODEL.RESNETS.STRIDE_IN_1X1 False" in str(load_fails(path, model))


def test_model_on_the_meta_device(backbone_file):
    with torch.device("meta"):
        model = make_resnext(SMALL)
    with pytest.raises(ValueError, match="meta device"):
        load_backbone(model, backbone_file)
