"""tools/make_shards.py, index_shards.py: parallel, resumable, reproducible, every post accounted for; evil tars."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from toy_data import TOY_HASHTAGS, jpeg

from wsl_d2.data import HashtagDataset, ShardError, index_shard

ROOT = Path(__file__).resolve().parents[3]


def tool(name, *arguments, code=0):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"WSL_D2_REGISTER": "0"},
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def posts(tmp_path, toy_vocabulary):
    """30 posts: one without an image, one with a broken image, one with a bad key, one without a label."""
    toy_vocabulary.save(tmp_path / "vocabulary.json")
    (tmp_path / "photos").mkdir()
    rows = [{"key": f"p{i:02d}", "hashtags": [TOY_HASHTAGS[i % 4]]} for i in range(30)]
    rows[4]["key"], rows[9]["hashtags"] = "a.b", ["#nofilter"]
    for i, row in enumerate(rows):
        if i != 3:
            (tmp_path / "photos" / f"{row['key']}.jpg").write_bytes(b"<html>" if i == 5 else jpeg(i))
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return tmp_path


def make(posts, output, *flags, **kwargs):
    common = ["--images", posts / "photos/{key}.jpg", "--vocabulary", posts / "vocabulary.json"]
    common += ["--images-per-shard", 8, "--output", posts / output]
    return tool("make_shards.py", posts / "posts.jsonl", *common, *flags, **kwargs)


def test_every_post_is_in_a_shard_or_accounted_for(posts):
    printed = make(posts, "out", "--workers", 2)
    dataset = HashtagDataset(posts / "out")
    assert len(dataset) == 26 and dataset.manifest["num_unlabelled"] == 1 and "written: 27" in printed
    assert dataset.manifest["posts"] == {
        "rows": 31,
        "invalid JSON": 1,
        "no image": 1,
        "the key is empty or has a '.' or '/'": 1,
        "unknown format": 1,
        "written": 27,
    }
    assert dataset[0]["image"] == jpeg(0)
    assert (posts / "out/shard-000000.rejected.tsv").read_text().splitlines() == [
        '"p03"\tno image',
        "\"a.b\"\tthe key is empty or has a '.' or '/'",
        '"p05"\tunknown format',
    ]


def test_the_bytes_depend_on_neither_workers_nor_an_interruption(posts):
    make(posts, "one", "--workers", 1)
    make(posts, "two", "--workers", 2)
    files = sorted(path.name for path in (posts / "one").iterdir())
    (posts / "two/manifest.json").unlink()
    (posts / "two/shard-000002.index.npz").unlink()  # as if killed before it was written
    untouched = (posts / "two/shard-000001.tar").stat().st_mtime_ns
    make(posts, "two", "--workers", 2)
    assert files == sorted(path.name for path in (posts / "two").iterdir()) and len(files) == 2 + 3 * 4
    assert all((posts / "one" / name).read_bytes() == (posts / "two" / name).read_bytes() for name in files)
    assert (posts / "two/shard-000001.tar").stat().st_mtime_ns == untouched


def test_other_posts_in_the_same_folder_and_repeated_keys_are_refused(posts):
    make(posts, "out", "--only-labelled")
    assert "other options; choose another folder" in make(posts, "out", code=1)
    rows = (posts / "posts.jsonl").read_text().splitlines()[:30]
    (posts / "posts.jsonl").write_text("\n".join([*rows, rows[0]]) + "\n")
    assert "1 keys occur in more than one shard, the first in shards 0 and 3" in make(posts, "repeated", code=1)
    assert not (posts / "repeated/manifest.json").exists()


def test_existing_tars_are_indexed_in_place(posts):
    make(posts, "out")
    out = posts / "out"
    before = (out / "manifest.json").read_text()
    for path in [*out.glob("*.npz"), out / "manifest.json"]:
        path.unlink()
    printed = tool("index_shards.py", out, "--vocabulary", posts / "vocabulary.json", "--workers", 2)
    assert "26 labelled images in 4 shards, 1 images without a label" in printed
    assert json.loads((out / "manifest.json").read_text()).items() <= json.loads(before).items()
    (out / "evil.tar").write_bytes(b"no tar at all" * 100)
    (out / "cut.tar").write_bytes((out / "shard-000000.tar").read_bytes()[:3000])
    printed = tool("index_shards.py", out, "--vocabulary", posts / "vocabulary.json", code=1)
    assert "2 of 6 tars cannot be used" in printed and "cut.tar: " in printed and "evil.tar: not a readable" in printed


def member(name, data=b"x", **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info, data


EVIL = {
    "parent": ([member("../../evil.jpg")], "unsafe path"),
    "absolute": ([member("/etc/evil.jpg")], "unsafe path"),
    "symlink": ([member("a.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "link, device or unsafe"),
    "hardlink": ([member("a.jpg", b"", type=tarfile.LNKTYPE, linkname="b.jpg")], "link, device or unsafe"),
    "device": ([member("a.jpg", b"", type=tarfile.CHRTYPE)], "link, device or unsafe"),
    "fifo": ([member("a.jpg", b"", type=tarfile.FIFOTYPE)], "link, device or unsafe"),
    "sparse": ([member("a.jpg", b"", type=tarfile.GNUTYPE_SPARSE)], "link, device|not a readable tar"),
    "huge metadata": ([member("a.json", b" " * ((1 << 20) + 1))], "1048577 bytes, more than 1048576; refused"),
    "twins": ([member("a.jpg"), member("a.jpg")], "two members of key 'a'"),
    "no json": ([member("a.jpg")], r"1 images have no \.json"),
    "no image": ([member("a.json", b'{"hashtags": []}')], r"1 \.json have no image"),
    "no list": ([member("a.jpg"), member("a.json", b'{"hashtags": "dog"}')], "list of strings 'hashtags'"),
    "depth bomb": ([member("a.jpg"), member("a.json", b"[" * 900_000)], "no valid JSON"),
    "long name": ([member("n" * 2_000_000 + ".jpg")], "extended header of 2000005 bytes|not a readable tar"),
}


@pytest.mark.parametrize("name", EVIL)
def test_an_evil_tar_is_refused(tmp_path, toy_vocabulary, name):
    members, message = EVIL[name]
    with tarfile.open(tmp_path / "evil.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ShardError, match=f"evil.tar: .*({message})"):
        index_shard(tmp_path / "evil.tar", toy_vocabulary)
    assert [path.name for path in tmp_path.iterdir()] == ["evil.tar"]


def test_a_member_that_claims_to_be_huge_is_refused_before_it_is_read(tmp_path, toy_vocabulary):
    info, _ = member("a.jpg")
    info.size = 1 << 40
    (tmp_path / "huge.tar").write_bytes(info.tobuf() + bytes(2048))
    with pytest.raises(ShardError, match="1099511627776 bytes, more than"):
        index_shard(tmp_path / "huge.tar", toy_vocabulary)
