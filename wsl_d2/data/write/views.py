"""Views of a dataset of shards: the same tars with fewer images, other labels, or label noise; no tar is read.

The studies of data size, of vocabulary and of noise are made of views.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsl_d2.data.format.index import ShardIndex, index_path, read_index, read_origins
from wsl_d2.data.format.labels import ShardLabels, label_index, read_labels, select_images, write_labels
from wsl_d2.data.format.manifest import (
    MANIFEST,
    VOCABULARY,
    ShardTable,
    find_missing,
    finish_dataset,
    read_manifest,
    shorten_list,
)
from wsl_d2.data.format.origin import limit_users, no_posters
from wsl_d2.data.format.stamps import has_content, read_stamps
from wsl_d2.data.read.store import ShardStore
from wsl_d2.data.runner import Workers, run_parts
from wsl_d2.data.write.noise import LabelNoise
from wsl_d2.data.write.source import reserved_folder
from wsl_d2.errors import EmptyDatasetError, ShardError, UserError
from wsl_d2.hashtags import Vocabulary


@dataclass(frozen=True)
class _Labelling:
    source: Path
    target: Path
    vocabulary: Vocabulary
    hashtags_column: str
    relabel: bool
    split: tuple[float, str, int] | None
    stamps: dict[str, tuple[str, list[int]]]


def make_view(
    source: str | Path,
    target: str | Path,
    *,
    num_images: int | None = None,
    max_images_per_user: int | None = None,
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
    hashtags_column: str | None = None,
    held_out: float = 0.0,
    part: str = "train",
    label_noise: float = 0.0,
    noise_seed: int = 0,
    workers: Workers = 1,
) -> dict:
    """Makes a folder with links to the source's tars and indexes, and labels of its own; can be repeated.

    Where the indexes know who posted the images, a split has all images of a poster on one side.

    A subset holds the images whose keys have the smallest keyed hashes. So subsets of one seed are nested: the one of
    1,000 images lies within that of 10,000. With a vocabulary it is drawn from the images that this labels.

    Args:
        source: a finished dataset.
        target: the folder to make.
        num_images: labeled images to keep; all if None.
        max_images_per_user: labeled images of a poster to keep, those with the smallest hashes; all if None.
        seed: of the subset, the split and the limit.
        vocabulary: labels the images anew from the raw hashtags in the indexes; the source's own if None.
        hashtags_column: the column to label them by; the source's own if None.
        held_out: fraction of the images that the split of this seed holds out; 0 makes no split.
        part: "train" for the images that are not held out, "val" for those that are.
        label_noise: this fraction of the labels is replaced by draws from their own distribution.
        noise_seed: of the noise.
        workers: processes, or a cluster.

    Returns:
        The view's manifest.

    Raises:
        ShardError: the source is not finished, has changed since it was indexed, or has fewer labeled images than
            asked for; or the target is something else.
    """
    source, target = Path(source), Path(target)
    manifest = read_manifest(source)
    if not 0 <= label_noise <= 1:
        raise UserError(f"label noise is a fraction in [0, 1], got {label_noise}.")
    if not 0 <= held_out < 1 or part not in ("train", "val"):
        raise UserError(f"held_out is a fraction in [0, 1), part is train or val; got {held_out} and {part!r}.")
    if part == "val" and not held_out:
        raise UserError("part val is what a split holds out; say how much with held_out (--held-out 0.02).")
    if num_images is not None and num_images < 1:
        raise UserError(f"a subset has at least 1 image, got {num_images}.")
    if max_images_per_user is not None and max_images_per_user < 1:
        raise UserError(f"at least 1 image of a user is kept, got {max_images_per_user}.")
    if target.resolve() == source.resolve():
        raise UserError(f"{target} is the source itself; choose another folder for the view.")
    vocabulary = vocabulary or Vocabulary.load(source / VOCABULARY)
    column = hashtags_column or manifest["hashtags_column"]
    relabel = vocabulary.checksum != manifest["vocabulary_checksum"] or column != manifest["hashtags_column"]
    table = ShardTable.from_manifest(manifest)
    _check_source(source, table)
    facts = {
        "made_by": "data view",
        "source": str(source.resolve()),
        "source_labels": hashlib.sha256(table.sha256.tobytes() + table.labels_sha256.tobytes()).hexdigest(),
        "vocabulary": vocabulary.checksum,
        "hashtags_column": column,
        "num_images": num_images,
        "max_images_per_user": max_images_per_user,
        "seed": seed if num_images is not None or max_images_per_user is not None or held_out else None,
        "held_out": [held_out, part] if held_out else None,
        "label_noise": [label_noise, noise_seed] if label_noise else None,
    }
    names = [table.name(shard) for shard in range(len(table))]
    if max_images_per_user is not None and not any(read_origins(source / name) for name in names):
        raise ShardError(no_posters(source))
    split = (held_out, part, seed) if held_out else None
    shared = _Labelling(source, target, vocabulary, column, relabel, split, read_stamps(source))
    with reserved_folder(target, facts):
        if (target / MANIFEST).is_file():
            return read_manifest(target)
        parts = run_parts(_label_one, list(enumerate(names)), shared, workers=workers, unit="shard", total=len(names))
        sizes = list(_in_order(parts))
        if max_images_per_user is not None:
            sizes = _limit_users(target, names, max_images_per_user, seed)
        if num_images is not None:
            sizes = _keep_smallest(target, names, num_images, seed)
        if label_noise:
            noise = LabelNoise(label_noise, noise_seed, _counts(target, names, len(vocabulary)))
            _add_noise(target, names, sizes, noise)
        return finish_dataset(target, vocabulary, {"view_of": str(source)})


def _check_source(source: Path, table: ShardTable) -> None:
    """The tars may be elsewhere at the moment; those that are there are the ones that were indexed."""
    found = find_missing(source, table, ShardStore(source).sizes())
    problems = [problem for problem in found if not problem.endswith(".tar is missing")]
    if problems:
        raise ShardError(f"{source}: {len(problems)} shards cannot be used: {shorten_list(problems)}")


def _label_one(shared: _Labelling, item: tuple[int, str]) -> tuple[int, int]:
    """Links a shard and labels it; returns its number and how many labeled images it has."""
    number, name = item
    for path in (shared.source / name, index_path(shared.source / name)):
        link = shared.target / path.name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(path.resolve(), shared.target.resolve()))
    index = read_index(shared.source / name, with_hashtags=shared.relabel)
    tar = shared.source / name
    if tar.exists() and not has_content(tar, index.tar_sha256, shared.stamps):
        raise ShardError(f"{tar} has changed since it was indexed; index the dataset again.")
    if shared.relabel:
        labels = label_index(index, shared.vocabulary, shared.hashtags_column)
    else:
        labels = read_labels(shared.source / name)
    if shared.split:
        fraction, part, seed = shared.split
        hashes = _hashes(index, labels, seed)
        origins = read_origins(tar)
        if origins:
            users = origins.users[labels.rows]
            hashes = np.where(users > 0, _keyed_hashes([user.tobytes() for user in users], seed), hashes)
        is_held_out = hashes < np.uint64(fraction * 2.0**64)
        labels = select_images(labels, np.flatnonzero(is_held_out == (part == "val")))
    write_labels(shared.target / name, labels)
    return number, len(labels.rows)


def _in_order(results: Iterator[tuple[int, int]]) -> Iterator[int]:
    yield from (size for _, size in sorted(results))


def _counts(folder: Path, names: list[str], num_labels: int) -> np.ndarray:
    counts = np.zeros(num_labels, np.int64)
    for name in names:
        counts += np.bincount(read_labels(folder / name).labels, minlength=num_labels)
    return counts


def _add_noise(folder: Path, names: list[str], sizes: list[int], noise: LabelNoise) -> None:
    first_image = 0
    for name, size in zip(names, sizes, strict=True):
        labels = read_labels(folder / name)
        labels.labels = noise.replace(labels.indptr, labels.labels, first_image)
        write_labels(folder / name, labels)
        first_image += size


def _limit_users(folder: Path, names: list[str], limit: int, seed: int) -> list[int]:
    """Keeps so many images of each poster; returns how many images each shard has of them."""
    hashes, users = [], []
    for name in names:
        labels, origins = read_labels(folder / name), read_origins(folder / name)
        hashes.append(_hashes(read_index(folder / name, with_hashtags=False), labels, seed))
        users.append(origins.users[labels.rows] if origins else np.zeros(len(labels.rows), np.uint64))
    keep = limit_users(np.concatenate(users), np.concatenate(hashes), limit, unknown=0)
    kept = np.split(keep, np.cumsum([len(part) for part in users])[:-1])
    for name, chosen in zip(names, kept, strict=True):
        write_labels(folder / name, select_images(read_labels(folder / name), np.flatnonzero(chosen)))
    return [int(chosen.sum()) for chosen in kept]


def _keep_smallest(folder: Path, names: list[str], num_images: int, seed: int) -> list[int]:
    """Keeps the labels of a subset alone; returns how many images each shard has of it."""
    hashes = [
        _hashes(read_index(folder / name, with_hashtags=False), read_labels(folder / name), seed) for name in names
    ]
    everything = np.concatenate(hashes)
    if num_images > len(everything):
        raise EmptyDatasetError(
            f"{folder}: asked for a subset of {num_images} images; there are {len(everything)} labeled ones."
        )
    limit = np.partition(everything, num_images - 1)[num_images - 1]
    if (everything <= limit).sum() != num_images:
        raise ShardError(f"{folder}: two images have the same key and cannot be told apart; keys must be unique.")
    for name, values in zip(names, hashes, strict=True):
        write_labels(folder / name, select_images(read_labels(folder / name), np.flatnonzero(values <= limit)))
    return [int((values <= limit).sum()) for values in hashes]


def _hashes(index: ShardIndex, labels: ShardLabels, seed: int) -> np.ndarray:
    """(N,) uint64 of a shard's labeled images."""
    return _keyed_hashes(index.keys[labels.rows].tolist(), seed)


def _keyed_hashes(keys: list[bytes], seed: int) -> np.ndarray:
    """(N,) uint64."""
    digests = [hashlib.blake2b(key, digest_size=8, key=seed.to_bytes(8, "little")).digest() for key in keys]
    return np.frombuffer(b"".join(digests), np.uint64)
