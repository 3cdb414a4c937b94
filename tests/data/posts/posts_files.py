"""Writers of small files of posts."""

import io
import json
import random
import tarfile
import urllib.parse

import pyarrow as pa
import pyarrow.parquet as pq

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
    "2019",
    "a b",
]


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
