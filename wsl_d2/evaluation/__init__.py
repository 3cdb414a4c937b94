"""Evaluators beyond Detectron2's own."""

from wsl_d2.evaluation.coco import FastCOCOEvaluator
from wsl_d2.evaluation.hashtag import HashtagEvaluator

__all__ = ["FastCOCOEvaluator", "HashtagEvaluator"]
