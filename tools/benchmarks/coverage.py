"""How often the 95% interval of "trained again, on other images" covers a known gain, and how wide it is.

Runs are simulated image by image and bootstrapped as real ones are: a run's value on an image is its seed's effect, its
side's on that image, and (--interaction) its own on that image. Widths are relative to the interval of one who knows
all variances. The two numbers behind them are those of the usual intervals: of images alone, and of runs and images
drawn together with replacement.
"""

import argparse
import itertools
import math
import os
import platform
import time
from dataclasses import dataclass

import numpy as np

from wsl_d2.analysis import BootstrapEstimate, gain_of
from wsl_d2.analysis.ap_gain import draw_counts

SEEDS = (2, 3, 5, 10)
RATIOS = (0.0, 0.5, 1.0, 5.0)
TRUE_GAIN = 2.0


@dataclass
class World:
    """Pairs of sides with known variances.

    Args:
        seeds: runs a side.
        ratio: standard deviation between seeds over that of the gain between sets of images, which is 1.
        unequal: the sides' variances between seeds are 1 to 9 with the same mean, instead of equal.
        interaction: standard deviation, between sets of images, of what is a run's own.
        correlation: of the seeds' effects of the two sides.
    """

    seeds: int
    ratio: float
    unequal: bool = False
    interaction: float = 0.0
    correlation: float = 0.0

    @property
    def seed_sds(self) -> tuple[float, float]:
        low, high = (0.2, 1.8) if self.unequal else (1.0, 1.0)
        return self.ratio * math.sqrt(low), self.ratio * math.sqrt(high)

    @property
    def sd_of_gain(self) -> float:
        (a, b), own = self.seed_sds, 2 * self.interaction**2
        return math.sqrt(1 + (a**2 + b**2 - 2 * self.correlation * a * b + own) / self.seeds)

    def draw(self, rng: np.random.Generator, counts: np.ndarray) -> list[list[BootstrapEstimate]]:
        """Two sides of runs, evaluated on the same images; counts (B, I)."""
        num_images = counts.shape[1]
        scale = math.sqrt(num_images)
        own, shared = rng.normal(size=(2, self.seeds)), rng.normal(size=self.seeds)
        effects = math.sqrt(self.correlation) * shared + math.sqrt(1 - self.correlation) * own
        sides = []
        for mean, effect, sd in zip((0.0, TRUE_GAIN), effects, self.seed_sds, strict=True):
            values = mean + sd * effect[:, None] + rng.normal(0, scale / math.sqrt(2), num_images)
            values = values + rng.normal(0, scale * self.interaction, (self.seeds, num_images))
            replicates = values @ counts.T / num_images
            sides.append([BootstrapEstimate(v.mean(), r) for v, r in zip(values, replicates, strict=True)])
        return sides


def measure(world: World, trials: int, counts: np.ndarray, seed: int, paired: bool = False) -> dict[str, float]:
    """Returns the fractions of intervals that cover the gain, and the mean and median relative width of the first."""
    rng = np.random.default_rng(seed)
    covered = {"method": 0, "images": 0, "drawn": 0}
    widths = []
    for _ in range(trials):
        sides = world.draw(rng, counts)
        gain = gain_of(*sides, paired=paired)
        intervals = {"method": gain["method_interval"], "images": gain["interval"], "drawn": _draw_runs(rng, sides)}
        for name, (low, high) in intervals.items():
            covered[name] += low <= TRUE_GAIN <= high
        widths.append((gain["method_interval"][1] - gain["method_interval"][0]) / (2 * 1.96 * world.sd_of_gain))
    found = {name: number / trials for name, number in covered.items()}
    return found | {"width": float(np.mean(widths)), "median_width": float(np.median(widths))}


def _draw_runs(rng: np.random.Generator, sides) -> np.ndarray:
    """The interval of runs drawn with replacement, each with its own bootstrap estimate (percentiles)."""
    means = []
    for side in sides:
        replicates = np.stack([run.replicates for run in side])
        chosen = rng.integers(0, len(side), (replicates.shape[1], len(side)))
        means.append(replicates[chosen, np.arange(replicates.shape[1])[:, None]].mean(axis=1))
    return np.percentile(means[1] - means[0], [2.5, 97.5])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmark.py coverage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=400)
    parser.add_argument("--interaction", type=float, default=0.0)
    parser.add_argument("--correlation", type=float, default=0.0, help="of paired seeds")
    parser.add_argument("--paired", action="store_true")
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    counts = draw_counts(args.images, args.resamples, 0).astype(float)
    print(f"{args.trials} trials of {args.images} images, {args.resamples} resamples; interaction {args.interaction:g}")
    print("seeds  seed sd / image sd  sides   covers  mean width  median | images alone  runs drawn")
    for cell, (unequal, seeds, ratio) in enumerate(itertools.product((False, True), SEEDS, RATIOS)):
        if args.paired and seeds < 3:
            continue  # gain_of refuses them: they would cover 87%
        world = World(seeds, ratio, unequal, args.interaction, args.correlation)
        row = measure(world, args.trials, counts, seed=cell, paired=args.paired)
        print(
            f"{seeds:5}  {ratio:18g}  {'1 to 9' if unequal else 'equal':6}  {100 * row['method']:5.1f}%  "
            f"{row['width']:10.2f}  {row['median_width']:6.2f} | {100 * row['images']:11.1f}%  "
            f"{100 * row['drawn']:9.1f}%",
            flush=True,
        )
    print(f"{time.perf_counter() - start:.0f} s on {platform.machine()}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
