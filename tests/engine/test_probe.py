"""The linear probes of a pretraining against the command that probes its backbone afterwards."""

import json

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from processes import in_processes
from toy_data import write_hashtag_folder
from training_runs import assert_same_state, merged_records, train, train_together

from wsl_d2.checkpoint import export_backbone
from wsl_d2.data.read.catalog import register_datasets
from wsl_d2.engine import probe as module
from wsl_d2.engine.evaluate import evaluate
from wsl_d2.engine.plan import open_plan
from wsl_d2.errors import ConfigError
from wsl_d2.transfer import probe_backbone

FOLDERS = "[['toy_train', 'toy/train'], ['toy_val', 'toy/val'], ['few', 'classes/train'], ['judge', 'classes/val']]"
PROBE = {"DATASETS__HASHTAG_FOLDERS": FOLDERS, "TEST__PROBE": "[['few', 'judge']]", "TEST__IMS_PER_BATCH": 8}


@pytest.fixture(scope="module")
def datasets(datasets, toy_vocabulary):
    """With labeled datasets of 60 and 50 images, batches of 8 of which end in a part of one; one image is damaged."""
    for part, number, damaged in (("train", 60, {7}), ("val", 50, ())):
        folder = datasets / "classes" / part
        write_hashtag_folder(folder, toy_vocabulary, number, damaged=damaged, second_label_every=0)
    return datasets


@pytest.fixture()
def cfg(cfg, datasets):
    added = [["few", str(datasets / "classes" / "train")], ["judge", str(datasets / "classes" / "val")]]
    cfg.DATASETS.HASHTAG_FOLDERS = cfg.DATASETS.HASHTAG_FOLDERS + added
    cfg.DATALOADER.MAX_DAMAGED_FRACTION = 0.1
    cfg.TEST.PROBE, cfg.TEST.PROBE_SHOTS, cfg.TEST.IMS_PER_BATCH = [["few", "judge"]], (2, 5), 8
    register_datasets(cfg)
    return cfg


def build(plan):
    torch.manual_seed(0)
    return build_model(plan.cfg).to(memory_format=torch.channels_last)


def test_it_is_the_probe_of_the_command(cfg, tmp_path):
    own = cfg.clone()
    plan = open_plan(cfg)
    model = build(plan)
    results = evaluate(plan, model)
    assert results["hashtag"]["num_images"] == 20 and model.training
    export_backbone(model, tmp_path / "backbone.pth")
    record, _ = probe_backbone(own, str(tmp_path / "backbone.pth"), "few", "judge", tmp_path / "out", shots=[2, 5])
    found = results["probe_few"]
    assert {name: found[name] for name in ("top1", "top5", "l2")} == {
        name: record[name] for name in ("top1", "top5", "l2")
    }
    assert [found["top1_2_shots"], found["top1_5_shots"]] == [row["top1_mean"] for row in record["few_shot"]]
    assert record["num_damaged"] == 1 and found["seconds"] > 0


def test_random_numbers_are_left_alone(cfg):
    plan = open_plan(cfg)
    model = build(plan)
    state = torch.get_rng_state()
    evaluate(plan, model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("number", [2, 3])
def test_several_processes_give_the_numbers_of_one(cfg, number):
    plan = open_plan(cfg)
    model = build(plan)

    def run():
        return module.run_probes(plan, model)

    (alone,) = in_processes(1, run)
    together = in_processes(number, run)
    for result in (alone, together[0]):
        assert result["probe_few"].pop("seconds") > 0
    assert together == [alone] + [{}] * (number - 1)


def test_a_probe_that_cannot_be_fitted_ends_no_run(cfg, caplog):
    plan = open_plan(cfg)
    model = build(plan)
    with torch.no_grad():
        model.backbone.res5[0].conv1.weight.fill_(np.nan)

    def run():
        with caplog.at_level("WARNING"):
            return module.run_probes(plan, model), caplog.text

    (found, text), (nothing, _) = in_processes(2, run)
    assert found == nothing == {}
    assert "no probe of few at this evaluation: the features of image 0 are not finite" in text


@pytest.mark.parametrize(
    ("rows", "shots", "message"),
    [
        ([["fwe", "judge"]], (), "TEST.PROBE: dataset 'fwe' of the probe is not registered; .* has unit_train"),
        ([["few"]], (), r"a row of TEST.PROBE is \[training set, test set\], got \['few'\]"),
        (["few"], (), "a row of TEST.PROBE is"),
        ([["few", "judge"], ["few", "unit_val"]], (), "has the training set few twice"),
        ([["few", "unit_val"]], (), "TEST.PROBE: .*image '000000' has 2 labels"),
        ([["few", "judge"]], (16,), "TEST.PROBE: class 0 has 15 training images, fewer than the 16"),
    ],
)
def test_bad_rows_are_refused_before_training(cfg, rows, shots, message):
    cfg.TEST.PROBE, cfg.TEST.PROBE_SHOTS = rows, shots
    with pytest.raises(ConfigError, match=message):
        open_plan(cfg)


def test_a_detector_has_no_probes(cfg):
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    with pytest.raises(ConfigError, match=r"TEST.PROBE is of pretraining; a GeneralizedRCNN needs it to be \[\]"):
        open_plan(cfg)


def test_a_run_records_its_probes_also_of_averaged_weights_and_trains_the_same(datasets, whole_run, tmp_path):
    common = PROBE | {"DATALOADER__MAX_DAMAGED_FRACTION": 0.1, "SOLVER__TOTAL_IMAGES": 240}
    train(datasets, tmp_path / "probed", TEST__EVAL_PERIOD=10, **common)
    assert_same_state(tmp_path / "probed", whole_run)
    lines = [json.loads(line) for line in (tmp_path / "probed" / "metrics.json").read_text().splitlines()]
    curve = {line["iteration"]: line["probe_few/top1"] for line in lines if "probe_few/top1" in line}
    assert sorted(curve) == [9, 19, 30]
    results = json.loads((tmp_path / "probed" / "record.json").read_text())["results"]
    assert results["probe_few/top1"] == curve[30]

    runs = train_together(
        datasets, tmp_path / "averaged", 2, SOLVER__EMA_DECAY=0.5, SOLVER__ZERO_STAGE_1=True, **common
    )
    last = merged_records(tmp_path / "averaged")
    assert 0 <= last["probe_few_ema/top1"] <= 100 and "probe_few/top1" in last and len(runs) == 2


def test_a_bad_name_is_one_line(datasets, tmp_path):
    run = train(datasets, tmp_path / "out", check=False, **PROBE | {"TEST__PROBE": "[['fewer', 'judge']]"})
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "TEST.PROBE: dataset 'fewer' of the probe is not registered" in run.stderr
    assert not (tmp_path / "out").exists()
