"""wsl-d2 data make, index: parallel, resumable, reproducible, every post accounted for; evil tars."""

import io
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import wsl_d2
from toy_data import TOY_HASHTAGS, jpeg, write_hashtag_folder

from wsl_d2.data import HashtagDataset, ShardError, index_shard, make_shards
from wsl_d2.data.format.labels import read_labels
from wsl_d2.data.format.tar import read_tar
from wsl_d2.errors import UserError
from wsl_d2.hashtags import Vocabulary, load_wordnet


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
    return wsl_d2("data", "make", posts / "posts.jsonl", *common, *flags, **kwargs)


def test_every_post_is_in_a_shard_or_accounted_for(posts):
    printed = make(posts, "out", "--workers", 2)
    dataset = HashtagDataset(posts / "out")
    assert len(dataset) == 26 and dataset.manifest["num_unlabelled"] == 1 and "written: 27" in printed
    assert dataset.manifest["account"] == {
        "rows": 31,
        "invalid JSON": 1,
        "no image": 1,
        "the key is empty or has a '.'": 1,
        "unknown format": 1,
        "written": 27,
    }
    assert dataset[0]["image"] == jpeg(0)
    rows = [json.loads(line) for line in (posts / "out/shard-000000.rejected.jsonl").read_text().splitlines()]
    assert rows == [
        {"key": "p03", "reason": "no image"},
        {"key": "a.b", "reason": "the key is empty or has a '.'"},
        {"key": "p05", "reason": "unknown format"},
    ]


def test_the_bytes_depend_on_neither_workers_nor_an_interruption(posts):
    make(posts, "one", "--workers", 1)
    make(posts, "two", "--workers", 2)
    files = sorted(path.name for path in (posts / "one").iterdir() if not path.name.startswith("."))
    (posts / "two/manifest.json").unlink()
    (posts / "two/shard-000002.labels.npz").unlink()  # as if killed before it was written
    untouched = (posts / "two/shard-000001.tar").stat().st_mtime_ns
    make(posts, "two", "--workers", 2)
    assert len(files) == 3 + 3 * 4 + 1  # the table of rejected posts of the one shard that has any
    assert files == sorted(path.name for path in (posts / "two").iterdir() if not path.name.startswith("."))
    assert all((posts / "one" / name).read_bytes() == (posts / "two" / name).read_bytes() for name in files)
    assert (posts / "two/shard-000001.tar").stat().st_mtime_ns == untouched


def test_a_shard_that_was_altered_is_written_again(posts):
    make(posts, "out")
    tar = posts / "out/shard-000001.tar"
    before = tar.read_bytes()
    times = tar.stat().st_atime_ns, tar.stat().st_mtime_ns
    tar.write_bytes(before[:600] + b"x" + before[601:])
    os.utime(tar, ns=times)  # the modification time is no proof
    make(posts, "out")
    assert tar.read_bytes() == before


def test_a_call_with_other_options_changes_nothing(posts, tmp_path):
    make(posts, "out")
    before = {path: path.read_bytes() for path in (posts / "out").iterdir()}
    Vocabulary.build("pets", load_wordnet(), synsets=["n02084071", "n02121620"]).save(posts / "pets.json")
    printed = make(posts, "out", "--only-labeled", "--vocabulary", posts / "pets.json", code=2)
    assert "is the place of another dataset: vocabulary" in printed and "only_labeled false, not true" in printed
    assert printed.splitlines()[-1].startswith("wsl-d2 data make: ") and printed.count("wsl-d2 data make: ") == 1
    assert {path: path.read_bytes() for path in (posts / "out").iterdir()} == before
    (posts / "mine").mkdir()
    (posts / "mine/a.tar").write_bytes(b"mine")
    assert "holds a.tar, which is of another dataset. Nothing was written" in make(posts, "mine", code=2)
    assert [path.name for path in (posts / "mine").iterdir()] == ["a.tar"]


def test_of_repeated_keys_the_first_counts_wherever_the_others_are(posts):
    rows = (posts / "posts.jsonl").read_text().splitlines()[:30]
    again = json.dumps({"key": "p00", "hashtags": ["#bird"]})
    (posts / "posts.jsonl").write_text("\n".join([*rows, again, rows[29], rows[29]]) + "\n")
    printed = make(posts, "out")
    assert "repeated key: 3" in printed and "written: 27" in printed
    assert HashtagDataset(posts / "out")[0]["image"] == jpeg(0)


def test_posts_that_cannot_be_used_stop_nothing_and_go_with_their_reason(tmp_path, toy_vocabulary):
    photos = tmp_path / "photos"
    (photos / "folder.jpg").mkdir(parents=True)
    (photos / "good.jpg").write_bytes(jpeg(0))
    keys = ["good", "folder", "k" * 400, "nul\0", "a\u2028b", "a\u0085b", "a\nb", "../good"]
    posts = tmp_path / "posts.jsonl"
    posts.write_text("".join(json.dumps({"key": key, "hashtags": ["#dog"]}) + "\n" for key in keys))
    manifest = make_shards([str(posts)], f"{photos}/{{key}}.jpg", toy_vocabulary, tmp_path / "out")
    assert manifest["account"]["written"] == 1 and manifest["account"]["the image is a folder"] == 1
    rejected = (tmp_path / "out/shard-000000.rejected.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(line)["key"] for line in rejected] == keys[1:]  # as they went in


def test_nothing_to_write_is_an_error_before_anything_is_written(tmp_path, toy_vocabulary):
    posts = tmp_path / "posts.jsonl"
    posts.write_text('{"id": "a", "hashtags": ["#dog"]}\n')
    with pytest.raises(ShardError, match=r"0 posts can be used \(rows: 1, no key: 1\)"):
        make_shards([str(posts)], f"{tmp_path}/{{key}}.jpg", toy_vocabulary, tmp_path / "out")
    for images in ("photos/x.jpg", "photos/{name}.jpg", "photos/{key"):
        with pytest.raises(UserError, match=r"images is a folder, or has \{key\} in it"):
            make_shards([str(posts)], images, toy_vocabulary, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    posts.write_text('{"key": "a", "hashtags": ["#dog"]}\n')
    with pytest.raises(ShardError, match=r"0 images could be written \(no image: 1\)"):
        make_shards([str(posts)], f"{tmp_path}/{{key}}.jpg", toy_vocabulary, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shard-000000.rejected.jsonl"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg(0))
    posts.write_text('{"key": "a", "hashtags": ["#nosuchthing"]}\n')
    with pytest.raises(ShardError, match="0 images have a label"):
        make_shards([str(posts)], str(tmp_path / "photos"), toy_vocabulary, tmp_path / "out")
    posts.write_text('{"key": "a", "hashtags": ["#dog"]}\n')
    manifest = make_shards([str(posts)], str(tmp_path / "photos"), toy_vocabulary, tmp_path / "out")
    assert manifest["num_images"] == 1 and manifest["account"] == {"rows": 1, "written": 1}


def test_existing_tars_are_indexed_in_place(posts):
    make(posts, "out")
    out = posts / "out"
    before = json.loads((out / "manifest.json").read_text())
    for path in [*out.glob("*.npz"), out / "manifest.json"]:
        path.unlink()
    (out / "shard-000001.index.npz.partial-17").write_bytes(b"of a process that was killed")
    printed = wsl_d2("data", "index", out, "--vocabulary", posts / "vocabulary.json", "--workers", 2)
    assert "26 labeled images in 4 shards, 1 images without a label" in printed
    assert not list(out.glob("*.partial-*"))
    assert json.loads((out / "manifest.json").read_text()).items() <= before.items()
    (out / "evil.tar").write_bytes(b"no tar at all" * 100)
    (out / "cut.tar").write_bytes((out / "shard-000000.tar").read_bytes()[:3000])
    printed = wsl_d2("data", "index", out, "--vocabulary", posts / "vocabulary.json", code=2)
    assert "2 of 6 tars cannot be used" in printed and "cut.tar: " in printed and "evil.tar: not a readable" in printed
    assert json.loads((out / "manifest.json").read_text()).items() <= before.items()


def test_a_finished_dataset_keeps_its_vocabulary_and_column(hashtag_folder, tmp_path):
    Vocabulary.build("pets", load_wordnet(), synsets=["n02084071", "n02121620"]).save(tmp_path / "pets.json")
    before = {path: path.read_bytes() for path in hashtag_folder.iterdir()}
    printed = wsl_d2("data", "index", hashtag_folder, "--vocabulary", tmp_path / "pets.json", code=2)
    assert "is a finished dataset of vocabulary 'toy'" in printed and "Nothing was changed" in printed
    own = hashtag_folder / "vocabulary.json"
    printed = wsl_d2("data", "index", hashtag_folder, "--vocabulary", own, "--hashtags-column", "tags", code=2)
    assert "hashtags of column 'hashtags', not 'tags'" in printed
    assert {path: path.read_bytes() for path in hashtag_folder.iterdir()} == before


def test_a_tar_that_was_replaced_is_indexed_again_whatever_its_time(tmp_path, toy_vocabulary):
    folder = write_hashtag_folder(tmp_path / "d", toy_vocabulary, num_images=8)
    tar = folder / "shard-000000.tar"
    data, times = tar.read_bytes(), (tar.stat().st_atime_ns, tar.stat().st_mtime_ns)
    assert b'["#Dog", "#cat"]' in data
    tar.write_bytes(data.replace(b'["#Dog", "#cat"]', b'["#cat", "#cat"]'))
    os.utime(tar, ns=times)
    with pytest.raises(ShardError, match="has changed since it was indexed"):
        from wsl_d2.data import make_view

        make_view(folder, tmp_path / "view", num_images=3)
    toy_vocabulary.save(tmp_path / "v.json")
    wsl_d2("data", "index", folder, "--vocabulary", tmp_path / "v.json", "--workers", 1)
    assert HashtagDataset(folder)[0]["labels"].tolist() == toy_vocabulary.labels(["#cat"]).tolist()


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
    "depth bomb": ([member("a.jpg"), member("a.json", b"[" * 900_000)], "invalid JSON"),
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


def pack(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def tags(*hashtags):
    return json.dumps({"hashtags": list(hashtags)}).encode()


def test_keys_are_webdatasets(tmp_path):
    pack(
        tmp_path / "a.tar",
        ("./one.jpg", b"1"),
        ("./one.json", tags("#dog")),
        ("a.b/two.JPEG", b"2"),
        ("a.b/two.json", tags("#cat")),
        ("./._one.jpg", b"x"),
        (".DS_Store", b"x"),
        ("img.001.jpg", b"3"),
        ("one.txt", b"caption"),
    )
    content = read_tar(tmp_path / "a.tar")
    assert [(image.key, image.metadata["hashtags"]) for image in content.images] == [
        ("one", ["#dog"]),
        ("a.b/two", ["#cat"]),
    ]
    assert content.ignored == {
        "hidden file or no extension": (2, "./._one.jpg"),
        ".jpg whose name has more than one dot": (1, "img.001.jpg"),
        ".txt": (1, "one.txt"),
    }


def test_a_sample_without_usable_hashtags_is_counted_and_stops_nothing(tmp_path, toy_vocabulary):
    pack(
        tmp_path / "a.tar",
        ("good.jpg", b"1"),
        ("good.json", tags("#dog")),
        ("null.jpg", b"2"),
        ("null.json", b'{"hashtags": null}'),
        ("text.jpg", b"3"),
        ("text.json", b'{"hashtags": "hot dog, cat"}'),
        ("number.jpg", b"4"),
        ("number.json", b'{"hashtags": 7}'),
        ("broken.jpg", b"5"),
        ("broken.json", b"{"),
        ("alone.jpg", b"6"),
        ("lost.json", b"{}"),
    )
    labels = index_shard(tmp_path / "a.tar", toy_vocabulary)
    assert labels.rows.tolist() == [0, 2] and labels.num_unlabelled == 4
    from wsl_d2.data import finish_dataset

    manifest = finish_dataset(tmp_path, toy_vocabulary)
    assert manifest["without_hashtags"] == {"hashtags are no list and no text": 1, "invalid JSON": 1, "no .json": 1}
    assert manifest["ignored"] == {"json without an image": [1, "a.tar: lost"]}


def test_a_dataset_without_any_label_is_an_error(tmp_path, toy_vocabulary):
    pack(tmp_path / "a.tar", ("img.001.jpg", b"1"), ("img.001.json", tags("#dog")))
    toy_vocabulary.save(tmp_path / "v.json")
    printed = wsl_d2("data", "index", tmp_path, "--vocabulary", tmp_path / "v.json", code=2)
    assert "0 images have a label" in printed and "1 .jpg whose name has more than one dot" in printed
    assert not (tmp_path / "manifest.json").exists() and not (tmp_path / "vocabulary.json").exists()


def test_tars_one_after_another_are_read_to_their_end(tmp_path, toy_vocabulary):
    for name in ("a", "b", "c"):
        pack(tmp_path / name, (f"{name}.jpg", jpeg(ord(name))), (f"{name}.json", tags("#dog")))
    whole = tmp_path / "all.tar"
    whole.write_bytes(b"".join((tmp_path / name).read_bytes() for name in ("a", "b", "c")))
    index_shard(whole, toy_vocabulary)
    from wsl_d2.data.format.index import read_index
    from wsl_d2.files import sha256_of

    index = read_index(whole)
    assert [index.key(row) for row in range(3)] == ["a", "b", "c"] and index.tar_sha256 == sha256_of(whole)
    with open(whole, "rb") as file:
        assert [index.read_image(file.fileno(), row) for row in range(3)] == [jpeg(ord(name)) for name in "abc"]
    assert len(read_labels(whole).rows) == 3
    whole.write_bytes((tmp_path / "a").read_bytes() + b"no tar" * 200)
    with pytest.raises(ShardError, match="not a readable tar"):
        index_shard(whole, toy_vocabulary)


def test_images_in_a_folder_are_found_by_name_by_path_and_with_their_ending(tmp_path, toy_vocabulary):
    toy_vocabulary.save(tmp_path / "vocabulary.json")
    for i, place in enumerate(("a.jpg", "day/b.JPG", "day/two/c.jpeg", "day/same.jpg", "other/same.jpg")):
        (tmp_path / "photos" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / place).write_bytes(jpeg(i))
    keys = ("a.jpg", "b", "day/two/c", "same", "other/same.jpg", "../a", "none.png")
    (tmp_path / "posts.csv").write_text("key,hashtags\n" + "".join(f"{key},dog\n" for key in keys))
    common = ["--images", tmp_path / "photos", "--vocabulary", tmp_path / "vocabulary.json"]
    wsl_d2("data", "make", tmp_path / "posts.csv", *common, "--output", tmp_path / "out")
    dataset = HashtagDataset(tmp_path / "out")
    assert [(row["key"], row["image"]) for row in map(dataset.__getitem__, range(len(dataset)))] == [
        ("a", jpeg(0)),
        ("b", jpeg(1)),
        ("day/two/c", jpeg(2)),
        ("other/same", jpeg(4)),
    ]
    rows = [json.loads(line) for line in (tmp_path / "out/shard-000000.rejected.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in rows] == [
        ("same", "several images of this name"),
        ("../a", "the key is no path that leads downwards"),
        ("none", "no image"),
    ]


def test_images_in_a_column_of_the_table(tmp_path, toy_vocabulary):
    pictures = [{"bytes": jpeg(i) if i != 5 else None, "path": f"p{i}.jpg"} for i in range(100)]
    tags = [f"#{TOY_HASHTAGS[0].lstrip('#')}#love" if i != 2 else None for i in range(100)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(
        pa.table({"image": pa.array(pictures, kind), "text": tags}), tmp_path / "a.parquet", row_group_size=70
    )
    columns = {"key_column": "image.path", "caption_column": "text", "images_per_shard": 40}
    posts = [str(tmp_path / "a.parquet")]
    manifest = make_shards(posts, "column:image", toy_vocabulary, tmp_path / "out", **columns, workers=2)
    assert manifest["account"] == {"no image": 1, "rows": 100, "written": 99}
    dataset = HashtagDataset(tmp_path / "out")
    assert [dataset[i]["key"] for i in range(5)] == ["p0", "p1", "p3", "p4", "p6"]
    assert all(dataset[i]["image"] == jpeg(int(dataset[i]["key"][1:])) for i in range(0, 98, 7))
    with pytest.raises(UserError, match="has no column 'text' of images; columns of bytes are 'image'"):
        make_shards(posts, "column:text", toy_vocabulary, tmp_path / "other", **columns)


def test_posts_are_found_by_folder_and_pattern_in_the_order_given(posts):
    (posts / "b").mkdir()
    for name, key in (("b/2.jsonl", "p01"), ("b/1.jsonl", "p00"), ("a.jsonl", "p02")):
        (posts / name).write_text(json.dumps({"key": key, "hashtags": [TOY_HASHTAGS[0]]}) + "\n")
    common = ["--images", posts / "photos", "--vocabulary", posts / "vocabulary.json"]
    for number, first in enumerate((posts / "b", posts / "b/*.jsonl")):
        wsl_d2("data", "make", first, posts / "a.jsonl", *common, "--output", posts / f"out{number}")
        dataset = HashtagDataset(posts / f"out{number}")
        assert [dataset[i]["key"] for i in range(3)] == ["p00", "p01", "p02"]
    printed = wsl_d2("data", "make", posts / "c*.jsonl", *common, "--output", posts / "none", code=2)
    assert "c*.jsonl: there is no such file" in printed and printed.count("\n") == 1
    assert not (posts / "none").exists()


@pytest.mark.timeout(60)
def test_a_pipe_among_photos_or_posts_is_named_and_waited_for_by_nobody(posts):
    os.remove(posts / "photos/p00.jpg")
    os.mkfifo(posts / "photos/p00.jpg")
    make(posts, "out")
    rows = [json.loads(line) for line in (posts / "out/shard-000000.rejected.jsonl").read_text().splitlines()]
    assert {"key": "p00", "reason": "no image (not a regular file)"} in rows
    os.mkfifo(posts / "pipe.jsonl")
    common = ["--images", posts / "photos", "--vocabulary", posts / "vocabulary.json", "--output", posts / "none"]
    printed = wsl_d2("data", "make", posts / "pipe.jsonl", *common, code=2)
    assert "pipe.jsonl is a pipe or device" in printed and printed.count("\n") == 1
    assert not (posts / "none").exists()
