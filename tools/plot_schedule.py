#!/usr/bin/env python3
"""Draws the learning rate of a config over the images of the run, and prints where it changes.

tools/plot_schedule.py --config-file configs/Hashtag-Pretraining/X_101_32x8d_17k.yaml --output schedule.png \\
    --variant "940M SOLVER.TOTAL_IMAGES 1970000000 SOLVER.NUM_LR_HALVINGS 10" \\
    --variant "3.5B SOLVER.TOTAL_IMAGES 7000000000 SOLVER.NUM_LR_HALVINGS 20" \\
    SOLVER.TOTAL_EPOCHS 0.0 SOLVER.IMS_PER_BATCH 8064

Without --variant the config is drawn as it is. A length in epochs needs --images-per-epoch.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from detectron2.solver import build_lr_scheduler
from matplotlib import pyplot as plt
from torch import nn, optim

from wsl_d2.engine.main import ConfigError, load_config
from wsl_d2.engine.schedule import resolve_schedule

STYLES = ("-", "--", ":", "-.")


def schedule(config_file: str, opts: list[str], images_per_epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns (n,) images seen and (n,) rates at every iteration, and the batch size."""
    cfg = load_config(config_file, opts)
    if cfg.SOLVER.TOTAL_EPOCHS > 0 and not images_per_epoch:
        raise ConfigError("the config counts in epochs (SOLVER.TOTAL_EPOCHS): give --images-per-epoch.")
    resolve_schedule(cfg, images_per_epoch or 1)
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=cfg.SOLVER.BASE_LR)
    multiplier = build_lr_scheduler(cfg, optimizer)._multiplier
    iterations = np.arange(cfg.SOLVER.MAX_ITER)
    rates = cfg.SOLVER.BASE_LR * np.array([multiplier(i / cfg.SOLVER.MAX_ITER) for i in iterations])
    return iterations * cfg.SOLVER.IMS_PER_BATCH, rates, cfg.SOLVER.IMS_PER_BATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--output", type=Path, required=True, help="picture, .png, .svg or .pdf")
    parser.add_argument("--variant", action="append", default=[], help='"LABEL KEY VALUE ..."')
    parser.add_argument("--images-per-epoch", type=int, default=0)
    parser.add_argument("opts", nargs="*", help="KEY VALUE ... for all variants")
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    try:
        for number, variant in enumerate(args.variant or [Path(args.config_file).stem]):
            label, *opts = variant.split()
            images, rates, batch_size = schedule(args.config_file, [*args.opts, *opts], args.images_per_epoch)
            axes.plot(images, rates, STYLES[number % len(STYLES)], color="0.1" if number == 0 else "0.45", label=label)
            changes = np.flatnonzero(np.abs(np.diff(rates)) > 0.2 * rates[:-1]) + 1
            rise = f"rate {rates[0]:g}, up to {rates.max():g}"
            print(f"{label}: {len(rates):,} iterations of {batch_size:,} images; {rise}")
            for iteration in changes:
                print(f"  from iteration {iteration:,} ({images[iteration]:,} images): {rates[iteration]:g}")
    except ConfigError as error:
        sys.exit(f"error: {error}")
    axes.set(xlabel="images seen", ylabel="learning rate", yscale="log")
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    figure.savefig(args.output, dpi=150)


if __name__ == "__main__":
    main()
