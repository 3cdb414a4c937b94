"""The plan of a run: opened once, and what trainer, loaders and records take from it."""

import json
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from training_runs import train

from wsl_d2 import add_wsl_config
from wsl_d2.engine.plan import open_plan
from wsl_d2.errors import ConfigError
from wsl_d2.run_keys import flatten


def test_a_plan_resolves_what_follows_from_the_data(cfg):
    cfg.SOLVER.IMS_PER_MICRO_BATCH = 4
    plan = open_plan(cfg)
    assert plan.is_pretraining and plan.cfg.is_frozen()
    assert plan.cfg.MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES == 4
    assert (plan.cfg.SOLVER.MAX_ITER, plan.cfg.SOLVER.BASE_LR) == (10, 0.4 * 8 / 256)
    assert len(plan.dataset) == plan.sampler.num_images == 48
    assert {name: len(test_set) for name, test_set in plan.test_sets.items()} == {"unit_val": 20}
    assert plan.dataset.mapper.is_train and not plan.test_sets["unit_val"].mapper.is_train
    assert plan.fingerprint["ghost batch size"] == "4" and plan.fingerprint["number of images"] == "48"
    assert plan.fingerprint["vocabulary"] == plan.dataset.vocabulary_checksum
    assert plan.describe_length().startswith("80 images in 10 iterations of 8: ")


def test_another_number_of_classes_than_the_vocabularys_is_refused(cfg):
    cfg.MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES = 5
    with pytest.raises(ConfigError, match="NUM_CLASSES is 5, but the vocabulary of unit_train .* has 4 labels; set it"):
        open_plan(cfg)


@pytest.mark.parametrize(
    ("saved", "resume", "size"),
    [
        ("SOLVER: {IMS_PER_MICRO_BATCH: 2}", True, 2),
        ("SOLVER: {IMS_PER_MICRO_BATCH: 2}", False, 8),
        ("SOLVER: {IMS_PER_MICRO", True, 8),
        ("SOLVER: {}", True, 8),
        (None, True, 8),
    ],
)
def test_a_resumed_run_keeps_its_ghost_batch_size(cfg, saved, resume, size):
    if saved is not None:
        (Path(cfg.OUTPUT_DIR) / "config.yaml").write_text(saved)
    assert open_plan(cfg, resume=resume).cfg.SOLVER.IMS_PER_MICRO_BATCH == size


def test_the_plan_of_a_detector_is_its_config():
    cfg = get_cfg()
    add_wsl_config(cfg)
    plan = open_plan(cfg)
    assert not plan.is_pretraining and plan.cfg.is_frozen() and plan.test_sets == {}
    assert plan.fingerprint["SEED"] == "-1" and "ghost batch size" not in plan.fingerprint


COUNTING = """
from wsl_d2.cli.main import main
import json, os, sys
import wsl_d2
from wsl_d2.data.order.sampler import HashtagSampler
from wsl_d2.data.read import dataset
from wsl_d2.data.read.dataset import HashtagDataset

calls = {"datasets": [], "samplers": 0, "manifests": 0}

def counting(kind, method, note):
    before = getattr(kind, method)
    def wrapped(self, *args, **kwargs):
        note(*args)
        return before(self, *args, **kwargs)
    setattr(kind, method, wrapped)

counting(HashtagDataset, "__init__", lambda folder, *_: calls["datasets"].append(os.path.basename(str(folder))))
counting(HashtagSampler, "__init__", lambda *_: calls.update(samplers=calls["samplers"] + 1))
reader = dataset.read_manifest
dataset.read_manifest = lambda folder: (calls.update(manifests=calls["manifests"] + 1), reader(folder))[1]
status = main(["train", *sys.argv[1:]])
print("CALLS", json.dumps(calls))
sys.exit(status)
"""


def test_a_run_opens_each_dataset_once_and_builds_one_order(datasets, tmp_path):
    run = train(datasets, tmp_path, script=COUNTING, SOLVER__TOTAL_IMAGES=80)
    calls = json.loads(run.stdout.split("CALLS")[1])
    assert calls == {"datasets": ["train", "val"], "samplers": 1, "manifests": 2}


def test_the_record_holds_the_whole_config_and_the_facts_of_the_data(whole_run):
    record = json.loads((whole_run / "record.json").read_text())
    assert record["config"]["SOLVER.MAX_ITER"] == "30" and record["config"]["DATASETS.TRAIN"] == "['toy_train']"
    assert {"vocabulary", "hashtags column", "SHA-256 of the labels", "ghost batch size"} <= record["data"].keys()
    assert len(record["config"]) > 200
    assert flatten({"A": {"B": (1, 2)}}) == {"A.B": "[1, 2]"}
