"""The verb train."""

from __future__ import annotations

import argparse

from wsl_d2.cli.verb import Verb
from wsl_d2.engine.arguments import add_arguments
from wsl_d2.engine.signals import stop_at_once


def train(args: argparse.Namespace) -> None:
    """Pretrains on hashtags, fine-tunes, or trains a detector, as the config says; also evaluates.

    wsl-d2 train --config-file configs/Hashtag-Pretraining/X_101_32x8d_17k.yaml --num-gpus 8
    torchrun --nproc-per-node 8 tools/train_net.py --config-file ...
    """
    stop_at_once()
    from wsl_d2.engine.cluster import submit_run
    from wsl_d2.engine.main import run
    from wsl_d2.errors import UserError

    try:
        if args.cluster:
            job = submit_run(args, args.command_line[args.command_line.index("train") + 1 :])
            print(f"job {job.job_id}; its logs are in {job.paths.folder}")
        else:
            run(args)
    except FloatingPointError as error:
        raise UserError(f"the loss is not finite: {error}") from error


TRAIN = Verb(train, add_arguments, "the checkpoints in OUTPUT_DIR are kept, and --resume goes on from the newest")
