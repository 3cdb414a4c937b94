"""The verb probe."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from wsl_d2.cli.verb import Verb, local_path, positive


def numbers(kind: Callable) -> Callable[[str], list]:
    """An argument type: numbers separated by commas."""

    def parse(text: str) -> list:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers with commas between them") from error

    return parse


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, help="of a HashtagClassifier; gives architecture and input")
    parser.add_argument(
        "--weights", required=True, help="backbone: a file, or a wsl://, torchvision:// or timm:// name"
    )
    parser.add_argument("--train", required=True, help="registered dataset with one label an image")
    parser.add_argument("--test", required=True, help="registered dataset of the same classes")
    parser.add_argument("--output", type=local_path, required=True, help="folder for features and results")
    parser.add_argument("--l2", type=float, help="strength of the regularizer; chosen on held-out images if left out")
    parser.add_argument(
        "--l2-grid", type=numbers(float), help="strengths to choose from, 1e-4,1e-3,1e-2; 1e-8 to 10 if left out"
    )
    parser.add_argument("--held-out-fraction", type=float, default=0.1, help="of the training images, to choose l2")
    parser.add_argument("--shots", type=numbers(int), default=[], help="also with so many images of each class: 1,5,20")
    parser.add_argument("--num-seeds", type=positive, default=5, help="draws of each number of shots")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out split and the first draw of shots")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys to override: KEY VALUE ...")


def probe(args: argparse.Namespace) -> None:
    """Linear probe: L2-regularized logistic regression on the features of a frozen backbone.

    wsl-d2 probe --config-file configs/Hashtag-Pretraining/miniworld_wsl.yaml --weights output/wsl/backbone.pth \\
        --train miniworld_clean_train --test miniworld_clean_val --output output/probe_wsl [KEY VALUE ...]

    Features are extracted once and kept in --output; the strength of the regularizer is chosen on a held-out part of
    the training images. With --shots the probe is repeated with that many training images a class, once per seed.
    Writes probe.json, and classes.csv with the accuracy of each class.
    """
    import numpy as np
    from detectron2.utils.logger import setup_logger

    from wsl_d2.config import load_config
    from wsl_d2.transfer import L2_GRID, probe_backbone

    setup_logger(name="wsl_d2")
    cfg = load_config(args.config_file, args.opts)
    record, classes = probe_backbone(
        cfg,
        args.weights,
        args.train,
        args.test,
        args.output,
        l2=args.l2,
        grid=args.l2_grid or L2_GRID,
        held_out_fraction=args.held_out_fraction,
        shots=args.shots,
        num_seeds=args.num_seeds,
        seed=args.seed,
    )
    print(
        f"top-1 {record['top1']:.2f} +- {record['top1_half_width']:.2f}, top-5 {record['top5']:.2f} "
        f"({record['num_train']:,} training and {record['num_test']:,} test images, l2 {record['l2']:g})"
    )
    for row in record["few_shot"]:
        print(
            f"{row['shots']} images a class: top-1 {row['top1_mean']:.2f} +- {row['top1_half_width']:.2f} "
            f"over {len(row['top1'])} draws"
        )
    worst = sorted((c for c in classes if np.isfinite(c["top1"])), key=lambda c: c["top1"])[:5]
    print("worst classes: " + ", ".join(f"{c['name']} {c['top1']:.1f}" for c in worst))
    print(f"written: {args.output / 'probe.json'}, {args.output / 'classes.csv'}")


PROBE = Verb(probe, _arguments, "the features that are extracted are kept, and the same command goes on")
