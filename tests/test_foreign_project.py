"""A Detectron2 project that knows nothing of this one but a backbone's name, in a folder and a process of its own."""

import subprocess
import sys

import pytest

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


def run(script: str, folder) -> str:
    (folder / "project.py").write_text(script)
    result = subprocess.run([sys.executable, "project.py"], cwd=folder, capture_output=True, text=True)
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
