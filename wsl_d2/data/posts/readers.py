"""Readers of tagged posts as people have them: YFCC100M, Parquet, JSON, CSV, SQLite and WebDataset tars.

All give chunks of keys and raw hashtags. A row that cannot be used is not lost and stops nothing: it comes out with the
reason. Which column holds the key and the hashtags is said by name; a dot leads into what is nested.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import sqlite3
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wsl_d2.data.format.origin import Origin, read_origin
from wsl_d2.data.format.tar import IMAGE_EXTENSIONS, read_tar
from wsl_d2.data.remote import is_url
from wsl_d2.errors import UserError
from wsl_d2.hashtags import parse_caption, parse_hashtags

FORMATS = ("yfcc100m", "parquet", "jsonl", "json", "csv", "sqlite", "webdataset")
CHUNK_ROWS = 200_000
_FIRST_ROWS = 1000
MAX_ROW_BYTES = 1 << 20
_WHOLE_FLOATS = 2.0**53  # beyond, a float has lost digits of a whole number

# Columns of YFCC100M's metadata (Thomee et al., arXiv 1503.01817): files of 25 columns begin with a row number and
# have a hash after the identifier; the older ones of 23 columns do not.
# number of columns -> identifier, user tags, marker (1: video), user, date taken, longitude, latitude
_YFCC_COLUMNS = {25: (1, 10, 24, 3, 5, 12, 13), 23: (0, 8, 22, 1, 3, 10, 11)}
_YFCC_NAMES = ("photoid", "usertags", "marker", "uid", "datetaken", "longitude", "latitude")  # of its SQLite file
_YFCC_TABLE = "yfcc100m_dataset"  # of its SQLite file
_ENDINGS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tar": "webdataset",
    ".sql": "sqlite",
    ".sqlite": "sqlite",
    ".db": "sqlite",
}

Row = tuple[str, list[str], Origin]


class PostsError(UserError, ValueError):
    """A file of posts cannot be read, or a folder of results does not fit what is asked for."""


@dataclass(frozen=True)
class Columns:
    """Where a row's key and hashtags are.

    Attributes:
        key: name of the column.
        hashtags: name of the column; see :func:`wsl_d2.hashtags.parse.parse_hashtags` for what it may hold.
        is_caption: only the #words of its text are hashtags.
        user, time, place: names of the columns of an image's origin, "" for none; two columns of coordinates are
            "longitude,latitude".
        with_origins: whether YFCC100M's, which are known, are read.
        seen: names in the rows of JSON read so far, if the origin is asked for.
    """

    key: str = "key"
    hashtags: str = "hashtags"
    is_caption: bool = False
    user: str = ""
    time: str = ""
    place: str = ""
    with_origins: bool = True
    seen: set[str] = field(default_factory=set, compare=False)

    @property
    def origin(self) -> list[str]:
        """The columns of the origin that are asked for."""
        return [name for name in (self.user, self.time, *self.place.split(",")) if name]

    def of_origin(self) -> dict[str, str]:
        """The columns of the origin that are asked for -> the options that choose them."""
        return dict.fromkeys(self.origin, "--user-column, --time-column or --place-column")

    def origin_of(self, value: Callable[[str], Any]) -> Origin:
        """Returns the origin of a row, of which ``value`` gives a column."""
        if not self.origin:
            return Origin()
        user, time = (value(name) if name else None for name in (self.user, self.time))
        place = [value(name) for name in self.place.split(",") if name]
        return read_origin(user, time, place if len(place) > 1 else place[0] if place else None)

    def origin_in(self, row: dict) -> Origin:
        """Returns the origin of a row of JSON."""
        if self.origin:
            self.seen.update(row)
        return self.origin_of(lambda name: _nested(row, name))

    def parse(self, value: Any) -> list[str]:
        """Returns the hashtags of a row; ValueError is the reason why there are none."""
        return parse_caption(value) if self.is_caption else parse_hashtags(value)


@dataclass
class Chunk:
    """Some rows of a file.

    Attributes:
        keys: (n,) strings, the images' keys.
        hashtags: (n,) lists of strings, as people wrote them.
        num_rows: rows read, whatever became of them.
        skipped: reason -> rows that are not images, such as videos.
        rejected: (row number, reason, beginning of the row) of rows that cannot be used.
        origins: (n,) of the images; empty where no column of them was asked for and the format has none.
        rows: (n,) of Parquet, which rows of the file these are, from 0.
    """

    keys: pa.Array
    hashtags: pa.ListArray
    num_rows: int
    skipped: dict[str, int] = field(default_factory=dict)
    rejected: list[tuple[int, str, str]] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    rows: np.ndarray | None = None


class _SkippedRow(ValueError):
    """The reason why a row is not an image."""


def detect_post_format(path: str) -> str:
    """Returns the format that a file's name stands for.

    Raises:
        PostsError: the name says nothing.
    """
    name = path.lower().removesuffix(".bz2").removesuffix(".gz")
    for ending, kind in _ENDINGS.items():
        if name.endswith(ending):
            return kind
    if "yfcc100m" in name or name.endswith(".tsv"):
        return "yfcc100m"
    raise PostsError(f"{path}: the name tells no format; give --format, one of {', '.join(FORMATS)}.")


def read_posts(
    path: str,
    kind: str,
    key_column: str = "key",
    hashtags_column: str = "hashtags",
    caption_column: str | None = None,
    row_groups: tuple[int, int] | None = None,
    chunk_rows: int | None = None,
    *,
    user_column: str = "",
    time_column: str = "",
    place_column: str = "",
    with_origins: bool = True,
) -> Iterator[Chunk]:
    """Reads a file chunk by chunk; memory stays bounded however large it is (but for "json", one list of all).

    Args:
        path: local, or a URL that fsspec knows; ``.bz2`` and ``.gz`` are unpacked.
        kind: one of ``FORMATS``.
        key_column, hashtags_column: names in all formats but YFCC100M's.
        caption_column: a text whose #words are the hashtags, instead of ``hashtags_column``.
        row_groups: of a Parquet file, first and behind the last; all if None.
        user_column, time_column, place_column, with_origins: see :class:`Columns`.
        chunk_rows: rows of a chunk; 200,000 if None.

    Raises:
        PostsError: the file cannot be read, is truncated, or has no such column.
    """
    is_caption = caption_column is not None
    origin = user_column, time_column, place_column, with_origins
    columns = Columns(key_column, caption_column or hashtags_column, is_caption, *origin)
    if kind not in FORMATS:
        raise PostsError(f"unknown format {kind!r}; choose one of {', '.join(FORMATS)}.")
    try:
        if kind == "parquet":
            yield from _read_parquet(path, columns, row_groups, chunk_rows or CHUNK_ROWS)
        else:
            for chunk in _collect(_rows_of(path, kind, columns), chunk_rows or CHUNK_ROWS):
                if columns.seen:
                    _check_names(path, sorted(columns.seen), columns.of_origin())
                yield chunk
    except FileNotFoundError as error:
        raise PostsError(f"{path}: there is no such file.") from error
    except (OSError, EOFError, pa.ArrowException, sqlite3.Error, csv.Error) as error:
        raise PostsError(f"{path}: not readable as {kind} to its end ({error}).") from error


def _rows_of(path: str, kind: str, columns: Columns) -> Iterator[tuple[bytes, Callable[[], Row]]]:
    if kind == "webdataset":
        yield from _tar_rows(path, columns)
    elif kind == "yfcc100m":
        yield from _yfcc_rows(path, columns.with_origins)
    elif kind == "sqlite":
        yield from _sqlite_rows(path, columns)
    elif kind == "jsonl":
        yield from ((line, _json_parser(line, columns)) for line in _lines(path) if line.strip())
    elif kind == "csv":
        yield from _csv_rows(path, columns)
    else:
        yield from ((_shown(row), _row_parser(row, columns)) for row in _json_list(path))


def first_rows(
    files: Iterable[tuple[str, str]],
    key_column: str = "key",
    hashtags_column: str = "hashtags",
    caption_column: str | None = None,
    number: int = 10,
) -> list[tuple[str, list[str]]]:
    """Returns (key, hashtags) of the first posts, to be looked at before all are read.

    Args:
        files: (path, format); for the others see :func:`read_posts`.
        number: of posts.

    Raises:
        PostsError: see :func:`read_posts`; or there is no hashtag in the first 200,000 rows.
    """
    found: list[tuple[str, list[str]]] = []
    reasons: dict[str, int] = {}
    example = ""
    paths: list[str] = []
    rows = hashtags = 0
    for path, kind in files:
        paths.append(path)
        columns = key_column, hashtags_column, caption_column
        for chunk in read_posts(path, kind, *columns, chunk_rows=_FIRST_ROWS, with_origins=False):
            rows += chunk.num_rows
            hashtags += len(chunk.hashtags.flatten())
            for reason, number_of in [*chunk.skipped.items(), *((reason, 1) for _, reason, _ in chunk.rejected)]:
                reasons[reason] = reasons.get(reason, 0) + number_of
            example = example or next((beginning for _, _, beginning in chunk.rejected), "")
            part = slice(0, number - len(found))
            found += zip(chunk.keys[part].to_pylist(), chunk.hashtags[part].to_pylist(), strict=True)
            if hashtags and len(found) == number:
                return found
            if rows >= CHUNK_ROWS:
                break
    if hashtags:
        return found
    raise PostsError(no_hashtags(paths, rows, caption_column or hashtags_column, reasons, example))


def no_hashtags(paths: list[str], rows: int, column: str, reasons: dict[str, int], example: str = "") -> str:
    """Returns the error that the rows of files hold no hashtag; ``example`` is the beginning of a rejected one."""
    files = ", ".join(paths[:3]) + (f" and {len(paths) - 3:,} more" if len(paths) > 3 else "")
    listed = ", ".join(f"{reason}: {number:,}" for reason, number in reasons.items())
    found = f" ({listed})" * bool(listed) + f", such as {example[:100]}" * bool(example)
    return (
        f"{files}: 0 hashtags in {rows:,} rows, by the column {column!r}{found}. Choose the right one with "
        "--hashtags-column or --caption-column, and --key-column."
    )


def _open(path: str) -> Any:
    file = fsspec.open(path, "rb").open()
    if is_url(path):  # files of stores read lines of any length alone
        file = io.BufferedReader(file, 1 << 20)
    if path.endswith(".bz2"):
        return bz2.open(file)
    return gzip.open(file) if path.endswith(".gz") else file


def _collect(rows: Iterable[tuple[bytes, Callable[[], Row]]], chunk_rows: int) -> Iterator[Chunk]:
    """Gathers (beginning of the row, what gives its key and hashtags) into chunks."""
    keys: list[str] = []
    hashtags: list[list[str]] = []
    origins: list[Origin] = []
    skipped: dict[str, int] = {}
    rejected: list[tuple[int, str, str]] = []
    start = number = 0

    def take() -> Chunk:
        nonlocal start
        chunk = Chunk(
            pa.array(keys, pa.large_string()),
            pa.array(hashtags, pa.large_list(pa.large_string())),
            number - start,
            dict(skipped),
            list(rejected),
            list(origins),
        )
        start = number
        for one in (keys, hashtags, skipped, rejected, origins):
            one.clear()
        return chunk

    for number, (raw, parse) in enumerate(rows, start=1):
        try:
            if len(raw) > MAX_ROW_BYTES:
                raise ValueError(f"longer than {MAX_ROW_BYTES} bytes")
            key, found, origin = parse()
        except _SkippedRow as reason:
            skipped[str(reason)] = skipped.get(str(reason), 0) + 1
        except ValueError as reason:
            rejected.append((number, str(reason), raw[:300].decode("utf-8", "backslashreplace")))
        else:
            keys.append(key)
            hashtags.append(found)
            origins.append(origin)
        if number - start >= chunk_rows:
            yield take()
    yield take()


def _shown(row: Any) -> bytes:
    return repr(row)[: MAX_ROW_BYTES + 1].encode("utf-8", "backslashreplace")


def _lines(path: str) -> Iterator[bytes]:
    """Lines without their end; one longer than MAX_ROW_BYTES is truncated, not split."""
    with _open(path) as file:
        first = True
        while line := file.readline(MAX_ROW_BYTES + 2):
            whole = line.endswith(b"\n")
            while not whole and (rest := file.readline(MAX_ROW_BYTES)):
                whole = rest.endswith(b"\n")
            if first:
                line, first = line.removeprefix(b"\xef\xbb\xbf"), False
            yield line.rstrip(b"\r\n")


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("invalid UTF-8") from error


def _key(value: Any, name: str) -> str:
    """Returns a key as text, unchanged; a float that stands for a whole number, as pandas writes, as that number."""
    if isinstance(value, float) and value.is_integer():
        if abs(value) >= _WHOLE_FLOATS:
            raise ValueError(f"{name} is a float that has lost digits")
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"no {name}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode") from error
    return value


def _nested(row: Any, name: str) -> Any:
    """The value of a column, None where it is not; dots lead into objects and lists, unless a name has them itself."""
    if isinstance(row, dict) and name in row:
        return row[name]
    head, dot, rest = name.partition(".")
    if not dot:
        return row[int(name)] if isinstance(row, list) and name.isdecimal() and int(name) < len(row) else None
    return _nested(_nested(row, head), rest)


def _row_parser(row: Any, columns: Columns) -> Callable[[], Row]:
    def parse() -> Row:
        if not isinstance(row, dict):
            raise ValueError("no JSON object")
        origin = columns.origin_in(row)
        return _key(_nested(row, columns.key), columns.key), columns.parse(_nested(row, columns.hashtags)), origin

    return parse


def _json_parser(line: bytes, columns: Columns) -> Callable[[], Row]:
    def parse() -> Row:
        text = _text(line)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError("invalid JSON") from error
        return _row_parser(row, columns)()

    return parse


def _json_list(path: str) -> list:
    with _open(path) as file:
        try:
            content = json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise PostsError(
                f"{path}: not valid JSON ({error}). A file with one object a line is read with --format jsonl."
            ) from error
    if isinstance(content, dict):  # {"posts": [...]}
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        raise PostsError(f"{path}: the JSON must be a list of objects, one for each post.")
    return content


def _csv_rows(path: str, columns: Columns) -> Iterator[tuple[bytes, Callable[[], Row]]]:
    limit = csv.field_size_limit(MAX_ROW_BYTES)  # of the whole process
    try:
        with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
            header = text.readline()
            delimiter = max(",;\t", key=header.count)
            names = next(csv.reader([header], delimiter=delimiter), [])
            _check_columns(path, names, columns)
            rows = csv.reader(text, delimiter=delimiter, strict=True)
            while True:
                try:
                    values = next(rows, None)
                except csv.Error as error:
                    yield b"", _failing(f"invalid CSV: {error}")
                    continue
                if values is None:
                    return
                if any(values[len(names) :]):
                    yield _shown(values), _failing("more values than columns")
                elif values:
                    row = dict(zip(names, values, strict=False))
                    yield _shown(row), _row_parser(row, columns)
    finally:
        csv.field_size_limit(limit)


def _check_columns(path: str, names: list[str], columns: Columns) -> None:
    if repeated := sorted({name for name in names if names.count(name) > 1} & {columns.key, columns.hashtags}):
        raise PostsError(f"{path} has several columns named {repeated[0]!r}; rename all but one.")
    wanted = columns.of_origin()
    wanted |= {columns.key: "--key-column", columns.hashtags: "--hashtags-column or --caption-column"}
    _check_names(path, names, wanted)


def _check_names(path: str, names: list[str], wanted: dict[str, str]) -> None:
    if missing := [name for name in wanted if name not in names and name.partition(".")[0] not in names]:
        raise PostsError(
            f"{path} has no column {missing[0]!r}; it has {', '.join(map(repr, names)) or 'none'}. Choose one with "
            f"{wanted[missing[0]]}."
        )


def _sqlite_rows(path: str, columns: Columns) -> Iterator[tuple[bytes, Callable[[], Row]]]:
    """Rows of YFCC100M's table, or of the one table that has the columns."""
    connection = sqlite3.connect(f"file:{urllib.parse.quote(path)}?mode=ro&immutable=1", uri=True)
    try:
        connection.text_factory = bytes
        tables = [
            name.decode()
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
        ]
        if _YFCC_TABLE in tables:
            there = {_text(row[1]) for row in connection.execute(f'PRAGMA table_info("{_YFCC_TABLE}")')}
            own = _YFCC_NAMES if columns.with_origins else _YFCC_NAMES[:3]
            names = ", ".join(name if name in there else "NULL" for name in own)
            for values in connection.execute(f"SELECT {names} FROM {_YFCC_TABLE}"):
                raw = [_raw(value) for value in values]
                yield b"\t".join(raw[:3]), _yfcc_parser(*raw)
            return
        described = {
            name: [_text(row[1]) for row in connection.execute(f"PRAGMA table_info({_quoted(name)})")]
            for name in tables
        }
        wanted = dict.fromkeys((columns.key, columns.hashtags, *columns.origin))
        fitting = [name for name, names in described.items() if wanted.keys() <= set(names)]
        if len(fitting) != 1:
            shown = "; ".join(f"{name}: {', '.join(names)}" for name, names in described.items()) or "no table"
            raise PostsError(
                f"{path}: {len(fitting)} tables have the columns {' and '.join(map(repr, wanted))} ({shown}). "
                "Choose with --key-column and --hashtags-column."
            )
        chosen = ", ".join(map(_quoted, wanted))
        for values in connection.execute(f"SELECT {chosen} FROM {_quoted(fitting[0])}"):
            yield b"\t".join(map(_raw, values)), _sqlite_parser(dict(zip(wanted, values, strict=True)), columns)
    finally:
        connection.close()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _raw(value: Any) -> bytes:
    return value if isinstance(value, bytes) else b"" if value is None else str(value).encode()


def _sqlite_parser(values: dict[str, Any], columns: Columns) -> Callable[[], Row]:
    def parse() -> Row:
        row = {name: _text(value) if isinstance(value, bytes) else value for name, value in values.items()}
        return _row_parser(row, columns)()

    return parse


def _yfcc_rows(path: str, with_origins: bool) -> Iterator[tuple[bytes, Callable[[], Row]]]:
    chosen = {number: places if with_origins else places[:3] for number, places in _YFCC_COLUMNS.items()}
    for line in _lines(path):
        if not line.strip():
            continue
        parts = line.split(b"\t")
        if len(parts) in chosen:
            yield line, _yfcc_parser(*[parts[i] for i in chosen[len(parts)]])
        else:
            yield (
                line,
                _failing(
                    f"{len(parts)} columns, not YFCC100M's 25 or 23 (a table with a header is read with --format csv)"
                ),
            )


def _failing(reason: str) -> Callable[[], Row]:
    def parse() -> Row:
        raise ValueError(reason)

    return parse


def _yfcc_parser(raw_key: bytes, raw_tags: bytes, raw_marker: bytes, *raw_origin: bytes) -> Callable[[], Row]:
    def parse() -> Row:
        key, tags, marker = _text(raw_key), _text(raw_tags), _text(raw_marker)
        if not (key.isascii() and key.isdecimal()):
            raise ValueError("the identifier is not a number")
        if marker not in ("0", "1"):
            raise ValueError("the photo/video marker is neither 0 nor 1")
        if marker == "1":
            raise _SkippedRow("video")
        try:
            found = [urllib.parse.unquote_plus(tag, errors="strict") for tag in tags.split(",") if tag]
        except UnicodeDecodeError as error:
            raise ValueError("tags are not URL-encoded UTF-8") from error
        if not raw_origin:
            return key, found, Origin()
        user, taken, *coordinates = (raw.decode("ascii", "replace") for raw in raw_origin)
        return key, found, read_origin(user, taken, coordinates)

    return parse


def _tar_rows(path: str, columns: Columns) -> Iterator[tuple[bytes, Callable[[], Row]]]:
    content = read_tar(path)
    for image in sorted(content.images, key=lambda image: image.key):
        yield image.key.encode("utf-8", "surrogateescape"), _tar_parser(image, columns)
    for _ in range(content.ignored.get("json without an image", (0, ""))[0]):
        yield b"", _failing("JSON without an image")
    for kind, (number, first) in content.ignored.items():
        if kind.endswith("more than one dot") and kind[1:].split()[0] in IMAGE_EXTENSIONS:
            yield from ((first.encode("utf-8", "surrogateescape"), _failing(kind)) for _ in range(number))


def _tar_parser(image: Any, columns: Columns) -> Callable[[], Row]:
    def parse() -> Row:
        if image.metadata is None:
            raise ValueError(image.problem)
        origin = columns.origin_in(image.metadata)
        return image.key, columns.parse(_nested(image.metadata, columns.hashtags)), origin

    return parse


def _read_parquet(path: str, columns: Columns, row_groups: tuple[int, int] | None, chunk_rows: int) -> Iterator[Chunk]:
    with fsspec.open(path, "rb") as file:
        table = pq.ParquetFile(file)
        _check_columns(path, table.schema_arrow.names, columns)
        start, end = row_groups or (0, table.num_row_groups)
        first = sum(table.metadata.row_group(i).num_rows for i in range(start))
        wanted = (columns.key, columns.hashtags, *columns.origin)
        names = list(dict.fromkeys(name.partition(".")[0] for name in wanted))
        names += [name for name in wanted if name in table.schema_arrow.names]
        for batch in table.iter_batches(
            chunk_rows, row_groups=list(range(start, end)), columns=list(dict.fromkeys(names))
        ):
            keys, hashtags = (_arrow_column(path, batch, name) for name in (columns.key, columns.hashtags))
            origins = {name: _arrow_column(path, batch, name).to_pylist() for name in columns.origin}
            yield _parquet_chunk(path, keys, hashtags, columns, first, origins)
            first += len(batch)


def _arrow_column(path: str, batch: pa.RecordBatch, name: str) -> pa.Array:
    names = batch.schema.names
    head, *rest = [name] if name in names else name.split(".")
    column = batch.column(names.index(head))
    for part in rest:
        if not pa.types.is_struct(column.type) or column.type.get_field_index(part) < 0:
            raise PostsError(f"{path}: there is no {name!r}; {head!r} is {column.type}.")
        column = pc.struct_field(column, part)
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _parquet_chunk(
    path: str, keys: pa.Array, hashtags: pa.Array, columns: Columns, first: int, origins: dict[str, list]
) -> Chunk:
    """Whole columns at once where they are lists of sound strings, row by row otherwise."""
    bad: dict[int, str] = {}
    keys = _parquet_keys(path, keys, columns.key, bad)
    kind = hashtags.type
    if pa.types.is_fixed_size_list(kind) or getattr(pa.types, "is_list_view", lambda _: False)(kind):
        hashtags = hashtags.cast(pa.large_list(kind.value_type))
    if pa.types.is_list(hashtags.type) or pa.types.is_large_list(hashtags.type):
        if columns.is_caption:
            raise PostsError(f"{path}: column {columns.hashtags!r} is {kind}, no caption; use --hashtags-column.")
        if pa.types.is_dictionary(hashtags.type.value_type):
            hashtags = hashtags.cast(pa.large_list(hashtags.type.value_type.value_type))
        if not _is_text(hashtags.type.value_type):
            raise PostsError(
                f"{path}: column {columns.hashtags!r} is {kind}; it must hold lists of strings, or strings."
            )
        if _is_sound(hashtags.flatten()):
            lists = hashtags.cast(pa.large_list(pa.large_string()))
        else:
            lists = _by_row(hashtags.cast(pa.large_list(pa.large_binary())), columns, bad)
        lists = _without_empty(_reject_null_tags(lists, bad))
    elif _is_text(kind) or pa.types.is_null(kind):
        lists = _by_row(hashtags.cast(pa.large_binary()), columns, bad)
    else:
        raise PostsError(f"{path}: column {columns.hashtags!r} is {kind}; it must hold lists of strings, or strings.")
    rejected = []
    for row in sorted(bad):
        raw = f"{_shown_value(keys, row)}\t{_shown_value(hashtags, row)}"[:300]
        rejected.append((first + row + 1, bad[row], raw))
    good = np.ones(len(keys), bool)
    good[list(bad)] = False
    mask = pa.array(good)
    found: list[Origin] = []
    if origins:
        rows = (dict(zip(origins, values, strict=True)) for values in zip(*origins.values(), strict=True))
        found = [columns.origin_of(row.__getitem__) for row, is_good in zip(rows, good, strict=True) if is_good]
    lists = pc.fill_null(lists, []).filter(mask)
    return Chunk(keys.filter(mask), lists, len(keys), {}, rejected, found, first + np.flatnonzero(good))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _is_sound(strings: pa.Array) -> bool:
    """Whether all are UTF-8, which Parquet does not check."""
    try:
        strings.validate(full=True)
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return False
    return True


def _parquet_keys(path: str, keys: pa.Array, name: str, bad: dict[int, str]) -> pa.Array:
    """Keys as text; the places of those that cannot be used go to ``bad``, with the reason."""
    if pa.types.is_integer(keys.type) or (pa.types.is_decimal(keys.type) and keys.type.scale == 0):
        found = keys.cast(pa.large_string())
    elif _is_text(keys.type) and _is_sound(keys):
        found = keys.cast(pa.large_string())
    elif _is_text(keys.type) or pa.types.is_floating(keys.type):
        values = keys.cast(pa.large_binary()).to_pylist() if _is_text(keys.type) else keys.to_pylist()
        texts: list[str | None] = []
        for row, value in enumerate(values):
            try:
                texts.append(_key(_text(value) if isinstance(value, bytes) else value, name))
            except ValueError as reason:
                bad[row] = str(reason)
                texts.append(None)
        return pa.array(texts, pa.large_string())
    else:
        raise PostsError(f"{path}: column {name!r} is {keys.type}; keys are texts or whole numbers.")
    empty = pc.fill_null(pc.equal(pc.binary_length(found), 0), True)
    bad |= dict.fromkeys(np.flatnonzero(empty.to_numpy(zero_copy_only=False)).tolist(), f"no {name}")
    return found


def _by_row(values: pa.Array, columns: Columns, bad: dict[int, str]) -> pa.Array:
    """Texts, or lists of texts, as bytes, to lists of strings."""
    rows: list[list[str]] = []
    for row, value in enumerate(values.to_pylist()):
        found: list[str] = []
        try:
            if isinstance(value, list):
                value = [_text(item) if item is not None else None for item in value]
                found = [item for item in value if item] if None not in value else parse_hashtags(value)
            else:
                found = columns.parse(_text(value) if value is not None else None)
        except ValueError as reason:
            bad.setdefault(row, str(reason))
        rows.append(found)
    return pa.array(rows, pa.large_list(pa.large_string()))


def _reject_null_tags(lists: pa.Array, bad: dict[int, str]) -> pa.Array:
    if lists.flatten().null_count:
        nulls = np.concatenate([[0], np.cumsum(lists.values.is_null().to_numpy(zero_copy_only=False))])
        offsets = lists.offsets.to_numpy()
        rows = np.flatnonzero(nulls[offsets[1:]] > nulls[offsets[:-1]])
        for row in rows.tolist():
            bad.setdefault(row, "hashtags are not all strings")
    return lists


def _without_empty(lists: pa.Array) -> pa.Array:
    """Leaves out empty strings, which fill up lists of fixed length."""
    lengths = pc.binary_length(lists.flatten())
    if not pc.any(pc.equal(lengths, 0)).as_py():
        return lists
    row = np.repeat(np.arange(len(lists)), pc.fill_null(pc.list_value_length(lists), 0).to_numpy())
    keep = pc.fill_null(pc.greater(lengths, 0), True)
    counts = np.bincount(row[keep.to_numpy(zero_copy_only=False)], minlength=len(lists))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int64())
    return pa.LargeListArray.from_arrays(offsets, lists.flatten().filter(keep))


def _shown_value(values: pa.Array, row: int) -> str:
    try:
        return str(values[row].as_py())
    except UnicodeDecodeError:
        return "(no UTF-8)"


__all__ = ["CHUNK_ROWS", "FORMATS", "Chunk", "Columns", "PostsError", "detect_post_format", "read_posts"]
