"""Evaluation of a run's model on its test sets, in training and alone."""

from __future__ import annotations

from collections import OrderedDict

import torch
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm

from wsl_d2.data.read.detection import DetectionMapper
from wsl_d2.data.read.loaders import build_hashtag_test_loader
from wsl_d2.engine.plan import RunPlan
from wsl_d2.engine.probe import run_probes
from wsl_d2.evaluation import HashtagEvaluator
from wsl_d2.evaluation.detection import build_detection_evaluator


def evaluate(plan: RunPlan, model: torch.nn.Module) -> OrderedDict:
    """Evaluates on every dataset of DATASETS.TEST, and by the probes of TEST.PROBE; called by all processes together.

    Returns:
        On the main process task -> metric -> value; with several datasets one such dict for each, by its name. Probes
        are tasks of their own.
    """
    cfg = plan.cfg
    results: OrderedDict = OrderedDict()
    for name in cfg.DATASETS.TEST:
        if plan.is_pretraining:
            loader, evaluator = build_hashtag_test_loader(cfg, plan.test_sets[name]), HashtagEvaluator()
        else:
            loader = build_detection_test_loader(cfg, name, mapper=DetectionMapper(cfg, False))
            evaluator = build_detection_evaluator(cfg, name)
        results[name] = inference_on_dataset(model, loader, evaluator)
        if comm.is_main_process():
            print_csv_format(results[name])
    results = next(iter(results.values())) if len(results) == 1 else results
    return results | run_probes(plan, model)
