#!/usr/bin/env python3
"""What an epoch of a config's training set holds after resampling, before any training: its length, and the hashtags.

tools/inspect_sampling.py --config-file CONFIG [--output sampling.svg] [KEY VALUE ...]
"""

import argparse
import sys

import numpy as np
from matplotlib.figure import Figure

from wsl_d2.data import ShardError, register_datasets
from wsl_d2.data.order.resampling import EpochDistribution
from wsl_d2.data.read.loaders import training_dataset, training_distribution
from wsl_d2.engine.main import load_config
from wsl_d2.errors import ConfigError
from wsl_d2.hashtags import Vocabulary, VocabularyError

_SHARES = (0.01, 0.1, 0.5)  # of the hashtags on an image, the most frequent first


def describe(counts: np.ndarray, num_images: int, epoch: EpochDistribution) -> list[str]:
    """Lines of text about (C,) counts of images with each hashtag, before and after resampling."""
    used = counts > 0
    factors = epoch.draws[used] / counts[used]
    lines = [
        f"{num_images:,} labelled images, {used.sum():,} of {len(counts):,} hashtags on an image",
        f"one epoch: {epoch.length:,} draws, {epoch.length / num_images:.3f} an image; an image of a hashtag comes "
        f"{factors.min():.2f} to {factors.max():.2f} times on average",
    ]
    before, after = np.sort(counts[used])[::-1], epoch.draws[used][np.argsort(-counts[used], kind="stable")]
    for share in _SHARES:
        top = max(1, round(share * len(before)))
        lines.append(
            f"the {top:,} most frequent hashtags have {before[:top].sum() / before.sum():.1%} of all labels, "
            f"{after[:top].sum() / after.sum():.1%} after resampling"
        )
    return lines


def draw(counts: np.ndarray, epoch: EpochDistribution, num_images: int) -> Figure:
    """Frequency against rank, before and after resampling, on logarithmic axes."""
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    ranks = np.arange(1, len(order) + 1)
    axes.loglog(ranks, epoch.draws[order] / epoch.length, "--", color="#b35806", label="draws of an epoch")
    axes.loglog(ranks, counts[order] / num_images, color="#1a1a1a", label="images")
    axes.set_xlabel("hashtag, by its number of images")
    axes.set_ylabel("fraction that carries it")
    axes.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--output", help="picture to write, .svg, .png or .pdf")
    parser.add_argument("--top", type=int, default=10, help="hashtags listed at both ends")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys to override: KEY VALUE ...")
    args = parser.parse_args()
    try:
        cfg = load_config(args.config_file, args.opts)
        register_datasets(cfg)
        dataset = training_dataset(cfg)
        epoch = training_distribution(cfg, dataset)
        counts = dataset.sharded_index.hashtag_counts()
        names = Vocabulary.load(dataset.folder / "vocabulary.json").synsets
    except (ConfigError, ShardError, VocabularyError, ValueError, KeyError) as error:
        sys.exit(f"error: {error}")
    resampling = cfg.DATALOADER.RESAMPLING
    print(f"{cfg.DATASETS.TRAIN[0]}: {resampling.MODE} resampling, threshold {resampling.THRESHOLD:g}")
    print("\n".join(describe(counts, len(dataset), epoch)))
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    print("synset       images    of images   of draws")
    for place, label in enumerate(order.tolist()):
        if place < args.top or place >= len(order) - args.top:
            share = f"{counts[label] / len(dataset):10.4%} {epoch.draws[label] / epoch.length:10.4%}"
            print(f"{names[label]:10} {counts[label]:8,} {share}")
        elif place == args.top:
            print("...")
    if args.output:
        draw(counts, epoch, len(dataset)).savefig(args.output)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
