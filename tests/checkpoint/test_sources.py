"""Checkpoints as other projects write them, as the source of a backbone."""

import argparse
import collections
import pathlib
import pickle

import pytest
import torch
from toy_backbones import SMALL, small_classifier

from wsl_d2.checkpoint import IncompleteLoadError, WeightFile, convert_state_dict, load_backbone
from wsl_d2.modeling import make_resnext

D2 = {name: tensor for name, tensor in small_classifier().backbone.state_dict().items()}
OTHER = {name: tensor + 1 for name, tensor in D2.items()}
TORCHVISION = convert_state_dict(D2, "torchvision")


def under(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def head(name, *shape):
    return {name: torch.zeros(shape or (3,))}


class Attributes(dict):
    """Like the class of Lightning's hyper_parameters."""


def loaded(tmp_path, payload, suffix="pth", **options):
    """The backbone that comes out of a file with that payload."""
    path = tmp_path / f"w.{suffix}"
    if suffix == "pkl":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path)
    model = make_resnext(SMALL)
    report = load_backbone(model, path, **options)
    assert report.num_tensors == 145
    return model, report


def assert_is(model, tensors):
    own = model.state_dict()
    assert all(torch.equal(own[name], tensors[name]) for name in own if "num_batches" not in name)


@pytest.mark.parametrize(
    ("payload", "prefix"),
    [
        # FPN and C4 detectors of Detectron2, RetinaNet, with an optimizer
        (
            {"model": under("backbone.bottom_up.", D2) | head("backbone.fpn_lateral2.weight")},
            "model.backbone.bottom_up",
        ),
        ({"model": under("backbone.bottom_up.", D2) | head("head.cls_subnet.0.weight")}, "model.backbone.bottom_up"),
        (
            {
                "model": under("backbone.", {k: v for k, v in D2.items() if "res5" not in k})
                | under("roi_heads.", {k: v for k, v in D2.items() if "res5" in k})
                | head("roi_heads.box_predictor.cls_score.weight"),
                "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
                "iteration": 7,
            },
            "model.backbone",
        ),
        ({"model": under("backbone.", D2) | head("sem_seg_head.predictor.query.weight")}, "model.backbone"),
        # wrappers: DDP, torch.compile, both, checkpointed or FSDP stages, a detector inside a model
        (under("module.", TORCHVISION), ""),
        (under("_orig_mod.", TORCHVISION), ""),
        (under("module._orig_mod.backbone.", D2), "backbone"),
        (under("backbone._orig_mod.", D2), "backbone"),
        ({k.replace("res3.", "res3._checkpoint_wrapped_module."): v for k, v in D2.items()}, ""),
        (
            under("model.detector.backbone.bottom_up.", D2) | head("model.loss.weight"),
            "model.detector.backbone.bottom_up",
        ),
        # Lightning, timm with its args, torchvision's reference script, RT-DETR's {"ema": {"module": ...}}
        ({"state_dict": under("model.", TORCHVISION), "hyper_parameters": Attributes(lr=1)}, "state_dict.model"),
        ({"state_dict": TORCHVISION, "arch": "x", "args": argparse.Namespace(lr=0.1)}, "state_dict"),
        ({"model": TORCHVISION, "args": argparse.Namespace(p=pathlib.PurePosixPath("a")), "epoch": 1}, "model"),
        ({"ema": {"module": under("backbone.body.", TORCHVISION)}}, "ema.module.backbone.body"),
        # self-supervised and other frameworks: MoCo, mmdetection, torchvision's detectors
        (under("module.encoder_q.", TORCHVISION) | head("module.queue"), "encoder_q"),
        ({"state_dict": under("backbone.", TORCHVISION) | head("bbox_head.fc_cls.weight")}, "state_dict.backbone"),
        (under("backbone.body.", TORCHVISION) | head("rpn.head.conv.weight"), "backbone.body"),
        (TORCHVISION | head("projection_head.0.weight") | head("prototypes.weight"), ""),
    ],
)
def test_the_one_backbone_is_found_and_the_rest_ignored(tmp_path, payload, prefix):
    model, report = loaded(tmp_path, payload)
    assert_is(model, D2)
    assert report.prefix == prefix


def test_pkl_of_detectron2s_converter(tmp_path):
    """tools/convert-torchvision-to-d2.py writes the head as stem.fc."""
    arrays = {name: tensor.numpy() for name, tensor in D2.items() if "num_batches" not in name}
    arrays |= {"stem.fc.weight": torch.zeros(5, 256).numpy(), "stem.fc.bias": torch.zeros(5).numpy()}
    payload = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    model, report = loaded(tmp_path, payload, "pkl")
    assert_is(model, D2)
    assert {"stem.fc.weight", "stem.fc.bias"} <= set(report.ignored)
    file = WeightFile.read(tmp_path / "w.pkl")
    assert set(file.backbone().head) == {"weight", "bias"} and not file.is_detector


TEACHER = {"model": under("modelTeacher.backbone.bottom_up.", OTHER) | under("modelStudent.backbone.bottom_up.", D2)}
EMA = {"state_dict": TORCHVISION, "state_dict_ema": convert_state_dict(OTHER, "torchvision")}


@pytest.mark.parametrize(
    ("payload", "prefix", "expected"),
    [
        (TEACHER, "modelTeacher", OTHER),
        (TEACHER, "modelTeacher.", OTHER),
        (TEACHER, "modelStudent.backbone.bottom_up", D2),
        (TEACHER, "model.modelStudent", D2),
        (EMA, "state_dict", D2),
        (EMA, "state_dict_ema", OTHER),
        ({"teacher": under("module.backbone.", D2), "student": under("module.backbone.", OTHER)}, "teacher", D2),
        (TORCHVISION | under("ema.", EMA["state_dict_ema"]), "", D2),
        (TORCHVISION | under("ema.", EMA["state_dict_ema"]), "ema", OTHER),
        ({"model": TORCHVISION, "model_ema": {"module": EMA["state_dict_ema"]}}, "model", D2),
        ({"model": TORCHVISION, "model_ema": {"module": EMA["state_dict_ema"]}}, "model_ema.module", OTHER),
    ],
)
def test_one_of_several_is_chosen_by_prefix(tmp_path, payload, prefix, expected):
    model, _ = loaded(tmp_path, payload, prefix=prefix)
    assert_is(model, expected)


def test_several_backbones_are_named(tmp_path):
    for payload, prefix, message in (
        (TEACHER, None, "it holds 2 backbones; choose with prefix= 'model.modelTeacher.backbone.bottom_up', 'model."),
        (EMA, None, "choose with prefix= 'state_dict', 'state_dict_ema'"),
        (TEACHER, "teacher", "prefix='teacher' stands for 0 of its backbones; they are at 'model.modelTeacher"),
        (TEACHER, "model", "prefix='model' stands for 2 of its backbones"),
    ):
        with pytest.raises(IncompleteLoadError) as error:
            loaded(tmp_path, payload, prefix=prefix)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_objects_of_a_training_script_are_not_made(tmp_path):
    class Made(collections.UserDict):
        def __reduce__(self):
            return pathlib.Path(tmp_path / "made").touch, ()

    with pytest.raises(IncompleteLoadError, match="not a checkpoint"):
        loaded(tmp_path, {"model": D2, "args": Made()})  # getattr is not called, nor the method found by it
    assert not (tmp_path / "made").exists()


def test_a_name_of_the_backbone_without_counterpart_is_an_error(tmp_path):
    for name in ("layer1.0.se.fc1.weight", "layer5.0.conv1.weight", "layer2.0.conv4.weight"):
        with pytest.raises(IncompleteLoadError, match=f"1 left over in the file: {name}"):
            loaded(tmp_path, TORCHVISION | head(name))
