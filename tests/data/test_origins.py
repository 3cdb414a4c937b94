"""Who posted the images, when and where: read from tables, kept in tars and indexes, used by caps and splits."""

import collections
import datetime
import json
import sqlite3

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import wsl_d2
from toy_data import TOY_HASHTAGS, jpeg

from wsl_d2.data import ShardError, index_shard, make_shards, make_view
from wsl_d2.data.format.index import read_index, read_origins
from wsl_d2.data.format.labels import read_labels
from wsl_d2.data.format.origin import Origin, read_origin
from wsl_d2.data.format.tar import read_tar
from wsl_d2.data.posts.readers import read_posts
from wsl_d2.errors import UserError


@pytest.mark.parametrize(
    ("user", "time", "place", "expected"),
    [
        (None, None, None, ("", 0, "")),
        ("", "null", ["", ""], ("", 0, "")),
        ("00000000000000ff", "2012-06-05 14:23:11.0", "  New\tZealand ", ("00000000000000ff", 2012, "New Zealand")),
        (None, 2009, ("13.7", "51.05"), ("", 2009, "50N 10E")),
        (None, "1340000000", (-0.1, -33.9), ("", 2012, "40S 10W")),
        (None, 1340000000123, (180, 90), ("", 2012, "80N 170E")),
        (None, datetime.datetime(2020, 1, 2), (181, 0), ("", 2020, "")),
        (True, "9999", {"lon": 1}, ("", 0, "")),
    ],
)
def test_an_origin_is_read_from_what_tables_hold(user, time, place, expected):
    origin = read_origin(user, time, place)
    assert (f"{origin.user:016x}" if origin.user else "", origin.year, origin.place) == expected
    assert read_origin(*(origin.metadata().get(name) for name in Origin._fields)) == origin


def test_the_name_of_a_poster_is_not_kept():
    one, other = read_origin("12345678@N00", None, None), read_origin("12345679@N00", None, None)
    assert one.user != other.user and "12345678" not in json.dumps(one.metadata())
    assert read_origin(7, None, None) == read_origin(7.0, None, None) == read_origin("7", None, None)


ROWS = [("1", "ann", "2011-01-01", 13.7, 51.0), ("2", "bob", "2012-01-01", None, None), ("3", None, None, 200.0, 0.0)]
EXPECTED = [
    read_origin("ann", 2011, (13.7, 51.0)),
    read_origin("bob", 2012, None),
    Origin(),
]
COLUMNS = {"user_column": "who", "time_column": "when", "place_column": "x,y"}


def write_rows(folder, kind):
    path = folder / f"posts.{kind}"
    names = ("key", "who", "when", "x", "y")
    rows = [dict(zip(names, row, strict=True)) | {"hashtags": "dog"} for row in ROWS]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        lines = [",".join([*names, "hashtags"])]
        lines += [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE posts (key, who, 'when', x, y, hashtags)")
            connection.executemany("INSERT INTO posts VALUES (?, ?, ?, ?, ?, ?)", [tuple(row.values()) for row in rows])
        connection.close()
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "sqlite"])
def test_origins_are_columns_of_every_kind_of_table(tmp_path, kind):
    path = write_rows(tmp_path, kind)
    (chunk,) = read_posts(str(path), kind, **COLUMNS)
    assert chunk.origins == EXPECTED and chunk.keys.to_pylist() == ["1", "2", "3"]
    with pytest.raises(UserError, match="nobody"):
        list(read_posts(str(path), kind, user_column="nobody"))


def test_a_column_of_json_that_no_row_has_is_named(tmp_path):
    path = write_rows(tmp_path, "jsonl")
    with pytest.raises(UserError, match="posts.jsonl has no column 'nobody'; it has .*'who'.* Choose one with --user-"):
        next(read_posts(str(path), "jsonl", user_column="nobody"))
    path.write_text('{"key": "0", "hashtags": "dog"}\n' + path.read_text())  # one row without it is an unknown origin
    (chunk,) = read_posts(str(path), "jsonl", **COLUMNS)
    assert chunk.origins == [Origin(), *EXPECTED]


@pytest.mark.parametrize(("columns", "places"), [(25, (1, 3, 5, 10, 12, 13)), (23, (0, 1, 3, 8, 10, 11))])
def test_yfcc100m_has_them_in_known_columns(tmp_path, columns, places):
    values = ["x"] * (columns - 1) + ["0"]
    for place, value in zip(places, ("77", "1%40N00", "2008-12-31 23:59:59.0", "dog", "2.35", "48.86"), strict=True):
        values[place] = value
    (tmp_path / "yfcc100m_dataset").write_text("\t".join(values) + "\n")
    (chunk,) = read_posts(str(tmp_path / "yfcc100m_dataset"), "yfcc100m")
    assert chunk.origins == [read_origin("1%40N00", 2008, "40N 0E")]


@pytest.fixture
def dataset(tmp_path, toy_vocabulary):
    """60 images in shards of 8: 40 of one poster, 4 of each of 4 others, 4 of nobody known."""
    users = ["much"] * 40 + [f"user{i // 4}" for i in range(16)] + [None] * 4
    order = np.random.default_rng(0).permutation(60).tolist()
    rows = [
        {"key": f"p{i:02d}", "hashtags": [TOY_HASHTAGS[i % 4]], "who": users[i], "when": 2010 + i % 3} for i in order
    ]
    for i in order:
        (tmp_path / f"p{i:02d}.jpg").write_bytes(jpeg(i))
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"images_per_shard": 8, "user_column": "who", "time_column": "when"}
    make_shards([str(tmp_path / "posts.jsonl")], f"{tmp_path}/{{key}}.jpg", toy_vocabulary, tmp_path / "all", **options)
    return tmp_path


def users_of(folder):
    """The poster of every labeled image."""
    found = []
    for tar in sorted(folder.glob("*.tar")):
        found += read_origins(tar).users[read_labels(tar).rows].tolist()
    return collections.Counter(found)


def test_a_split_has_all_images_of_a_poster_on_one_side(dataset):
    sides = set()
    for seed in range(12):
        parts = {}
        for part in ("train", "val"):
            try:
                make_view(dataset / "all", dataset / f"{part}{seed}", held_out=0.5, part=part, seed=seed)
                parts[part] = users_of(dataset / f"{part}{seed}")
            except ShardError:  # all posters are on the other side
                parts[part] = collections.Counter()
        assert not (parts["train"].keys() & parts["val"].keys()) - {0}
        assert (parts["train"] + parts["val"]) == users_of(dataset / "all")
        sides.add(parts["val"][read_origin("much", None, None).user])
    assert sides == {0, 40}  # of a lot of images each as a whole, by the seed


def test_a_limit_of_images_of_a_poster(dataset, toy_vocabulary):
    much = read_origin("much", None, None).user
    assert users_of(dataset / "all")[much] == 40
    arguments = ["--images", f"{dataset}/{{key}}.jpg", "--vocabulary", dataset / "v.json", "--user-column", "who"]
    toy_vocabulary.save(dataset / "v.json")
    wsl_d2("data", "make", dataset / "posts.jsonl", *arguments, "--max-images-per-user", 3, "--output", dataset / "few")
    assert sorted(users_of(dataset / "few").values()) == [3, 3, 3, 3, 3, 4] and users_of(dataset / "few")[0] == 4
    account = json.loads((dataset / "few/manifest.json").read_text())["account"]
    assert account == {"rows": 60, "written": 19, "more than 3 of one user": 41}
    refused = wsl_d2(
        "data", "make", dataset / "posts.jsonl", *arguments[:4], "--max-images-per-user", 3, "--output", dataset / "no",
        code=2,
    )  # fmt: skip
    assert "--user-column" in refused and not (dataset / "no").exists()

    wsl_d2("data", "view", dataset / "all", dataset / "view", "--max-images-per-user", 3)
    wsl_d2("data", "view", dataset / "all", dataset / "view2", "--max-images-per-user", 2)
    assert users_of(dataset / "view") == users_of(dataset / "few")
    kept, fewer = (
        {key for tar in sorted((dataset / name).glob("*.tar")) for key in read_index(tar).keys[read_labels(tar).rows]}
        for name in ("view", "view2")
    )
    assert fewer < kept


def test_a_limit_needs_to_know_the_posters(hashtag_folder, tmp_path):
    with pytest.raises(ShardError, match="do not say who posted"):
        make_view(hashtag_folder, tmp_path / "view", max_images_per_user=3)
    assert not (tmp_path / "view").exists()


def test_origins_come_back_when_a_tar_is_indexed_again(dataset, toy_vocabulary):
    tar = dataset / "all" / "shard-000000.tar"
    before = read_index(tar)
    metadata = read_tar(tar).images[0].metadata
    assert metadata.keys() == {"hashtags", "user", "year"} and "much" not in json.dumps(metadata)
    index_shard(tar, toy_vocabulary)
    after = read_index(tar).origins
    assert np.array_equal(after.users, before.origins.users) and np.array_equal(after.years, before.origins.years)
    assert after.place_names == [""] and set(after.years.tolist()) <= {2010, 2011, 2012}
