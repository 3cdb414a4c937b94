"""The plan of a run: opened once, and what trainer, loaders and records take from it."""

import json

from training_runs import train

from wsl_d2.run_keys import flatten

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
