"""Detectron2 projects that know nothing of this one but the READMEs' lines, in folders and processes of their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.engine import DefaultTrainer, SimpleTrainer
from torch import nn
from toy_backbones import RGB_STATISTICS, SMALL, fpn_detector_cfg, randomise, small_classifier
from toy_data import jpeg

import wsl_d2
from wsl_d2.checkpoint import PixelStatisticsError, WeightsError, check_pixel_statistics, export_backbone
from wsl_d2.modeling import make_resnext

ROOT = Path(__file__).parents[1]
PROJECT = """
import torch, wsl_d2
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor, DefaultTrainer
cfg = get_cfg()
cfg.MODEL.BACKBONE.NAME = "build_resnext101_32x8d_fpn_backbone"
{lines}
cfg.MODEL.DEVICE, cfg.INPUT.MIN_SIZE_TEST, cfg.MODEL.WEIGHTS = "cpu", 64, ""
predictor = DefaultPredictor(cfg)
print(type(predictor.model).__name__, list(predictor.model.backbone.output_shape()))
print(predictor(torch.zeros(64, 64, 3, dtype=torch.uint8).numpy())["instances"].image_size)
"""
RETINANET = 'cfg.MODEL.META_ARCHITECTURE = "RetinaNet"'
FASTER_RCNN = """
cfg.MODEL.RPN.IN_FEATURES, cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"], ["p2", "p3", "p4", "p5"]
cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_BOX_HEAD.NAME = "StandardROIHeads", "FastRCNNConvFCHead"
cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 2, 7
cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
"""


def run(script: str, folder, *arguments) -> str:
    (folder / "project.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "project.py", *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (RETINANET, "RetinaNet ['p3', 'p4', 'p5', 'p6', 'p7']"),
        (FASTER_RCNN, "GeneralizedRCNN ['p2', 'p3', 'p4', 'p5', 'p6']"),
    ],
    ids=["retinanet", "faster_rcnn"],
)
def test_one_config_line_in_another_project(tmp_path, lines, expected):
    assert run(PROJECT.format(lines=lines), tmp_path).splitlines() == [expected, "(64, 64)"]


# ---- the training script of configs/README.md, run, stopped and resumed


def readme_blocks() -> list[str]:
    section = (ROOT / "configs" / "README.md").read_text().split("## Weights in your own project")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


DATASET = """
from detectron2.data.datasets import register_coco_instances
register_coco_instances("toy", {}, "toy.json", ".")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a COCO dataset of two images, pretrained weights and a config of Detectron2's own keys."""
    folder = tmp_path_factory.mktemp("project")
    images = []
    for i in (1, 2):
        (folder / f"{i}.jpg").write_bytes(jpeg(i, size=(64, 64)))
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 64, "width": 64})
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [8, 8, 40, 40], "area": 1600, "iscrowd": 0} for i in (1, 2)
    ]
    contents = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "toy.json").write_text(json.dumps(contents))
    export_backbone(small_classifier(), folder / "backbone.pth")
    cfg = fpn_detector_cfg()
    cfg.MODEL.MASK_ON = False
    cfg.MODEL.WEIGHTS = str(folder / "backbone.pth")
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = RGB_STATISTICS["pixel_mean"], RGB_STATISTICS["pixel_std"]
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy",), ()
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 0, 1
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.OUTPUT_DIR = 2, 0.01, str(folder / "output")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


def test_readmes_training_script_loads_resumes_and_leaves_a_resumed_run_alone(project):
    script = DATASET + readme_blocks()[0]
    assert "wsl_d2.load_pretrained(trainer)" in script
    run(script, project, "--config-file", "config.yaml")
    log = (project / "output" / "log.txt").read_text()
    assert "145 backbone tensors loaded from" in log
    trained = torch.load(project / "output" / "model_final.pth", weights_only=True)["model"]
    pretrained = small_classifier().backbone.state_dict()
    assert not torch.equal(trained["backbone.bottom_up.res5.1.conv3.weight"], pretrained["res5.1.conv3.weight"])
    # Resumed with a learning rate of 0: what is saved next is what was loaded, bit by bit.
    arguments = ("SOLVER.MAX_ITER", 3, "SOLVER.BASE_LR", 0.0)
    resume(project, script, arguments)
    log = (project / "output" / "log.txt").read_text().rpartition("Starting training")[0]
    assert "resumed at iteration 2: the weights are the checkpoint's, no pretrained ones are loaded" in log
    resumed = torch.load(project / "output" / "model_final.pth", weights_only=True)
    assert resumed["iteration"] == 2
    assert all(torch.equal(resumed["model"][name], tensor) for name, tensor in trained.items())


def resume(project, script, arguments):
    """The rate of a resumed run is the checkpoint's, so that has to be set to 0, too."""
    path = project / "output" / "model_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    for group in checkpoint["trainer"]["_trainer"]["optimizer"]["param_groups"]:
        group["lr"] = group["initial_lr"] = 0.0
    checkpoint["trainer"]["hooks"]["LRScheduler"]["base_lrs"] = [
        0.0 for _ in checkpoint["trainer"]["hooks"]["LRScheduler"]["base_lrs"]
    ]
    torch.save(checkpoint, path)
    run(script, project, "--config-file", "config.yaml", "--resume", *arguments)


def project_cfg(project, tmp_path):
    cfg = get_cfg()
    cfg.merge_from_file(str(project / "config.yaml"))
    cfg.OUTPUT_DIR = str(tmp_path)
    return cfg


def is_pretrained(model) -> bool:
    name = "res5.1.conv3.weight"
    return torch.equal(model.backbone.bottom_up.state_dict()[name], small_classifier().backbone.state_dict()[name])


def test_plain_loops_pass_where_they_start(project, tmp_path):
    cfg = project_cfg(project, tmp_path)
    model = DefaultTrainer.build_model(cfg)
    assert wsl_d2.load_pretrained(model, cfg, 1) is None and not is_pretrained(model)
    assert wsl_d2.load_pretrained(model, cfg, 0).num_tensors == 145 and is_pretrained(model)
    cfg.MODEL.WEIGHTS = ""
    assert wsl_d2.load_pretrained(model, cfg, 0) is None
    path = project / "backbone.pth"
    assert wsl_d2.load_pretrained(model, cfg, 0, path=path, target="backbone", prefix="").path == str(path)
    for arguments in ((model,), (model, cfg), (SimpleTrainer(nn.Linear(1, 1).train(), [], None), cfg)):
        with pytest.raises(WeightsError, match="load_pretrained cannot tell from a .* alone; pass cfg, and start_iter"):
            wsl_d2.load_pretrained(*arguments)
    cfg.MODEL.WEIGHTS, cfg.INPUT.FORMAT = str(path), "BGR"
    with pytest.raises(PixelStatisticsError):
        wsl_d2.load_pretrained(model, cfg, 0)


def test_detectron2s_own_loading_of_raw_torchvision_weights_is_completed(project, tmp_path):
    """resume_or_load fills nothing from such a file and warns; the line after it fills all."""
    from wsl_d2.checkpoint import convert_state_dict

    cfg = project_cfg(project, tmp_path)
    cfg.MODEL.WEIGHTS = str(tmp_path / "raw.pth")
    torch.save(convert_state_dict(small_classifier().backbone.state_dict(), "torchvision"), cfg.MODEL.WEIGHTS)
    model = DefaultTrainer.build_model(cfg)
    checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR)
    start_iter = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=True).get("iteration", -1) + 1
    assert not is_pretrained(model)
    assert wsl_d2.load_pretrained(model, cfg, start_iter).num_tensors == 145 and is_pretrained(model)


# ---- LazyConfig


def test_the_lazy_config_example(tmp_path):
    backbone = randomise(make_resnext(SMALL))
    export_backbone(backbone, tmp_path / "backbone.pth", **RGB_STATISTICS)
    cfg = LazyConfig.load(str(ROOT / "configs/LazyConfig/mask_rcnn_X_101_32x8d_FPN_wsl.py"))
    assert cfg.model.backbone.bottom_up.architecture == "resnext101_32x8d"
    assert cfg.train.init_checkpoint == "wsl://resnext101_32x8d"
    cfg = LazyConfig.apply_overrides(
        cfg, [f"model.backbone.bottom_up.architecture={SMALL}", f"train.init_checkpoint={tmp_path / 'backbone.pth'}"]
    )
    model = instantiate(cfg.model)
    assert wsl_d2.load_pretrained(model, cfg, 5) is None
    report = wsl_d2.load_pretrained(model, cfg, 0)
    assert report.num_tensors == 145 and report.path == str(tmp_path / "backbone.pth")
    assert torch.equal(model.backbone.bottom_up.res5[1].conv3.weight, backbone.res5[1].conv3.weight)
    assert not model.backbone.bottom_up.res2[0].conv1.weight.requires_grad  # freeze_at

    cfg.dataloader.train.mapper.image_format = "BGR"
    cfg.model.pixel_mean = [103.530, 116.280, 123.675]
    with pytest.raises(PixelStatisticsError) as error:
        check_pixel_statistics(cfg, tmp_path / "backbone.pth")
    text, cure = str(error.value).split(" Set, in the config or at the end of the command line: ")
    assert "dataloader.train.mapper.image_format is BGR, the weights need RGB" in text
    assert "model.pixel_mean is [103.53, 116.28, 123.675], the weights need [123.675, 116.28, 103.53]" in text
    check_pixel_statistics(LazyConfig.apply_overrides(cfg, cure.split()), tmp_path / "backbone.pth")
