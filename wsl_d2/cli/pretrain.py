"""The verb pretrain."""

from __future__ import annotations

import argparse

from wsl_d2.cli.hashtags import add_columns
from wsl_d2.cli.verb import Verb, add_workers, local_path, place, positive


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", type=local_path, help="folder of images named by their keys, or of WebDataset tars")
    parser.add_argument(
        "posts", type=place, nargs="*", help="tables with key and hashtags of each photo; none with tars"
    )
    parser.add_argument("--output", type=local_path, required=True, help="folder of all results")
    parser.add_argument(
        "--architecture", default="resnext50_32x4d", help="resnext50_32x4d, resnext101_32x8d, ..., resnext26_8x4d"
    )
    parser.add_argument("--vocabulary", default="17k", help="17k, 8.5k, 1.5k, coco, or a vocabulary.json")
    parser.add_argument(
        "--min-images", type=positive, default=2, help="of 17k and 8.5k: photos that a label must be on to count"
    )
    parser.add_argument("--held-out", type=float, default=0.05, help="fraction of the photos to judge on")
    parser.add_argument("--image-size", type=positive, default=224, help="side of the crops in pixels")
    parser.add_argument(
        "--total-images", type=positive, help="images to process, repetitions counted; by the recipe if left out"
    )
    parser.add_argument("--batch-size", type=positive, help="images per step; fit for the data if left out")
    parser.add_argument("--lr-per-256-images", type=float, help="learning rate for 256 images a step")
    parser.add_argument("--num-gpus", type=int, help="processes; all GPUs of this machine if left out")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the order and the initial weights")
    add_columns(parser)
    add_workers(parser)
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="a config key to override"
    )


def pretrain(args: argparse.Namespace) -> None:
    """Pretrains a backbone on your photos: counts, vocabulary, shards, training, evaluation, export in one command.

    wsl-d2 pretrain photos/ posts.parquet --architecture resnext50_32x4d --output run/
    wsl-d2 pretrain tars/ --output run/

    Each stage is shown, and kept: the same command goes on where it was. The config that it trains by,
    run/pretrain.yaml, is yours to keep and to change.
    """
    from wsl_d2.data.posts.count import CountOptions
    from wsl_d2.study.pretraining import pretrain as run

    backbone = run(
        args.photos,
        args.posts,
        output=args.output,
        architecture=args.architecture,
        vocabulary=args.vocabulary,
        min_images=args.min_images,
        held_out=args.held_out,
        image_size=args.image_size,
        total_images=args.total_images,
        batch_size=args.batch_size,
        lr_per_256_images=args.lr_per_256_images,
        num_gpus=args.num_gpus,
        seed=args.seed,
        columns=CountOptions(args.format, args.key_column, args.hashtags_column, args.caption_column),
        workers=args.workers,
        overrides=[text for pair in args.set for text in pair],
        say=lambda text: print(text, flush=True),
    )
    print(f"backbone: {backbone}; use it as MODEL.WEIGHTS with build_{args.architecture}_fpn_backbone")


PRETRAIN = Verb(pretrain, _arguments, "every finished stage is kept, and the same command goes on", starts_runs=True)
