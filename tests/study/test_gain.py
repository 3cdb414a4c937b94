"""The comparison of two pretrainings on somebody's own data: twin configs, the sweep of their rates, and the page."""

import copy
import functools
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from command_line import commands_of, wsl_d2
from toy_detections import write_own_data

from wsl_d2.checkpoint import WeightFile, export_backbone
from wsl_d2.checkpoint.weight_file import MissingFileError
from wsl_d2.cli.gain import weights as parse_weights
from wsl_d2.cli.main import build_parser
from wsl_d2.config import load_config
from wsl_d2.errors import ConfigError, FaultsError, UserError
from wsl_d2.modeling import RESNEXT_ARCHITECTURES, make_resnext
from wsl_d2.run_keys import KEYS_OF_INITIALIZATION, KEYS_OF_RANDOM_WEIGHTS, flatten, is_among
from wsl_d2.study.gain import Question, architecture_of, choose_rates, prepare
from wsl_d2.study.study import Study

BASE = "Base-Miniworld-Mask-RCNN-FPN.yaml"
RGB = {"input_format": "RGB", "pixel_mean": [123.675, 116.280, 103.530], "pixel_std": [58.395, 57.120, 57.375]}
BGR = {"input_format": "BGR", "pixel_mean": [103.530, 116.280, 123.675], "pixel_std": [1.0, 1.0, 1.0]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train.json, val.json, images/, and two backbones of other pixel statistics."""
    root = tmp_path_factory.mktemp("own data")
    write_own_data(root, "images")
    for seed, (name, statistics) in enumerate({"rgb": RGB, "bgr": BGR}.items()):
        torch.manual_seed(seed)
        export_backbone(make_resnext("resnext26_8x4d"), root / f"{name}.pth", **statistics)
    return root


def question(data, **changes):
    fields = {
        "train": data / "train.json",
        "val": data / "val.json",
        "train_images": data / "images",
        "val_images": data / "images",
        "baseline": ("imagenet", str(data / "bgr.pth")),
        "candidate": ("wsl", str(data / "rgb.pth")),
        "config_file": BASE,
        "iterations": 2,
        "batch_size": 2,
    }
    return Question(**(fields | changes))


def config_of(output, name):
    return load_config(str(output / f"{name}.yaml"), [])


def test_the_twins_differ_in_their_initialization_alone(data, tmp_path):
    study = prepare(question(data), tmp_path / "out")
    configs = {name: config_of(tmp_path / "out", name) for name in ("imagenet", "wsl")}
    flat = {name: flatten(cfg) for name, cfg in configs.items()}
    different = {key for key in flat["wsl"] if flat["wsl"][key] != flat["imagenet"][key]}
    assert different == {"MODEL.WEIGHTS", "INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"}
    assert all(is_among(key, KEYS_OF_INITIALIZATION) for key in different)
    cfg = configs["wsl"]
    assert cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "bitmask" and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 4
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH) == (2, 2)
    assert study.rates == [0.000625, 0.00125, 0.0025, 0.005]  # 0.02 for 8 images, and below
    assert study.tasks == {"box AP": "bbox/AP", "mask AP": "segm/AP"}
    images = str(data / "images")
    assert cfg.DATASETS.COCO_FOLDERS == [
        ["gain_train", str(data / "train.json"), images],
        ["gain_val", str(data / "val.json"), images],
        ["gain_sweep_train", str(tmp_path / "out" / "sweep_train.json"), images],
        ["gain_sweep_val", str(tmp_path / "out" / "sweep_val.json"), images],
    ]
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("gain_train",), ("gain_val",))


def test_scratch_trains_what_random_weights_need(data, tmp_path):
    changes = {"config_file": "Base-RCNN-FPN.yaml", "architecture": "resnext26_8x4d", "short_side": 160}
    prepare(question(data, baseline=("scratch", "scratch"), **changes), tmp_path / "out")
    scratch, wsl = (config_of(tmp_path / "out", name) for name in ("scratch", "wsl"))
    assert scratch.MODEL.WEIGHTS == "" and scratch.MODEL.BACKBONE.FREEZE_AT == 0 and scratch.MODEL.RESNETS.NORM == "BN"
    different = {key for key, value in flatten(wsl).items() if flatten(scratch)[key] != value}
    assert all(is_among(key, KEYS_OF_INITIALIZATION + KEYS_OF_RANDOM_WEIGHTS) for key in different)
    assert wsl.MODEL.BACKBONE.NAME == "build_resnext26_8x4d_fpn_backbone" and wsl.INPUT.MIN_SIZE_TEST == 160
    assert wsl.MODEL.ANCHOR_GENERATOR.SIZES[0] == [32 * 160 / 800]


def test_rates_are_chosen_on_training_images_that_the_sweep_holds_out(data, tmp_path):
    study = prepare(question(data), tmp_path / "out")
    parts = [json.loads((tmp_path / "out" / f"sweep_{part}.json").read_text()) for part in ("train", "val")]
    whole = json.loads((data / "train.json").read_text())
    assert [len(part["images"]) for part in parts] == [8, 2]
    for key in ("images", "annotations"):
        assert sorted(row["id"] for part in parts for row in part[key]) == [row["id"] for row in whole[key]]
    cells = Study.load(study.write_sweep()).cells(study.output / "sweep")
    assert len(cells) == 8 and all("('gain_sweep_val',)" in cell.command for cell in cells)
    cells = Study.load(study.write_study({"imagenet": 0.005, "wsl": 0.0025}, 3)).cells(study.output)
    rates = {(cell.values["arm"], cell.command[cell.command.index("SOLVER.BASE_LR") + 1]) for cell in cells}
    assert len(cells) == 6 and rates == {("imagenet", "0.005"), ("wsl", "0.0025")}
    assert not any("gain_sweep_val" in word for cell in cells for word in cell.command)


def test_the_best_rate_of_each_side():
    def row(arm, lr, *values):
        return {"arm": arm, "lr": lr} | dict(zip(("box AP", "mask AP"), values, strict=False))

    rows = [row("a", 0.1, 3, 4), row("a", 0.2, 5, 6), row("a", 0.4, None, None)]
    rows += [row("b", 0.1, 9, 2), row("b", 0.2, 2, 8), row("b", 0.4, float("nan"), 3)]
    chosen, lines = choose_rates(rows, ("a", "b"), [0.1, 0.2, 0.4])
    assert chosen == {"a": 0.2, "b": 0.1}
    assert lines[0] == "a: learning rate 0.2 (mean AP on held-out training images 0.1: 3.5, 0.2: 5.5, 0.4: diverged)"
    assert "the lowest that was tried is the best" in lines[2] and len(lines) == 3
    with pytest.raises(ConfigError, match=r"c: the loss was not finite with any learning rate of \[0.1\]"):
        choose_rates([row("c", 0.1, None, None)], ("c",), [0.1])


def test_boxes_alone_are_trained_without_masks_and_the_schedule_follows_the_data(data, tmp_path):
    world = json.loads((data / "train.json").read_text())
    for row in world["annotations"]:
        del row["segmentation"]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(world))
    study = prepare(question(data, train=path, iterations=None, batch_size=16, budget=2.0), tmp_path / "out")
    cfg = config_of(study.output, "wsl")
    assert not cfg.MODEL.MASK_ON and study.tasks == {"box AP": "bbox/AP"}
    assert cfg.SOLVER.MAX_ITER == 6000 and cfg.SOLVER.STEPS == (4000, 5333)


def test_masks_that_not_all_objects_have_are_left_out_and_it_says_so(data, tmp_path):
    world = json.loads((data / "train.json").read_text())
    row = next(row for row in world["annotations"] if not row.get("iscrowd"))
    del row["segmentation"]
    path = tmp_path / "some.json"
    path.write_text(json.dumps(world))
    study = prepare(question(data, train=path), tmp_path / "out")
    assert not config_of(study.output, "wsl").MODEL.MASK_ON
    (line,) = [line for line in study.lines if line.startswith("no masks: 1 of ")]
    assert line.endswith(f"have no masks, such as annotation {row['id']}") and str(path) in line


@pytest.mark.parametrize("architecture", RESNEXT_ARCHITECTURES)
def test_weights_tell_their_architecture(architecture):
    with torch.device("meta"):
        tensors = make_resnext(architecture).state_dict()
    assert architecture_of(tensors) == architecture
    del tensors["res4.0.conv2.weight"]
    assert architecture_of(tensors) is None and architecture_of({}) is None


def test_the_detector_gets_the_architecture_of_the_weights(data, tmp_path):
    changes = {"config_file": "Base-RCNN-FPN.yaml", "baseline": ("scratch", "scratch")}
    prepare(question(data, **changes), tmp_path / "out")
    assert config_of(tmp_path / "out", "scratch").MODEL.BACKBONE.NAME == "build_resnext26_8x4d_fpn_backbone"
    assert parse_weights("torchvision://A.B") == ("torchvision", "torchvision://A.B")
    assert parse_weights("mine=out/a.pth") == ("mine", "out/a.pth") and parse_weights("a.pth") == ("", "a.pth")
    nothing = {"baseline": ("a", "scratch"), "candidate": ("b", "scratch"), "config_file": "Base-RCNN-FPN.yaml"}
    with pytest.raises(ConfigError, match="the weights do not tell their architecture; name it by"):
        prepare(question(data, **nothing), tmp_path / "other")


def test_weights_of_different_architectures_are_not_compared(data, tmp_path):
    tensors = torch.load(data / "rgb.pth", weights_only=True)["model"]
    kept = {name: tensor for name, tensor in tensors.items() if ".1." not in name}
    torch.save({"model": kept}, tmp_path / "small.pth")
    with pytest.raises(ConfigError, match=r"\(imagenet of resnext26_8x4d, wsl of no known ResNeXt\)"):
        prepare(question(data, candidate=("wsl", str(tmp_path / "small.pth"))), tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "resnext50_32x4d"},
        {"architecture": "resnext50_32x4d", "candidate": ("scratch", "scratch")},
    ],
)
def test_weights_of_another_architecture_than_asked_for_are_refused_before_anything_is_written(data, tmp_path, changes):
    message = (
        "imagenet: .*bgr.pth holds a backbone of resnext26_8x4d, and resnext50_32x4d is to be trained; give weights of "
        "resnext50_32x4d, or --architecture resnext26_8x4d with weights of it"
    )
    with pytest.raises(ConfigError, match=message):
        prepare(question(data, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_without_a_known_architecture_do_not_fill_that_of_the_config(data, tmp_path):
    tensors = torch.load(data / "rgb.pth", weights_only=True)["model"]
    torch.save({"model": {name: tensor for name, tensor in tensors.items() if ".1." not in name}}, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match="a.pth holds a backbone of no known ResNeXt, and resnext26_8x4d is to be"):
        prepare(
            question(data, candidate=("wsl", str(tmp_path / "a.pth")), baseline=("scratch", "scratch")),
            tmp_path / "out",
        )


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"candidate": ("wsl", "absent.pth")},
            MissingFileError,
            "no weight file .*absent.pth; give scratch, a file, wsl",
        ),
        ({"candidate": ("wsl", "scrach")}, MissingFileError, "scrach; give scratch, .*did you mean scratch"),
        ({"candidate": ("wsl", "wls://a")}, MissingFileError, "no weight file wls://a; .*did you mean wsl://"),
        ({"candidate": ("wsl", "wsl://resnext101_32x4")}, MissingFileError, "did you mean resnext101_32x48?d"),
        ({"candidate": ("imagenet", "x.pth")}, ConfigError, "both sides are called 'imagenet'"),
        ({"architecture": "resnet50"}, ConfigError, "unknown architecture 'resnet50'; choose"),
        ({"mask": "on "}, ConfigError, "mask is 'on '; it must be"),
        ({"overrides": ("MODEL.NONSENSE", "1")}, ConfigError, "unknown config key MODEL.NONSENSE"),
        ({"val_images": "elsewhere"}, FaultsError, "10 of 10 image files are not in elsewhere"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_written(data, tmp_path, changes, kind, message):
    with pytest.raises(kind, match=message):
        prepare(question(data, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_downloads_nothing(data, tmp_path, monkeypatch):
    monkeypatch.setattr(WeightFile, "read", lambda path: pytest.fail(f"{path} was read"))
    public = {
        "config_file": "Base-RCNN-FPN.yaml",
        "baseline": ("imagenet", "torchvision://ResNeXt101_32X8D_Weights.IMAGENET1K_V1"),
        "candidate": ("wsl", "wsl://resnext101_32x8d"),
    }
    prepare(question(data, **public), tmp_path / "out", is_plan=True)
    cfg = config_of(tmp_path / "out", "wsl")
    assert cfg.MODEL.WEIGHTS == "wsl://resnext101_32x8d" and cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.BACKBONE.NAME == "build_resnext101_32x8d_fpn_backbone" and cfg.MODEL.PIXEL_STD[0] == 58.395
    with pytest.raises(ConfigError, match="imagenet: torchvision://.* holds a backbone of resnext101_32x8d"):
        prepare(question(data, architecture="resnext50_32x4d", **public), tmp_path / "other", is_plan=True)


def test_both_sets_need_the_same_categories(data, tmp_path):
    world = json.loads((data / "val.json").read_text())
    other = copy.deepcopy(world)
    other["categories"][0]["name"] = "other"
    (tmp_path / "val.json").write_text(json.dumps(other))
    with pytest.raises(
        FaultsError, match="val.json: its categories are other, .* those of .*train.json .*; both must have the same"
    ):
        prepare(question(data, val=tmp_path / "val.json"), tmp_path / "out")


def test_a_folder_is_of_one_question_once_a_training_has_begun(data, tmp_path):
    prepare(question(data, iterations=5), tmp_path / "out")
    prepare(question(data), tmp_path / "out")
    (tmp_path / "out" / "sweep").mkdir()
    prepare(question(data, rates=(0.1,)), tmp_path / "out")
    with pytest.raises(UserError, match=r"holds a comparison that was .* \(iterations 2, now 3\)"):
        prepare(question(data, iterations=3), tmp_path / "out")


def test_the_commands_of_the_readme_are_understood():
    text = (Path(__file__).parents[2] / "README.md").read_text().replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith(("wsl-d2 gain", "wsl-d2 data check"))]
    assert len(commands) == 3
    for command in commands:
        args = build_parser().parse_args(shlex.split(command, comments=True)[1:])
        assert str(args.output if "gain" in command.split()[:2] else args.annotations) in (
            "gain",
            "gain_wsl",
            "train.json",
        )


@pytest.mark.slow
def test_what_it_is_worth_on_my_dataset_as_pasted_goes_on_where_it_was(data, tmp_path):
    output = tmp_path / "out"
    (data / "photos").symlink_to("images")
    (data / "run").mkdir()
    shutil.copy(data / "rgb.pth", data / "run" / "backbone.pth")
    as_pasted = next(words for words in commands_of("README.md") if words[0] == "gain")
    call = [
        *as_pasted,
        *("--config-file", BASE, "--short-side", 96, "--iterations", 2, "--batch-size", 2, "--num-gpus", 0),
        *("--learning-rates", "0.001,0.002", "--jobs", 2, "--output", output, "--seeds"),
    ]
    run = functools.partial(wsl_d2, cwd=data)
    plan = run(*call, 1, "--plan")
    assert "boxes and masks, 4 classes, 2 steps of 2 images" in plan
    assert "What candidate adds to scratch on " in plan and "/val.json" in plan and not (output / "sweep").exists()
    text = run(*call, 1)
    assert "candidate: learning rate 0.00" in text and "one run each, nothing about other trainings" in text
    assert "What candidate adds to scratch" in (output / "report" / "report.html").read_text()
    gains = json.loads((output / "report" / "ap_gain.json").read_text())
    assert gains["iou_types"] == ["bbox", "segm"] and gains["gains"][0]["candidate"] == "candidate"
    config = yaml.safe_load((output / "detect" / "arm=candidate,seed=0" / "config.yaml").read_text())
    assert config["INPUT"]["FORMAT"] == "RGB" and config["MODEL"]["WEIGHTS"] == str(data / "run" / "backbone.pth")
    again = run(*call, 2)
    spread = run(*call, 2, "--seed-sd", 0.3)
    assert "over images and training seeds" in spread
    assert "arm=candidate,seed=1: wsl-d2 train" in again and "arm=candidate,seed=0: wsl-d2 train" not in again
    assert "lr=0.001: wsl-d2 train" not in again and "2 runs each" in again
