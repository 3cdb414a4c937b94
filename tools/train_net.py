#!/usr/bin/env python3
"""Trains or evaluates: hashtag pretraining, clean-label pretraining, or detection, as the config says.

tools/train_net.py --config-file configs/... [--resume] [--eval-only] [--num-gpus N] [KEY VALUE ...]
torchrun --nproc-per-node N tools/train_net.py --config-file configs/... [KEY VALUE ...]
"""

from wsl_d2.engine import run_command_line

if __name__ == "__main__":
    run_command_line()
