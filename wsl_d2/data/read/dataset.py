"""HashtagDataset: map-style access to the labeled images of a folder of shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch.utils.data import Dataset

from wsl_d2.data.format.index import ShardIndex, index_path, read_index, save_arrays
from wsl_d2.data.format.labels import HashtagIndex, ShardedIndex, ShardLabels, labels_path, read_labels
from wsl_d2.data.format.manifest import MANIFEST, VOCABULARY, ShardTable, find_missing, read_manifest, shorten_list
from wsl_d2.data.order.resampling import EpochDistribution, epoch_distribution
from wsl_d2.data.read.mapper import DamagedImageError, HashtagMapper
from wsl_d2.data.read.store import ShardStore
from wsl_d2.errors import ShardError
from wsl_d2.files import cache_folder

_MAX_OPEN_SHARDS = 128
_MAX_REPLACEMENTS = 100
_Content = TypeVar("_Content")


class HashtagDataset(Dataset):
    """The labeled images of a folder of shards, by number.

    ``dataset[i]`` or ``dataset[i, position]`` gives a dict with "image" (uint8 (3, H, W), or without a mapper
    the encoded bytes), "labels" ((k,) int64), "key" (str) and "skipped" (list of (key, reason)): an image that cannot
    be decoded is replaced by the next one in the dataset and listed there, so that it can be counted. One that has
    changed since it was indexed is an error.

    Opening reads the manifest alone; a shard and its index are opened when its first image is read, and the 128 last
    used stay open. The object pickles to its folder and mapper, so that worker processes open files of their own.

    Args:
        folder: with ``manifest.json``, ``vocabulary.json`` and the shards; a path or a URL of fsspec.
        mapper: turns encoded bytes into a crop.
        seed: together with the position it seeds each crop.
        fresh: copy the manifest from a store again; one process of a machine does it for all.

    Attributes:
        store: where the shards come from.
        folder: local, with ``manifest.json`` and ``vocabulary.json``.

    Raises:
        ShardError: see :func:`wsl_d2.data.format.manifest.read_manifest`.
    """

    def __init__(self, folder: str | Path, mapper: HashtagMapper | None = None, seed: int = 0, *, fresh: bool = True):
        self.store = ShardStore(folder)
        for name in (MANIFEST, VOCABULARY):
            self.store.path(name, fresh=fresh)
        self.folder = self.store.folder
        self.mapper = mapper
        self.seed = seed
        self.manifest = read_manifest(self.folder)
        self.table = ShardTable.from_manifest(self.manifest)
        del self.manifest["shards"]  # hundreds of megabytes where there are many; the table holds what is needed
        self._ends = np.cumsum(self.table.num_images)
        self._open: OrderedDict[int, tuple[int, ShardIndex, ShardLabels]] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest["num_images"]

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.pop("index", None)
        return state | {"_open": OrderedDict()}

    @property
    def vocabulary_checksum(self) -> str:
        return self.manifest["vocabulary_checksum"]

    @property
    def num_labels(self) -> int:
        return self.manifest["num_labels"]

    @property
    def shards_sha256(self) -> str:
        """A digest of the content of all tars."""
        return hashlib.sha256(self.table.sha256.tobytes()).hexdigest()

    @property
    def labels_sha256(self) -> str:
        """A digest of the labels of all images."""
        return hashlib.sha256(self.table.labels_sha256.tobytes()).hexdigest()

    def read_labels(self, shard: int, mapped: bool = False) -> ShardLabels:
        """Reads the labels of a shard; ``mapped``: see :func:`wsl_d2.data.format.labels.read_labels`.

        Raises:
            ShardError: they are missing, damaged or do not belong to the manifest.
        """
        name = self.table.name(shard)

        def read() -> ShardLabels:
            labels = read_labels(self.folder / name, mapped=mapped)
            if labels.sha256 != self.table.labels_hex_digest(shard):
                raise ShardError(
                    f"{self.store.place(labels_path(name).name)} holds other labels than the manifest says (vocabulary "
                    f"{labels.vocabulary_checksum[:12]}, column {labels.hashtags_column!r}, {len(labels.rows)} "
                    "images); index the dataset again."
                )
            return labels

        return self._from_store(labels_path(name).name, read)

    def read_index(self, shard: int) -> ShardIndex:
        """Reads the index of a shard, but for its hashtags.

        Raises:
            ShardError: it is missing, damaged or does not belong to the manifest.
        """
        name = self.table.name(shard)

        def read() -> ShardIndex:
            index = read_index(self.folder / name, with_hashtags=False, mapped=True)
            if index.tar_sha256 != self.table.hex_digest(shard):
                raise ShardError(
                    f"{self.store.place(index_path(name).name)} is the index of another tar than the manifest says; "
                    "index the dataset again."
                )
            return index

        return self._from_store(index_path(name).name, read)

    def _from_store(self, name: str, read: Callable[[], _Content]) -> _Content:
        """Reads a file; one of a store whose copy in the cache is damaged or outdated is copied again."""
        self.store.path(name)
        try:
            return read()
        except ShardError:
            if not self.store.is_remote:
                raise
        self.store.path(name, fresh=True)
        return read()

    @property
    def sharded_index(self) -> ShardedIndex:
        """The labels of all images, read from one shard at a time."""
        counts = np.array(self.manifest["hashtag_counts"], np.int64)
        return ShardedIndex(self.read_labels, self.table.num_images, counts)

    @cached_property
    def index(self) -> HashtagIndex:
        """The labels of all images in memory; reads every shard's labels."""
        return self.sharded_index.load()

    def epoch_distribution(self, mode: str, threshold: float) -> EpochDistribution:
        """Returns what an epoch holds after resampling; see :func:`wsl_d2.data.order.resampling.repeat_factors`.

        It is computed once from the labels of all shards, and cached on disk.
        """
        facts = [mode, threshold if mode in ("sqrt", "uniform") else None, self.labels_sha256]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        path = cache_folder("resampling", f"{digest[:24]}.npz")
        if path.is_file():
            with np.load(path) as arrays:
                return EpochDistribution(arrays["totals"], int(arrays["length"]), arrays["draws"])
        found = epoch_distribution(self.sharded_index, threshold, mode)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(path, {"totals": found.totals, "length": np.int64(found.length), "draws": found.draws})
        return found

    def check_shards(self) -> None:
        """Raises ShardError that lists each shard which is missing or has another size than the manifest says.

        Web servers do not list their files; there a shard is checked when it is copied.
        """
        if self.store.location.startswith(("http://", "https://")):
            return
        if problems := find_missing(self.store.location, self.table, self.store.sizes()):
            raise ShardError(f"{len(problems)} of {len(self.table)} shards cannot be used: {shorten_list(problems)}")

    def fetch(self, shard: int, *, fresh: bool = False) -> Path:
        """Returns the local path of a shard, copied from the store if it is not in the cache, or ``fresh``."""
        return self.store.path(self.table.name(shard), self.table.hex_digest(shard), fresh=fresh)

    def _shard(self, shard: int) -> tuple[int, ShardIndex, ShardLabels]:
        """An open file of the shard, its index and its labels."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        index, labels = self.read_index(shard), self.read_labels(shard, mapped=True)
        if len(labels.rows) and labels.rows[-1] >= len(index.keys):
            raise ShardError(f"shard {self.store.place(self.table.name(shard))}: labels of images that it lacks.")
        try:
            file = self._open_file(shard)
            num_bytes = os.fstat(file).st_size
        except OSError as error:
            place = self.store.place(self.table.name(shard))
            raise ShardError(f"shard {place} cannot be opened: {error.strerror}.") from error
        if num_bytes != self.table.num_bytes[shard]:
            os.close(file)
            raise ShardError(
                f"shard {self.store.place(self.table.name(shard))} has {num_bytes} bytes, the manifest says "
                f"{self.table.num_bytes[shard]}; write or download it again."
            )
        if len(self._open) >= _MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        self._open[shard] = file, index, labels
        return file, index, labels

    def _open_file(self, shard: int) -> int:
        for _ in range(10):
            try:
                path = self.fetch(shard)
                if self.store.is_remote and path.stat().st_size != self.table.num_bytes[shard]:
                    path = self.fetch(shard, fresh=True)
                return os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # another process evicted it from the cache; copy it again
                if not self.store.is_remote:
                    raise
        raise ShardError(
            f"{self.store.place(self.table.name(shard))} is evicted from the shard cache before it can be read; raise "
            f"DATALOADER.SHARD_CACHE_GB (now {self.store.cache_bytes / 1e9:g}) or lower "
            "DATALOADER.SHUFFLE_WINDOW_SHARDS."
        )

    def _read(self, image: int) -> tuple[str, bytes, np.ndarray]:
        shard = int(np.searchsorted(self._ends, image, side="right"))
        place = image - (int(self._ends[shard - 1]) if shard else 0)
        file, index, labels = self._shard(shard)
        row = int(labels.rows[place])
        data, key = index.read_image(file, row), index.key(row)
        if data is None and self.store.is_remote:  # the copy in the cache may be damaged
            os.close(self._open.pop(shard)[0])
            self.fetch(shard, fresh=True)
            data = index.read_image(self._shard(shard)[0], row)
        if data is None:
            raise ShardError(
                f"shard {self.store.place(self.table.name(shard))}: image {key!r} is not what was indexed; the shard "
                "was altered or damaged. Restore it, or index it again and finish the dataset."
            )
        own = labels.labels[labels.indptr[place] : labels.indptr[place + 1]]
        return key, data, own.astype(np.int64)

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        image, position = item if isinstance(item, tuple) else (item, item)
        if not 0 <= image < len(self):
            raise IndexError(f"image {image} of {len(self)} in {self.folder}")
        skipped: list[tuple[str, str]] = []
        for replacement in range(min(_MAX_REPLACEMENTS, len(self))):
            key, data, labels = self._read((image + replacement) % len(self))
            if self.mapper is None:
                return {"image": data, "labels": labels, "key": key, "skipped": skipped}
            try:
                pixels = self.mapper(data, np.random.Generator(np.random.Philox(key=[self.seed, position])))
            except DamagedImageError as error:
                skipped.append((key, str(error)))
                continue
            return {"image": pixels, "labels": labels, "key": key, "skipped": skipped}
        raise ShardError(
            f"{self.folder}: {len(skipped)} images in a row cannot be decoded, the first {skipped[0][0]!r} "
            f"({skipped[0][1]}); verify the shards."
        )
