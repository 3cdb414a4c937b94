"""HashtagDataset: map-style access to the labelled images of a folder of shards."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from wsl_d2.data.mapper import DamagedImageError, HashtagMapper
from wsl_d2.data.noise import LabelNoise
from wsl_d2.data.shards import (
    HashtagIndex,
    ShardError,
    ShardIndex,
    check_shards,
    load_hashtag_index,
    read_index,
    read_manifest,
)

_MAX_OPEN_SHARDS = 128
_MAX_REPLACEMENTS = 100


class HashtagDataset(Dataset):
    """The labelled images of a folder of shards, by number.

    ``dataset[i]`` or ``dataset[i, position]`` gives a dict with "image" (uint8 (3, H, W), or the encoded bytes
    without a mapper), "labels" ((k,) int64), "key" (str) and "skipped" (list of (key, reason)): an image that cannot
    be decoded is replaced by the next one in the dataset and listed there, so that it can be counted.

    Opening reads the manifest alone; a shard's index is read when its first image is asked for. The object pickles
    to its folder and mapper, so that worker processes open files of their own.

    Args:
        folder: with ``manifest.json``, ``vocabulary.json`` and the shards.
        mapper: turns encoded bytes into a crop.
        seed: together with the position it seeds each crop.

    Attributes:
        noise: replaces labels as they are read, in ``index`` too; set before either is.

    Raises:
        ShardError: see :func:`wsl_d2.data.shards.read_manifest`.
    """

    def __init__(self, folder: str | Path, mapper: HashtagMapper | None = None, seed: int = 0):
        self.folder = Path(folder)
        self.mapper = mapper
        self.seed = seed
        self.noise: LabelNoise | None = None
        self.manifest = read_manifest(self.folder)
        self._ends = np.cumsum([shard["num_images"] for shard in self.manifest["shards"]])
        self._indexes: dict[int, ShardIndex] = {}
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return self.manifest["num_images"]

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.pop("index", None)
        return state | {"_indexes": {}, "_files": {}}

    @property
    def vocabulary_checksum(self) -> str:
        return self.manifest["vocabulary_checksum"]

    @property
    def num_labels(self) -> int:
        return self.manifest["num_labels"]

    @cached_property
    def index(self) -> HashtagIndex:
        """The labels of all images; reads every shard's index."""
        index = load_hashtag_index(self.folder, self.manifest)
        return self.noise.apply(index) if self.noise else index

    def check_shards(self) -> None:
        """Raises ShardError that lists each shard which is missing or has another size than the manifest says."""
        check_shards(self.folder, self.manifest)

    def _read(self, image: int) -> tuple[str, bytes, np.ndarray]:
        shard = int(np.searchsorted(self._ends, image, side="right"))
        row = image - (int(self._ends[shard - 1]) if shard else 0)
        path = self.folder / self.manifest["shards"][shard]["name"]
        if shard not in self._indexes:
            self._indexes[shard] = read_index(path)
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))
            try:
                self._files[shard] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ShardError(f"shard {path} cannot be opened: {error.strerror}.") from error
        index = self._indexes[shard]
        data = os.pread(self._files[shard], int(index.sizes[row]), int(index.offsets[row]))
        labels = index.labels[index.indptr[row] : index.indptr[row + 1]]
        if self.noise:
            labels = self.noise.replace(np.array([0, len(labels)]), labels, image)
        return index.keys[row].decode(), data, labels.astype(np.int64)

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
