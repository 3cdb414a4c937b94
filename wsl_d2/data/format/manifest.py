"""The manifest of a dataset: ``manifest.json``, written last, says that a folder of shards is whole and what it holds.

A dataset is a folder::

    vocabulary.json           which hashtags are labels (wsl_d2.hashtags.Vocabulary)
    shard-000000.tar          <key>.jpg and <key>.json, the latter with at least {"hashtags": [...]}
    shard-000000.index.npz    where each image lies in the tar, and its raw hashtags
    shard-000000.labels.npz   which images are labeled, and with what
    manifest.json             vocabulary, column, counts, bytes and SHA-256 of every shard; written last
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from wsl_d2.data.format.index import index_path, index_tar, read_facts, write_index
from wsl_d2.data.format.labels import ShardLabels, label_index, labels_path, read_labels, write_labels
from wsl_d2.data.format.stamps import note_stamp, stamp_of
from wsl_d2.data.format.tar import write_tar
from wsl_d2.errors import EmptyDatasetError, ShardError
from wsl_d2.files import write_atomically
from wsl_d2.hashtags import Vocabulary

FORMAT = "wsl_d2 shards"
FORMAT_VERSION = 2
MANIFEST, VOCABULARY = "manifest.json", "vocabulary.json"


def write_shard(path: str | Path, samples) -> int:
    """Writes one shard as a WebDataset tar, atomically and byte for byte reproducibly.

    Args:
        path: the ``.tar`` to write; its folder must exist.
        samples: (key, encoded image, metadata) with ``metadata["hashtags"]`` a list of str. A key is a plain name
            without dots or slashes (WebDataset splits names at the first dot).

    Returns:
        The number of samples written.

    Raises:
        ValueError: for a key that cannot be used or is repeated, or metadata without hashtags.
    """

    def checked():
        for key, image, metadata in samples:
            if not isinstance(metadata.get("hashtags"), list):
                raise ValueError(f"{path}: metadata of {key!r} needs a list under 'hashtags', got {metadata!r}.")
            yield key, image, metadata

    return len(write_tar(path, checked()).images)


def index_shard(
    tar_path: str | Path, vocabulary: Vocabulary, hashtags_column: str = "hashtags", source: str = ""
) -> ShardLabels:
    """Indexes an existing WebDataset tar in place: writes ``<shard>.index.npz`` and ``<shard>.labels.npz`` beside it.

    Args:
        tar_path: a tar whose images (``.jpg``, ``.jpeg``, ``.png``, ``.webp``) have a ``.json`` of the same key.
        vocabulary: maps the raw hashtags to labels; images left without a label are counted, not listed.
        hashtags_column: the name of the hashtags' list in the JSON.
        source: kept in the index.

    Raises:
        ShardError: see :func:`wsl_d2.data.format.tar.read_tar`.
    """
    stamp = stamp_of(tar_path) if Path(tar_path).is_file() else None
    index = index_tar(tar_path, hashtags_column, source)
    labels = label_index(index, vocabulary, hashtags_column)
    labels_path(tar_path).unlink(missing_ok=True)
    write_index(tar_path, index)
    write_labels(tar_path, labels)
    note_stamp(tar_path, index.tar_sha256, stamp)
    return labels


def finish_dataset(
    folder: str | Path, vocabulary: Vocabulary, extra: dict | None = None, names: list[str] | None = None
) -> dict:
    """Writes ``vocabulary.json`` and ``manifest.json`` for a folder whose shards are all written and indexed.

    Files that a killed process left half-written are removed.

    Args:
        folder: holds ``*.tar`` with their indexes and labels.
        vocabulary: the one the shards were labeled with.
        extra: more entries for the manifest.
        names: of the tars, which may lie elsewhere; those in the folder if None.

    Returns:
        The manifest.

    Raises:
        ShardError: there is no shard, an index or labels are missing, they were made with another vocabulary or from
            different columns, or no image has a label.
    """
    folder = Path(folder)
    tars = sorted(folder.glob("*.tar")) if names is None else [folder / name for name in names]
    if not tars:
        raise ShardError(f"{folder}: no *.tar shards here.")
    shards: list[dict] = []
    counts = np.zeros(len(vocabulary), np.int64)
    columns: dict[str, str] = {}
    problems: Counter[str] = Counter()
    ignored: dict[str, list] = {}
    for tar in tqdm(tars, unit="shard", desc="manifest", disable=None if len(tars) > 99 else True):
        facts, labels = read_facts(tar), read_labels(tar)
        if labels.vocabulary_checksum != vocabulary.checksum:
            raise ShardError(
                f"{labels_path(tar)} was made with vocabulary {labels.vocabulary_checksum[:12]}, the dataset's is "
                f"{vocabulary.checksum[:12]}; index the shard again."
            )
        if labels.tar_sha256 != facts["tar_sha256"]:
            raise ShardError(f"{labels_path(tar)} belongs to another tar than {index_path(tar)}; index it again.")
        columns.setdefault(labels.hashtags_column, tar.name)
        counts += np.bincount(labels.labels, minlength=len(vocabulary))
        problems.update(dict(zip(facts["columns"], facts["problems"], strict=True)).get(labels.hashtags_column, {}))
        for kind, (number, first) in facts["ignored"].items():
            ignored[kind] = [ignored.get(kind, [0])[0] + number, ignored.get(kind, [0, f"{tar.name}: {first}"])[1]]
        shards.append(
            {
                "name": tar.name,
                "num_images": len(labels.rows),
                "num_unlabelled": labels.num_unlabelled,
                "bytes": facts["tar_bytes"],
                "sha256": facts["tar_sha256"],
                "labels_sha256": labels.sha256,
            }
        )
    if len(columns) > 1:
        (one, first), (other, second), *_ = columns.items()
        raise ShardError(f"{folder}: {first} was labeled by column {one!r}, {second} by {other!r}; index them again.")
    manifest = (extra or {}) | {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "vocabulary": vocabulary.name,
        "vocabulary_checksum": vocabulary.checksum,
        "hashtags_column": next(iter(columns)),
        "num_labels": len(vocabulary),
        "num_images": sum(shard["num_images"] for shard in shards),
        "num_unlabelled": sum(shard["num_unlabelled"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "without_hashtags": dict(sorted(problems.items())),
        "ignored": dict(sorted(ignored.items())),
        "hashtag_counts": counts.tolist(),
        "shards": shards,
    }
    if not manifest["num_images"]:
        raise EmptyDatasetError(f"{folder}: 0 images have a label. {describe_images(manifest)}")
    for left in folder.glob("*.partial-*"):
        left.unlink()
    vocabulary.save(folder / VOCABULARY)
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


def describe_images(manifest: dict) -> str:
    """Returns what is in a dataset and what was left out, with reasons, for people to read."""
    parts = [
        f"{manifest['num_images']:,} labeled images in {len(manifest['shards']):,} shards, "
        f"{manifest['num_unlabelled']:,} images without a label"
    ]
    parts += [f"{count:,} images without hashtags: {reason}" for reason, count in manifest["without_hashtags"].items()]
    parts += [
        f"ignored: {count:,} {kind} (the first in {first})" for kind, (count, first) in manifest["ignored"].items()
    ]
    return "; ".join(parts)


def read_manifest(folder: str | Path) -> dict:
    """Reads and checks ``manifest.json``.

    Raises:
        ShardError: it is missing, not JSON, of another format or version, or its vocabulary.json is another one.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ShardError(
            f"{path} does not exist: {folder} is not a finished dataset of shards. Check the path, or finish "
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
            f"{path}: format version {manifest.get('format_version')!r}; this wsl_d2 reads {FORMAT_VERSION}. Index the "
            "tars again, with a vocabulary built by this version."
        )
    name, checksum = Vocabulary.read_name_and_checksum(Path(folder) / VOCABULARY)
    if checksum != manifest["vocabulary_checksum"]:
        raise ShardError(
            f"{Path(folder) / VOCABULARY} is vocabulary {name!r} {checksum[:12]}, but the "
            f"shards were labeled with {manifest['vocabulary']!r} {manifest['vocabulary_checksum'][:12]}. Put the "
            "right vocabulary.json back or index the shards again."
        )
    return manifest


@dataclass
class ShardTable:
    """The shards of a manifest as arrays, so that hundreds of thousands of them take little memory.

    Attributes:
        names: (S,) bytes.
        num_images, num_bytes: (S,) int64, labeled images, and size of the tar.
        sha256, labels_sha256: (S,) 32 bytes each, of the tars and of the labels.
    """

    names: np.ndarray
    num_images: np.ndarray
    num_bytes: np.ndarray
    sha256: np.ndarray
    labels_sha256: np.ndarray

    @classmethod
    def from_manifest(cls, manifest: dict) -> ShardTable:
        """Raises ShardError for a row that is none, or a name that leaves the folder."""
        rows = manifest["shards"]
        try:
            names = [row["name"] for row in rows]
            table = cls(
                names=np.array([name.encode() for name in names], np.bytes_),
                num_images=np.array([row["num_images"] for row in rows], np.int64),
                num_bytes=np.array([row["bytes"] for row in rows], np.int64),
                sha256=_digests(rows, "sha256"),
                labels_sha256=_digests(rows, "labels_sha256"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShardError(f"manifest.json: damaged list of shards ({error!r}); finish the dataset again.") from error
        if bad := [name for name in names if "/" in name or name in ("", ".", "..") or "\0" in name]:
            raise ShardError(f"manifest.json: shard name {bad[0]!r} is not a plain name; refused.")
        return table

    def __len__(self) -> int:
        return len(self.names)

    def name(self, shard: int) -> str:
        return self.names[shard].decode()

    def hex_digest(self, shard: int) -> str:
        return self.sha256[shard].tobytes().hex()

    def labels_hex_digest(self, shard: int) -> str:
        return self.labels_sha256[shard].tobytes().hex()


def _digests(rows: list[dict], name: str) -> np.ndarray:
    joined = bytes.fromhex("".join([row[name] for row in rows]))
    return np.frombuffer(joined, np.dtype((np.void, 32)), len(rows))


def find_missing(place: str | Path, table: ShardTable, sizes: Mapping[str, int]) -> list[str]:
    """Compares every shard's presence and size with the manifest, without reading contents; returns the problems.

    Args:
        place: of the dataset, for messages.
        table: of its manifest.
        sizes: name -> bytes of the files that are there.
    """
    problems = []
    endings = [path("a.tar").name.removeprefix("a") for path in (index_path, labels_path)]
    for name, num_bytes in zip(table.names.tolist(), table.num_bytes.tolist(), strict=True):
        tar = name.decode()
        if tar not in sizes:
            problems.append(f"{place}/{tar} is missing")
        elif sizes[tar] != num_bytes:
            problems.append(f"{place}/{tar} has {sizes[tar]} bytes, the manifest says {num_bytes}")
        else:
            beside = [tar.removesuffix(".tar") + ending for ending in endings]
            problems += [f"{place}/{one} is missing" for one in beside if one not in sizes]
    return problems


def shorten_list(lines: list[str], limit: int = 5) -> str:
    """Returns lines as one, those beyond the limit as a number."""
    more = [f"and {len(lines) - limit} more"] if len(lines) > limit else []
    return "; ".join([*lines[:limit], *more])


def same_dataset(manifest: dict[str, Any], vocabulary: Vocabulary, hashtags_column: str) -> str:
    """Returns in which of the facts that decide the labels a dataset differs, "" if in none."""
    differences = []
    if manifest["vocabulary_checksum"] != vocabulary.checksum:
        differences.append(
            f"vocabulary {manifest['vocabulary']!r} {manifest['vocabulary_checksum'][:12]}, not {vocabulary.name!r} "
            f"{vocabulary.checksum[:12]}"
        )
    if manifest["hashtags_column"] != hashtags_column:
        differences.append(f"hashtags of column {manifest['hashtags_column']!r}, not {hashtags_column!r}")
    return " and ".join(differences)
