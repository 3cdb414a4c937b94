"""Backbones, losses and the pretraining model. Importing this package registers them with detectron2."""

from . import builders  # noqa: F401  (registers them)
from .complexity import Complexity, count_complexity
from .hashtag_classifier import HashtagClassifier, is_hashtag_classifier
from .losses import hashtag_binary_cross_entropy, hashtag_cross_entropy
from .resnext import (
    RESNEXT_ARCHITECTURES,
    ArchitectureError,
    ResNeXtArchitecture,
    checkpoint_stages,
    make_resnext,
    make_resnext_stages,
)

__all__ = [
    "RESNEXT_ARCHITECTURES",
    "ArchitectureError",
    "Complexity",
    "HashtagClassifier",
    "ResNeXtArchitecture",
    "checkpoint_stages",
    "count_complexity",
    "hashtag_binary_cross_entropy",
    "hashtag_cross_entropy",
    "is_hashtag_classifier",
    "make_resnext",
    "make_resnext_stages",
]
