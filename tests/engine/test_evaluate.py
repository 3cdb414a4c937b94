"""Evaluation on every test set of a run."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from wsl_d2 import add_wsl_config
from wsl_d2.engine import evaluate as module
from wsl_d2.engine.evaluate import evaluate
from wsl_d2.engine.plan import RunPlan, open_plan
from wsl_d2.engine.record import describe_run


@pytest.mark.parametrize("names", [("unit_val",), ("unit_val", "unit_train")])
def test_a_classifier_is_evaluated_on_every_image_of_every_test_set(cfg, names):
    cfg.DATASETS.TEST = names
    plan = open_plan(cfg)
    model = build_model(plan.cfg)
    was_training = model.training
    found = evaluate(plan, model)
    results = {"unit_val": found} if len(names) == 1 else found
    assert {name: result["hashtag"]["num_images"] for name, result in results.items()} == {
        name: {"unit_val": 20, "unit_train": 48}[name] for name in names
    }
    assert all(result["hashtag"]["top5"] == 100 for result in results.values())  # of 4 labels
    assert model.training == was_training


def test_a_detector_is_evaluated_by_the_evaluator_of_its_dataset(monkeypatch):
    class Evaluator:
        def __init__(self, cfg, name):
            self.name, self.seen = name, 0

        def reset(self):
            self.seen = 0

        def process(self, inputs, outputs):
            self.seen += len(outputs)

        def evaluate(self):
            return {"bbox": {"AP": float(self.seen)}, "name": {self.name: 0.0}}

    monkeypatch.setattr(module, "build_detection_test_loader", lambda cfg, name, mapper: [[{}], [{}, {}]])
    monkeypatch.setattr(module, "build_detection_evaluator", Evaluator)
    cfg = get_cfg()
    add_wsl_config(cfg)
    cfg.DATASETS.TEST = ("one", "two")

    class Detector(torch.nn.Module):
        def forward(self, inputs):
            return inputs

    found = evaluate(RunPlan(cfg), Detector())
    assert found == {name: {"bbox": {"AP": 3.0}, "name": {name: 0.0}} for name in ("one", "two")}


def test_the_record_of_several_test_sets_names_each(cfg):
    cfg.DATASETS.TEST = ("unit_val", "unit_train")
    plan = open_plan(cfg)
    results = describe_run(plan, evaluate(plan, build_model(plan.cfg)))["results"]
    assert results["unit_val/hashtag/num_images"] == 20 and results["unit_train/hashtag/num_images"] == 48


def test_without_a_test_set_there_is_no_result(cfg):
    cfg.DATASETS.TEST = ()
    assert evaluate(open_plan(cfg), torch.nn.Identity()) == {}
