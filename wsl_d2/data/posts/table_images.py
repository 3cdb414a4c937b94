"""Encoded images in a column of Parquet files, such as those of Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from wsl_d2.data.posts.readers import PostsError

_BATCH = 32  # images in memory at a time


class TableImages:
    """The images of a column that holds bytes, or structs with "bytes"; quick if asked for in the order of the rows.

    Args:
        column: its name.
    """

    def __init__(self, column: str):
        self.column = column
        self._path = ""
        self._first = 0  # row of the first image in the batch
        self._batch: pa.Array = pa.array([], pa.binary())
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def check(self, path: str) -> None:
        """Raises PostsError where a file has no such column of images."""
        with fsspec.open(path, "rb") as file:
            schema = pq.read_schema(file)
        names = [name for name, kind in zip(schema.names, schema.types, strict=True) if _holds_images(kind)]
        if self.column not in names:
            raise PostsError(
                f"{path} has no column {self.column!r} of images; columns of bytes are "
                f"{', '.join(map(repr, names)) or 'none'}."
            )

    def read(self, path: str, row: int) -> bytes:
        """Returns the image of a row; raises ValueError with the reason where there is none."""
        if path != self._path or row < self._first:
            self._start(path, row)
        while row >= self._first + len(self._batch):
            self._first += len(self._batch)
            self._batch = next(self._batches).column(0)
        value: Any = self._batch[row - self._first].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise ValueError("no image")
        return data

    def _start(self, path: str, row: int) -> None:
        table = pq.ParquetFile(fsspec.open(path, "rb").open())
        first = group = 0
        while first + table.metadata.row_group(group).num_rows <= row:
            first += table.metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, table.num_row_groups))
        self._batches = table.iter_batches(_BATCH, row_groups=groups, columns=[self.column])
        self._path, self._first, self._batch = path, first, self._batch[:0]


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_images(kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
