"""Posts as people have them: every format, odd rows, damaged files."""

import bz2
import csv
import http.server
import io
import json
import random
import sqlite3
import tarfile
import threading
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from posts_files import make_posts, write_jsonl, write_parquet, write_tar, yfcc_line

from wsl_d2.data.posts.readers import PostsError, detect_post_format, first_rows, read_posts

ROWS = [("p0", ["#golden retriever", "beach"]), ("p1", ["dog", "#cats"]), ("p2", ["New York", "hot dog"]), ("p3", [])]


def read(path, kind=None, **options):
    """[(key, hashtags)], {reason: rows}, {reason: rows that are not images}."""
    rows, rejected, skipped, number = [], {}, {}, 0
    for chunk in read_posts(str(path), kind or detect_post_format(str(path)), **options):
        assert len(chunk.keys) + len(chunk.rejected) + sum(chunk.skipped.values()) == chunk.num_rows
        number += chunk.num_rows
        rows += zip(chunk.keys.to_pylist(), chunk.hashtags.to_pylist(), strict=True)
        for _, reason, _ in chunk.rejected:
            rejected[reason] = rejected.get(reason, 0) + 1
        for reason, count in chunk.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    return rows, rejected, skipped


def test_the_first_posts_are_shown_and_a_column_without_a_hashtag_is_an_error(tmp_path):
    write_jsonl(tmp_path / "empty.jsonl", [(f"e{i}", []) for i in range(3)])
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    files = [(str(tmp_path / name), "jsonl") for name in ("empty.jsonl", "a.jsonl")]
    assert first_rows(files, number=5) == [*((f"e{i}", []) for i in range(3)), *ROWS[:2]]
    with pytest.raises(PostsError, match=r"empty\.jsonl: 0 hashtags in 3 rows, by the column 'hashtags'\. Choose"):
        first_rows(files[:1])
    with pytest.raises(
        PostsError, match=r"in 7 rows, by the column 'tags' \(no id: 7\), such as {\"key\": \"e0\""
    ) as error:
        first_rows(files, "id", "tags")
    assert all(path in str(error.value) for path, _ in files)


def test_lines_of_a_web_server_are_read(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert read(f"http://127.0.0.1:{server.server_port}/a.jsonl")[0] == ROWS
        server.shutdown()


def test_every_format_gives_the_same_posts(tmp_path):
    posts = [(key, [tag for tag in tags if tag]) for key, tags in make_posts(120)]
    write_parquet(tmp_path / "a.parquet", posts, row_group_size=50)
    write_jsonl(tmp_path / "a.jsonl", posts)
    write_tar(tmp_path / "a.tar", posts)
    (tmp_path / "a.json").write_text(json.dumps([{"key": key, "hashtags": tags} for key, tags in posts]))
    for columns, name in ((25, "a_yfcc100m.bz2"), (23, "a.tsv")):
        data = "".join(yfcc_line(key, tags, columns) + "\n" for key, tags in posts).encode()
        (tmp_path / name).write_bytes(bz2.compress(data) if name.endswith("bz2") else data)
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["key", "hashtags"], *([key, ",".join(tags)] for key, tags in posts)])
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("CREATE TABLE posts (key, hashtags)")
        database.executemany("INSERT INTO posts VALUES (?, ?)", [(key, ",".join(tags)) for key, tags in posts])
    paths = sorted(path for path in tmp_path.iterdir())
    assert len(paths) == 8
    for path in paths:
        assert read(path) == (posts, {}, {}), path


@pytest.mark.parametrize(
    "column",
    [
        pa.array([tags for _, tags in ROWS], pa.large_list(pa.large_string())),
        pa.array([[*tags, *[""] * (3 - len(tags))] for _, tags in ROWS], pa.list_(pa.string(), 3)),
        pa.array([tags for _, tags in ROWS], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        pa.array([", ".join(tags) for _, tags in ROWS]),
        pa.array([",".join(tags) for _, tags in ROWS]).dictionary_encode(),
        pa.array([repr(tags) for _, tags in ROWS]),
        pa.array([json.dumps(tags) for _, tags in ROWS]),
        pa.array(["#golden retriever,beach", "dog, #cats", "New York, hot dog", None]),
    ],
    ids=str,
)
def test_parquet_with_hashtags_of_any_type(tmp_path, column):
    pq.write_table(pa.table({"key": [key for key, _ in ROWS], "hashtags": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (ROWS, {}, {})


def test_captions_and_nested_columns(tmp_path):
    captions = ["My dog #beach #sunset.", "#a#b#c", "no tags, just my cat", "Link. #TBT, @friend", None]
    expected = [["beach", "sunset"], ["a", "b", "c"], [], ["TBT"], []]
    image = pa.array([{"path": f"p{i}", "bytes": b""} for i in range(5)])
    pq.write_table(pa.table({"image": image, "text": captions}), tmp_path / "a.parquet")
    rows, _, _ = read(tmp_path / "a.parquet", key_column="image.path", caption_column="text")
    assert rows == [(f"p{i}", tags) for i, tags in enumerate(expected)]
    posts = [{"id": i, "edges": [{"node": {"text": text}}]} for i, text in enumerate(captions)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, posts)))
    rows, _, _ = read(tmp_path / "a.jsonl", key_column="id", caption_column="edges.0.node.text")
    assert rows == [(str(i), tags) for i, tags in enumerate(expected)]


def test_keys_come_out_as_they_went_in(tmp_path):
    pq.write_table(
        pa.table({"key": [12345678901.0, 2.0, None, 2.5, 2.0**60], "hashtags": [["a"]] * 5}), tmp_path / "f.parquet"
    )
    rows, rejected, _ = read(tmp_path / "f.parquet")
    assert [key for key, _ in rows] == ["12345678901", "2"]
    assert rejected == {"no key": 2, "key is a float that has lost digits": 1}
    keys = ["a b", "c\n", "ü", "x.y", ""]
    pq.write_table(pa.table({"key": keys, "hashtags": [["a"]] * 5}), tmp_path / "t.parquet")
    rows, rejected, _ = read(tmp_path / "t.parquet")
    assert [key for key, _ in rows] == keys[:4] and rejected == {"no key": 1}
    pq.write_table(pa.table({"key": pa.array([7, 2**60], pa.int64()), "hashtags": [["a"]] * 2}), tmp_path / "i.parquet")
    assert [key for key, _ in read(tmp_path / "i.parquet")[0]] == ["7", str(2**60)]
    decimals = pa.array([7, 2**60]).cast(pa.decimal128(20, 0))
    pq.write_table(pa.table({"key": decimals, "hashtags": [["a"]] * 2}), tmp_path / "d.parquet")
    assert [key for key, _ in read(tmp_path / "d.parquet")[0]] == ["7", str(2**60)]


def test_bytes_that_are_no_text_cost_one_row(tmp_path):
    def text(values):
        return pa.array(values, pa.binary()).view(pa.string())

    bad = text([b"a", b"caf\xe9", b"c"])
    lists = pa.ListArray.from_arrays([0, 1, 2, 3], bad)
    pq.write_table(pa.table({"key": ["1", "2", "3"], "hashtags": lists}), tmp_path / "tags.parquet")
    assert read(tmp_path / "tags.parquet") == ([("1", ["a"]), ("3", ["c"])], {"invalid UTF-8": 1}, {})
    pq.write_table(pa.table({"key": bad, "hashtags": [["x"]] * 3}), tmp_path / "keys.parquet")
    assert read(tmp_path / "keys.parquet") == ([("a", ["x"]), ("c", ["x"])], {"invalid UTF-8": 1}, {})
    pq.write_table(pa.table({"key": ["1", "2", "3"], "hashtags": bad}), tmp_path / "text.parquet")
    assert read(tmp_path / "text.parquet") == ([("1", ["a"]), ("3", ["c"])], {"invalid UTF-8": 1}, {})


def test_a_byte_order_mark_is_no_part_of_the_first_post(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"key": "1", "hashtags": ["a"]}\r\n')
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfkey;hashtags\r\n1;"a"\r\n')
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"posts": [{"key": "1", "hashtags": ["a"]}]}')
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == ([("1", ["a"])], {}, {})


BAD_LINES = {
    b'{"hashtags": ["dog"]}': "no key",
    b'{"key": "", "hashtags": []}': "no key",
    b'{"key": true, "hashtags": []}': "no key",
    b'{"key": "1", "hashtags": [1]}': "hashtags are not all strings",
    b'{"key": "1", "hashtags": {"a": 1}}': "hashtags are no list and no text",
    b'{"key": "1", "hashtags": ["dog"]': "invalid JSON",
    b"[1, 2]": "no JSON object",
    b"null": "no JSON object",
    b"\xff\xfe\x00": "invalid UTF-8",
    b"[" * 100_000: "invalid JSON",
    b'{"key": "1", "hashtags": ["\\ud800"]}': "hashtags are no valid Unicode",
    b'{"key": "\\ud800", "hashtags": []}': "key is not valid Unicode",
    b'{"key": "' + b"x" * (1 << 20) + b'", "hashtags": []}': "longer than 1048576 bytes",
}


def test_bad_lines_come_out_with_their_reason(tmp_path):
    good = b'{"key": "9", "hashtags": ["dog"]}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, *BAD_LINES, b"", b'{"key": "8"}']))
    (chunk,) = read_posts(str(tmp_path / "a.jsonl"), "jsonl")
    assert [reason for _, reason, _ in chunk.rejected] == list(BAD_LINES.values())
    assert [row for row, _, _ in chunk.rejected] == list(range(2, 2 + len(BAD_LINES)))
    assert chunk.rejected[0][2] == '{"hashtags": ["dog"]}'
    assert chunk.keys.to_pylist() == ["9", "8"] and chunk.hashtags.to_pylist() == [["dog"], []]


def test_videos_and_bad_lines_of_yfcc100m(tmp_path):
    lines = [yfcc_line("1", ["dog"]), yfcc_line("2", ["dog"], marker="1"), yfcc_line("x", ["dog"]), "a\tb"]
    lines += [yfcc_line("3", ["dog"], marker="7")]
    lines += ["\t".join("%FF" if i == 10 else value for i, value in enumerate(yfcc_line("4", []).split("\t")))]
    (tmp_path / "p.tsv").write_text("\n".join(lines))
    rows, rejected, skipped = read(tmp_path / "p.tsv")
    assert rows == [("1", ["dog"])] and skipped == {"video": 1}
    assert rejected == {
        "2 columns, not YFCC100M's 25 or 23 (a table with a header is read with --format csv)": 1,
        "tags are not URL-encoded UTF-8": 1,
        "the identifier is not a number": 1,
        "the photo/video marker is neither 0 nor 1": 1,
    }


def test_the_sqlite_file_of_yfcc100m(tmp_path):
    with sqlite3.connect(tmp_path / "yfcc100m_dataset.sql") as database:
        database.execute("CREATE TABLE yfcc100m_dataset (photoid, usertags, marker)")
        rows = [("1", "caf%C3%A9,golden+gate", "0"), ("2", "dog", "1"), (3, None, 0)]
        database.executemany("INSERT INTO yfcc100m_dataset VALUES (?, ?, ?)", rows)
    assert read(tmp_path / "yfcc100m_dataset.sql") == ([("1", ["café", "golden gate"]), ("3", [])], {}, {"video": 1})


def test_nulls_in_parquet_and_stray_members_in_tars(tmp_path):
    keys = pa.array(["1", None, "3", "4"])
    tags = pa.array([["dog"], ["dog"], None, ["dog", None]], pa.list_(pa.string()))
    pq.write_table(pa.table({"key": keys, "hashtags": tags}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (
        [("1", ["dog"]), ("3", [])],
        {"no key": 1, "hashtags are not all strings": 1},
        {},
    )
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name, data in (
            ("w.jpg", b""),
            ("w.json", b"{}"),
            ("x.jpg", b""),
            ("y.json", b"{}"),
            ("z.jpg", b""),
            ("z.json", b"{"),
            ("v.1.jpg", b""),
            ("v.1.json", b"{}"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    expected = {
        "no .json": 1,
        "invalid JSON": 1,
        "JSON without an image": 1,
        ".jpg whose name has more than one dot": 1,
    }
    assert read(tmp_path / "b.tar") == ([("w", [])], expected, {})


BAD_CSV = {
    b"1,dog,cat": "more values than columns",
    b'1,"dog"s': "invalid CSV: ',' expected after '\"'",
    b"1,caf\xe9": "hashtags are no valid Unicode",
    b"1," + b"x" * ((1 << 20) + 1): "invalid CSV: field larger than field limit (1048576)",
    b'1,"dog': "invalid CSV: unexpected end of data",
}


def test_bad_lines_of_csv_cost_themselves_alone(tmp_path):
    lines = [b"key,hashtags", b"7,dog,", b"", *list(BAD_CSV)[:-1], b"8,cat", list(BAD_CSV)[-1]]
    (tmp_path / "a.csv").write_bytes(b"\r\n".join(lines))
    (chunk,) = read_posts(str(tmp_path / "a.csv"), "csv")
    assert chunk.keys.to_pylist() == ["7", "8"] and chunk.hashtags.to_pylist() == [["dog"], ["cat"]]
    assert [reason for _, reason, _ in chunk.rejected] == list(BAD_CSV.values())
    assert chunk.num_rows == 2 + len(BAD_CSV)


def test_names_and_views_of_sqlite(tmp_path):
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute('CREATE TABLE "a""b" (id, "t""s")')
        database.execute("""INSERT INTO "a""b" VALUES (1, 'dog')""")
        database.execute('CREATE VIEW posts AS SELECT id AS key, "t""s" AS hashtags FROM "a""b"')
    assert read(tmp_path / "a.db") == ([("1", ["dog"])], {}, {})
    assert read(tmp_path / "a.db", key_column="id", hashtags_column='t"s') == ([("1", ["dog"])], {}, {})


def test_reading_leaves_the_limit_of_other_readers_of_csv_alone(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"key,hashtags\na,{'#dog ' * 100_000}\nb,#cat\n")
    assert read(tmp_path / "a.csv")[0][1] == ("b", ["#cat"])
    assert csv.field_size_limit() == before < 500_000


@pytest.mark.parametrize("name", ["cut.bz2", "cut.parquet", "cut.tar", "empty.parquet", "cut.json", "cut.db"])
def test_a_truncated_file_is_one_error_that_names_it(tmp_path, name):
    posts = make_posts(3000)
    whole = tmp_path / "whole"
    if name.endswith("bz2"):
        whole.write_bytes(bz2.compress("".join(yfcc_line(key, ["dog"]) + "\n" for key, _ in posts).encode()))
    elif name.endswith("parquet"):
        write_parquet(whole, posts)
    elif name.endswith("json"):
        whole.write_text(json.dumps([{"key": key, "hashtags": tags} for key, tags in posts]))
    elif name.endswith("db"):
        with sqlite3.connect(whole) as database:
            database.execute("CREATE TABLE posts (key, hashtags)")
            database.executemany("INSERT INTO posts VALUES (?, ?)", [(key, "dog") for key, _ in posts])
    else:
        write_tar(whole, posts[:100])
    data = whole.read_bytes()
    (tmp_path / name).write_bytes(b"" if name.startswith("empty") else data[: len(data) // 2])
    kind = "yfcc100m" if name.endswith("bz2") else None
    with pytest.raises(ValueError, match=f"{name}: "):
        read(tmp_path / name, kind)


def test_columns_that_are_not_there_or_there_twice_are_named(tmp_path):
    pq.write_table(pa.table({"photo": [7], "tags": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(PostsError, match=r"has no column 'key'; it has 'photo', 'tags'. Choose one with --key-column"):
        read(tmp_path / "a.parquet")
    twice = pa.Table.from_arrays(
        [pa.array(["1"]), pa.array([["a"]]), pa.array([["b"]])], ["key", "hashtags", "hashtags"]
    )
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(PostsError, match="several columns named 'hashtags'; rename all but one"):
        read(tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("id,tags\n1,a\n")
    with pytest.raises(PostsError, match="has no column 'key'; it has 'id', 'tags'"):
        read(tmp_path / "c.csv")
    pq.write_table(pa.table({"key": ["1"], "hashtags": [{"a": 1}]}), tmp_path / "d.parquet")
    with pytest.raises(PostsError, match="column 'hashtags' is struct<a: int64>; it must hold lists of strings"):
        read(tmp_path / "d.parquet")
    pq.write_table(pa.table({"key": [True], "hashtags": [["a"]]}), tmp_path / "e.parquet")
    with pytest.raises(PostsError, match=r"e\.parquet: column 'key' is bool; keys are texts or whole numbers"):
        read(tmp_path / "e.parquet")
    with pytest.raises(PostsError, match="the name tells no format; give --format"):
        detect_post_format("posts.dat")


def test_random_damage_never_crashes_and_every_row_is_accounted_for(tmp_path):
    """Thousands of rows with random bytes flipped, cut, repeated; every one is a post, no image or rejected."""
    rng = random.Random(0)
    for kind in ("jsonl", "tsv", "csv"):
        lines = [b"key,hashtags"] if kind == "csv" else []
        for key, tags in make_posts(1500, seed=8):
            line = json.dumps({"key": key, "hashtags": tags}) if kind == "jsonl" else yfcc_line(key, tags)
            data = bytearray((f'{key},"{",".join(tags)}"' if kind == "csv" else line).encode())
            for _ in range(rng.randrange(0, 6)):
                position = rng.randrange(len(data))
                data[position : position + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
            lines.append(bytes(data).replace(b"\n", b" ").replace(b"\r", b" "))
        (tmp_path / f"posts.{kind}").write_bytes(b"\n".join(lines))
        rows, rejected, skipped = read(tmp_path / f"posts.{kind}")
        found = len(rows) + sum(rejected.values()) + sum(skipped.values())
        assert found == 1500 or kind == "csv"  # a lost quotation mark joins rows of CSV
        assert len(rows) > 300
