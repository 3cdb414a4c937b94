import json
import subprocess

import numpy as np
import pytest
import webdataset
from command_line import wsl_d2
from toy_data import TOY_HASHTAGS, jpeg, write_hashtag_folder

from wsl_d2.data import HashtagDataset, ShardError, finish_dataset, index_shard, write_shard
from wsl_d2.data.format.index import read_index
from wsl_d2.data.format.labels import read_labels
from wsl_d2.data.format.manifest import read_manifest
from wsl_d2.data.format.tar import write_tar
from wsl_d2.data.read.loaders import collate
from wsl_d2.data.read.mapper import HashtagMapper
from wsl_d2.data.write.views import make_view
from wsl_d2.hashtags import Vocabulary, load_wordnet

MAPPER = HashtagMapper(True, size=16, scale=(0.5, 1.0))


def test_webdataset_and_tar_read_the_shards(hashtag_folder):
    shard = hashtag_folder / "shard-000000.tar"
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == [f"{i:06d}" for i in range(16)]
    assert samples[0]["json"]["hashtags"] == ["#Dog", "#cat"]
    names = subprocess.run(["tar", "tf", shard], check=True, capture_output=True, text=True).stdout.split()
    assert names[:2] == ["000000.jpg", "000000.json"] and len(names) == 32


def test_dataset_gives_the_written_images_and_labels(hashtag_folder, toy_vocabulary):
    dataset = HashtagDataset(hashtag_folder)
    assert len(dataset) == 48
    for i in (0, 15, 16, 47):
        assert dataset[i]["key"] == f"{i:06d}"
        assert dataset[i]["image"] == jpeg(i)
        tags = [TOY_HASHTAGS[i % 4]] + ([TOY_HASHTAGS[(i + 1) % 4]] if i % 3 == 0 else [])
        np.testing.assert_array_equal(dataset[i]["labels"], toy_vocabulary.labels(tags))
    assert dataset.index.hashtag_counts().tolist() == dataset.manifest["hashtag_counts"]
    assert sum(dataset.manifest["hashtag_counts"]) == 48 + 16


def test_images_without_a_label_are_counted_not_listed(tmp_path, toy_vocabulary):
    toy_vocabulary.save(tmp_path / "vocabulary.json")
    write_shard(
        tmp_path / "s.tar", [("a", jpeg(0), {"hashtags": ["#nofilter"]}), ("b", jpeg(1), {"hashtags": ["#dog"]})]
    )
    index_shard(tmp_path / "s.tar", toy_vocabulary)
    manifest = finish_dataset(tmp_path, toy_vocabulary)
    assert (manifest["num_images"], manifest["num_unlabelled"]) == (1, 1)
    assert HashtagDataset(tmp_path)[0]["key"] == "b"


def test_writing_is_reproducible(tmp_path, toy_vocabulary):
    a = write_hashtag_folder(tmp_path / "a", toy_vocabulary)
    b = write_hashtag_folder(tmp_path / "b", toy_vocabulary)
    assert (a / "manifest.json").read_bytes() == (b / "manifest.json").read_bytes()


@pytest.mark.parametrize("key", ["a.b", "/a", "a/../b", "", "x"])
def test_bad_keys_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="keys are unique plain names"):
        write_shard(tmp_path / "s.tar", [("x", b"", {"hashtags": []}), (key, b"", {"hashtags": []})])


def test_a_missing_and_a_short_shard_are_listed(hashtag_folder):
    (hashtag_folder / "shard-000001.tar").unlink()
    with open(hashtag_folder / "shard-000002.tar", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ShardError, match=r"2 of 3 shards.*000001.tar is missing.*000002.tar has 1000 bytes"):
        HashtagDataset(hashtag_folder).check_shards()


def test_a_truncated_tar_is_refused_by_the_indexer(hashtag_folder, toy_vocabulary):
    shard = hashtag_folder / "shard-000000.tar"
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    with pytest.raises(ShardError, match="shard-000000.tar: (not a readable tar|the tar is truncated)"):
        index_shard(shard, toy_vocabulary)


def test_an_unfinished_dataset_is_named(tmp_path):
    with pytest.raises(ShardError, match="manifest is written last"):
        HashtagDataset(tmp_path)


def test_the_vocabulary_of_another_dataset_is_refused(hashtag_folder):
    Vocabulary.build("other", load_wordnet(), synsets=["n02084071"]).save(hashtag_folder / "vocabulary.json")
    with pytest.raises(ShardError, match=r"vocabulary 'other' \w{12}, but the shards were labeled with 'toy'"):
        HashtagDataset(hashtag_folder)


def test_damaged_images_are_replaced_by_the_next_one_and_listed(tmp_path, toy_vocabulary):
    folder = write_hashtag_folder(tmp_path / "d", toy_vocabulary, damaged={5, 6})
    dataset = HashtagDataset(folder, MAPPER)
    sample = dataset[5, 1234]
    assert sample["key"] == "000007"
    assert [key for key, _ in sample["skipped"]] == ["000005", "000006"]
    assert all(reason.startswith("truncated") for _, reason in sample["skipped"])
    assert collate([dataset[4], sample])["skipped"] == sample["skipped"]


def test_a_dataset_without_any_good_image_ends_with_an_error(tmp_path, toy_vocabulary):
    folder = write_hashtag_folder(tmp_path / "d", toy_vocabulary, num_images=8, damaged=set(range(8)))
    with pytest.raises(ShardError, match="8 images in a row cannot be decoded, the first '000003'"):
        HashtagDataset(folder, MAPPER)[3]


def test_a_crop_depends_on_seed_and_position_only(hashtag_folder):
    dataset = HashtagDataset(hashtag_folder, MAPPER, seed=3)
    same = HashtagDataset(hashtag_folder, MAPPER, seed=3)
    assert (dataset[7, 100]["image"] == same[7, 100]["image"]).all()
    assert (dataset[7, 100]["image"] != dataset[7, 101]["image"]).any()
    assert dataset[7, 100]["image"].shape == (3, 16, 16)


def test_manifest_of_another_version_is_refused(hashtag_folder):
    path = hashtag_folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(ShardError, match="format version 99; this wsl_d2 reads 2"):
        HashtagDataset(hashtag_folder)


def test_mapped_arrays_are_the_same_and_own_no_memory(hashtag_folder):
    path = hashtag_folder / "shard-000000.tar"
    arrays = (read_index, ("keys", "offsets", "sizes", "crc32")), (read_labels, ("rows", "indptr", "labels"))
    for read, names in arrays:
        loaded, mapped = read(path), read(path, mapped=True)
        for name in names:
            ours, theirs = getattr(mapped, name), getattr(loaded, name)
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
            assert not ours.flags.owndata and not ours.flags.writeable


def test_tars_with_captions_are_labeled_by_their_words(tmp_path, toy_vocabulary):
    """As img2dataset writes them with --caption_col."""
    vocabulary = tmp_path / "vocabulary.json"
    toy_vocabulary.save(vocabulary)
    captions = ["So nice #dog#cat", "a dog without #", None]
    (tmp_path / "set").mkdir()
    samples = [(f"{i:09d}", jpeg(i), {"caption": text, "url": "u"}) for i, text in enumerate(captions)]
    write_tar(tmp_path / "set" / "00000.tar", samples)
    call = ("data", "index", tmp_path / "set", "--vocabulary", vocabulary)
    told = wsl_d2(*call, code=2)
    assert "0 images have a label" in told and "3 images without hashtags: no 'hashtags' in the .json" in told
    told = wsl_d2(*call, "--caption-column", "caption")
    assert "1 labeled images in 1 shards, 2 images without a label" in told
    assert HashtagDataset(tmp_path / "set").index.labels.tolist() == sorted(toy_vocabulary.labels(["dog", "cat"]))
    assert read_manifest(tmp_path / "set")["hashtags_column"] == "#caption"
    view = make_view(tmp_path / "set", tmp_path / "view", vocabulary=toy_vocabulary)
    assert view["num_images"] == 1
