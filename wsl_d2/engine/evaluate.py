"""Evaluation of a run's model on its test sets, in training and alone."""

from __future__ import annotations

import os
from collections import OrderedDict

import torch
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm

from wsl_d2.data.read.loaders import build_hashtag_test_loader
from wsl_d2.engine.plan import RunPlan
from wsl_d2.errors import ConfigError
from wsl_d2.evaluation import FastCOCOEvaluator, HashtagEvaluator


def evaluate(plan: RunPlan, model: torch.nn.Module) -> OrderedDict:
    """Evaluates on every dataset of DATASETS.TEST; called by all processes together.

    Returns:
        On the main process task -> metric -> value; with several datasets one such dict for each, by its name.
    """
    cfg = plan.cfg
    results: OrderedDict = OrderedDict()
    for name in cfg.DATASETS.TEST:
        if plan.is_pretraining:
            loader, evaluator = build_hashtag_test_loader(cfg, plan.test_sets[name]), HashtagEvaluator()
        else:
            loader, evaluator = build_detection_test_loader(cfg, name), _detection_evaluator(cfg, name)
        results[name] = inference_on_dataset(model, loader, evaluator)
        if comm.is_main_process():
            print_csv_format(results[name])
    return next(iter(results.values())) if len(results) == 1 else results


def _detection_evaluator(cfg, name: str) -> FastCOCOEvaluator:
    evaluator_type = MetadataCatalog.get(name).evaluator_type
    if evaluator_type != "coco":
        raise ConfigError(f"dataset {name!r} has evaluator type {evaluator_type!r}; only 'coco' is known.")
    return FastCOCOEvaluator(name, os.path.join(cfg.OUTPUT_DIR, "inference"), cfg.TEST.FAST_EVAL)
