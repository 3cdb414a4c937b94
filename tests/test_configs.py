"""Every config loads and builds; twins differ in what the comparison is about and in nothing else."""

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from toy_data import jpeg
from toy_detections import random_world

from wsl_d2.checkpoint import export_backbone, find_bottom_up
from wsl_d2.engine.main import is_pretraining, load_config
from wsl_d2.engine.schedule import resolve_schedule
from wsl_d2.modeling import make_resnext
from wsl_d2.modeling.resnext import describe_resnext

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
ALL = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "Studies")
LEAVES = [path for path in ALL if not path.name.startswith("Base-")]
MASK, SWEEP = CONFIGS / "COCO-InstanceSegmentation", CONFIGS / "COCO-InstanceSegmentation" / "lr_sweep"
# mask_rcnn_X_101_32x8d_FPN_1x_wsl and faster_rcnn_...; a sweep's leaf ends in _lr0.005
DETECTOR = re.compile(r"(?P<twins>(mask|faster)_rcnn_X_\d+_\d+x\d+d_FPN)_(?P<schedule>[123]x)_(?P<init>[a-z0-9_]+)")
DETECTORS = [path for path in LEAVES if DETECTOR.fullmatch(path.stem)]
PIXEL_STATISTICS = {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"}
INITIALISATION = PIXEL_STATISTICS | {"MODEL.WEIGHTS", "OUTPUT_DIR", "SOLVER.BASE_LR"}
# Nothing pretrained means nothing to freeze.
FROM_SCRATCH = INITIALISATION | {"MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS.NORM"}
SCHEDULE = {"SOLVER.STEPS", "SOLVER.MAX_ITER", "OUTPUT_DIR"}


def identify(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


@functools.cache
def load(path: Path):
    cfg = load_config(str(path), [])
    cfg.freeze()
    return cfg


def flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(a: Path, b: Path) -> set[str]:
    ours, theirs = (dict(flat(load(path))) for path in (a, b))
    return {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}


@pytest.mark.parametrize("path", ALL, ids=identify)
def test_every_config_loads_and_has_a_schedule(path):
    cfg = load(path).clone()
    cfg.defrost()
    if is_pretraining(cfg):
        resolve_schedule(cfg, images_per_epoch=1_000_000_000)
    assert cfg.SOLVER.MAX_ITER > 0 and cfg.SOLVER.BASE_LR > 0
    assert all(0 < step < cfg.SOLVER.MAX_ITER for step in cfg.SOLVER.STEPS) or "STEPS" not in path.read_text()
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    # Channel order, means and deviations go together; PIXEL_MEAN and PIXEL_STD are in the order of FORMAT.
    rgb = [123.675, 116.280, 103.530], [58.395, 57.120, 57.375]
    order = 1 if cfg.INPUT.FORMAT == "RGB" else -1
    assert (cfg.MODEL.PIXEL_MEAN[::order], cfg.MODEL.PIXEL_STD[::order]) == rgb
    assert cfg.INPUT.FORMAT == ("BGR" if "caffe2" in path.stem else "RGB")


@pytest.mark.parametrize("path", LEAVES, ids=identify)
def test_every_leaf_is_short_and_says_how_to_run_it(path):
    lines = path.read_text().splitlines()
    assert 5 <= len(lines) <= 15
    assert lines[0].startswith(f"# tools/train_net.py --config-file {path.relative_to(ROOT)}")
    assert all(line.startswith("# ") for line in lines[:2])
    if "miniworld" not in path.name:
        assert lines[0].endswith(" --num-gpus 8")
        assert lines[1].endswith(". Not yet run.") and len(lines[1]) <= 120
        assert load(path).OUTPUT_DIR == f"output/{path.stem}"


def test_every_config_named_in_a_header_or_the_readme_exists():
    for path in [*ALL, CONFIGS / "README.md"]:
        for name in re.findall(r"(?<![\w/])configs/[\w./-]+\.\w+", path.read_text()):
            assert (ROOT / name).is_file(), f"{path.name} names {name}"


def test_no_two_leaves_write_to_the_same_folder():
    folders = [load(path).OUTPUT_DIR for path in LEAVES]
    assert len(set(folders)) == len(folders)


def test_the_generated_set_is_complete():
    """Every architecture has every initialisation and schedule; 32x8d has more."""
    found = {path.relative_to(CONFIGS).as_posix() for path in LEAVES if "miniworld" not in path.name}
    expected = set()
    for name in ("X_50_32x4d", "X_101_32x4d", "X_101_32x8d", "X_101_32x16d", "X_101_32x32d", "X_101_32x48d"):
        expected.add(f"Hashtag-Pretraining/{name}_17k.yaml")
        for init in ("imagenet", "wsl", "scratch"):
            for schedule in ("1x", "2x", "3x"):
                expected.add(f"COCO-InstanceSegmentation/mask_rcnn_{name}_FPN_{schedule}_{init}.yaml")
    for schedule in ("1x", "2x", "3x"):
        expected.add(f"COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_{schedule}_imagenet_caffe2.yaml")
    for init in ("imagenet", "imagenet_caffe2", "wsl", "scratch"):
        for schedule in ("1x", "3x"):
            expected.add(f"COCO-Detection/faster_rcnn_X_101_32x8d_FPN_{schedule}_{init}.yaml")
    for init in ("imagenet", "wsl"):
        for rate in ("0.02", "0.01", "0.005", "0.0025", "0.00125"):
            expected.add(f"COCO-InstanceSegmentation/lr_sweep/mask_rcnn_X_101_32x8d_FPN_1x_{init}_lr{rate}.yaml")
    expected |= {f"Image-Classification/{name}_X_101_32x8d_wsl.yaml" for name in ("imagenet", "cub", "places365")}
    assert found == expected


def write_configs(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "write_configs.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_generated_set_is_what_the_tool_writes(tmp_path):
    result = write_configs("--check")
    assert result.returncode == 0, result.stderr

    assert write_configs("--configs", tmp_path).returncode == 0
    assert write_configs("--check", "--configs", tmp_path).returncode == 0
    folder = tmp_path / "COCO-Detection"
    (folder / "faster_rcnn_X_101_32x8d_FPN_1x_wsl.yaml").write_text("SEED: 1\n")
    (folder / "faster_rcnn_X_101_32x8d_FPN_3x_wsl.yaml").unlink()
    (folder / "mine.yaml").touch()
    (folder / "miniworld_mine.yaml").touch()
    result = write_configs("--check", "--configs", tmp_path)
    assert result.returncode == 1
    assert sorted(result.stderr.splitlines()) == [
        f"differs: {folder}/faster_rcnn_X_101_32x8d_FPN_1x_wsl.yaml",
        f"left over: {folder}/mine.yaml",
        f"missing: {folder}/faster_rcnn_X_101_32x8d_FPN_3x_wsl.yaml",
    ]
    result = write_configs("--configs", tmp_path)
    assert "81 generated configs, 2 written" in result.stdout and (folder / "mine.yaml").exists()
    assert write_configs("--check", "--configs", tmp_path).stderr == f"left over: {folder}/mine.yaml\n"


def distinct_models() -> dict[str, Path]:
    """One leaf per MODEL node; which weights it starts from does not change what is built."""
    found = {}
    for path in LEAVES:
        model = {key: value for key, value in flat(load(path).MODEL) if key != "WEIGHTS"}
        found.setdefault(json.dumps(model, sort_keys=True), path)
    return found


@pytest.mark.parametrize("path", distinct_models().values(), ids=identify)
def test_every_distinct_model_builds(path):
    cfg = load(path).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES = 1000
    with torch.device("meta"):
        model = build_model(cfg)
    bottom_up = find_bottom_up(model)
    named = re.search(r"X_(\d+_\d+x\d+d)", path.stem)
    expected = f"resnext{named[1]}" if named else "resnext26_8x4d"
    assert describe_resnext(bottom_up)["architecture"] == expected
    trained = [p.requires_grad for p in bottom_up.parameters()]
    assert any(trained) and all(trained) == (cfg.MODEL.BACKBONE.FREEZE_AT == 0)
    if not is_pretraining(cfg):
        assert list(model.backbone.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
        assert ("mask_rcnn" in path.stem) == hasattr(model.roi_heads, "mask_head")


def test_the_largest_backbones_and_only_they_recompute_activations():
    for path in LEAVES:
        stages = ("res2", "res3", "res4", "res5") if re.search("32x(32|48)d", path.stem) else ()
        assert load(path).MODEL.RESNEXT.CHECKPOINT_STAGES == stages, path


@pytest.mark.parametrize("path", DETECTORS, ids=identify)
def test_coco_twins_differ_in_their_initialisation_alone(path):
    name = DETECTOR.fullmatch(path.stem)
    baseline = path.with_name(f"{name['twins']}_{name['schedule']}_imagenet.yaml")
    found = differences(baseline, path)
    if name["init"] == "scratch":
        assert found <= FROM_SCRATCH
    else:
        assert found <= INITIALISATION
    if name["init"] != "imagenet_caffe2":
        assert not found & PIXEL_STATISTICS


@pytest.mark.parametrize("path", DETECTORS, ids=identify)
def test_schedules_of_a_detector_differ_in_their_length_alone(path):
    name = DETECTOR.fullmatch(path.stem)
    short = path.with_name(f"{name['twins']}_1x_{name['init']}.yaml")
    assert differences(short, path) == (set() if name["schedule"] == "1x" else SCHEDULE)
    lengths = {"1x": ((60000, 80000), 90000), "2x": ((120000, 160000), 180000), "3x": ((210000, 250000), 270000)}
    solver = load(path).SOLVER
    assert (solver.STEPS, solver.MAX_ITER) == lengths[name["schedule"]]
    assert (solver.IMS_PER_BATCH, solver.BASE_LR) == (16, 0.02)


def test_faster_r_cnn_is_mask_r_cnn_without_masks():
    for path in (CONFIGS / "COCO-Detection").glob("*.yaml"):
        twin = MASK / path.name.replace("faster", "mask")
        assert differences(path, twin) == {"MODEL.MASK_ON", "OUTPUT_DIR"}


def test_leaves_of_the_sweep_differ_in_their_rate_alone():
    for path in SWEEP.glob("*.yaml"):
        leaf, rate = path.stem.split("_lr")
        assert load(path).SOLVER.BASE_LR == float(rate)
        assert differences(MASK / f"{leaf}.yaml", path) | {"SOLVER.BASE_LR"} == {"SOLVER.BASE_LR", "OUTPUT_DIR"}


def test_weights_are_those_of_the_architecture_and_can_be_had():
    """Public weights name their architecture; others come from a run of that architecture."""
    for path in DETECTORS:
        name, weights = DETECTOR.fullmatch(path.stem), load(path).MODEL.WEIGHTS
        architecture = re.search(r"X_\d+_(\d+x\d+d)", path.stem)
        assert (weights == "") == (name["init"] == "scratch")
        assert architecture[1] in weights.lower() or not weights, path
        if name["init"] == "wsl" and not weights.startswith("wsl://"):
            run = CONFIGS / "Hashtag-Pretraining" / f"{architecture[0]}_17k.yaml"
            assert weights == f"{load(run).OUTPUT_DIR}/backbone.pth"
            assert f"configs/Hashtag-Pretraining/{run.name}" in path.read_text()


def test_pretraining_of_the_architectures_differs_in_the_backbone_and_the_batch():
    paths = sorted((CONFIGS / "Hashtag-Pretraining").glob("X_*_17k.yaml"))
    free = {"MODEL.BACKBONE.NAME", "MODEL.RESNEXT.CHECKPOINT_STAGES", "SOLVER.IMS_PER_BATCH", "OUTPUT_DIR"}
    assert len(paths) == 6 and all(differences(paths[0], path) <= free for path in paths)


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """COCO-format images and a backbone of random numbers, for detectors that run on a CPU in seconds."""
    root = tmp_path_factory.mktemp("datasets")
    world = random_world(seed=0, num_images=6)
    (root / "instances.json").write_text(json.dumps(world))
    for image in world["images"]:
        (root / image["file_name"]).write_bytes(jpeg(image["id"], (image["width"], image["height"])))
    torch.manual_seed(0)
    backbone = make_resnext("resnext50_32x4d", zero_init_residual=False)
    for stage in backbone.stages:
        for block in stage:
            # Frozen statistics normalise nothing: without this, activations would double from block to block.
            torch.nn.init.constant_(block.conv3.norm.weight, 0.2)
    statistics = {"pixel_mean": [123.675, 116.280, 103.530], "pixel_std": [58.395, 57.120, 57.375]}
    export_backbone(backbone, root / "backbone.pth", input_format="RGB", **statistics)
    return root


def train_reduced(config: Path, small_world: Path, output: Path) -> list[dict]:
    """Three iterations and an evaluation of a COCO config; returns the metric records."""
    overrides = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": small_world / "backbone.pth",
        "MODEL.FPN.OUT_CHANNELS": 64,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 64,
        "MODEL.ROI_HEADS.NUM_CLASSES": 4,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
        "INPUT.MASK_FORMAT": "bitmask",
        "INPUT.MIN_SIZE_TRAIN": "(96,)",
        "INPUT.MIN_SIZE_TEST": 96,
        "DATASETS.COCO_FOLDERS": "[['small', 'instances.json', '.']]",
        "DATASETS.TRAIN": "('small',)",
        "DATASETS.TEST": "('small',)",
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 3,
        "SOLVER.LOG_PERIOD": 1,
        "TEST.DETECTIONS_PER_IMAGE": 10,
        "OUTPUT_DIR": output,
    }
    pairs = [str(text) for pair in overrides.items() for text in pair]
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file", str(config), *pairs],
        env=os.environ | {"DETECTRON2_DATASETS": str(small_world), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert re.search(r"(\d+) of \1 backbone tensors loaded from .*backbone.pth", result.stdout + result.stderr)
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


@pytest.mark.slow
def test_reduced_twins_train_evaluate_and_are_equal_given_equal_weights(small_world, tmp_path):
    records = {}
    for init in ("imagenet", "wsl"):
        config = MASK / f"mask_rcnn_X_50_32x4d_FPN_1x_{init}.yaml"
        rows = train_reduced(config, small_world, tmp_path / init)
        records[init] = [{k: v for k, v in row.items() if "loss" in k or "AP" in k or k == "iteration"} for row in rows]
        losses = [row["total_loss"] for row in rows if "total_loss" in row]
        assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
        assert {"bbox/AP", "segm/AP"} <= set().union(*rows)
        assert any(row.get("loss_mask", 0) > 0 for row in rows)
        (tmp_path / init / "model_final.pth").unlink()  # written, and too large to leave behind
    assert json.dumps(records["imagenet"]) == json.dumps(records["wsl"])  # as text: an AP without objects is NaN


@pytest.mark.parametrize("name", ["imagenet", "imagenet_equal_views", "wsl"])
def test_miniworld_twins_differ_in_their_initialisation_alone(name):
    scratch, twin = (MASK / f"miniworld_mask_rcnn_X_26_8x4d_FPN_{n}.yaml" for n in ("scratch", name))
    assert differences(scratch, twin) <= INITIALISATION


def test_the_equal_views_control_differs_in_its_length_alone():
    folder = CONFIGS / "Hashtag-Pretraining"
    plateau, equal_views = folder / "miniworld_imagenet.yaml", folder / "miniworld_imagenet_equal_views.yaml"
    assert differences(plateau, equal_views) == {"SOLVER.TOTAL_IMAGES", "SOLVER.WARMUP_IMAGES", "OUTPUT_DIR"}
    wsl, control = (load(path) for path in (folder / "miniworld_wsl.yaml", equal_views))
    assert wsl.SOLVER.TOTAL_IMAGES == control.SOLVER.TOTAL_IMAGES


def test_the_miniworld_detector_uses_the_swept_rates():
    sweep = yaml.safe_load((MASK / "miniworld_lr_sweep.json").read_text())
    for name, row in sweep["arms"].items():
        path = MASK / f"miniworld_mask_rcnn_X_26_8x4d_FPN_{name}.yaml"
        assert load(path).SOLVER.BASE_LR == row["best"], name
        finished = {float(lr): r for lr, r in row["swept"].items() if r != "diverged"}
        assert row["best"] == max(finished, key=lambda lr: finished[lr]["bbox/AP"] + finished[lr]["segm/AP"])


def test_the_miniworld_detector_builds():
    model = build_model(load(MASK / "miniworld_mask_rcnn_X_26_8x4d_FPN_wsl.yaml"))
    assert list(model.backbone.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
