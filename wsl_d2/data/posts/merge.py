"""Tables of (hashtag, images) sorted by hashtag: sums of many of them, in memory or as files larger than memory.

Files are merged by ranges of hashtags, each read from all files at once; the ranges are chosen from the statistics that
Parquet keeps of its row groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from wsl_d2.files import open_atomically

COUNTS_SCHEMA = pa.schema([("hashtag", pa.large_string()), ("images", pa.int64())])
_GROUP_ROWS = 32_768
_RANGE_ROWS = 500_000


def merge_counts(tables: list[pa.Table]) -> pa.Table:
    """Returns the sums over tables of (hashtag, images), sorted by hashtag."""
    everything = pa.concat_tables([COUNTS_SCHEMA.empty_table(), *tables]).sort_by("hashtag").combine_chunks()
    if not len(everything):
        return everything
    hashtags, images = (column.chunk(0) for column in everything.columns)
    starts = np.flatnonzero(np.concatenate([[True], pc.not_equal(hashtags[1:], hashtags[:-1])]))
    sums = np.add.reduceat(images.to_numpy(), starts)
    return pa.Table.from_arrays([hashtags.take(pa.array(starts)), pa.array(sums)], schema=COUNTS_SCHEMA)


def write_counts(tables: Iterable[pa.Table], path: Path) -> None:
    """Writes tables of ascending hashtags as one Parquet file, atomically."""
    with (
        open_atomically(path) as file,
        pq.ParquetWriter(file, COUNTS_SCHEMA, compression="zstd", store_schema=False) as writer,
    ):
        for table in tables:
            writer.write_table(table, row_group_size=_GROUP_ROWS)


def merge_files(files: Sequence[Path], path: Path) -> None:
    """Writes the sums over sorted files of counts, atomically; holds a range of hashtags in memory at a time."""
    write_counts(_ranges(files), path)


def _ranges(files: Sequence[Path]) -> Iterator[pa.Table]:
    counts = _open(files)
    hashtag = pc.field("hashtag")
    start = None
    for end in [*_boundaries(files), None]:
        inside = [*([hashtag >= start] if start is not None else []), *([hashtag < end] if end is not None else [])]
        chosen = inside[0] & inside[-1] if inside else None
        yield merge_counts([counts.to_table(filter=chosen)])
        start = end


def _boundaries(files: Sequence[Path]) -> list[str]:
    """Hashtags, ascending, between which the files have about _RANGE_ROWS rows in all."""
    groups: list[tuple[str, int]] = []
    for file in files:
        footer = pq.read_metadata(file)
        for group in map(footer.row_group, range(footer.num_row_groups)):
            statistics = group.column(0).statistics
            if statistics is not None and statistics.has_min_max:
                groups.append((statistics.max, group.num_rows))
    boundaries, rows = [], 0
    for hashtag, number in sorted(groups):
        rows += number
        if rows >= _RANGE_ROWS:
            boundaries.append(hashtag)
            rows = 0
    return boundaries


def read_most_frequent_first(path: Path) -> Iterator[pa.Table]:
    """Yields the rows of a sorted file of counts, those of most images first and of as many by hashtag.

    Rows of the same number of images come as they lie in the file; different numbers are sorted about _RANGE_ROWS rows
    at a time.
    """
    counts = _open([path])
    sizes: Counter[int] = Counter()  # number of images -> of how many hashtags
    for batch in counts.to_batches(columns=["images"]):
        for images, size in zip(*np.unique(batch.column(0).to_numpy(), return_counts=True), strict=True):
            sizes[int(images)] += int(size)
    frequent: list[int] = []
    rows = 0
    for images, size in sorted(sizes.items(), reverse=True):
        if frequent and rows + size > _RANGE_ROWS:
            yield from _read_range(counts, frequent)
            frequent, rows = [], 0
        frequent.append(images)
        rows += size
    if frequent:
        yield from _read_range(counts, frequent)


def _read_range(counts: ds.Dataset, images: list[int]) -> Iterator[pa.Table]:
    chosen = (pc.field("images") <= images[0]) & (pc.field("images") >= images[-1])
    if len(images) > 1:
        table = counts.to_table(filter=chosen)
        yield table.sort_by([("images", "descending"), ("hashtag", "ascending")])
    else:
        for batch in counts.to_batches(filter=chosen):
            yield pa.Table.from_batches([batch])


def _open(files: Sequence[Path]) -> ds.Dataset:
    return ds.dataset([str(file) for file in files], COUNTS_SCHEMA, format="parquet")
