"""Counting hashtags: exact counts, an account of every row, interruption, wrong input."""

import collections
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import wsl_d2
from posts_files import make_posts, write_jsonl, write_parquet, write_tar

from wsl_d2.data.posts import readers
from wsl_d2.data.posts.count import CountOptions, PostsError, count_hashtags, plan_parts
from wsl_d2.hashtags import read_hashtag_counts

ROOT = Path(__file__).parents[3]


def count(inputs, output, workers=1, **options):
    return count_hashtags([str(path) for path in inputs], output, CountOptions(**options), workers=workers)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_image_counts_once_for_a_hashtag_as_it_is_written(tmp_path):
    posts = [*make_posts(120, 1), ("x", ["#Dog", "Dog", " #Dog ", "dog", "🐶", "#", ""])]
    write_parquet(tmp_path / "a.parquet", posts[:60], row_group_size=50)
    write_jsonl(tmp_path / "b.jsonl", posts[60:100])
    write_tar(tmp_path / "c.tar", posts[100:])
    output = tmp_path / "out"
    manifest = count([tmp_path / name for name in ("a.parquet", "b.jsonl", "c.tar")], output)
    expected = collections.Counter(tag for _, tags in posts for tag in {t.strip().lstrip("#") for t in tags} - {""})
    assert read_hashtag_counts(output / "hashtag_counts.tsv") == expected
    listed = [int(line.split("\t")[1]) for line in (output / "hashtag_counts.tsv").read_text("utf-8").splitlines()]
    assert listed == sorted(listed, reverse=True) and manifest["distinct"] == len(expected)
    assert manifest["rows"] == manifest["posts"] == 121


def test_rows_that_cannot_be_used_are_kept_with_their_reason(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"key": "1", "hashtags": ["a"]}\n{"key": "2"\n{"hashtags": []}\n')
    manifest = count([tmp_path / "a.jsonl"], tmp_path / "out")
    assert manifest["rejected"] == {"invalid JSON": 1, "no key": 1} and manifest["posts"] == 1
    lines = [json.loads(line) for line in (tmp_path / "out/rejected/part-000000.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in lines] == [(2, "invalid JSON"), (3, "no key")]
    assert lines[0]["beginning"] == '{"key": "2"' and lines[0]["file"].endswith("a.jsonl")


def test_neither_chunks_nor_workers_change_a_byte(tmp_path, monkeypatch):
    for number in range(3):
        write_parquet(tmp_path / f"{number}.parquet", make_posts(400, seed=number + 1), row_group_size=100)
    count([tmp_path / "*.parquet"], tmp_path / "one")
    count([tmp_path / "*.parquet"], tmp_path / "two", workers=2)
    monkeypatch.setattr(readers, "CHUNK_ROWS", 64)
    count([tmp_path / "*.parquet"], tmp_path / "three")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_killed_half_way_and_started_again(tmp_path):
    for number in range(12):
        write_parquet(tmp_path / f"{number:02d}.parquet", make_posts(30_000, seed=number + 1))
    command = [sys.executable, "-m", "wsl_d2", "hashtags", "count", str(tmp_path / "*.parquet"), "--workers", "1"]
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, "--output", str(killed)], cwd=ROOT, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 90
    while len(list(killed.glob("parts/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("parts/*.json")}
    assert 2 <= len(finished) < 12 and not (killed / "manifest.json").exists()
    wsl_d2("hashtags", "count", tmp_path / "*.parquet", "--workers", 1, "--output", killed)
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    count([tmp_path / "*.parquet"], tmp_path / "whole")
    assert contents(killed) == contents(tmp_path / "whole")


def test_a_folder_of_other_results_is_refused(tmp_path):
    write_jsonl(tmp_path / "posts.jsonl", make_posts(20))
    count([tmp_path / "posts.jsonl"], tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(PostsError, match="key_column: 'key' before, 'id' now.*Nothing was written"):
        count([tmp_path / "posts.jsonl"], tmp_path / "out", key_column="id")
    write_jsonl(tmp_path / "posts.jsonl", make_posts(30))
    with pytest.raises(PostsError, match="files have changed"):
        count([tmp_path / "posts.jsonl"], tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_wrong_input_is_one_clear_error(tmp_path):
    with pytest.raises(PostsError, match=r"nothing\.jsonl: there is no such file"):
        count([tmp_path / "nothing.jsonl"], tmp_path / "out")
    pq.write_table(pa.table({"key": ["1"], "tags": [["a"]]}), tmp_path / "a.parquet")
    with pytest.raises(PostsError, match="1 of 1 parts could not be read.*has no column 'hashtags'"):
        count([tmp_path / "a.parquet"], tmp_path / "out")
    (tmp_path / "b.jsonl").write_text('{"key": "1", "tags": ["a"]}\n')
    printed = wsl_d2("hashtags", "count", tmp_path / "b.jsonl", "--output", tmp_path / "none", code=2)
    assert "0 hashtags in 1 rows, by the column 'hashtags'" in printed and printed.count("\n") == 1
    assert not (tmp_path / "none/manifest.json").exists()


def test_of_a_folder_of_img2dataset_the_tars_are_the_posts(tmp_path):
    write_tar(tmp_path / "00000.tar", make_posts(5))
    write_parquet(tmp_path / "00000.parquet", make_posts(5))
    (tmp_path / "00000_stats.json").write_text("{}")
    assert [part.path for part in plan_parts([str(tmp_path)], CountOptions())] == [str(tmp_path / "00000.tar")]
