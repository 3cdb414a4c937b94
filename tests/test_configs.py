"""Every config loads; twins differ in what the comparison is about and in nothing else."""

from pathlib import Path

import pytest
import yaml
from detectron2.modeling import build_model

from wsl_d2.engine.main import is_pretraining, load_config
from wsl_d2.engine.schedule import check_periods, resolve_schedule

CONFIGS = Path(__file__).parents[1] / "configs"
LEAVES = sorted(path for path in CONFIGS.glob("*/*.yaml"))
INITIALISATION = {
    "MODEL.WEIGHTS",
    "OUTPUT_DIR",
    "SOLVER.BASE_LR",
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
}


def flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(a: Path, b: Path) -> set[str]:
    ours, theirs = (dict(flat(load_config(str(path), []))) for path in (a, b))
    return {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_every_leaf_loads_is_short_and_has_a_schedule(path):
    cfg = load_config(str(path), [])
    if is_pretraining(cfg):
        check_periods(cfg)
        resolve_schedule(cfg, images_per_epoch=1_000_000_000)
    assert cfg.SOLVER.MAX_ITER > 0 and cfg.SOLVER.BASE_LR > 0
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False and cfg.INPUT.FORMAT == "RGB"
    assert path.stem in cfg.OUTPUT_DIR or "miniworld" in cfg.OUTPUT_DIR
    assert path.read_text().startswith("# tools/train_net.py --config-file " + str(path.relative_to(CONFIGS.parent)))
    assert len(list(flat(yaml.safe_load(path.read_text())))) <= 15


@pytest.mark.parametrize("name", ["imagenet", "imagenet_equal_views", "wsl"])
def test_miniworld_twins_differ_in_their_initialisation_alone(name):
    folder = CONFIGS / "COCO-InstanceSegmentation"
    scratch, twin = (folder / f"miniworld_mask_rcnn_X_26_8x4d_FPN_{n}.yaml" for n in ("scratch", name))
    assert differences(scratch, twin) <= INITIALISATION


def test_coco_twins_differ_in_their_initialisation_alone():
    folder = CONFIGS / "COCO-InstanceSegmentation"
    imagenet, wsl, scratch = (folder / f"mask_rcnn_X_101_32x8d_FPN_1x_{n}.yaml" for n in ("imagenet", "wsl", "scratch"))
    assert differences(imagenet, wsl) <= INITIALISATION
    # Nothing pretrained means nothing to freeze.
    assert differences(imagenet, scratch) <= INITIALISATION | {"MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS.NORM"}


def test_the_equal_views_control_differs_in_its_length_alone():
    folder = CONFIGS / "Hashtag-Pretraining"
    plateau, equal_views = folder / "miniworld_imagenet.yaml", folder / "miniworld_imagenet_equal_views.yaml"
    assert differences(plateau, equal_views) == {"SOLVER.TOTAL_IMAGES", "SOLVER.WARMUP_IMAGES", "OUTPUT_DIR"}
    wsl, control = (load_config(str(path), []) for path in (folder / "miniworld_wsl.yaml", equal_views))
    assert wsl.SOLVER.TOTAL_IMAGES == control.SOLVER.TOTAL_IMAGES


def test_the_miniworld_detector_uses_the_swept_rates():
    sweep = yaml.safe_load((CONFIGS / "COCO-InstanceSegmentation" / "miniworld_lr_sweep.json").read_text())
    for name, row in sweep["arms"].items():
        path = CONFIGS / "COCO-InstanceSegmentation" / f"miniworld_mask_rcnn_X_26_8x4d_FPN_{name}.yaml"
        assert load_config(str(path), []).SOLVER.BASE_LR == row["best"], name
        finished = {float(lr): r for lr, r in row["swept"].items() if r != "diverged"}
        assert row["best"] == max(finished, key=lambda lr: finished[lr]["bbox/AP"] + finished[lr]["segm/AP"])


def test_the_miniworld_detector_builds():
    cfg = load_config(str(CONFIGS / "COCO-InstanceSegmentation" / "miniworld_mask_rcnn_X_26_8x4d_FPN_wsl.yaml"), [])
    model = build_model(cfg)
    assert list(model.backbone.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
