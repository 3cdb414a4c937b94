"""The order of images: pure functions from (seed, position) to an image, and the samplers over them.

Position p counts images drawn by the whole run, over all processes. An epoch is the resampled dataset of L draws;
epoch e = p // L. Every image holds a stretch of a line, as long as its repeat factor, shard after shard; slot k of the
epoch is the point k T / L + u_e of that line of length T, with a random offset u_e of the epoch. So image I comes
floor(r(I)) or ceil(r(I)) times with mean r(I); with all factors 1 every image comes exactly once. A keyed permutation
says which slot comes at p % L: over all slots, or over those of a window of shards at a time, the shards being in
an order of the epoch, so that disks and object stores read mostly in sequence.

All of it is integer arithmetic on one number per shard. Nothing depends on the number of processes or workers, and a
run resumes from a single number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from wsl_d2.data.format.labels import HashtagIndex, ShardedIndex
from wsl_d2.data.order.resampling import ONE, fixed_point, largest_factors, repeat_factors, shard_totals

_FEISTEL_ROUNDS = 6
_DRAWS_AHEAD = 1 << 16
_MAX_CACHED_IMAGES = 4_000_000


def mix64(values: np.ndarray, key: int) -> np.ndarray:
    """A 64-bit integer hash (the finalizer of splitmix64), vectorized over uint64."""
    with np.errstate(over="ignore"):
        x = values + np.uint64(key & 0xFFFFFFFFFFFFFFFF)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def keyed_permutation(positions: np.ndarray, size: int, seed: int, epoch: int, window: int = 0) -> np.ndarray:
    """Permutes [0, size) without storing it: a Feistel network with cycle walking.

    Args:
        positions: (n,) integers in [0, size).
        size: at least 1, below 2**62.
        seed, epoch, window: the key; another key gives another order.

    Returns:
        (n,) int64 in [0, size); a bijection of [0, size).
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, window]))
    round_keys = [int(key) for key in keys.integers(0, 2**63, _FEISTEL_ROUNDS)]

    def encrypt(x: np.ndarray) -> np.ndarray:
        left, right = x >> half_bits, x & mask
        for key in round_keys:
            left, right = right, left ^ (mix64(right, key) & mask)
        return (left << half_bits) | right

    result = encrypt(np.asarray(positions).astype(np.uint64))
    outside = np.flatnonzero(result >= np.uint64(size))
    while len(outside):  # the network permutes the next power of four, less than 4 * size: walk until inside
        walked = encrypt(result[outside])
        result[outside] = walked
        outside = outside[walked >= np.uint64(size)]
    return result.astype(np.int64)


@dataclass
class _Epoch:
    """One epoch's order: (S,) arrays, shards in the order of the epoch where not said otherwise."""

    offset: int  # u_e
    shards: np.ndarray  # numbers
    first_slot: np.ndarray  # by shard number
    ends: np.ndarray  # draws up to and with each shard
    window_ends: np.ndarray  # draws up to and with each window


class DrawOrder:
    """The order of all draws of a run over a line of S shards; see the module's text.

    Args:
        totals: (S,) int64, sum of the repeat factors of each shard's images, in units of 1 / ONE.
        seed: a non-negative integer.
        window_shards: shards whose images are mixed; 0 mixes all.
        streams: equal parts of each batch that read different shards: the draws of an epoch are cut into that many
            runs of consecutive shards. A process then reads the shards of its own streams, mostly.
        batch_size: images per iteration; matters with more than one stream only, which it must be a multiple of.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        totals: np.ndarray,
        *,
        seed: int,
        window_shards: int = 0,
        streams: int = 1,
        batch_size: int = 1,
    ):
        if seed < 0:
            raise ValueError(f"the sampler's seed must be non-negative, got {seed}; set SEED in the config.")
        if window_shards < 0:
            raise ValueError(f"DATALOADER.SHUFFLE_WINDOW_SHARDS must not be negative, got {window_shards}.")
        if streams < 1 or batch_size % streams:
            raise ValueError(
                f"DATALOADER.READ_STREAMS is {streams}, which does not divide SOLVER.IMS_PER_BATCH ({batch_size})."
            )
        self.ends = np.cumsum(totals, dtype=np.int64)  # of each shard's stretch
        self.total = int(self.ends[-1])
        self.length = max(1, round(self.total / ONE))
        self.seed = seed
        self.window_shards = window_shards if window_shards < len(totals) else 0
        self.streams = streams
        self.share = batch_size // streams
        # Slot k is at k * step + min(k, longer) + offset: T / L in integers.
        self._step, self._longer = divmod(self.total, self.length)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def _slots_before(self, point: np.ndarray, offset: int) -> np.ndarray:
        """Number of slots that lie before each point of the line."""
        behind = point - offset
        limit = self._longer * (self._step + 1)
        early = -(-behind // (self._step + 1))
        late = self._longer - (-(behind - limit) // max(1, self._step))
        return np.clip(np.where(behind <= limit, early, late), 0, self.length)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            random = np.random.Generator(np.random.Philox(key=[self.seed, epoch ^ (1 << 62)]))
            offset = int(random.random() * self._step)
            last = self._slots_before(self.ends, offset)
            first = np.concatenate([[0], last[:-1]])
            num_shards, window = len(last), self.window_shards
            shards = random.permutation(num_shards) if window else np.arange(num_shards)
            ends = np.cumsum((last - first)[shards])
            window_ends = np.append(ends[window - 1 : -1 : window], ends[-1]) if window else ends[-1:]
            if len(self._epochs) > 1:
                self._epochs.popitem(last=False)
            self._epochs[epoch] = _Epoch(offset, shards, first, ends, window_ends)
        return self._epochs[epoch]

    def _sequence(self, draws: np.ndarray) -> np.ndarray:
        """Where the draws of an epoch lie in its order of windows: itself, but for several streams."""
        if self.streams == 1:
            return draws
        rows, rest = divmod(self.length, self.share * self.streams)
        group, place = np.divmod(draws, self.share)
        row, stream = np.divmod(group, self.streams)
        stream_lengths = rows * self.share + np.clip(rest - np.arange(self.streams) * self.share, 0, self.share)
        return (np.cumsum(stream_lengths) - stream_lengths)[stream] + row * self.share + place

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns where the draws at (n,) positions of the run lie: (n,) shard numbers, and (n,) points within the
        shards' stretches of the line, both int64."""
        positions = np.asarray(positions, np.int64)
        shards, points = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        epochs, draws = np.divmod(positions, self.length)
        for number in _distinct(epochs):
            chosen = np.flatnonzero(epochs == number)
            shards[chosen], points[chosen] = self._locate(int(number), self._sequence(draws[chosen]))
        return shards, points

    def _locate(self, number: int, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epoch = self._epoch(number)
        windows = np.searchsorted(epoch.window_ends, sequence, side="right")
        mixed = np.empty(len(sequence), np.int64)
        distinct = _distinct(windows)
        for window in distinct:
            chosen = slice(None) if len(distinct) == 1 else np.flatnonzero(windows == window)
            start = int(epoch.window_ends[window - 1]) if window else 0
            size = int(epoch.window_ends[window]) - start
            mixed[chosen] = start + keyed_permutation(sequence[chosen] - start, size, self.seed, number, int(window))
        place = np.searchsorted(epoch.ends, mixed, side="right")
        shards = epoch.shards[place]
        slots = epoch.first_slot[shards] + mixed - np.where(place > 0, epoch.ends[place - 1], 0)
        points = slots * self._step + np.minimum(slots, self._longer) + epoch.offset
        return shards, points - np.where(shards > 0, self.ends[shards - 1], 0)


def _distinct(values: np.ndarray) -> np.ndarray:
    """np.unique, fast where all values are the same."""
    return values[:1] if len(values) and (values == values[0]).all() else np.unique(values)


class _ImagesInMemory:
    """Finds images on the line with one number per image: (N,) repeat factors in units of 1 / ONE."""

    def __init__(self, factors: np.ndarray, first_image: np.ndarray):
        self.ends = np.cumsum(factors)
        self.starts = np.concatenate([[0], self.ends])[first_image[:-1]]  # of each shard
        self.totals = np.diff(np.append(self.starts, self.ends[-1]))

    def __call__(self, shards: np.ndarray, points: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, self.starts[shards] + points, side="right")


class _EqualImages:
    """Finds images on the line where all repeat factors are 1."""

    def __init__(self, first_image: np.ndarray):
        self.first_image = first_image
        self.totals = np.diff(first_image) * ONE

    def __call__(self, shards: np.ndarray, points: np.ndarray) -> np.ndarray:
        return self.first_image[shards] + points // ONE


class _ImagesByShard:
    """Finds images on the line, reading the labels of one shard at a time and keeping those last used."""

    def __init__(self, index: HashtagIndex | ShardedIndex, per_hashtag: np.ndarray, totals: np.ndarray):
        self.index = index
        self.per_hashtag = per_hashtag
        self.totals = totals
        self._ends: OrderedDict[int, np.ndarray] = OrderedDict()
        self._num_cached = 0

    def _shard(self, shard: int) -> np.ndarray:
        if shard in self._ends:
            self._ends.move_to_end(shard)
            return self._ends[shard]
        ends = np.cumsum(largest_factors(*self.index.labels_of(shard), self.per_hashtag))
        self._ends[shard] = ends
        self._num_cached += len(ends)
        while self._num_cached > _MAX_CACHED_IMAGES and len(self._ends) > 1:
            self._num_cached -= len(self._ends.popitem(last=False)[1])
        return ends

    def __call__(self, shards: np.ndarray, points: np.ndarray) -> np.ndarray:
        order = np.argsort(shards, kind="stable")
        starts = np.flatnonzero(np.diff(shards[order], prepend=-1))
        images = np.empty(len(shards), np.int64)
        for chosen in np.split(order, starts[1:]):
            shard = int(shards[chosen[0]])
            rows = np.searchsorted(self._shard(shard), points[chosen], side="right")
            images[chosen] = self.index.first_image[shard] + rows
        return images


class PositionSampler:
    """Infinite stream of dataset indices for one process, in an order fixed by the seed and repeat factors alone.

    Iteration i of a run draws the positions [i * batch_size, (i + 1) * batch_size); rank r of W takes the r-th of W
    equal, contiguous parts, so that the ranks' parts together are the batch of a single process.

    Args:
        repeat_factors: (N,) float64, each image's expected number of draws per epoch; positive.
        seed: a non-negative integer.
        batch_size: images per iteration over all processes (``SOLVER.IMS_PER_BATCH``).
        rank, world_size: this process and their number. Given explicitly, since worker processes cannot ask.
        start_iteration: the first iteration to draw; resuming at k equals skipping k iterations.
        window_shards, streams: see :class:`DrawOrder`; of use to :class:`HashtagSampler`.

    Attributes:
        on_shards: called with the shards of each stretch of coming draws, in the order of their first use.

    Raises:
        ValueError: ``batch_size`` is not a multiple of ``world_size``, or a value is out of range.
    """

    def __init__(self, repeat_factors: np.ndarray, **kwargs):
        factors = fixed_point(np.asarray(repeat_factors, np.float64))
        self._start(_ImagesInMemory(factors, np.array([0, len(factors)])), len(factors), **kwargs)

    def _start(
        self,
        images,
        num_images: int,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_iteration: int = 0,
        window_shards: int = 0,
        streams: int = 1,
    ) -> None:
        if batch_size <= 0 or batch_size % world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is {batch_size}, which {world_size} processes cannot share equally; "
                f"use a multiple of {world_size}."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"the sampler's rank must be in [0, {world_size}), got {rank}.")
        if start_iteration < 0:
            raise ValueError(f"the sampler's start_iteration must not be negative, got {start_iteration}.")
        self.num_images = num_images
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start_iteration = start_iteration
        self.on_shards: Callable[[np.ndarray], None] | None = None
        self._images = images
        self._order = DrawOrder(
            images.totals,
            seed=seed,
            window_shards=window_shards,
            streams=streams,
            batch_size=batch_size,
        )

    @property
    def epoch_length(self) -> int:
        """Draws per epoch of the resampled dataset."""
        return self._order.length

    def positions(self, iteration: int, num_iterations: int = 1) -> np.ndarray:
        """Returns (num_iterations, batch_size / world_size) int64: this rank's positions of the run."""
        share = self.batch_size // self.world_size
        starts = (iteration + np.arange(num_iterations, dtype=np.int64)) * self.batch_size + self.rank * share
        return starts[:, None] + np.arange(share, dtype=np.int64)

    def images_at(self, positions: np.ndarray) -> np.ndarray:
        """Returns the (n,) int64 image indices in [0, N) drawn at (n,) positions of the run."""
        return self._images(*self._order.locate(positions))

    def _draws(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (positions, images) of stretches of iterations, each (k, batch_size / world_size) int64."""
        draws_ahead = min(_DRAWS_AHEAD * self.world_size, self._order.length)
        num_iterations = max(1, draws_ahead // self.batch_size)
        iteration, ahead = self.start_iteration, 1  # the first batch is soon there
        pending = None
        while True:
            positions = self.positions(iteration, ahead)
            shards, points = self._order.locate(positions.ravel())
            if self.on_shards:
                self.on_shards(shards[np.sort(np.unique(shards, return_index=True)[1])])
            if pending:
                yield pending[0], self._images(*pending[1:]).reshape(pending[0].shape)
            pending = positions, shards, points
            iteration, ahead = iteration + ahead, min(num_iterations, 8 * ahead)

    def batches(self) -> Iterator[list[tuple[int, int]]]:
        """Yields, per iteration, this rank's list of (dataset index, position); the position seeds the crop."""
        for positions, images in self._draws():
            for row_of_positions, row_of_images in zip(positions, images, strict=True):
                yield list(zip(row_of_images.tolist(), row_of_positions.tolist(), strict=True))

    def __iter__(self) -> Iterator[int]:
        for _, images in self._draws():
            yield from images.ravel().tolist()


class HashtagSampler(PositionSampler):
    """The order of hashtag images under resampling; see :class:`PositionSampler`.

    Memory is one number per shard, and one per image of the shards in the window. A full shuffle under resampling
    needs one number for every image of the dataset: 8 bytes each.

    Args:
        index: labels of the images, all of them in memory or shard by shard.
        mode, threshold: see :func:`wsl_d2.data.order.resampling.repeat_factors`.
        totals: of :func:`wsl_d2.data.order.resampling.shard_totals`, where they are known already.
    """

    def __init__(
        self,
        index: HashtagIndex | ShardedIndex,
        *,
        mode: str = "sqrt",
        threshold: float = 1e-3,
        totals: np.ndarray | None = None,
        window_shards: int = 0,
        **kwargs,
    ):
        if index.num_images == 0:
            raise ValueError("the dataset has no image with a label of its vocabulary.")
        images: _EqualImages | _ImagesInMemory | _ImagesByShard
        if mode == "natural":
            images = _EqualImages(index.first_image)
        else:
            per_hashtag = fixed_point(repeat_factors(index.hashtag_counts() / index.num_images, threshold, mode))
            if 0 < window_shards < len(index.first_image) - 1:
                totals = shard_totals(index, per_hashtag) if totals is None else totals
                images = _ImagesByShard(index, per_hashtag, totals)
            else:
                factors = [
                    largest_factors(*index.labels_of(shard), per_hashtag) for shard in range(len(index.first_image) - 1)
                ]
                images = _ImagesInMemory(np.concatenate(factors), index.first_image)
        self._start(images, index.num_images, window_shards=window_shards, **kwargs)
