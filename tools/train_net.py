#!/usr/bin/env python3
"""Trains or evaluates: hashtag pretraining, clean-label pretraining, or detection, as the config says.

tools/train_net.py --config-file configs/... [--resume] [--eval-only] [--num-gpus N] [KEY VALUE ...]
torchrun --nproc-per-node N tools/train_net.py --config-file configs/... [KEY VALUE ...]
"""

import sys

from detectron2.engine import default_argument_parser

from wsl_d2.checkpoint import IncompleteLoadError, PixelStatisticsError
from wsl_d2.data import ShardError
from wsl_d2.engine import run
from wsl_d2.engine.schedule import ConfigError
from wsl_d2.engine.trainer import DamagedImagesError
from wsl_d2.hashtags import VocabularyError

USER_ERRORS = (
    ConfigError,
    DamagedImagesError,
    FileNotFoundError,
    IncompleteLoadError,
    PixelStatisticsError,
    ShardError,
    VocabularyError,
)

if __name__ == "__main__":
    try:
        run(default_argument_parser().parse_args())
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
