"""The order of billions of images: start, memory and speed of the sampler, and what it draws, on a simulated index.

The index is that of SHARDS shards of IMAGES images, each with one hashtag out of HASHTAGS by Zipf's law, in 64
different shards that come again and again; there are no pixels. Peers: torch's RandomSampler and detectron2's
TrainingSampler, which hold a permutation of all images, on the largest dataset that is given for them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("WSL_D2_REGISTER", "0")

import numpy as np
from scipy.stats import chi2

from wsl_d2.data.order.resampling import fixed_point, largest_factors, repeat_factors
from wsl_d2.data.order.sampler import HashtagSampler

_TEMPLATES = 64
_MB = 1e6


class SimulatedIndex:
    """Stands in for :class:`wsl_d2.data.ShardedIndex`."""

    def __init__(self, num_shards: int, images_per_shard: int, num_hashtags: int):
        self.first_image = np.arange(num_shards + 1, dtype=np.int64) * images_per_shard
        self.num_labels = num_hashtags
        shares = 1 / np.arange(1, num_hashtags + 1)
        ends = np.cumsum(shares / shares.sum())
        uniform = np.random.default_rng(0).random((_TEMPLATES, images_per_shard))
        self.templates = np.minimum(np.searchsorted(ends, uniform), num_hashtags - 1).astype(np.int32)
        self.indptr = np.arange(images_per_shard + 1)
        self.times = np.bincount(np.arange(num_shards) % _TEMPLATES, minlength=_TEMPLATES)

    @property
    def num_images(self) -> int:
        return int(self.first_image[-1])

    def labels_of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        return self.indptr, self.templates[shard % _TEMPLATES]

    def hashtag_counts(self) -> np.ndarray:
        counts = [np.bincount(template, minlength=self.num_labels) for template in self.templates]
        return (np.array(counts) * self.times[:, None]).sum(0)

    def totals(self, threshold: float, mode: str) -> np.ndarray:
        """What :func:`wsl_d2.data.order.resampling.shard_totals` would read from every shard."""
        factors = fixed_point(repeat_factors(self.hashtag_counts() / self.num_images, threshold, mode))
        sums = np.array([largest_factors(self.indptr, template, factors).sum() for template in self.templates])
        return sums[np.arange(len(self.first_image) - 1) % _TEMPLATES]


def make_sampler(args, index: SimulatedIndex, **kwargs) -> HashtagSampler:
    totals = None if args.mode == "natural" else index.totals(args.threshold, args.mode)
    options = {"seed": 0, "batch_size": args.batch_size, "world_size": 1, "window_shards": args.window_shards}
    return HashtagSampler(index, mode=args.mode, threshold=args.threshold, totals=totals, **(options | kwargs))


def memory() -> float:
    """MB that this process alone holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / _MB


def measure(args) -> None:
    """Start, memory and speed of one process; printed as numbers for the parent."""
    index = SimulatedIndex(args.shards, args.images, args.hashtags)
    before = memory()
    start = time.perf_counter()
    batches = make_sampler(args, index, rank=args.world_size - 1, world_size=args.world_size).batches()
    next(batches)
    started = time.perf_counter() - start
    drawn, peak, start = 0, memory(), time.perf_counter()
    while time.perf_counter() - start < args.seconds:
        for _ in range(100):
            drawn += len(next(batches))
        peak = max(peak, memory())
    speed = drawn / (time.perf_counter() - start)
    print(started, peak - before, speed, memory())


def check_distribution(args, index: SimulatedIndex) -> None:
    """Draws from windows all over the epoch, against the closed form c_h r(h) / sum of c r."""
    sampler = make_sampler(args, index)
    counts = index.hashtag_counts()
    weights = counts * repeat_factors(counts / index.num_images, args.threshold, args.mode)
    expected = weights / weights.sum()
    block = 1_000
    starts = np.random.default_rng(1).integers(0, sampler.epoch_length - block, args.draws // block)
    observed = np.zeros(args.hashtags)
    for start in starts.tolist():
        images = sampler.images_at(np.arange(start, start + block))
        shard, row = np.divmod(images, args.images)
        observed += np.bincount(index.templates[shard % _TEMPLATES, row], minlength=args.hashtags)
    total = observed.sum()
    order = np.argsort(-expected)
    often = order[expected[order] * total >= 20]
    statistic = ((observed - total * expected)[often] ** 2 / (total * expected)[often]).sum()
    exact = epoch_distribution_of(index, args)
    print(
        f"distribution, {args.mode}: {total:,.0f} draws from {len(starts):,} places: chi-square {statistic:,.0f} for "
        f"{len(often):,} hashtags (p {chi2.sf(statistic, len(often) - 1):.3f}); the most frequent hashtag has "
        f"{counts.max() / index.num_images:.2%} of images, {expected.max():.2%} of draws (observed "
        f"{observed.max() / total:.2%}); expected epoch {exact:,} draws, the sampler's {sampler.epoch_length:,}"
    )


def epoch_distribution_of(index: SimulatedIndex, args) -> int:
    """The epoch's length from the 64 shards that there are, by the reader of real indexes."""
    small = SimulatedIndex(_TEMPLATES, args.images, args.hashtags)
    small.hashtag_counts = index.hashtag_counts  # type: ignore[method-assign]
    factors = fixed_point(repeat_factors(index.hashtag_counts() / index.num_images, args.threshold, args.mode))
    sums = [int(largest_factors(*small.labels_of(shard), factors).sum()) for shard in range(_TEMPLATES)]
    total = sum(int(times) * value for times, value in zip(index.times, sums, strict=True))
    return round(total / float(1 << 20))


def check_permutation(args, index: SimulatedIndex) -> None:
    """Every image of every whole shard that was reached must have come exactly once."""
    sampler = make_sampler(argparse.Namespace(**(vars(args) | {"mode": "natural"})), index)
    window = args.window_shards * args.images
    num_draws = args.permutation_draws // window * window
    per_shard = np.zeros(args.shards, np.int64)
    tracked = np.zeros((args.shards // 100 + 1, args.images), np.uint8)
    start = time.perf_counter()
    block = 1 << 20
    for first in range(0, num_draws, block):
        images = sampler.images_at(np.arange(first, min(num_draws, first + block)))
        shard, row = np.divmod(images, args.images)
        per_shard += np.bincount(shard, minlength=args.shards)
        chosen = shard % 100 == 0
        np.add.at(tracked, (shard[chosen] // 100, row[chosen]), 1)
    whole = per_shard == args.images
    seen = tracked[: len(whole[::100])][whole[::100]]
    assert (per_shard[~whole] == 0).all() and (seen == 1).all(), "an image came twice or not at all"
    print(
        f"permutation: {num_draws:,} draws in {time.perf_counter() - start:.0f} s reached {whole.sum():,} shards, each "
        f"exactly {args.images:,} times and no other; all images of {len(seen):,} of them came exactly once"
    )


def peers(args) -> None:
    import detectron2.data.samplers as d2
    import torch

    size = args.peer_images
    for name, make in (
        ("torch RandomSampler", lambda: torch.utils.data.RandomSampler(range(size))),
        ("detectron2 TrainingSampler", lambda: d2.TrainingSampler(size, seed=0)),
    ):
        before, start = memory(), time.perf_counter()
        stream = iter(make())
        next(stream)
        started, count, start = time.perf_counter() - start, 0, time.perf_counter()
        while time.perf_counter() - start < args.seconds and count < size - 100_000:
            for _ in range(10_000):
                next(stream)
            count += 10_000
        speed = count / (time.perf_counter() - start)
        print(
            f"{name}, {size:,} images: first index after {started:.2f} s, {memory() - before:,.0f} MB, "
            f"{speed / 1e6:.2f} M indices/s"
        )
        del stream


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=350_000)
    parser.add_argument("--images", type=int, default=10_000, help="of each shard")
    parser.add_argument("--hashtags", type=int, default=17_000)
    parser.add_argument("--mode", default="sqrt")
    parser.add_argument("--threshold", type=float, default=1e-3)
    parser.add_argument("--window-shards", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8064)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--draws", type=int, default=10_000_000, help="for the distribution")
    parser.add_argument("--permutation-draws", type=int, default=0, help="for example 1000000000")
    parser.add_argument("--peer-images", type=int, default=10_000_000)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure:
        return measure(args)
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmark.py"), "sampler", "--measure"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items() if name != "measure"]
    runs = []
    for _ in range(args.repeats):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append([float(value) for value in done.stdout.split()])
    started, extra, speed, whole = (statistics.median(column) for column in zip(*runs, strict=True))
    print(
        f"wsl_d2, {args.shards * args.images:,} images in {args.shards:,} shards, {args.mode}, window of "
        f"{args.window_shards} shards: first batch after {started:.2f} s, {extra:,.0f} MB ({whole:,.0f} MB with the "
        f"interpreter and its libraries), {speed / 1e6:.2f} M indices/s (medians of {args.repeats} processes)"
    )
    peers(args)
    index = SimulatedIndex(args.shards, args.images, args.hashtags)
    check_distribution(args, index)
    if args.permutation_draws:
        check_permutation(args, index)


if __name__ == "__main__":
    main()
