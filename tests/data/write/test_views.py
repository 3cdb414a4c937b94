"""Views of a dataset: nested subsets and other vocabularies over the same tars."""

import numpy as np
import pytest
from filelock import FileLock
from toy_data import write_hashtag_folder

from wsl_d2.data import HashtagDataset, ShardError, make_view
from wsl_d2.data.format.labels import read_labels
from wsl_d2.data.format.manifest import read_manifest
from wsl_d2.errors import UserError
from wsl_d2.hashtags import Vocabulary, load_wordnet


def contents(folder) -> dict:
    dataset = HashtagDataset(folder)
    samples = [dataset[i] for i in range(len(dataset))]
    return {sample["key"]: (sample["image"], sample["labels"].tolist()) for sample in samples}


def test_subsets_are_nested_and_hold_the_same_images(hashtag_folder, tmp_path):
    everything = contents(hashtag_folder)
    views = {}
    for size in (5, 20, 48):
        manifest = make_view(hashtag_folder, tmp_path / str(size), num_images=size)
        views[size] = contents(tmp_path / str(size))
        assert manifest["num_images"] == len(views[size]) == size
        assert all(everything[key] == value for key, value in views[size].items())
        assert (
            manifest["hashtag_counts"]
            == np.bincount(np.concatenate([labels for _, labels in views[size].values()]), minlength=4).tolist()
        )
    assert views[5].keys() < views[20].keys() < views[48].keys()
    make_view(hashtag_folder, tmp_path / "other", num_images=20, seed=1)
    assert contents(tmp_path / "other").keys() != views[20].keys()
    assert (tmp_path / "5" / "shard-000000.tar").is_symlink()


def test_a_subset_is_drawn_from_all_shards(hashtag_folder, tmp_path):
    make_view(hashtag_folder, tmp_path / "view", num_images=24)
    assert [len(read_labels(path).rows) > 0 for path in sorted((tmp_path / "view").glob("*.tar"))] == [True] * 3


def test_another_vocabulary_labels_the_same_images_anew(hashtag_folder, tmp_path):
    pets = Vocabulary.build("pets", load_wordnet(), synsets=["n02084071", "n02121620"])  # dog, cat
    manifest = make_view(hashtag_folder, tmp_path / "pets", vocabulary=pets)
    whole, view = contents(hashtag_folder), contents(tmp_path / "pets")
    synsets = HashtagDataset(hashtag_folder), Vocabulary.load(hashtag_folder / "vocabulary.json").synsets
    expected = {}
    for key, (image, labels) in whole.items():
        kept = sorted(pets.synsets.index(synsets[1][label]) for label in labels if synsets[1][label] in pets.synsets)
        if kept:
            expected[key] = (image, kept)
    assert view == expected and 0 < len(view) < 48
    assert manifest["num_labels"] == 2 and manifest["num_unlabelled"] == 48 - len(view)


def test_a_finished_view_is_kept_and_another_is_refused(hashtag_folder, tmp_path):
    first = make_view(hashtag_folder, tmp_path / "view", num_images=10)
    assert make_view(hashtag_folder, tmp_path / "view", num_images=10) == first == read_manifest(tmp_path / "view")
    with pytest.raises(ShardError, match="num_images 10, not 11"):
        make_view(hashtag_folder, tmp_path / "view", num_images=11)
    with pytest.raises(ShardError, match="holds shard-000000.tar, which is of another dataset"):
        make_view(
            hashtag_folder, write_hashtag_folder(tmp_path / "own", Vocabulary.load(hashtag_folder / "vocabulary.json"))
        )


def test_a_folder_in_which_another_process_works_is_refused(hashtag_folder, tmp_path):
    (tmp_path / "view").mkdir()
    with FileLock(tmp_path / "view" / ".lock"), pytest.raises(ShardError, match="is being written by another process"):
        make_view(hashtag_folder, tmp_path / "view", num_images=3)
    assert make_view(hashtag_folder, tmp_path / "view", num_images=3)["num_images"] == 3


def test_more_images_than_there_are_is_refused(hashtag_folder, tmp_path):
    with pytest.raises(ShardError, match="subset of 49 images; there are 48"):
        make_view(hashtag_folder, tmp_path / "view", num_images=49)
    assert make_view(hashtag_folder, tmp_path / "view", num_images=48)["num_images"] == 48


def test_a_part_that_is_held_out_needs_its_size(hashtag_folder, tmp_path):
    with pytest.raises(UserError, match="part val is what a split holds out; say how much with held_out"):
        make_view(hashtag_folder, tmp_path / "view", part="val")
    assert not (tmp_path / "view").exists()
