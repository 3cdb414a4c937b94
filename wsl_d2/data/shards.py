"""Shards: WebDataset tars of hashtagged images, each with an index, described by one manifest.

A dataset is a folder::

    vocabulary.json           which hashtags are labels (wsl_d2.hashtags.Vocabulary)
    shard-000000.tar          <key>.jpg and <key>.json, the latter with at least {"hashtags": [...]}
    shard-000000.index.npz    where each labelled image lies in the tar, and its labels
    manifest.json             counts, bytes and SHA-256 of every shard; written last

Shapes: N labelled images, L label entries (one per image and label), C labels in the vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import mmap
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from wsl_d2.hashtags import Vocabulary

FORMAT = "wsl_d2 shards"
FORMAT_VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_BYTES = 256 << 20
MAX_METADATA_BYTES = 1 << 20


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
class ShardIndex:
    """One shard's index.

    Args:
        keys: (n,) bytes, the images' names in the tar without extension.
        offsets, sizes: (n,) int64, where the encoded image lies in the tar, in bytes.
        indptr, labels: CSR labels as in :class:`HashtagIndex`.
        num_unlabelled: images of the tar without any label in the vocabulary; they are not in the arrays.
        crc32: (n,) uint32 checksums of the encoded images, by which one altered later is found when it is read.
        tar_sha256: of the whole tar, as hex digits.
        source: whatever the maker of the shard wants to recognise its input by.
    """

    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    indptr: np.ndarray
    labels: np.ndarray
    num_unlabelled: int
    vocabulary_checksum: str
    crc32: np.ndarray | None = None
    tar_sha256: str = ""
    source: str = ""

    def read_image(self, file: int, row: int) -> bytes | None:
        """Reads an encoded image from the open tar ``file``; None if it is no longer what was indexed."""
        size = int(self.sizes[row])
        data = os.pread(file, size, int(self.offsets[row]))
        altered = len(data) != size or (self.crc32 is not None and zlib.crc32(data) != self.crc32[row])
        return None if altered else data


def index_path(tar_path: str | Path) -> Path:
    """Returns the index's path for a shard: ``shard-000000.tar`` -> ``shard-000000.index.npz``."""
    return Path(tar_path).with_suffix(".index.npz")


@contextlib.contextmanager
def open_atomically(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a file beside ``path`` for writing; at the end it is flushed to disk and renamed onto ``path``."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes ``data`` beside ``path``, flushes it to disk, and renames it onto ``path``."""
    with open_atomically(path) as file:
        file.write(data)


def write_shard(path: str | Path, samples: Iterable[tuple[str, bytes, dict]]) -> int:
    """Writes one shard as a WebDataset tar, atomically and byte for byte reproducibly.

    Args:
        path: the ``.tar`` to write; its folder must exist.
        samples: (key, encoded image, metadata) with ``metadata["hashtags"]`` a list of str. A key is a plain name
            without dots or slashes (WebDataset splits names at the first dot).

    Returns:
        The number of samples written.

    Raises:
        ValueError: for a key with a dot or slash, a repeated key, or metadata without hashtags.
    """
    seen: set[str] = set()
    with open_atomically(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, image, metadata in samples:
            if not key or "." in key or "/" in key or key in seen:
                raise ValueError(
                    f"{path}: sample key {key!r} is empty, repeated, or has a '.' or '/'; keys are unique plain names."
                )
            if not isinstance(metadata.get("hashtags"), list):
                raise ValueError(f"{path}: metadata of {key!r} needs a list under 'hashtags', got {metadata!r}.")
            seen.add(key)
            encoded = json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode()
            for name, data in ((f"{key}.{_image_extension(image)}", image), (f"{key}.json", encoded)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                member.mode = 0o644
                tar.addfile(member, io.BytesIO(data))
    return len(seen)


def _image_extension(image: bytes) -> str:
    if image.startswith(b"\x89PNG"):
        return "png"
    return "webp" if image.startswith(b"RIFF") and image[8:12] == b"WEBP" else "jpg"


class _CheckedTarInfo(tarfile.TarInfo):
    """Refuses the headers whose content tarfile would read into memory whatever their size."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        is_header = member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE) or member.type in (
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
        )
        if is_header and member.size > MAX_METADATA_BYTES:
            raise tarfile.ReadError(f"an extended header of {member.size} bytes")
        return member


class _HashingReader:
    """A file to be read from start to end, and the SHA-256 of what was read."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data


@dataclass
class TarImage:
    """One image of a tar: where it lies, the CRC-32 of its bytes, and its metadata."""

    key: str
    offset: int
    size: int
    crc32: int
    metadata: dict


def read_tar(tar_path: str | Path, hashtags_column: str = "hashtags") -> tuple[list[TarImage], str]:
    """Reads a WebDataset tar of images and their JSON once, without unpacking anything.

    Returns:
        The images in the tar's order, and the SHA-256 of the whole file.

    Raises:
        ShardError: the tar is unreadable or cut off, an image has no JSON or a JSON no image or no list of hashtags, a
            key is repeated, or a member is no plain file with a safe relative name and a sane size.
    """
    images: dict[str, tuple[int, int, int]] = {}
    described: dict[str, dict] = {}
    end = 0
    try:
        with open(tar_path, "rb") as file:
            reader = _HashingReader(file)
            with tarfile.open(fileobj=reader, mode="r|", tarinfo=_CheckedTarInfo) as tar:  # type: ignore[call-overload]
                for member in tar:
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if member.isdir():
                        continue
                    _read_member(tar_path, tar, member, hashtags_column, images, described)
                    tar.members = []  # type: ignore[attr-defined]
            while reader.read(1 << 20):
                pass
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ShardError(f"{tar_path}: the tar is cut off after {end} bytes; write or download it again.")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ShardError(f"{tar_path}: not a readable tar shard ({error}); write or download it again.") from error
    for found, others, complaint in (
        (images, described, "images have no .json with hashtags"),
        (described, images, ".json have no image"),
    ):
        if missing := sorted(found.keys() - others.keys()):
            raise ShardError(f"{tar_path}: {len(missing)} {complaint}, the first {missing[0]!r}.")
    return [TarImage(key, *place, described[key]) for key, place in images.items()], reader.digest.hexdigest()


def _read_member(tar_path, tar, member: tarfile.TarInfo, hashtags_column: str, images: dict, described: dict) -> None:
    name = member.name
    if not member.isreg() or member.issparse() or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ShardError(f"{tar_path}: member {name!r} is a link, device or unsafe path; refused.")
    matched = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", name)  # WebDataset's rule: the first dot of the last part
    key, extension = matched.groups() if matched else (name, "")
    extension = extension.lower()
    if extension not in (*IMAGE_EXTENSIONS, "json"):
        return
    limit = MAX_METADATA_BYTES if extension == "json" else MAX_IMAGE_BYTES
    if member.size > limit:
        raise ShardError(f"{tar_path}: member {name!r} has {member.size} bytes, more than {limit}; refused.")
    if key in (described if extension == "json" else images):
        raise ShardError(f"{tar_path}: there are two members of key {key!r}; keys must be unique.")
    data = tar.extractfile(member).read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"cut off in {name!r}")
    if extension != "json":
        images[key] = (member.offset_data, member.size, zlib.crc32(data))
        return
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{tar_path}: {name!r} is no valid JSON ({error}).") from error
    hashtags = metadata.get(hashtags_column) if isinstance(metadata, dict) else None
    if not isinstance(hashtags, list) or not all(isinstance(hashtag, str) for hashtag in hashtags):
        raise ShardError(f"{tar_path}: {name!r} must be an object with a list of strings {hashtags_column!r}.")
    described[key] = metadata


def index_shard(
    tar_path: str | Path, vocabulary: Vocabulary, hashtags_column: str = "hashtags", source: str = ""
) -> ShardIndex:
    """Indexes an existing WebDataset tar in place and writes ``<shard>.index.npz`` beside it.

    Args:
        tar_path: a tar whose images (``.jpg``, ``.jpeg``, ``.png``, ``.webp``) each have a ``.json`` of the same key.
        vocabulary: maps the raw hashtags to labels; images left without a label are counted, not listed.
        hashtags_column: the name of the hashtags' list in the JSON.
        source: kept in the index.

    Raises:
        ShardError: see :func:`read_tar`.
    """
    images, sha256 = read_tar(tar_path, hashtags_column)
    labels = [vocabulary.labels(image.metadata[hashtags_column]) for image in images]
    kept = [(image, found) for image, found in zip(images, labels, strict=True) if len(found)]
    index = ShardIndex(
        keys=np.array([image.key.encode() for image, _ in kept], dtype=np.bytes_) if kept else np.zeros(0, "S1"),
        offsets=np.array([image.offset for image, _ in kept], dtype=np.int64),
        sizes=np.array([image.size for image, _ in kept], dtype=np.int64),
        indptr=np.concatenate([[0], np.cumsum([len(found) for _, found in kept])]).astype(np.int64),
        labels=np.concatenate([found for _, found in kept]).astype(np.int32) if kept else np.zeros(0, np.int32),
        num_unlabelled=len(images) - len(kept),
        vocabulary_checksum=vocabulary.checksum,
        crc32=np.array([image.crc32 for image, _ in kept], dtype=np.uint32),
        tar_sha256=sha256,
        source=source,
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
            "tar_sha256": np.bytes_(index.tar_sha256.encode()),
            "source": np.bytes_(index.source.encode()),
        }
        | ({} if index.crc32 is None else {"crc32": index.crc32}),
    )
    write_atomically(index_path(tar_path), buffer.getvalue())


def read_index(tar_path: str | Path, vocabulary_checksum: str | None = None, mapped: bool = False) -> ShardIndex:
    """Reads a shard's index.

    Args:
        tar_path: the shard.
        vocabulary_checksum: what the index must have been made with; anything if None.
        mapped: once checked, leave the arrays in the file, so that they take the system's memory once for all processes
            and only as long as there is room; for an index that is kept.

    Raises:
        ShardError: the index is missing or unreadable, contradicts itself, or was made with another vocabulary.
    """
    path = index_path(tar_path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = ShardIndex(
                keys=arrays["keys"],
                offsets=arrays["offsets"],
                sizes=arrays["sizes"],
                indptr=arrays["indptr"],
                labels=arrays["labels"],
                num_unlabelled=int(arrays["num_unlabelled"]),
                vocabulary_checksum=bytes(arrays["vocabulary_checksum"]).decode(),
                crc32=arrays["crc32"] if "crc32" in arrays else None,
                tar_sha256=bytes(arrays["tar_sha256"]).decode() if "tar_sha256" in arrays else "",
                source=bytes(arrays["source"]).decode() if "source" in arrays else "",
            )
        _check_index(index)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ShardError(f"{path}: missing or damaged shard index ({error}); index the shard again.") from error
    if vocabulary_checksum is not None and index.vocabulary_checksum != vocabulary_checksum:
        raise ShardError(
            f"{path} was made with vocabulary {index.vocabulary_checksum[:12]}, the dataset's is "
            f"{vocabulary_checksum[:12]}; index the shard again."
        )
    return _map_arrays(index, path) if mapped else index


def _map_arrays(index: ShardIndex, path: Path) -> ShardIndex:
    """The same index with the large arrays as views of the file."""
    found: dict[str, Any] = {}
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name not in ("keys", "offsets", "sizes", "indptr", "labels", "crc32") or member.compress_type:
                continue
            file.seek(member.header_offset + 26)  # of the lengths of the name and of the extra field after it
            lengths = file.read(4)
            file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), os.SEEK_CUR)
            if np.lib.format.read_magic(file) != (1, 0):
                continue
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            found[name] = np.frombuffer(mapping, dtype, math.prod(shape), file.tell()).reshape(shape)
    return replace(index, **found)


def _check_index(index: ShardIndex) -> None:
    num_images = len(index.keys)
    lengths = {len(index.offsets), len(index.sizes), len(index.indptr) - 1}
    if index.crc32 is not None:
        lengths.add(len(index.crc32))
    if lengths != {num_images}:
        raise ValueError(f"its arrays have {sorted(lengths | {num_images})} images")
    if num_images and (
        index.indptr[0] != 0
        or (np.diff(index.indptr) < 1).any()
        or index.indptr[-1] != len(index.labels)
        or index.labels.min() < 0
        or index.offsets.min() < 0
        or index.sizes.min() < 0
    ):
        raise ValueError("its numbers are out of range")


def sha256_of(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def finish_dataset(folder: str | Path, vocabulary: Vocabulary, extra: dict | None = None) -> dict:
    """Writes ``manifest.json`` for a folder whose shards are all written and indexed.

    Args:
        folder: holds ``*.tar`` with their indexes and ``vocabulary.json``.
        vocabulary: the one the shards were indexed with.
        extra: more entries for the manifest.

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
    for tar in tqdm(tars, unit="shard", desc="manifest", disable=None if len(tars) > 99 else True):
        index = read_index(tar, vocabulary.checksum)
        counts += np.bincount(index.labels, minlength=len(vocabulary))
        shards.append(
            {
                "name": tar.name,
                "num_images": len(index.keys),
                "num_unlabelled": index.num_unlabelled,
                "bytes": tar.stat().st_size,
                "sha256": index.tar_sha256 or sha256_of(tar),
            }
        )
    manifest = (extra or {}) | {
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


@dataclass
class ShardTable:
    """The shards of a manifest as arrays, so that hundreds of thousands of them take little memory.

    Attributes:
        names: (S,) bytes.
        num_images, num_bytes: (S,) int64, labelled images, and size of the tar.
        sha256: (S,) 32 bytes each.
    """

    names: np.ndarray
    num_images: np.ndarray
    num_bytes: np.ndarray
    sha256: np.ndarray

    @classmethod
    def from_manifest(cls, manifest: dict) -> ShardTable:
        """Raises ShardError for a row that is none, or a name that leaves the folder."""
        rows = manifest["shards"]
        try:
            table = cls(
                names=np.array([row["name"].encode() for row in rows], np.bytes_),
                num_images=np.array([row["num_images"] for row in rows], np.int64),
                num_bytes=np.array([row["bytes"] for row in rows], np.int64),
                sha256=np.array([bytes.fromhex(row["sha256"]) for row in rows], "S32"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShardError(f"manifest.json: damaged list of shards ({error!r}); finish the dataset again.") from error
        if bad := [row["name"] for row in rows if Path(row["name"]).name != row["name"] or not row["name"]]:
            raise ShardError(f"manifest.json: shard name {bad[0]!r} is no plain name; refused.")
        return table

    def __len__(self) -> int:
        return len(self.names)

    def name(self, shard: int) -> str:
        return self.names[shard].decode()

    def hex_digest(self, shard: int) -> str:
        return self.sha256[shard].ljust(32, b"\0").hex()


def find_missing(folder: str | Path, table: ShardTable) -> list[str]:
    """Compares every shard's presence and size with the manifest, without reading contents; returns the problems."""
    with os.scandir(folder) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith((".tar", ".npz"))}
    problems = []
    for name, num_bytes in zip(table.names.tolist(), table.num_bytes.tolist(), strict=True):
        path = Path(folder) / name.decode()
        if path.name not in sizes:
            problems.append(f"{path} is missing")
        elif sizes[path.name] != num_bytes:
            problems.append(f"{path} has {sizes[path.name]} bytes, the manifest says {num_bytes}")
        elif index_path(path).name not in sizes:
            problems.append(f"{index_path(path)} is missing")
    return problems


def check_shards(folder: str | Path, table: ShardTable) -> None:
    """Raises ShardError that lists each missing or altered shard; see :func:`find_missing`."""
    if problems := find_missing(folder, table):
        shown = "\n  ".join(problems[:10]) + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ShardError(f"{len(problems)} of {len(table)} shards cannot be used:\n  {shown}")


class ShardedIndex:
    """Labels of N images in S shards, read one shard at a time.

    Args:
        read: shard number -> its :class:`ShardIndex`.
        num_images: (S,) labelled images of each shard.
        hashtag_counts: (C,) number of images with each label.
        noise: replaces labels as they are read (:class:`wsl_d2.data.noise.LabelNoise`), or None.

    Attributes:
        first_image: (S + 1,) int64; images first_image[s] to first_image[s + 1] - 1 are those of shard s.
    """

    def __init__(self, read, num_images: np.ndarray, hashtag_counts: np.ndarray, noise: Any = None):
        self._read = read
        self.first_image = np.concatenate([[0], np.cumsum(num_images)]).astype(np.int64)
        self._counts = np.asarray(hashtag_counts, np.int64)
        self._noise = noise
        self._noisy_counts: np.ndarray | None = None

    @property
    def num_images(self) -> int:
        return int(self.first_image[-1])

    @property
    def num_labels(self) -> int:
        return len(self._counts)

    def labels_of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (n + 1,) indptr and labels of a shard's n images."""
        index = self._read(shard)
        labels = index.labels
        if self._noise:
            labels = self._noise.replace(index.indptr, labels, int(self.first_image[shard]))
        return index.indptr, labels

    def hashtag_counts(self) -> np.ndarray:
        """Returns (C,) int64: the number of images carrying each label, with label noise if there is any."""
        if not self._noise:
            return self._counts
        if self._noisy_counts is None:
            shards = range(len(self.first_image) - 1)
            counts = (np.bincount(self.labels_of(shard)[1], minlength=self.num_labels) for shard in shards)
            self._noisy_counts = np.sum(np.fromiter(counts, (np.int64, self.num_labels)), axis=0)
        return self._noisy_counts

    def load(self) -> HashtagIndex:
        """Returns the labels of all images, in memory."""
        parts = [self.labels_of(shard) for shard in range(len(self.first_image) - 1)]
        lengths = np.concatenate([np.zeros(1, np.int64), *(np.diff(indptr) for indptr, _ in parts)])
        labels = np.concatenate([np.zeros(0, np.int32), *(labels for _, labels in parts)])
        return HashtagIndex(np.cumsum(lengths), labels, self.num_labels)
