"""Views of a dataset of shards: the same tars with fewer images or another vocabulary, without copying them.

The studies of data size and of vocabulary are made of views.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from wsl_d2.data.shards import (
    ShardError,
    ShardIndex,
    finish_dataset,
    index_path,
    index_shard,
    read_index,
    read_manifest,
    write_index,
)
from wsl_d2.hashtags import Vocabulary


def make_view(
    source: str | Path,
    target: str | Path,
    *,
    num_images: int | None = None,
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
) -> dict:
    """Makes a folder with links to the source's tars and indexes of its own; an interrupted call can be repeated.

    A subset holds the images whose keys have the smallest keyed hashes. So subsets of one seed are nested: the one of
    1,000 images lies within that of 10,000. With a vocabulary it is drawn from the images that this labels.

    Args:
        source: a finished dataset.
        target: the folder to make. If it is finished already, it is checked to be this view and left alone.
        num_images: labelled images to keep; all if None.
        seed: of the subset.
        vocabulary: labels the images anew from the hashtags in the tars; the source's own if None.

    Returns:
        The view's manifest.

    Raises:
        ShardError: the source is not finished or has fewer labelled images than asked for, or the target is another
            view.
    """
    source, target = Path(source), Path(target)
    manifest = read_manifest(source)
    vocabulary = vocabulary or Vocabulary.load(source / "vocabulary.json")
    facts = f"view of {manifest['num_images']} images of {source.resolve()}, vocabulary {vocabulary.checksum}, " + (
        "all images" if num_images is None else f"{num_images} images of seed {seed}"
    )
    description = target / "view.txt"
    if description.is_file() and description.read_text().strip() != facts:
        raise ShardError(f"{target} is already the {description.read_text().strip()}; choose another folder.")
    if (target / "manifest.json").is_file():
        if not description.is_file():
            raise ShardError(f"{target} is a dataset of its own and no view; choose another folder.")
        return read_manifest(target)
    target.mkdir(parents=True, exist_ok=True)
    description.write_text(facts + "\n")
    vocabulary.save(target / "vocabulary.json")

    names = [shard["name"] for shard in manifest["shards"]]
    same_labels = vocabulary.checksum == manifest["vocabulary_checksum"]
    for name in tqdm(names, unit="shard", desc="labels", disable=None):
        link = target / name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath((source / name).resolve(), target.resolve()))
        if not index_path(link).is_file():
            if same_labels:
                write_index(link, read_index(source / name))
            else:
                index_shard(link, vocabulary)
    if num_images is not None:
        _keep_smallest(target, names, num_images, seed)
    return finish_dataset(target, vocabulary)


def _keep_smallest(folder: Path, names: list[str], num_images: int, seed: int) -> None:
    hashes = [_hashes(read_index(folder / name).keys, seed) for name in names]
    total = sum(map(len, hashes))
    if not 0 < num_images <= total:
        raise ShardError(f"{folder}: asked for a subset of {num_images} images; there are {total} labelled ones.")
    everything = np.concatenate(hashes)
    limit = np.partition(everything, num_images - 1)[num_images - 1]
    if (everything <= limit).sum() != num_images:
        raise ShardError(f"{folder}: two images have the same key and cannot be told apart; keys must be unique.")
    for name, values in zip(names, hashes, strict=True):
        write_index(folder / name, _select(read_index(folder / name), np.flatnonzero(values <= limit)))


def _hashes(keys: np.ndarray, seed: int) -> np.ndarray:
    """(n,) uint64 of (n,) bytes."""
    digests = [hashlib.blake2b(key, digest_size=8, key=seed.to_bytes(8, "little")).digest() for key in keys.tolist()]
    return np.frombuffer(b"".join(digests), np.uint64)


def _select(index: ShardIndex, rows: np.ndarray) -> ShardIndex:
    counts = np.diff(index.indptr)[rows]
    labels = [index.labels[index.indptr[row] : index.indptr[row + 1]] for row in rows]
    return ShardIndex(
        keys=index.keys[rows],
        offsets=index.offsets[rows],
        sizes=index.sizes[rows],
        indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        labels=np.concatenate(labels) if labels else index.labels[:0],
        num_unlabelled=index.num_unlabelled,
        vocabulary_checksum=index.vocabulary_checksum,
        crc32=None if index.crc32 is None else index.crc32[rows],
        tar_sha256=index.tar_sha256,
        source=index.source,
    )
