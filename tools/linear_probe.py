#!/usr/bin/env python3
"""Linear probe: L2-regularised logistic regression on the features of a frozen backbone.

tools/linear_probe.py --config-file configs/Hashtag-Pretraining/miniworld_wsl.yaml --weights output/wsl/backbone.pth \\
    --train miniworld_clean_train --test miniworld_clean_val --output output/probe_wsl [KEY VALUE ...]

Features are extracted once and kept in --output; the strength of the regulariser is chosen on a held-out part of the
training images. With --shots the probe is repeated with that many training images a class, once per seed.
Writes probe.json, and classes.csv with the accuracy of each class.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from detectron2.utils.logger import setup_logger

from wsl_d2.engine.main import USER_ERRORS, load_config
from wsl_d2.transfer import L2_GRID, ProbeError, probe_backbone


def numbers(kind):
    """An argument type: numbers separated by commas."""
    return lambda text: [kind(part) for part in text.split(",")]


def main(arguments: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--config-file", required=True, help="of a HashtagClassifier; gives architecture and input")
    parser.add_argument(
        "--weights", required=True, help="backbone: a file, or a wsl://, torchvision:// or timm:// name"
    )
    parser.add_argument("--train", required=True, help="registered dataset with one label an image")
    parser.add_argument("--test", required=True, help="registered dataset of the same classes")
    parser.add_argument("--output", type=Path, required=True, help="folder for features and results")
    parser.add_argument("--l2", type=float, help="strength of the regulariser; chosen on held-out images if left out")
    parser.add_argument(
        "--l2-grid", type=numbers(float), default=L2_GRID, help="strengths to choose from: 1e-4,1e-3,1e-2"
    )
    parser.add_argument("--held-out-fraction", type=float, default=0.1, help="of the training images, to choose l2")
    parser.add_argument("--shots", type=numbers(int), default=[], help="also with so many images of each class: 1,5,20")
    parser.add_argument("--num-seeds", type=int, default=5, help="draws of each number of shots")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out split and the first draw of shots")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    args = parser.parse_args(arguments)
    setup_logger(name="wsl_d2")
    try:
        cfg = load_config(args.config_file, args.opts)
        record, classes = probe_backbone(
            cfg,
            args.weights,
            args.train,
            args.test,
            args.output,
            l2=args.l2,
            grid=args.l2_grid,
            held_out_fraction=args.held_out_fraction,
            shots=args.shots,
            num_seeds=args.num_seeds,
            seed=args.seed,
        )
    except (*USER_ERRORS, ProbeError, KeyError) as error:
        sys.exit(f"error: {error}")
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


if __name__ == "__main__":
    main()
