"""Shards: WebDataset tars of hashtagged images, each with an index, described by one manifest.

A dataset is a folder::

    vocabulary.json           which hashtags are labels (wsl_d2.hashtags.Vocabulary)
    shard-000000.tar          <key>.jpg and <key>.json, the latter with at least {"hashtags": [...]}
    shard-000000.index.npz    where each labelled image lies in the tar, and its labels
    manifest.json             counts, bytes and SHA-256 of every shard; written last

Shapes: N labelled images, L label entries (one per image and label), C labels in the vocabulary.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsl_d2.hashtags import Vocabulary

FORMAT = "wsl_d2 shards"
FORMAT_VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class ShardError(ValueError):
    """A shard, its index or the manifest is missing, incomplete or inconsistent."""


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

    def hashtag_counts(self) -> np.ndarray:
        """Returns (C,) int64: the number of images carrying each label."""
        return np.bincount(self.labels, minlength=self.num_labels).astype(np.int64)


@dataclass
class ShardIndex:
    """One shard's index.

    Args:
        keys: (n,) bytes, the images' names in the tar without extension.
        offsets, sizes: (n,) int64, where the encoded image lies in the tar, in bytes.
        indptr, labels: CSR labels as in :class:`HashtagIndex`.
        num_unlabelled: images of the tar without any label in the vocabulary; they are not in the arrays.
    """

    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    indptr: np.ndarray
    labels: np.ndarray
    num_unlabelled: int
    vocabulary_checksum: str


def index_path(tar_path: str | Path) -> Path:
    """Returns the index's path for a shard: ``shard-000000.tar`` -> ``shard-000000.index.npz``."""
    return Path(tar_path).with_suffix(".index.npz")


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes ``data`` beside ``path``, flushes it to disk, and renames it onto ``path``."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_shard(path: str | Path, samples: Iterable[tuple[str, bytes, dict]]) -> int:
    """Writes one shard as a WebDataset tar, atomically and byte for byte reproducibly.

    Args:
        path: the ``.tar`` to write; its folder must exist.
        samples: (key, encoded JPEG, metadata) with ``metadata["hashtags"]`` a list of str. A key is a plain name
            without dots or slashes (WebDataset splits names at the first dot).

    Returns:
        The number of samples written.

    Raises:
        ValueError: for a key with a dot or slash, a repeated key, or metadata without hashtags.
    """
    buffer = io.BytesIO()
    seen: set[str] = set()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, jpeg, metadata in samples:
            if not key or "." in key or "/" in key or key in seen:
                raise ValueError(
                    f"{path}: sample key {key!r} is empty, repeated, or has a '.' or '/'; keys are unique plain names."
                )
            if not isinstance(metadata.get("hashtags"), list):
                raise ValueError(f"{path}: metadata of {key!r} needs a list under 'hashtags', got {metadata!r}.")
            seen.add(key)
            encoded = json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode()
            for name, data in ((f"{key}.jpg", jpeg), (f"{key}.json", encoded)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                member.mode = 0o644
                tar.addfile(member, io.BytesIO(data))
    write_atomically(path, buffer.getvalue())
    return len(seen)


def index_shard(tar_path: str | Path, vocabulary: Vocabulary) -> ShardIndex:
    """Indexes an existing WebDataset tar in place and writes ``<shard>.index.npz`` beside it.

    Args:
        tar_path: a tar whose images (``.jpg``, ``.jpeg``, ``.png``, ``.webp``) each have a ``.json`` of the same key.
        vocabulary: maps the raw hashtags to labels; images left without a label are counted, not listed.

    Raises:
        ShardError: the tar is unreadable or cut off, an image has no JSON, a JSON no hashtags, or a member is
            not a plain file with a relative name.
    """
    tar_path = Path(tar_path)
    images: dict[str, tuple[int, int]] = {}
    hashtags: dict[str, list[str]] = {}
    end = 0
    try:
        with tarfile.open(tar_path, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isdir():
                    continue
                if not member.isreg() or member.name.startswith("/") or ".." in member.name.split("/"):
                    raise ShardError(f"{tar_path}: member {member.name!r} is a link, device or unsafe path; refused.")
                key, _, extension = member.name.partition(".")
                extension = extension.lower()
                if extension in IMAGE_EXTENSIONS:
                    images[key] = (member.offset_data, member.size)
                elif extension == "json":
                    metadata = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
                    if not isinstance(metadata, dict) or not isinstance(metadata.get("hashtags"), list):
                        raise ShardError(f"{tar_path}: {member.name!r} must be an object with a list 'hashtags'.")
                    hashtags[key] = metadata["hashtags"]
    except (tarfile.TarError, OSError, json.JSONDecodeError) as error:
        raise ShardError(f"{tar_path}: not a readable tar shard ({error}); write or download it again.") from error
    with open(tar_path, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ShardError(f"{tar_path}: the tar is cut off after {end} bytes; write or download it again.")
    if missing := sorted(images.keys() - hashtags.keys()):
        raise ShardError(f"{tar_path}: {len(missing)} images have no .json with hashtags, the first {missing[0]!r}.")

    keys, offsets, sizes, counts, labels = [], [], [], [], []
    for key, (offset, size) in images.items():
        image_labels = vocabulary.labels(hashtags[key])
        if len(image_labels) == 0:
            continue
        keys.append(key.encode())
        offsets.append(offset)
        sizes.append(size)
        counts.append(len(image_labels))
        labels.append(image_labels)
    index = ShardIndex(
        keys=np.array(keys, dtype=np.bytes_) if keys else np.zeros(0, "S1"),
        offsets=np.array(offsets, dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64),
        indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        labels=np.concatenate(labels).astype(np.int32) if labels else np.zeros(0, np.int32),
        num_unlabelled=len(images) - len(keys),
        vocabulary_checksum=vocabulary.checksum,
    )
    write_index(tar_path, index)
    return index


def write_index(tar_path: str | Path, index: ShardIndex) -> None:
    """Writes a shard's index atomically beside the tar."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        **{
            "keys": index.keys,
            "offsets": index.offsets,
            "sizes": index.sizes,
            "indptr": index.indptr,
            "labels": index.labels,
            "num_unlabelled": np.int64(index.num_unlabelled),
            "vocabulary_checksum": np.bytes_(index.vocabulary_checksum.encode()),
        },
    )
    write_atomically(index_path(tar_path), buffer.getvalue())


def read_index(tar_path: str | Path) -> ShardIndex:
    """Reads a shard's index.

    Raises:
        ShardError: the index is missing or unreadable.
    """
    path = index_path(tar_path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return ShardIndex(
                keys=arrays["keys"],
                offsets=arrays["offsets"],
                sizes=arrays["sizes"],
                indptr=arrays["indptr"],
                labels=arrays["labels"],
                num_unlabelled=int(arrays["num_unlabelled"]),
                vocabulary_checksum=bytes(arrays["vocabulary_checksum"]).decode(),
            )
    except (OSError, KeyError, ValueError) as error:
        raise ShardError(f"{path}: missing or damaged shard index ({error}); index the shard again.") from error


def sha256_of(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def finish_dataset(folder: str | Path, vocabulary: Vocabulary) -> dict:
    """Writes ``manifest.json`` for a folder whose shards are all written and indexed.

    Args:
        folder: holds ``*.tar`` with their indexes and ``vocabulary.json``.
        vocabulary: the one the shards were indexed with.

    Returns:
        The manifest.

    Raises:
        ShardError: there is no shard, an index is missing, or one was made with another vocabulary.
    """
    folder = Path(folder)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ShardError(f"{folder}: no *.tar shards here.")
    shards: list[dict] = []
    counts = np.zeros(len(vocabulary), np.int64)
    for tar in tars:
        index = read_index(tar)
        if index.vocabulary_checksum != vocabulary.checksum:
            raise ShardError(
                f"{index_path(tar)} was made with vocabulary {index.vocabulary_checksum[:12]}, the dataset's is "
                f"{vocabulary.name!r} {vocabulary.checksum[:12]}; index the shard again."
            )
        counts += np.bincount(index.labels, minlength=len(vocabulary))
        shards.append(
            {
                "name": tar.name,
                "num_images": len(index.keys),
                "num_unlabelled": index.num_unlabelled,
                "bytes": tar.stat().st_size,
                "sha256": sha256_of(tar),
            }
        )
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "vocabulary": vocabulary.name,
        "vocabulary_checksum": vocabulary.checksum,
        "num_labels": len(vocabulary),
        "num_images": sum(shard["num_images"] for shard in shards),
        "num_unlabelled": sum(shard["num_unlabelled"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "hashtag_counts": counts.tolist(),
        "shards": shards,
    }
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def read_manifest(folder: str | Path) -> dict:
    """Reads and checks ``manifest.json``.

    Raises:
        ShardError: it is missing, no JSON, of another format or version, or its vocabulary.json is another one.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise ShardError(
            f"{path} does not exist: {folder} is no finished dataset of shards. Check the path, or finish "
            "preparing the dataset (the manifest is written last)."
        )
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise ShardError(f"{path}: not valid JSON ({error}); prepare the dataset again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ShardError(f"{path}: not a manifest of {FORMAT!r}.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ShardError(
            f"{path}: format version {manifest.get('format_version')!r}; this wsl_d2 reads {FORMAT_VERSION}."
        )
    vocabulary = Vocabulary.load(Path(folder) / "vocabulary.json")
    if vocabulary.checksum != manifest["vocabulary_checksum"]:
        raise ShardError(
            f"{Path(folder) / 'vocabulary.json'} is vocabulary {vocabulary.name!r} {vocabulary.checksum[:12]}, but the "
            f"shards were labelled with {manifest['vocabulary']!r} {manifest['vocabulary_checksum'][:12]}. Put the "
            "right vocabulary.json back or index the shards again."
        )
    return manifest


def check_shards(folder: str | Path, manifest: dict) -> None:
    """Compares every shard's presence and size with the manifest, without reading contents.

    Raises:
        ShardError: listing each missing or altered shard.
    """
    problems = []
    for shard in manifest["shards"]:
        path = Path(folder) / shard["name"]
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != shard["bytes"]:
            problems.append(f"{path} has {path.stat().st_size} bytes, the manifest says {shard['bytes']}")
        elif not index_path(path).is_file():
            problems.append(f"{index_path(path)} is missing")
    if problems:
        shown = "\n  ".join(problems[:10]) + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ShardError(f"{len(problems)} of {len(manifest['shards'])} shards cannot be used:\n  {shown}")


def load_hashtag_index(folder: str | Path, manifest: dict) -> HashtagIndex:
    """Concatenates the label rows of all shards, in manifest order.

    Raises:
        ShardError: an index disagrees with the manifest's counts or vocabulary.
    """
    lengths, labels = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)]
    for shard in manifest["shards"]:
        index = read_index(Path(folder) / shard["name"])
        if len(index.keys) != shard["num_images"] or index.vocabulary_checksum != manifest["vocabulary_checksum"]:
            raise ShardError(
                f"{index_path(Path(folder) / shard['name'])} does not belong to this manifest ({len(index.keys)} "
                f"images against {shard['num_images']}, vocabulary {index.vocabulary_checksum[:12]} against "
                f"{manifest['vocabulary_checksum'][:12]}); index the shard and finish the dataset again."
            )
        lengths.append(np.diff(index.indptr))
        labels.append(index.labels)
    return HashtagIndex(np.cumsum(np.concatenate(lengths)), np.concatenate(labels), manifest["num_labels"])
