"""Readers of tagged posts: YFCC100M metadata, JSONL, Parquet and WebDataset tars, as chunks of keys and hashtags.

A row that cannot be used is not lost: it comes out with the reason.
"""

from __future__ import annotations

import bz2
import gzip
import json
import tarfile
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

FORMATS = ("yfcc100m", "jsonl", "parquet", "webdataset")
CHUNK_ROWS = 200_000
MAX_ROW_BYTES = 1 << 20
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

# Columns of YFCC100M's metadata (Thomee et al., arXiv 1503.01817): files of 25 columns begin with a row number and
# have a hash after the identifier; the older ones of 23 columns do not.
_YFCC_COLUMNS = {25: (1, 10, 24), 23: (0, 8, 22)}  # number of columns -> identifier, user tags, marker (1: video)


class CorpusError(ValueError):
    """A file of posts cannot be read, or a folder of results does not fit what is asked for."""


@dataclass
class Chunk:
    """Some rows of a file.

    Attributes:
        keys: (n,) strings, the images' keys.
        hashtags: (n,) lists of strings, as people wrote them.
        num_rows: rows read, whatever became of them.
        skipped: reason -> rows that are no images, such as videos.
        quarantined: (row number, reason, beginning of the row) of rows that cannot be used.
    """

    keys: pa.Array
    hashtags: pa.ListArray
    num_rows: int
    skipped: dict[str, int] = field(default_factory=dict)
    quarantined: list[tuple[int, str, str]] = field(default_factory=list)


class _BadRow(ValueError):
    """The reason why a row cannot be used."""


class _SkippedRow(ValueError):
    """The reason why a row is no image."""


def detect_post_format(path: str) -> str:
    """Returns the format that a file's name stands for.

    Raises:
        CorpusError: the name says nothing.
    """
    name = path.lower().removesuffix(".bz2").removesuffix(".gz")
    for ending, kind in ((".parquet", "parquet"), (".jsonl", "jsonl"), (".ndjson", "jsonl"), (".tar", "webdataset")):
        if name.endswith(ending):
            return kind
    if "yfcc100m" in name or name.endswith(".tsv"):
        return "yfcc100m"
    raise CorpusError(f"{path}: the name tells no format; give --format, one of {', '.join(FORMATS)}.")


def read_posts(
    path: str,
    kind: str,
    key_column: str = "key",
    hashtags_column: str = "hashtags",
    row_groups: tuple[int, int] | None = None,
) -> Iterator[Chunk]:
    """Reads a file chunk by chunk; memory stays bounded however large it is.

    Args:
        path: local, or a URL that fsspec knows; ``.bz2`` and ``.gz`` are unpacked.
        kind: one of ``FORMATS``.
        key_column, hashtags_column: names in JSONL, Parquet and WebDataset's JSON members. Hashtags are a list of
            strings, or one string with blanks or commas between them.
        row_groups: of a Parquet file, first and behind the last; all if None.

    Raises:
        CorpusError: the file cannot be read, is cut off, or has no such column.
    """
    try:
        if kind == "parquet":
            yield from _read_parquet(path, key_column, hashtags_column, row_groups)
        elif kind == "webdataset":
            yield from _read_webdataset(path, hashtags_column)
        elif kind == "yfcc100m":
            yield from _read_lines(path, _parse_yfcc)
        elif kind == "jsonl":
            yield from _read_lines(path, lambda line: _parse_json(line, key_column, hashtags_column))
        else:
            raise CorpusError(f"unknown format {kind!r}; choose one of {', '.join(FORMATS)}.")
    except (OSError, EOFError, tarfile.TarError, pa.ArrowException) as error:
        raise CorpusError(f"{path}: not readable as {kind} to its end ({error}).") from error


def _open(path: str) -> Any:
    file = fsspec.open(path, "rb").open()
    if path.endswith(".bz2"):
        return bz2.open(file)
    return gzip.open(file) if path.endswith(".gz") else file


class _Collector:
    """Gathers rows until there are enough for a chunk."""

    def __init__(self) -> None:
        self.row = 0
        self._start()

    def _start(self) -> None:
        self._keys: list[str] = []
        self._hashtags: list[list[str]] = []
        self._rows = 0
        self._skipped: dict[str, int] = {}
        self._quarantined: list[tuple[int, str, str]] = []

    def add(self, raw: bytes, parse: Callable[[bytes], tuple[str, list[str]]]) -> None:
        self.row += 1
        self._rows += 1
        try:
            if len(raw) > MAX_ROW_BYTES:
                raise _BadRow(f"longer than {MAX_ROW_BYTES} bytes")
            key, hashtags = parse(raw)
        except _SkippedRow as reason:
            self._skipped[str(reason)] = self._skipped.get(str(reason), 0) + 1
        except _BadRow as reason:
            self._quarantined.append((self.row, str(reason), raw[:300].decode("utf-8", "backslashreplace")))
        else:
            self._keys.append(key)
            self._hashtags.append(hashtags)

    def is_full(self) -> bool:
        return self._rows >= CHUNK_ROWS

    def take(self) -> Chunk:
        chunk = Chunk(
            pa.array(self._keys, pa.large_string()),
            pa.array(self._hashtags, pa.large_list(pa.large_string())),
            self._rows,
            self._skipped,
            self._quarantined,
        )
        self._start()
        return chunk


def _read_lines(path: str, parse: Callable[[bytes], tuple[str, list[str]]]) -> Iterator[Chunk]:
    collector = _Collector()
    with _open(path) as file:
        for line in _lines(file):
            if line.strip():
                collector.add(line, parse)
            if collector.is_full():
                yield collector.take()
    yield collector.take()


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines without their end; one longer than MAX_ROW_BYTES comes cut off behind that, not in many pieces."""
    while line := file.readline(MAX_ROW_BYTES + 2):
        whole = line.endswith(b"\n")
        while not whole and (rest := file.readline(MAX_ROW_BYTES)):
            whole = rest.endswith(b"\n")
        yield line.rstrip(b"\r\n")


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRow("invalid UTF-8") from error


def _parse_yfcc(line: bytes) -> tuple[str, list[str]]:
    columns = _text(line).split("\t")
    if len(columns) not in _YFCC_COLUMNS:
        raise _BadRow(f"{len(columns)} columns instead of 25 or 23")
    key_at, tags_at, marker_at = _YFCC_COLUMNS[len(columns)]
    key, tags, marker = columns[key_at], columns[tags_at], columns[marker_at]
    if not (key.isascii() and key.isdecimal()):
        raise _BadRow("the identifier is no number")
    if marker not in ("0", "1"):
        raise _BadRow("the photo/video marker is neither 0 nor 1")
    if marker == "1":
        raise _SkippedRow("video")
    try:
        return key, [urllib.parse.unquote_plus(tag, errors="strict") for tag in tags.split(",") if tag]
    except UnicodeDecodeError as error:
        raise _BadRow("tags are no URL-encoded UTF-8") from error


def _parse_json(line: bytes, key_column: str, hashtags_column: str) -> tuple[str, list[str]]:
    try:
        row = json.loads(_text(line))
    except (ValueError, RecursionError) as error:
        if isinstance(error, _BadRow):
            raise
        raise _BadRow("invalid JSON") from error
    if not isinstance(row, dict):
        raise _BadRow("no JSON object")
    return _key(row.get(key_column), key_column), _hashtags(row.get(hashtags_column), hashtags_column)


def _key(value: Any, name: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise _BadRow(f"no {name}")
    return _encodable(value, name)


def _hashtags(value: Any, name: str) -> list[str]:
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    if not isinstance(value, list):
        raise _BadRow(f"no {name}")
    if not all(isinstance(tag, str) for tag in value):
        raise _BadRow(f"{name} are not all strings")
    return [_encodable(tag, name) for tag in value]


def _encodable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold halves of surrogate pairs
        raise _BadRow(f"{name}: invalid Unicode") from error
    return text


def _read_parquet(
    path: str, key_column: str, hashtags_column: str, row_groups: tuple[int, int] | None
) -> Iterator[Chunk]:
    with fsspec.open(path, "rb") as file:
        table = pq.ParquetFile(file)
        if missing := {key_column, hashtags_column} - set(table.schema_arrow.names):
            raise CorpusError(
                f"{path} has no column {', '.join(sorted(missing))}; it has {', '.join(table.schema_arrow.names)}. "
                "Choose with --key-column and --hashtags-column."
            )
        kind = table.schema_arrow.field(hashtags_column).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not is_list and not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
            raise CorpusError(f"{path}: column {hashtags_column} is {kind}; it must hold lists of strings, or strings.")
        start, end = row_groups or (0, table.num_row_groups)
        first = sum(table.metadata.row_group(i).num_rows for i in range(start))
        columns = [key_column, hashtags_column]
        for batch in table.iter_batches(CHUNK_ROWS, row_groups=list(range(start, end)), columns=columns):
            yield _parquet_chunk(batch.column(key_column), batch.column(hashtags_column), is_list, first)
            first += len(batch)


def _parquet_chunk(keys: pa.Array, hashtags: pa.Array, is_list: bool, first: int) -> Chunk:
    keys = keys.cast(pa.large_string())
    if not is_list:
        hashtags = pc.split_pattern_regex(pc.utf8_trim(hashtags, " ,"), r"[\s,]+")
    hashtags = hashtags.cast(pa.large_list(pa.large_string()))
    return _without_bad_rows(keys, hashtags, first)


def _without_bad_rows(keys: pa.Array, hashtags: pa.Array, first: int) -> Chunk:
    no_key = keys.is_null().to_numpy(zero_copy_only=False)
    no_hashtags = hashtags.is_null().to_numpy(zero_copy_only=False) & ~no_key
    null_tag = np.zeros(len(keys), bool)
    if hashtags.flatten().null_count:
        offsets = hashtags.offsets.to_numpy()
        nulls = np.concatenate([[0], np.cumsum(hashtags.values.is_null().to_numpy(zero_copy_only=False))])
        null_tag = (nulls[offsets[1:]] > nulls[offsets[:-1]]) & ~no_key & ~no_hashtags
    bad = no_key | no_hashtags | null_tag
    reasons = {0: "no key", 1: "no hashtags", 2: "hashtags are not all strings"}
    kinds = np.select([no_key, no_hashtags, null_tag], [0, 1, 2], default=-1)
    quarantined = []
    for row in np.flatnonzero(bad).tolist():
        raw = f"{keys[row].as_py()}\t{hashtags[row].as_py()}"[:300]
        quarantined.append((first + row + 1, reasons[int(kinds[row])], raw))
    good = pa.array(~bad)
    return Chunk(keys.filter(good), hashtags.filter(good), len(keys), {}, quarantined)


def _read_webdataset(path: str, hashtags_column: str) -> Iterator[Chunk]:
    collector = _Collector()
    with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        images: set[str] = set()
        described: dict[str, bytes] = {}
        end = 0
        for member in tar:
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if not member.isreg():
                continue
            key, _, extension = member.name.partition(".")
            if extension.lower() in IMAGE_EXTENSIONS:
                images.add(key)
            elif extension.lower() == "json":
                content = tar.extractfile(member)
                described[key] = content.read(MAX_ROW_BYTES + 1) if content else b""
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError(f"cut off after {end} bytes")
        for key in sorted(images | described.keys()):
            collector.add(described.get(key, b""), _tar_parser(key, key in images, key in described, hashtags_column))
            if collector.is_full():
                yield collector.take()
    yield collector.take()


def _tar_parser(key: str, has_image: bool, has_json: bool, column: str) -> Callable[[bytes], tuple[str, list[str]]]:
    def parse(raw: bytes) -> tuple[str, list[str]]:
        if not has_image:
            raise _BadRow(f"{key}: JSON without an image")
        if not has_json:
            raise _BadRow(f"{key}: image without JSON")
        try:
            row = json.loads(_text(raw))
        except (ValueError, RecursionError) as error:
            raise _BadRow(f"{key}: invalid JSON") from error
        if not isinstance(row, dict):
            raise _BadRow(f"{key}: no JSON object")
        return key, _hashtags(row.get(column), column)

    return parse
