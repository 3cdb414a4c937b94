"""Which images of a shard are labeled, and with what: the one step from raw hashtags to what trains.

``shard-000000.labels.npz`` names the vocabulary's checksum and the column of hashtags it was made from, and the tar.

Shapes: n images in the tar, of which N have labels; L label entries (one per image and label), C labels in the
vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsl_d2.data.format.index import _DAMAGE, ShardIndex, _json_bytes, map_arrays, save_arrays
from wsl_d2.errors import ShardError
from wsl_d2.hashtags import Vocabulary

_VERSION = 2


@dataclass
class HashtagIndex:
    """Labels of N images in compressed sparse rows: image i has ``labels[indptr[i]:indptr[i + 1]]``.

    Args:
        indptr: (N + 1,) int64, starts at 0.
        labels: (L,) int32, values in [0, num_labels); each image has at least one, sorted and unique.
        num_labels: C.
    """

    indptr: np.ndarray
    labels: np.ndarray
    num_labels: int

    @property
    def num_images(self) -> int:
        return len(self.indptr) - 1

    @property
    def first_image(self) -> np.ndarray:
        """(2,) int64: in memory, all images are one shard; see :class:`ShardedIndex`."""
        return np.array([0, self.num_images])

    def labels_of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns indptr and labels of a shard's images, of which there is one here."""
        return self.indptr, self.labels

    def hashtag_counts(self) -> np.ndarray:
        """Returns (C,) int64: the number of images carrying each label."""
        return np.bincount(self.labels, minlength=self.num_labels).astype(np.int64)


@dataclass
class ShardLabels:
    """The labeled images of one shard.

    Args:
        rows: (N,) int32, rows of the shard's index, ascending.
        indptr, labels: CSR labels as in :class:`HashtagIndex`.
        num_unlabelled: images of the tar that are not listed.
        vocabulary_checksum: of the vocabulary.
        hashtags_column: of the JSON.
        tar_sha256: of the shard.
    """

    rows: np.ndarray
    indptr: np.ndarray
    labels: np.ndarray
    num_unlabelled: int
    vocabulary_checksum: str
    hashtags_column: str
    tar_sha256: str

    @property
    def sha256(self) -> str:
        """A digest of all that training sees of them."""
        digest = hashlib.sha256(f"{self.vocabulary_checksum} {self.tar_sha256}".encode())
        for array, kind in ((self.rows, np.int32), (self.indptr, np.int64), (self.labels, np.int32)):
            digest.update(np.ascontiguousarray(array, kind).tobytes())
        return digest.hexdigest()


def labels_path(tar_path: str | Path) -> Path:
    """Returns the path of a shard's labels: ``shard-000000.tar`` -> ``shard-000000.labels.npz``."""
    return Path(tar_path).with_suffix(".labels.npz")


def label_index(index: ShardIndex, vocabulary: Vocabulary, hashtags_column: str = "hashtags") -> ShardLabels:
    """Labels the images of a shard from the raw hashtags in its index; each distinct hashtag is mapped once.

    Raises:
        ShardError: the index does not hold this column.
    """
    if hashtags_column not in index.hashtags:
        raise ShardError(
            f"the index holds no hashtags of column {hashtags_column!r}, only of "
            f"{', '.join(map(repr, index.hashtags)) or 'none'}; choose one, or index the tars anew with it."
        )
    column = index.hashtags[hashtags_column]
    n = len(index.keys)
    found = vocabulary.mapping.map_all(column.names)
    count = np.fromiter(map(len, found), np.int64, len(found))
    start = np.cumsum(count) - count
    flat = np.fromiter(itertools.chain.from_iterable(found), np.int64)
    image = np.repeat(np.arange(n), np.diff(column.indptr))  # of each entry
    codes = column.codes.astype(np.int64, copy=False)
    entries = np.flatnonzero((count > 0)[codes]) if len(found) else codes
    image, codes = image[entries], codes[entries]
    label = flat[start[codes]] if len(codes) else flat
    if count.max(initial=0) > 1:  # only where ambiguous hashtags get all of their labels
        repeats = count[codes]
        within = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        image, label = np.repeat(image, repeats), flat[np.repeat(start[codes], repeats) + within]
    pairs = sorted_unique(image * len(vocabulary) + label)
    image, label = np.divmod(pairs, len(vocabulary))
    per_image = np.bincount(image, minlength=n)
    rows = np.flatnonzero(per_image).astype(np.int32)
    return ShardLabels(
        rows=rows,
        indptr=np.concatenate([[0], np.cumsum(per_image[rows])]).astype(np.int64),
        labels=label.astype(np.int32),
        num_unlabelled=n - len(rows),
        vocabulary_checksum=vocabulary.checksum,
        hashtags_column=hashtags_column,
        tar_sha256=index.tar_sha256,
    )


def sorted_unique(numbers: np.ndarray) -> np.ndarray:
    """Returns the different ones of (n,) integers of 0 or more, ascending; np.unique is ten times slower."""
    numbers = np.sort(numbers)
    return numbers[np.diff(numbers, prepend=-1) > 0] if len(numbers) else numbers


def select_images(labels: ShardLabels, chosen: np.ndarray) -> ShardLabels:
    """Returns the labels of some of the labeled images alone; ``chosen`` are their places, ascending."""
    lengths = np.diff(labels.indptr)[chosen]
    starts = labels.indptr[:-1][chosen]
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    place = np.repeat(starts - indptr[:-1], lengths) + np.arange(indptr[-1])
    return ShardLabels(
        rows=labels.rows[chosen],
        indptr=indptr,
        labels=labels.labels[place],
        num_unlabelled=labels.num_unlabelled,
        vocabulary_checksum=labels.vocabulary_checksum,
        hashtags_column=labels.hashtags_column,
        tar_sha256=labels.tar_sha256,
    )


def write_labels(tar_path: str | Path, labels: ShardLabels) -> None:
    """Writes a shard's labels atomically beside the tar."""
    facts = {
        "version": _VERSION,
        "num_unlabelled": labels.num_unlabelled,
        "vocabulary_checksum": labels.vocabulary_checksum,
        "hashtags_column": labels.hashtags_column,
        "tar_sha256": labels.tar_sha256,
    }
    arrays = {"rows": labels.rows, "indptr": labels.indptr, "labels": labels.labels, "facts": _json_bytes(facts)}
    save_arrays(labels_path(tar_path), arrays)


def read_labels(tar_path: str | Path, *, mapped: bool = False) -> ShardLabels:
    """Reads a shard's labels.

    Args:
        tar_path: the shard.
        mapped: see :func:`wsl_d2.data.format.index.map_arrays`.

    Raises:
        ShardError: they are missing, unreadable, of another version, or contradict themselves.
    """
    path = labels_path(tar_path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(bytes(arrays["facts"]))
            if facts.pop("version") != _VERSION:
                raise ValueError("it was written by another version")
            labels = ShardLabels(arrays["rows"], arrays["indptr"], arrays["labels"], **facts)
        if len(labels.indptr) - 1 != len(labels.rows):
            raise ValueError(f"its arrays have {len(labels.indptr) - 1} and {len(labels.rows)} images")
        if len(labels.rows) and (
            labels.indptr[0] != 0
            or (np.diff(labels.indptr) < 1).any()
            or labels.indptr[-1] != len(labels.labels)
            or labels.labels.min() < 0
            or labels.rows.min() < 0
        ):
            raise ValueError("its numbers are out of range")
    except _DAMAGE as error:
        raise ShardError(f"{path}: missing or damaged labels ({error}); index the shard again.") from error
    return map_arrays(labels, path, ("rows", "indptr", "labels")) if mapped else labels


class ShardedIndex:
    """Labels of N images in S shards, read one shard at a time.

    Args:
        read: shard number -> something with ``indptr`` and ``labels``, such as its :class:`ShardLabels`.
        num_images: (S,) labeled images of each shard.
        hashtag_counts: (C,) number of images with each label.

    Attributes:
        first_image: (S + 1,) int64; images first_image[s] to first_image[s + 1] - 1 are those of shard s.
    """

    def __init__(self, read: Callable, num_images: np.ndarray, hashtag_counts: np.ndarray):
        self._read = read
        self.first_image = np.concatenate([[0], np.cumsum(num_images)]).astype(np.int64)
        self._counts = np.asarray(hashtag_counts, np.int64)

    @property
    def num_images(self) -> int:
        return int(self.first_image[-1])

    @property
    def num_labels(self) -> int:
        return len(self._counts)

    def labels_of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (n + 1,) indptr and labels of a shard's n images."""
        labels = self._read(shard)
        return labels.indptr, labels.labels

    def hashtag_counts(self) -> np.ndarray:
        """Returns (C,) int64: the number of images carrying each label."""
        return self._counts

    def load(self) -> HashtagIndex:
        """Returns the labels of all images, in memory."""
        parts = [self.labels_of(shard) for shard in range(len(self.first_image) - 1)]
        lengths = np.concatenate([np.zeros(1, np.int64), *(np.diff(indptr) for indptr, _ in parts)])
        labels = np.concatenate([np.zeros(0, np.int32), *(labels for _, labels in parts)])
        return HashtagIndex(np.cumsum(lengths), labels, self.num_labels)
