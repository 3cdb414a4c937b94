"""Train and test loaders of hashtag images: dataset + sampler + mapper -> batches.

A batch is a dict: "image" (N, 3, H, W) uint8 or an EncodedBatch (device_decode.py), "labels" (K,) int64, "image_index"
(K,) int64 saying which of the N images each label belongs to, "keys" (N,) list of str, "skipped" list of (key, reason).
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from wsl_d2.data.order.sampler import HashtagSampler
from wsl_d2.data.read.dataset import HashtagDataset
from wsl_d2.data.read.device_decode import EncodedBatch, EncodedCrop
from wsl_d2.data.read.mapper import HashtagMapper
from wsl_d2.errors import UserError

MAX_FULLY_SHUFFLED_IMAGES = 200_000_000
_PREFETCHED_SHARDS = 4  # shards of a store copied at a time by each process
_SECONDS_FOR_LOCK = 1.0  # that a living worker holds for microseconds


def collate(samples: list[dict]) -> dict:
    """Stacks N samples of :class:`HashtagDataset` into one batch."""
    counts = [len(sample["labels"]) for sample in samples]
    crops = [sample["image"] for sample in samples]
    if any(isinstance(crop, EncodedCrop) for crop in crops):
        images = EncodedBatch(crops)
    else:
        # In a worker, torch stacks straight into the shared memory that the batch is handed over in.
        images = default_collate([torch.from_numpy(crop) for crop in crops])
    return {
        "image": images,
        "labels": torch.from_numpy(np.concatenate([sample["labels"] for sample in samples])),
        "image_index": torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
        "keys": [sample["key"] for sample in samples],
        "skipped": [entry for sample in samples for entry in sample["skipped"]],
    }


def get_hashtag_dataset(name: str) -> HashtagDataset:
    """Opens the registered hashtag dataset of that name.

    Raises:
        ValueError: the name belongs to something else.
        KeyError: it is not registered (Detectron2's message lists the known names).
    """
    dataset = DatasetCatalog.get(name)
    if not isinstance(dataset, HashtagDataset):
        raise UserError(
            f"dataset {name!r} is not a hashtag dataset; register it through DATASETS.HASHTAG_FOLDERS or "
            "wsl_d2.data.register_hashtag_dataset."
        )
    return dataset


def sampler_seed(cfg) -> int:
    """Returns the seed of data order and crops: SEED, or 0 where Detectron2's default (-1) is left."""
    return max(0, cfg.SEED)


def training_dataset(cfg) -> HashtagDataset:
    """Opens the one dataset of ``DATASETS.TRAIN``, with its training mapper."""
    if len(cfg.DATASETS.TRAIN) != 1:
        raise UserError(f"DATASETS.TRAIN must name exactly one hashtag dataset, got {tuple(cfg.DATASETS.TRAIN)}.")
    dataset = get_hashtag_dataset(cfg.DATASETS.TRAIN[0])
    dataset.mapper = HashtagMapper.from_config(cfg, is_train=True)
    dataset.seed = sampler_seed(cfg)
    dataset.store.cache_bytes = cfg.DATALOADER.SHARD_CACHE_GB * 1e9
    dataset.store.attempts = cfg.DATALOADER.READ_ATTEMPTS
    return dataset


def _shard_totals(cfg, dataset: HashtagDataset) -> np.ndarray | None:
    """The sums of repeat factors of all shards; computed by one process for all."""
    resampling = cfg.DATALOADER.RESAMPLING
    totals = None
    if comm.is_main_process():
        totals = dataset.epoch_distribution(resampling.MODE, resampling.THRESHOLD).totals
    if comm.get_world_size() > 1:
        box = [totals]
        torch.distributed.broadcast_object_list(box, src=0)
        totals = box[0]
    return totals


def build_sampler(cfg, dataset: HashtagDataset) -> HashtagSampler:
    """Builds this process's training sampler from the config; called by all processes together.

    Raises:
        UserError: the dataset is too large to be shuffled as a whole.
        ValueError: a key is out of range.
    """
    mode, window = cfg.DATALOADER.RESAMPLING.MODE, cfg.DATALOADER.SHUFFLE_WINDOW_SHARDS
    if mode != "natural" and window == 0 and len(dataset) > MAX_FULLY_SHUFFLED_IMAGES:
        raise UserError(
            f"DATALOADER.SHUFFLE_WINDOW_SHARDS is 0, which shuffles all {len(dataset):,} images of {dataset.folder} at "
            f"once and needs {len(dataset) * 16 / 1e9:.0f} GB in every process under {mode} resampling; set it to the "
            "number of shards whose images are to be mixed, for example 512."
        )
    return HashtagSampler(
        dataset.sharded_index,
        seed=sampler_seed(cfg),
        mode=mode,
        threshold=cfg.DATALOADER.RESAMPLING.THRESHOLD,
        totals=_shard_totals(cfg, dataset) if mode != "natural" and 0 < window < len(dataset.table) else None,
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
        window_shards=window,
        streams=cfg.DATALOADER.READ_STREAMS,
    )


class _ShardPrefetcher:
    """Prefetches the shards of the next draws from a store while the current ones are in use."""

    def __init__(self, dataset: HashtagDataset):
        self.dataset = dataset
        self._pool: ThreadPoolExecutor | None = None
        self._asked: dict[int, None] = {}

    def __call__(self, shards: np.ndarray) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_PREFETCHED_SHARDS, thread_name_prefix="prefetch")
        new = [shard for shard in shards.tolist() if shard not in self._asked]
        self._asked = dict.fromkeys(shards.tolist())
        for shard in new:
            # A failure is not lost: the worker that reads the shard tries again, and raises it.
            self._pool.submit(self.dataset.fetch, shard)


class _BatchSampler:
    """Adapts a sampler's batches, cut into micro-batches of ``size`` images, to DataLoader's ``batch_sampler``."""

    def __init__(self, sampler: HashtagSampler, size: int):
        self.sampler = sampler
        self.size = size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.sampler.batches():
            for start in range(0, len(batch), self.size):
                yield batch[start : start + self.size]


class WorkerError(UserError, RuntimeError):
    """A worker process of a loader has died or hangs."""


@contextlib.contextmanager
def name_dead_workers() -> Iterator[None]:
    """Turns torch's errors about worker processes that die or hang into one kind of error.

    Such an error may appear anywhere in the main process, since torch raises it from a signal handler.

    Raises:
        WorkerError: a worker process has died, or returned nothing for DATALOADER.TIMEOUT_SECONDS.
    """
    try:
        yield
    except (ConnectionError, EOFError, RuntimeError) as error:
        message = str(error)
        if message.startswith("DataLoader timed out after"):
            seconds = message.split("after", 1)[1].split()[0]
            raise WorkerError(
                f"the data workers gave no batch for {seconds} s, DATALOADER.TIMEOUT_SECONDS; most often a disk or "
                "store does not answer. Start again with --resume."
            ) from error
        died = message.startswith("DataLoader worker") and ("exited unexpectedly" in message or "killed by" in message)
        # Others were raised by the dataset in a living worker, or have nothing to do with the loader.
        if not died and (isinstance(error, RuntimeError) or "DataLoader worker" in message):
            raise
        raise WorkerError(
            "a DataLoader worker process died, most often because memory ran out; lower DATALOADER.NUM_WORKERS or "
            "DATALOADER.PREFETCH_BATCHES, and start again with --resume."
        ) from error


class WorkerIterator(_MultiProcessingDataLoaderIter):
    """Torch's, which ends also where a worker was killed while it looked whether it should end.

    The lock of what it looked at died with it, and torch would wait for it without end.
    """

    def _mark_worker_as_unavailable(self, worker_id: int, shutdown: bool = False) -> None:
        self._free_lock()
        super()._mark_worker_as_unavailable(worker_id, shutdown)

    def _shutdown_workers(self) -> None:
        if not getattr(self, "_shutdown", True):  # nor half begun
            self._free_lock()
        super()._shutdown_workers()

    def _free_lock(self) -> None:
        if not all(worker.is_alive() for worker in self._workers):
            lock = self._workers_done_event._cond
            lock.acquire(timeout=_SECONDS_FOR_LOCK)
            lock.release()


class _WorkerLoader(DataLoader):
    """A DataLoader that raises WorkerError whenever a worker process dies or hangs."""

    def _get_iterator(self) -> Any:
        return WorkerIterator(self) if self.num_workers else super()._get_iterator()

    def __iter__(self) -> Iterator[dict]:  # type: ignore[override]
        with name_dead_workers():
            iterator: Any = super().__iter__()
            try:
                yield from iterator
            finally:
                if hasattr(iterator, "_shutdown_workers"):  # now: the garbage collector may take seconds
                    iterator._shutdown_workers()


def outlive_signals(worker: int) -> None:
    """Keeps a worker alive when Ctrl-C or a scheduler signals all processes: the main process still has to save.

    The second SIGTERM ends it; that is how its loader ends a worker that hangs.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _worker_options(cfg) -> dict:
    """DataLoader's arguments that training and testing share."""
    num_workers = cfg.DATALOADER.NUM_WORKERS
    return {
        "num_workers": num_workers,
        "collate_fn": collate,
        "pin_memory": torch.cuda.is_available(),
        "prefetch_factor": cfg.DATALOADER.PREFETCH_BATCHES if num_workers else None,
        "timeout": cfg.DATALOADER.TIMEOUT_SECONDS if num_workers else 0,
        "worker_init_fn": outlive_signals,
        "generator": torch.Generator(),  # for the workers' seeds, which nothing uses; the global one is the model's
    }


def build_hashtag_train_loader(cfg, dataset: HashtagDataset, sampler: HashtagSampler) -> DataLoader:
    """Builds the infinite training loader of this process.

    Args:
        cfg: reads DATALOADER, SOLVER.IMS_PER_BATCH and SOLVER.IMS_PER_MICRO_BATCH, which says how many images are
            delivered at a time (0: all that this process has of a batch).
        dataset: of :func:`training_dataset`.
        sampler: of :func:`build_sampler`; its ``start_iteration`` is the first iteration to deliver.

    Taking a batch raises :class:`WorkerError` if a worker process died, as when the system ran out of memory, or hangs.
    """
    if dataset.store.is_remote:
        sampler.on_shards = _ShardPrefetcher(dataset)
    size = cfg.SOLVER.IMS_PER_MICRO_BATCH or cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    return _WorkerLoader(
        dataset,
        batch_sampler=_BatchSampler(sampler, size),  # type: ignore[arg-type]
        persistent_workers=cfg.DATALOADER.NUM_WORKERS > 0,
        **_worker_options(cfg),
    )


def build_hashtag_test_loader(cfg, dataset: HashtagDataset, images: range | None = None) -> DataLoader:
    """Builds a finite loader: every image of the dataset once over all processes, none padded or repeated.

    Args:
        images: only these, in this process.
    """
    return _WorkerLoader(
        dataset,
        batch_size=cfg.TEST.IMS_PER_BATCH,
        sampler=InferenceSampler(len(dataset)) if images is None else images,
        drop_last=False,
        **_worker_options(cfg),
    )
