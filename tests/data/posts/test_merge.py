"""Sums of counts larger than memory: the same as in memory, in the same order."""

import collections
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from posts_files import write_parquet

from wsl_d2.data.posts import count as counting
from wsl_d2.data.posts import merge
from wsl_d2.data.posts.count import count_hashtags
from wsl_d2.data.posts.merge import COUNTS_SCHEMA, merge_files, read_most_frequent_first, write_counts


@pytest.fixture
def small_ranges(monkeypatch):
    monkeypatch.setattr(merge, "_GROUP_ROWS", 7)
    monkeypatch.setattr(merge, "_RANGE_ROWS", 40)


def tables(number, rng):
    """Counts of some hashtags: frequent and rare ones, of all scripts, and one longer than Parquet's statistics."""
    for _ in range(number):
        names = {f"{rng.choice('aéя東🐶Z')}{min(rng.randrange(400), rng.randrange(400))}" for _ in range(150)}
        names |= {"x" * 5000}
        yield {name: rng.choice([1, 1, 1, 2, 3, rng.randrange(1, 1000)]) for name in sorted(names)}


def as_table(counts):
    return pa.table([list(counts), list(counts.values())], schema=COUNTS_SCHEMA)


def test_merged_files_hold_the_sums_in_order(tmp_path, small_ranges):
    expected = collections.Counter()
    files = []
    for number, counts in enumerate(tables(6, random.Random(1))):
        expected.update(counts)
        files.append(tmp_path / f"{number}.parquet")
        write_counts([as_table(counts)], files[-1])
    assert len(merge._boundaries(files)) > 5
    merge_files(files, tmp_path / "sum.parquet")
    found = pq.read_table(tmp_path / "sum.parquet").to_pydict()
    assert found["hashtag"] == sorted(expected) and found["images"] == [expected[name] for name in sorted(expected)]
    rows = [row for table in read_most_frequent_first(tmp_path / "sum.parquet") for row in table.to_pylist()]
    assert [(row["hashtag"], row["images"]) for row in rows] == sorted(
        expected.items(), key=lambda item: (-item[1], item[0])
    )


def test_empty_files_merge_to_an_empty_one(tmp_path):
    for name in ("a", "b"):
        write_counts([COUNTS_SCHEMA.empty_table()], tmp_path / name)
    merge_files([tmp_path / "a", tmp_path / "b"], tmp_path / "sum")
    assert pq.read_metadata(tmp_path / "sum").num_rows == 0 and list(read_most_frequent_first(tmp_path / "sum")) == []


def test_hashtags_beyond_memory_go_through_files(tmp_path, monkeypatch, small_ranges):
    rng = random.Random(2)
    for number in range(5):
        posts = [(f"{number}-{i}", [f"tag{rng.randrange(500)}", f"tag{rng.randrange(9)}"]) for i in range(300)]
        write_parquet(tmp_path / f"{number}.parquet", posts)
    everything = count_hashtags([f"{tmp_path}/*.parquet"], tmp_path / "in_memory")
    monkeypatch.setattr(counting, "_ROWS_IN_MEMORY", 20)
    monkeypatch.setattr(counting, "_MERGED_AT_ONCE", 2)
    monkeypatch.setattr("wsl_d2.data.posts.readers.CHUNK_ROWS", 50)
    spills = []
    monkeypatch.setattr(
        counting, "merge_files", lambda files, path: (spills.append(len(files)), merge_files(files, path))
    )
    through_files = count_hashtags([f"{tmp_path}/*.parquet"], tmp_path / "through_files", workers=1)
    assert max(spills) > 2 and spills.count(2) >= 3  # of a part; of the tree
    assert through_files["distinct"] == everything["distinct"] > 400
    name = "hashtag_counts.tsv"
    assert (tmp_path / "through_files" / name).read_bytes() == (tmp_path / "in_memory" / name).read_bytes()
    assert {path.name for path in (tmp_path / "through_files").iterdir()} == {
        "counts", "rejected", "parts", "plan.json", "manifest.json", name
    }  # fmt: skip
