"""Posts to labels: every format, the account of every row, damaged input, interruption, and who runs it."""

import bz2
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import urllib.parse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wsl_d2.data.posts import count as corpus_module
from wsl_d2.data.posts import readers as posts_module
from wsl_d2.data.posts.count import CorpusError, CorpusOptions, plan_parts, prepare_hashtags, process_part
from wsl_d2.hashtags import HashtagMapping, Vocabulary, load_wordnet, normalize_hashtag, read_hashtag_counts

ROOT = Path(__file__).parents[3]
TAGS = [
    "#dog",
    "dogs",
    "#Pizza",
    "brownbear",
    "#bear",
    "cat",
    "#BrownBear",
    "tbt",
    "#canon",
    "собака",
    "🐶",
    "",
    "2019",
    "a,b",
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.json"
    Vocabulary.build("coco", load_wordnet()).save(path)
    return path


def make_posts(num_posts, seed=0):
    rng = random.Random(seed)
    return [(f"{seed}{i:06d}", rng.choices(TAGS, k=rng.randrange(0, 6))) for i in range(num_posts)]


def write_parquet(path, posts, **settings):
    table = pa.table(
        {"key": [key for key, _ in posts], "hashtags": pa.array([tags for _, tags in posts], pa.list_(pa.string()))}
    )
    pq.write_table(table, path, **settings)


def write_jsonl(path, posts):
    path.write_text("".join(json.dumps({"key": key, "hashtags": tags}) + "\n" for key, tags in posts), encoding="utf-8")


def yfcc_line(key, tags, columns=25, marker="0"):
    values = ["x"] * columns
    key_at, tags_at = (1, 10) if columns == 25 else (0, 8)
    values[key_at], values[-1] = key, marker
    values[tags_at] = ",".join(urllib.parse.quote_plus(tag) for tag in tags)
    return "\t".join(values)


def write_tar(path, posts):
    with tarfile.open(path, "w") as tar:
        for key, tags in posts:
            for name, data in ((f"{key}.jpg", b"pixels"), (f"{key}.json", json.dumps({"hashtags": tags}).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def run(inputs, output, vocabulary, **options):
    chosen = CorpusOptions(str(vocabulary) if vocabulary else None, **options)
    return prepare_hashtags([str(path) for path in inputs], output, chosen, workers=1, progress=False)


def labels_in(output):
    rows = pa.concat_tables([pq.read_table(path) for path in sorted((output / "labels").glob("*.parquet"))]).to_pylist()
    return {row["key"]: row["labels"] for row in rows}


def expected_labels(posts, vocabulary):
    mapping = HashtagMapping(Vocabulary.load(vocabulary))
    labels = {key: sorted({label for tag in tags for label in mapping.map(tag).labels}) for key, tags in posts}
    return {key: found for key, found in labels.items() if found}


def account_is_complete(manifest):
    rows = manifest["labelled"] + manifest["unlabelled"]
    rows += sum(manifest["skipped"].values()) + sum(manifest["quarantined"].values())
    pairs = manifest["pairs_mapped"] + sum(manifest["pairs_dropped"].values())
    return rows == manifest["rows_in"] and pairs == manifest["pairs_in"]


def test_every_format_gives_the_labels_of_the_mapping(tmp_path, vocabulary):
    posts = {
        kind: make_posts(120, seed)
        for seed, kind in enumerate(("parquet", "jsonl", "webdataset", "new", "old"), start=1)
    }
    write_parquet(tmp_path / "a.parquet", posts["parquet"], row_group_size=50)
    write_jsonl(tmp_path / "b.jsonl", posts["jsonl"])
    write_tar(tmp_path / "c.tar", posts["webdataset"])
    for name, kind, columns in (("d_yfcc100m.bz2", "new", 25), ("e.tsv", "old", 23)):
        # Commas separate tags there and cannot be in one; empty tags do not exist.
        posts[kind] = [(key, [tag for tag in tags if tag and "," not in tag]) for key, tags in posts[kind]]
        lines = "".join(yfcc_line(key, tags, columns) + "\n" for key, tags in posts[kind])
        data = lines.encode()
        (tmp_path / name).write_bytes(bz2.compress(data) if name.endswith("bz2") else data)
    output = tmp_path / "out"
    manifest = run([path for path in tmp_path.iterdir() if path.is_file()], output, vocabulary)
    everything = [post for part in posts.values() for post in part]
    assert labels_in(output) == expected_labels(everything, vocabulary)
    assert manifest["rows_in"] == 600 and account_is_complete(manifest)

    counts = {}
    for _, tags in everything:
        for key in {normalize_hashtag(tag) for tag in tags} - {""}:
            counts[key] = counts.get(key, 0) + 1
    assert read_hashtag_counts(output / "hashtag_counts.tsv") == counts
    listed = [int(line.split("\t")[1]) for line in (output / "hashtag_counts.tsv").read_text("utf-8").splitlines()]
    assert listed == sorted(listed, reverse=True)
    per_label = {
        int(line.split("\t")[0]): int(line.split("\t")[2])
        for line in (output / "label_counts.tsv").read_text().splitlines()
    }
    assert sum(per_label.values()) == sum(map(len, labels_in(output).values())) and len(per_label) == 80


def test_counting_alone_needs_no_vocabulary(tmp_path):
    write_jsonl(tmp_path / "posts.jsonl", [("1", ["#Dog", "dog"]), ("2", ["dog", "tbt"])])
    manifest = run([tmp_path / "posts.jsonl"], tmp_path / "out", None)
    assert read_hashtag_counts(tmp_path / "out" / "hashtag_counts.tsv") == {"dog": 2, "tbt": 1}
    assert (manifest["pairs_in"], manifest["pairs_mapped"]) == (4, 0) and not (
        tmp_path / "out" / "label_counts.tsv"
    ).exists()


def test_policies_and_columns_are_passed_on(tmp_path, vocabulary):
    table = pa.table({"photo": [7, 8], "tags": ["#poodle, tbt", "dog cat"]})
    pq.write_table(table, tmp_path / "posts.parquet")
    options = dict(key_column="photo", hashtags_column="tags")
    assert run([tmp_path / "posts.parquet"], tmp_path / "strict", vocabulary, **options)["labelled"] == 1
    dog = Vocabulary.load(vocabulary).synsets.index("n02084071")
    run([tmp_path / "posts.parquet"], tmp_path / "near", vocabulary, max_distance=3, **options)
    assert labels_in(tmp_path / "near")["7"] == [dog]
    with pytest.raises(CorpusError, match="no column hashtags, key; it has photo, tags"):
        run([tmp_path / "posts.parquet"], tmp_path / "wrong", vocabulary)


BAD_LINES = {
    b'{"key": "1"}': "no hashtags",
    b'{"hashtags": ["dog"]}': "no key",
    b'{"key": "", "hashtags": []}': "no key",
    b'{"key": true, "hashtags": []}': "no key",
    b'{"key": "1", "hashtags": [1]}': "hashtags are not all strings",
    b'{"key": "1", "hashtags": {"a": 1}}': "no hashtags",
    b'{"key": "1", "hashtags": ["dog"]': "invalid JSON",
    b"[1, 2]": "no JSON object",
    b"null": "no JSON object",
    b"\xff\xfe\x00": "invalid UTF-8",
    b"[" * 100_000: "invalid JSON",
    b'{"key": "1", "hashtags": ["\\ud800"]}': "hashtags: invalid Unicode",
    b'{"key": "' + b"x" * (1 << 20) + b'", "hashtags": []}': "longer than 1048576 bytes",
}


def test_bad_lines_are_quarantined_with_their_reason(tmp_path, vocabulary):
    good = b'{"key": "9", "hashtags": ["dog"]}'
    (tmp_path / "posts.jsonl").write_bytes(b"\n".join([good, *BAD_LINES, b"", good]))
    manifest = run([tmp_path / "posts.jsonl"], tmp_path / "out", vocabulary)
    expected = {}
    for reason in BAD_LINES.values():
        expected[reason] = expected.get(reason, 0) + 1
    assert manifest["quarantined"] == dict(sorted(expected.items()))
    assert manifest["labelled"] == 2 and account_is_complete(manifest)
    lines = [json.loads(line) for line in (tmp_path / "out/quarantine/part-000000.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == list(BAD_LINES.values())
    assert [line["row"] for line in lines] == list(range(2, 2 + len(BAD_LINES)))
    assert lines[0]["beginning"] == '{"key": "1"}' and lines[0]["file"].endswith("posts.jsonl")


def test_videos_and_bad_lines_of_yfcc100m(tmp_path, vocabulary):
    lines = [yfcc_line("1", ["dog"]), yfcc_line("2", ["dog"], marker="1"), yfcc_line("x", ["dog"]), "a\tb"]
    lines += [yfcc_line("3", ["dog"], marker="7"), ""]
    lines[-1] = "\t".join("%FF" if i == 10 else value for i, value in enumerate(yfcc_line("4", []).split("\t")))
    (tmp_path / "p.tsv").write_text("\n".join(lines))
    manifest = run([tmp_path / "p.tsv"], tmp_path / "out", vocabulary)
    assert manifest["skipped"] == {"video": 1} and manifest["labelled"] == 1
    assert manifest["quarantined"] == {
        "2 columns instead of 25 or 23": 1,
        "tags are no URL-encoded UTF-8": 1,
        "the identifier is no number": 1,
        "the photo/video marker is neither 0 nor 1": 1,
    }


def test_nulls_in_parquet_and_stray_members_in_tars(tmp_path, vocabulary):
    keys = pa.array(["1", None, "3", "4"])
    tags = pa.array([["dog"], ["dog"], None, ["dog", None]], pa.list_(pa.string()))
    pq.write_table(pa.table({"key": keys, "hashtags": tags}), tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name, data in (("x.jpg", b""), ("y.json", b'{"hashtags": ["dog"]}'), ("z.jpg", b""), ("z.json", b"{")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    manifest = run([tmp_path / "a.parquet", tmp_path / "b.tar"], tmp_path / "out", vocabulary)
    assert manifest["labelled"] == 1 and sum(manifest["quarantined"].values()) == 6 and account_is_complete(manifest)


@pytest.mark.parametrize("name", ["cut.bz2", "cut.parquet", "cut.tar", "empty.parquet"])
def test_a_file_that_is_cut_off_is_one_error_that_names_it(tmp_path, vocabulary, name):
    posts = make_posts(3000)
    whole = tmp_path / "whole"
    if name.endswith("bz2"):
        whole.write_bytes(bz2.compress("".join(yfcc_line(key, ["dog"]) + "\n" for key, _ in posts).encode()))
    elif name.endswith("parquet"):
        write_parquet(whole, posts)
    else:
        write_tar(whole, posts[:100])
    data = whole.read_bytes()
    whole.unlink()
    (tmp_path / name).write_bytes(b"" if name.startswith("empty") else data[: len(data) // 2])
    kind = "yfcc100m" if name.endswith("bz2") else "auto"
    with pytest.raises(CorpusError, match=f"{name}: not readable as"):
        run([tmp_path / name], tmp_path / "out", vocabulary, format=kind)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_random_damage_never_crashes_and_is_accounted_for(tmp_path, vocabulary):
    """Thousands of rows with random bytes flipped, cut, repeated; every one is labelled, unlabelled or quarantined."""
    rng = random.Random(0)
    written = 0
    for kind in ("jsonl", "tsv"):
        lines = []
        for key, tags in make_posts(1500, seed=8):
            line = json.dumps({"key": key, "hashtags": tags}) if kind == "jsonl" else yfcc_line(key, tags)
            data = bytearray(line.encode())
            for _ in range(rng.randrange(0, 6)):
                position = rng.randrange(len(data))
                data[position : position + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
            data = bytes(data).replace(b"\n", b" ").replace(b"\r", b" ")
            lines.append(data)
            written += bool(data.strip())
        (tmp_path / f"posts.{kind}").write_bytes(b"\n".join(lines))
    manifest = run([tmp_path / "posts.jsonl", tmp_path / "posts.tsv"], tmp_path / "out", vocabulary)
    assert manifest["rows_in"] == written and account_is_complete(manifest)
    in_quarantine = sum(len(path.read_text().splitlines()) for path in (tmp_path / "out/quarantine").iterdir())
    assert in_quarantine == sum(manifest["quarantined"].values()) > 300


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_neither_chunks_nor_a_full_table_nor_workers_change_a_byte(tmp_path, vocabulary, monkeypatch):
    for number in range(3):
        write_parquet(tmp_path / f"{number}.parquet", make_posts(400, seed=number + 1), row_group_size=100)
    options = CorpusOptions(str(vocabulary))
    prepare_hashtags([str(tmp_path / "*.parquet")], tmp_path / "one", options, workers=1, progress=False)
    prepare_hashtags([str(tmp_path / "*.parquet")], tmp_path / "two", options, workers=2, progress=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    part = plan_parts([str(tmp_path / "0.parquet")], options)[0]
    checksum = Vocabulary.load(vocabulary).checksum
    first = process_part(part, options, checksum, tmp_path / "a")
    monkeypatch.setattr(corpus_module, "_REMEMBERED", 3)
    monkeypatch.setattr(posts_module, "CHUNK_ROWS", 64)
    corpus_module._open_table.cache_clear()
    second = process_part(part, options, checksum, tmp_path / "b")
    corpus_module._open_table.cache_clear()
    assert {k: v for k, v in first.items() if k != "files"} == {k: v for k, v in second.items() if k != "files"}
    assert labels_in(tmp_path / "a") == labels_in(tmp_path / "b")


def test_killed_half_way_and_started_again(tmp_path, vocabulary):
    for number in range(12):
        write_parquet(tmp_path / f"{number:02d}.parquet", make_posts(3000, seed=number + 1))
    arguments = [str(tmp_path / "*.parquet"), "--vocabulary", str(vocabulary), "--workers", "1"]
    command = [sys.executable, "tools/prepare_hashtags.py", *arguments]
    environment = os.environ | {"WSL_D2_REGISTER": "0"}
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, "--output", str(killed)], cwd=ROOT, env=environment, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 90
    while len(list(killed.glob("parts/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("parts/*.json")}
    assert 2 <= len(finished) < 12 and not (killed / "manifest.json").exists()
    again = subprocess.run(
        [*command, "--output", str(killed)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    run([tmp_path / "*.parquet"], tmp_path / "whole", vocabulary)
    assert contents(killed) == contents(tmp_path / "whole")


def test_a_folder_of_other_results_is_refused(tmp_path, vocabulary):
    write_jsonl(tmp_path / "posts.jsonl", make_posts(20))
    run([tmp_path / "posts.jsonl"], tmp_path / "out", vocabulary)
    with pytest.raises(CorpusError, match="max_distance: 0 before, 2 now"):
        run([tmp_path / "posts.jsonl"], tmp_path / "out", vocabulary, max_distance=2)
    write_jsonl(tmp_path / "posts.jsonl", make_posts(30))
    with pytest.raises(CorpusError, match="files have changed"):
        run([tmp_path / "posts.jsonl"], tmp_path / "out", vocabulary)


def test_wrong_input_is_one_clear_error(tmp_path, vocabulary):
    with pytest.raises(CorpusError, match=r"nothing\.jsonl: there is no such file"):
        run([tmp_path / "nothing.jsonl"], tmp_path / "out", vocabulary)
    (tmp_path / "posts.dat").write_text("")
    with pytest.raises(CorpusError, match="the name tells no format; give --format"):
        run([tmp_path / "posts.dat"], tmp_path / "out", vocabulary)
