"""Every config loads and builds; twins differ in what the comparison is about and in nothing else."""

import functools
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import detectron2
import pytest
import torch
import yaml
from detectron2.modeling import build_model
from toy_data import jpeg
from toy_detections import random_world

from wsl_d2.analysis.records import Run, check_comparable
from wsl_d2.checkpoint import export_backbone, find_bottom_up
from wsl_d2.cli.main import build_parser
from wsl_d2.config import get_config_file, load_config
from wsl_d2.engine.schedule import resolve_schedule
from wsl_d2.errors import ConfigError
from wsl_d2.modeling import make_resnext
from wsl_d2.modeling.resnext import describe_resnext
from wsl_d2.run_keys import KEYS_OF_RANDOM_WEIGHTS, flatten

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
README = (CONFIGS / "README.md").read_text()
ALL = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "Studies")
LEAVES = [path for path in ALL if not path.name.startswith("Base-")]
MASK = CONFIGS / "COCO-InstanceSegmentation"
ARCHITECTURES = ("X_50_32x4d", "X_101_32x4d", "X_101_32x8d", "X_101_32x16d", "X_101_32x32d", "X_101_32x48d")
DETECTORS = [path for path in LEAVES if path.parent == MASK and "miniworld" not in path.name]
PIXEL_STATISTICS = {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"}
INITIALISATION = PIXEL_STATISTICS | {"MODEL.WEIGHTS", "OUTPUT_DIR", "SOLVER.BASE_LR"}
ROWS = re.findall(r"^\| ([^|]+) \| `([A-Z]+\.[^`]+)` \|$", README, re.M)
OVERRIDES = {what: shlex.split(keys) for what, keys in ROWS}  # "the 3x schedule" -> ["SOLVER.MAX_ITER", "270000", ...]


def identify(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


@functools.cache
def load(path: Path, what: str = ""):
    """A config, with the overrides that the README gives for something."""
    cfg = load_config(str(path), OVERRIDES[what] if what else [])
    cfg.freeze()
    return cfg


def differences(a: Path, b: Path, what: str = "", than: str = "") -> set[str]:
    ours, theirs = flatten(load(a, what)), flatten(load(b, than))
    return {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}


def twins_of(path: Path) -> tuple[Path, str]:
    """The twin that starts from ImageNet, and the initialization of this one."""
    stem, init = path.stem.split("_1x_")
    return path.with_name(f"{stem}_1x_imagenet.yaml"), init


def is_pretraining(cfg) -> bool:
    return cfg.MODEL.META_ARCHITECTURE == "HashtagClassifier"


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
    assert all(line.startswith("# ") for line in lines[:2])
    args = build_parser().parse_args(shlex.split(lines[0])[2:])  # "# wsl-d2 train --config-file ..."
    assert args.prog == "wsl-d2 train" and ROOT / args.config_file == path and not args.opts
    if "miniworld" not in path.name:
        assert args.num_gpus == 8
        assert lines[1].endswith(". Not yet run.") and len(lines[1]) <= 120
        assert load(path).OUTPUT_DIR == f"output/{path.stem}"


def test_every_config_named_in_a_header_or_the_readme_exists():
    paths = [*CONFIGS.rglob("*.yaml"), CONFIGS / "README.md"]
    names = {name for path in paths for name in re.findall(r"(?<![\w/])configs/[\w./-]+\.\w+", path.read_text())}
    assert len(names) > len(LEAVES)
    assert not [name for name in sorted(names) if not (ROOT / name).is_file()]


def test_every_command_of_the_readme_can_be_run():
    blocks = "".join(re.findall(r"```\n(.*?)```", README.split("\n## ")[0], re.S)).replace("\\\n", " ")
    commands = [shlex.split(line) for line in blocks.splitlines()]
    assert {command[1] for command in commands} == {"train", "compare"}
    for program, *arguments in commands:
        args = build_parser().parse_args(arguments)
        assert program == "wsl-d2"
        if arguments[0] == "train":
            cfg = load_config(str(ROOT / args.config_file), args.opts)
            assert cfg.OUTPUT_DIR in blocks.split("compare")[1] and cfg.SOLVER.MAX_ITER == 270000


def test_a_config_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_1x_wsl.yaml"
    assert get_config_file(name) == str(CONFIGS / name)
    assert load_config(name, []) == load_config(f"configs/{name}", []) == load(CONFIGS / name)
    Path("configs", name).parent.mkdir(parents=True)
    Path("configs", name).write_text("SEED: 7\n")
    assert load_config(f"configs/{name}", []).SEED == 7  # one's own comes first
    longer = name.replace("1x", "3x")
    with pytest.raises(ConfigError, match=f"{longer} does not exist; the nearest of wsl_d2's own: {name},"):
        load_config(f"configs/{longer}", [])


def test_no_two_leaves_write_to_the_same_folder():
    folders = [load(path).OUTPUT_DIR for path in LEAVES]
    assert len(set(folders)) == len(folders)


def test_every_architecture_has_every_initialization():
    found = {path.relative_to(CONFIGS).as_posix() for path in LEAVES if "miniworld" not in path.name}
    expected = {"COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_1x_imagenet_caffe2.yaml"}
    expected |= {f"Image-Classification/{name}_X_101_32x8d_wsl.yaml" for name in ("imagenet", "cub", "places365")}
    for name in ARCHITECTURES:
        expected.add(f"Hashtag-Pretraining/{name}_17k.yaml")
        for init in ("imagenet", "wsl", "scratch"):
            expected.add(f"COCO-InstanceSegmentation/mask_rcnn_{name}_FPN_1x_{init}.yaml")
    assert found == expected


def distinct_models() -> dict[str, Path]:
    """One leaf per MODEL node; which weights it starts from does not change what is built."""
    found = {}
    for path in LEAVES:
        model = {key: value for key, value in flatten(load(path).MODEL).items() if key != "WEIGHTS"}
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
        assert hasattr(model.roi_heads, "mask_head")


def test_the_largest_backbones_and_only_they_recompute_activations():
    for path in LEAVES:
        stages = ("res2", "res3", "res4", "res5") if re.search("32x(32|48)d", path.stem) else ()
        assert load(path).MODEL.RESNEXT.CHECKPOINT_STAGES == stages, path


@pytest.mark.parametrize("path", DETECTORS, ids=identify)
def test_coco_twins_differ_in_their_initialization_alone(path):
    baseline, init = twins_of(path)
    found = differences(baseline, path)
    if init == "scratch":
        assert found == {"MODEL.WEIGHTS", "OUTPUT_DIR", *KEYS_OF_RANDOM_WEIGHTS}
    else:
        assert found <= INITIALISATION
    if init != "imagenet_caffe2":
        assert not found & PIXEL_STATISTICS
    runs = {one.stem: [Run(one, flatten(load(one)), one)] for one in (baseline, path)}
    check_comparable(runs)  # by wsl-d2 compare, without --force


@pytest.mark.parametrize("path", DETECTORS, ids=identify)
def test_overrides_of_the_readme_give_every_twin_what_they_are_for(path):
    solver = {"SOLVER.STEPS", "SOLVER.MAX_ITER"}
    expected = {
        "the 2x schedule": (solver, ((120000, 160000), 180000, 0.02)),
        "the 3x schedule": (solver, ((210000, 250000), 270000, 0.02)),
        "Faster R-CNN": ({"MODEL.MASK_ON"}, ((60000, 80000), 90000, 0.02)),
        "another learning rate": ({"SOLVER.BASE_LR"}, ((60000, 80000), 90000, 0.005)),
        "your own backbone": ({"MODEL.WEIGHTS"}, ((60000, 80000), 90000, 0.02)),
    }
    frozen_alike = "a comparison with `scratch` in which all train their batch norm"
    assert OVERRIDES.keys() == {*expected, frozen_alike}
    for what, (keys, schedule) in expected.items():
        cfg = load(path, what)
        assert differences(path, path, what) == keys
        assert (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == schedule
        assert cfg.SOLVER.IMS_PER_BATCH == 16 and cfg.MODEL.MASK_ON == (what != "Faster R-CNN")
    baseline, init = twins_of(path)
    if init == "scratch":
        assert differences(baseline, path, frozen_alike) == {"MODEL.WEIGHTS", "OUTPUT_DIR"}


def test_weights_are_those_of_the_architecture_and_can_be_had():
    """Public weights name their architecture; others come from a run of that architecture."""
    for path in DETECTORS:
        init, weights = twins_of(path)[1], load(path).MODEL.WEIGHTS
        architecture = re.search(r"X_\d+_(\d+x\d+d)", path.stem)
        assert (weights == "") == (init == "scratch")
        assert architecture[1] in weights.lower() or not weights, path
        if init == "wsl" and not weights.startswith("wsl://"):
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
            # Frozen statistics normalize nothing: without this, activations would double from block to block.
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


@pytest.mark.parametrize("name", ["imagenet", "imagenet_equal_views", "self_supervised", "wsl"])
def test_miniworld_twins_differ_in_their_initialization_alone(name):
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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("_BASE_: odd.yaml\n", "_BASE_ leads back to a file that it began from"),
        ("MODEL:\n\tDEVICE: cpu\n", r"no YAML: .*line 2"),
        ("", "no mapping of config keys"),
        ("hello\n", "no mapping of config keys"),
        ("- SEED\n", "no mapping of config keys"),
        ("MODEL: 3\n", "no mapping of config keys"),
        ("OUTPUT_DIR: caf\udce9\n", "can't decode byte 0xe9 in position 15"),
    ],
)
def test_a_file_that_is_no_config_is_one_clear_error(tmp_path, text, told):
    path = tmp_path / "odd.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=rf"(?s)odd\.yaml.*{told}"):
        load_config(str(path), [])


def test_configs_of_detectron2_are_read_as_it_reads_them():
    zoo = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    cfg = load_config(str(zoo / "COCO-Detection" / "retinanet_R_50_FPN_1x.yaml"), [])
    assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == 5  # worked out by an expression in the file
