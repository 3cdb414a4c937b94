"""The index beside a tar: where each image lies, and the raw hashtags of all, so that labels never need the tar again.

``shard-000000.index.npz`` depends on the tar alone. Which image has which label is in ``shard-000000.labels.npz``
(labels.py), which another vocabulary or another column of hashtags replaces.

Shapes: n images in the tar; per column of hashtags T entries (one for each image and hashtag) and D distinct hashtags.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from wsl_d2.data.format.origin import Origins
from wsl_d2.data.format.tar import TarContent, TarImage, read_tar
from wsl_d2.errors import ShardError
from wsl_d2.files import write_atomically
from wsl_d2.hashtags import parse_caption, parse_hashtags

CAPTION = "#"  # before the name of a column of captions, whose #words are the hashtags
_VERSION = 2
_DAMAGE = (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)
_Arrays = TypeVar("_Arrays")


@dataclass
class RawHashtags:
    """One column of hashtags as people wrote them, in compressed sparse rows over a dictionary.

    Args:
        indptr: (n + 1,) int64; image i has the entries indptr[i] to indptr[i + 1] - 1.
        codes: (T,) int32 into ``names``.
        names: D distinct hashtags, sorted.
        problems: reason -> how many images have no hashtags for it, such as "no .json".
    """

    indptr: np.ndarray
    codes: np.ndarray
    names: list[str]
    problems: dict[str, int] = field(default_factory=dict)


@dataclass
class ShardIndex:
    """What lies in one tar.

    Args:
        keys: (n,) bytes, the samples' keys.
        offsets, sizes: (n,) int64, where the encoded image lies in the tar, in bytes.
        crc32: (n,) uint32 checksums of the encoded images, by which reading finds those that have changed.
        hashtags: column of the JSON -> its hashtags. Every column that holds lists is here, and the one asked for; the
            #words of a caption under its name behind a #.
        tar_sha256: of the whole tar, as hex digits.
        tar_bytes: its size.
        ignored: kind of member -> how many were ignored, and the first one's name.
        source: anything by which the writer of the shard recognizes its input.
        origins: who posted the images, when and where; None if nothing is known.
    """

    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    crc32: np.ndarray
    hashtags: dict[str, RawHashtags] = field(default_factory=dict)
    tar_sha256: str = ""
    tar_bytes: int = 0
    ignored: dict[str, tuple[int, str]] = field(default_factory=dict)
    source: str = ""
    origins: Origins | None = None

    def read_image(self, file: int, row: int) -> bytes | None:
        """Reads an encoded image from the open tar ``file``; None if it has changed since it was indexed."""
        size = int(self.sizes[row])
        data = os.pread(file, size, int(self.offsets[row]))
        return None if len(data) != size or zlib.crc32(data) != self.crc32[row] else data

    def key(self, row: int) -> str:
        """Returns the key of an image."""
        return self.keys[row].decode("utf-8", "surrogateescape")


def index_path(tar_path: str | Path) -> Path:
    """Returns the index's path for a shard: ``shard-000000.tar`` -> ``shard-000000.index.npz``."""
    return Path(tar_path).with_suffix(".index.npz")


def make_index(content: TarContent, hashtags_column: str, source: str = "") -> ShardIndex:
    """Gathers the index of a tar that was just read or written.

    Args:
        content: of :func:`wsl_d2.data.format.tar.read_tar` or ``write_tar``.
        hashtags_column: the column of the JSON that is kept even if it holds text instead of lists; "#caption" are the
            #words of the text in column "caption".
        source: kept in the index.
    """
    images = content.images
    names = {hashtags_column: None}
    for image in images:
        names |= {name: None for name, value in (image.metadata or {}).items() if _holds_words(value)}
    return ShardIndex(
        keys=np.array([image.key.encode("utf-8", "surrogateescape") for image in images] or [b""], np.bytes_)[
            : len(images)
        ],
        offsets=np.array([image.offset for image in images], np.int64),
        sizes=np.array([image.size for image in images], np.int64),
        crc32=np.array([image.crc32 for image in images], np.uint32),
        hashtags={name: _column(images, name) for name in names},
        tar_sha256=content.sha256,
        tar_bytes=content.num_bytes,
        ignored=content.ignored,
        source=source,
        origins=Origins.of([image.metadata for image in images]),
    )


def _holds_words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _parse(metadata: dict[str, Any], name: str) -> list[str]:
    if name in metadata:
        return parse_hashtags(metadata[name])
    column = name.removeprefix(CAPTION)
    if name == column or column not in metadata:
        raise ValueError(f"no {column!r} in the .json")
    return parse_caption(metadata[column])


def _column(images: Iterable[TarImage], name: str) -> RawHashtags:
    rows: list[list[str]] = []
    problems: Counter[str] = Counter()
    for image in images:
        found: list[str] = []
        if image.metadata is None:
            problems[image.problem] += 1
        else:
            try:
                found = _parse(image.metadata, name)
            except ValueError as reason:
                problems[str(reason)] += 1
        rows.append(found)
    return encode_hashtags(rows, dict(sorted(problems.items())))


def encode_hashtags(rows: list[list[str]], problems: dict[str, int] | None = None) -> RawHashtags:
    """Returns the hashtags of n images, each a list, as a column."""
    names = sorted({hashtag for row in rows for hashtag in row})
    code = {name: i for i, name in enumerate(names)}
    codes = np.array([code[hashtag] for row in rows for hashtag in row], np.int32)
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return RawHashtags(indptr, codes, names, problems or {})


def index_tar(tar_path: str | Path, hashtags_column: str = "hashtags", source: str = "") -> ShardIndex:
    """Reads a tar and returns its index, which is not written.

    Raises:
        ShardError: see :func:`wsl_d2.data.format.tar.read_tar`.
    """
    return make_index(read_tar(tar_path), hashtags_column, source)


def write_index(tar_path: str | Path, index: ShardIndex) -> None:
    """Writes a shard's index atomically beside the tar."""
    arrays: dict[str, Any] = {
        "keys": index.keys,
        "offsets": index.offsets,
        "sizes": index.sizes,
        "crc32": index.crc32,
    }
    for place, column in enumerate(index.hashtags.values()):
        arrays |= {
            f"hashtags{place}_indptr": column.indptr,
            f"hashtags{place}_codes": column.codes,
            f"hashtags{place}_names": _json_bytes(column.names),
        }
    if index.origins:
        arrays |= {
            "users": index.origins.users,
            "years": index.origins.years,
            "places": index.origins.places,
            "place_names": _json_bytes(index.origins.place_names),
        }
    facts = {
        "version": _VERSION,
        "columns": list(index.hashtags),
        "problems": [column.problems for column in index.hashtags.values()],
        "tar_sha256": index.tar_sha256,
        "tar_bytes": index.tar_bytes,
        "ignored": index.ignored,
        "source": index.source,
    }
    save_arrays(index_path(tar_path), arrays | {"facts": _json_bytes(facts)})


def _json_bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays to an .npz, atomically and not compressed."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def read_index(tar_path: str | Path, *, with_hashtags: bool = True, mapped: bool = False) -> ShardIndex:
    """Reads a shard's index.

    Args:
        tar_path: the shard.
        with_hashtags: read the raw hashtags and the origins, too, which training does not need.
        mapped: see :func:`map_arrays`.

    Raises:
        ShardError: the index is missing, unreadable, of another version, or contradicts itself.
    """
    path = index_path(tar_path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            facts = _facts(arrays)
            hashtags = {}
            for place, name in enumerate(facts["columns"] if with_hashtags else ()):
                hashtags[name] = RawHashtags(
                    arrays[f"hashtags{place}_indptr"],
                    arrays[f"hashtags{place}_codes"],
                    json.loads(bytes(arrays[f"hashtags{place}_names"])),
                    facts["problems"][place],
                )
            index = ShardIndex(
                keys=arrays["keys"],
                offsets=arrays["offsets"],
                sizes=arrays["sizes"],
                crc32=arrays["crc32"],
                hashtags=hashtags,
                tar_sha256=facts["tar_sha256"],
                tar_bytes=facts["tar_bytes"],
                ignored={kind: (count, first) for kind, (count, first) in facts["ignored"].items()},
                source=facts["source"],
                origins=_origins(arrays) if with_hashtags else None,
            )
        _check(index)
    except _DAMAGE as error:
        raise ShardError(f"{path}: missing or damaged shard index ({error}); index the shard again.") from error
    return map_arrays(index, path, ("keys", "offsets", "sizes", "crc32")) if mapped else index


def read_origins(tar_path: str | Path) -> Origins | None:
    """Returns the origins of a shard's images alone, None if its tar names none.

    Raises:
        ShardError: the index is missing, unreadable or of another version.
    """
    path = index_path(tar_path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            _facts(arrays)
            return _origins(arrays)
    except _DAMAGE as error:
        raise ShardError(f"{path}: missing or damaged shard index ({error}); index the shard again.") from error


def _origins(arrays: Any) -> Origins | None:
    if "users" not in arrays:
        return None
    names = json.loads(bytes(arrays["place_names"]))
    return Origins(arrays["users"], arrays["years"], arrays["places"], names)


def read_facts(tar_path: str | Path) -> dict[str, Any]:
    """Returns of a shard's index what takes no arrays: "tar_sha256", "tar_bytes", "ignored", "source", "columns", and
    the columns' "problems".

    Raises:
        ShardError: the index is missing, unreadable or of another version.
    """
    path = index_path(tar_path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return _facts(arrays)
    except _DAMAGE as error:
        raise ShardError(f"{path}: missing or damaged shard index ({error}); index the shard again.") from error


def _facts(arrays: Any) -> dict[str, Any]:
    if "facts" not in arrays:
        raise ValueError("it was written by an older version")
    facts = json.loads(bytes(arrays["facts"]))
    if facts["version"] != _VERSION:
        raise ValueError(f"its version is {facts['version']}, this wsl_d2 reads {_VERSION}")
    return facts


def _check(index: ShardIndex) -> None:
    n = len(index.keys)
    lengths = {len(index.offsets), len(index.sizes), len(index.crc32)}
    if index.origins:
        lengths |= {len(index.origins.users), len(index.origins.years), len(index.origins.places)}
    lengths |= {len(column.indptr) - 1 for column in index.hashtags.values()}
    if lengths != {n}:
        raise ValueError(f"its arrays have {sorted(lengths | {n})} images")
    if n and (index.offsets.min() < 0 or index.sizes.min() < 0):
        raise ValueError("its numbers are out of range")
    for column in index.hashtags.values():
        in_range = not len(column.codes) or 0 <= column.codes.min() <= column.codes.max() < len(column.names)
        if column.indptr[-1] != len(column.codes) or (np.diff(column.indptr) < 0).any() or not in_range:
            raise ValueError("its hashtags are out of range")


def map_arrays(value: _Arrays, path: Path, names: tuple[str, ...]) -> _Arrays:
    """Returns the same dataclass with arrays as views of the .npz file that they were read from and checked in, so that
    they take the system's memory once for all processes, and only as long as there is room."""
    found: dict[str, Any] = {}
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name not in names or member.compress_type:
                continue
            file.seek(member.header_offset + 26)  # of the lengths of the name and of the extra field after it
            lengths = file.read(4)
            file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), os.SEEK_CUR)
            if np.lib.format.read_magic(file) != (1, 0):
                continue
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            found[name] = np.frombuffer(mapping, dtype, math.prod(shape), file.tell()).reshape(shape)
    return replace(value, **found)  # type: ignore[type-var]
