"""Backbones, losses and the pretraining model. Importing this package registers them with detectron2."""

from .complexity import Complexity, count_complexity
from .hashtag_classifier import HashtagClassifier
from .losses import hashtag_binary_cross_entropy, hashtag_cross_entropy
from .resnext import (
    RESNEXT_ARCHITECTURES,
    ResNeXtArchitecture,
    build_resnext_backbone,
    build_resnext_fpn_backbone,
    make_resnext,
    make_resnext_stages,
)

__all__ = [
    "RESNEXT_ARCHITECTURES",
    "Complexity",
    "HashtagClassifier",
    "ResNeXtArchitecture",
    "build_resnext_backbone",
    "build_resnext_fpn_backbone",
    "count_complexity",
    "hashtag_binary_cross_entropy",
    "hashtag_cross_entropy",
    "make_resnext",
    "make_resnext_stages",
]
