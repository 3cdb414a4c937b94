"""Class folders and tars of them become shards that training, fine-tuning and probing read."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from command_line import wsl_d2
from toy_data import jpeg
from training_runs import merged_records, train

from wsl_d2.data import HashtagDataset, ShardError
from wsl_d2.data.write.class_folders import class_vocabulary, list_images, make_class_shards
from wsl_d2.data.write.posts import ImageFolder

CLASSES = ["n01440764", "001.Black_footed_Albatross", "a/abbey", "001-black footed albatross"]


@pytest.fixture()
def folder(tmp_path):
    root = tmp_path / "pictures"
    for number in range(24):
        path = root / CLASSES[number % 4] / f"img.{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
        (path.parent / "readme.txt").write_text("no image")
    return root


def contents(shards) -> dict[str, tuple[bytes, str]]:
    dataset = HashtagDataset(shards)
    vocabulary = json.loads((shards / "vocabulary.json").read_text())
    names = [label["synset"] for label in vocabulary["labels"]] if "labels" in vocabulary else vocabulary["synsets"]
    samples = [dataset[i] for i in range(len(dataset))]
    assert all(len(sample["labels"]) == 1 for sample in samples)
    return {sample["key"].split("-")[0]: (sample["image"], names[sample["labels"][0]]) for sample in samples}


def test_every_image_gets_the_label_of_its_folder(folder, tmp_path):
    manifest = make_class_shards(folder, tmp_path / "out", images_per_shard=10, workers=2)
    assert manifest["num_images"] == 24 and manifest["num_labels"] == 4 and manifest["account"] == {"written": 24}
    assert [shard["num_images"] for shard in manifest["shards"]] == [10, 10, 4]
    images, _ = list_images(folder)
    expected = {f"{n:08d}": (image.read(), image.label) for n, image in enumerate(images)}
    assert contents(tmp_path / "out") == expected
    first = HashtagDataset(tmp_path / "out").index.labels[:10]
    assert len(np.unique(first)) > 1  # a shard mixes the classes


def test_tars_and_tars_of_tars_are_the_folder(folder, tmp_path):
    plain, nested = tmp_path / "plain.tar", tmp_path / "nested.tar"
    with tarfile.open(plain, "w") as tar:
        tar.add(folder, arcname=".")
    with tarfile.open(nested, "w") as outer:
        for name in CLASSES:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for path in (folder / name).glob("*.JPEG"):
                    inner.add(path, arcname=path.name)
            member = tarfile.TarInfo(f"{name}.tar")
            member.size = buffer.tell()
            outer.addfile(member, io.BytesIO(buffer.getvalue()))
    expected = [(image.label, image.name, image.read()) for image in list_images(folder)[0]]
    for tar in (plain, nested):
        assert [(image.label, image.name, image.read()) for image in list_images(tar)[0]] == expected


def test_names_that_mean_the_same_stay_two_classes():
    vocabulary = class_vocabulary("v", CLASSES)
    assert vocabulary.synsets == tuple(sorted(CLASSES))
    assert len({group[0] for group in vocabulary.hashtags}) == 4


def test_a_repeated_call_writes_only_what_is_missing(folder, tmp_path):
    out = tmp_path / "out"
    first = make_class_shards(folder, out, images_per_shard=10)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert make_class_shards(folder, out, images_per_shard=10) == first
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")} == times
    (out / "shard-000001.tar").unlink()
    assert make_class_shards(folder, out, images_per_shard=10) == first
    again = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert [name for name in sorted(times) if again[name] != times[name]] == ["shard-000001.tar"]


@pytest.mark.timeout(60)
def test_damaged_images_are_listed(folder, tmp_path):
    (folder / CLASSES[0] / "broken.jpg").write_bytes(b"<html>")
    os.mkfifo(folder / CLASSES[1] / "pipe.jpg")
    manifest = make_class_shards(folder, tmp_path / "out")
    assert manifest["num_images"] == 24
    assert [count for reason, count in manifest["account"].items() if reason.startswith("unknown format")] == [1]
    assert manifest["account"]["no image (not a regular file)"] == 1
    rows = [json.loads(line) for line in (tmp_path / "out" / "shard-000000.rejected.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "pipe" not in row["key"]]
    assert "broken_jpg" in row["key"] and row["reason"].startswith("unknown format")
    assert make_class_shards(folder, tmp_path / "out") == manifest


def test_another_source_changes_nothing(folder, tmp_path):
    make_class_shards(folder, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ShardError, match="is the place of another dataset: num_images 24, not .*Nothing was written"):
        make_class_shards(folder / "a", tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    "name", [".hidden", "__MACOSX", "@eaDir", ".Trash-1000/files/x", "n01/.ipynb_checkpoints", "lost+found"]
)
def test_folders_that_systems_leave_are_no_classes_and_counted(folder, tmp_path, name):
    expected, _ = list_images(folder)
    (folder / name).mkdir(parents=True)
    (folder / name / "img.JPEG").write_bytes(jpeg(0))
    (folder / CLASSES[0] / "._img.JPEG").write_bytes(b"x")
    images, skipped = list_images(folder)
    assert images == expected
    assert skipped.pop("hidden file") == 1 and list(skipped.values()) == [1]
    assert make_class_shards(folder, tmp_path / "out")["skipped"] == {"hidden file": 1, **skipped}


def test_a_folder_that_is_linked_more_than_once_is_read_once(folder, tmp_path):
    expected, _ = list_images(folder)
    (folder / "a" / "up").symlink_to("..")
    (folder / "0_link").symlink_to(folder / "a" / "abbey")
    (folder / "elsewhere").symlink_to(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.jpg").write_bytes(jpeg(0))
    images, skipped = list_images(folder)
    assert [image.name for image in images] == sorted([*(image.name for image in expected), "elsewhere/x.jpg"])
    assert skipped == {"folder that is linked more than once": 2}
    assert (
        ImageFolder(folder).find("x") == "elsewhere/x.jpg"
        and ImageFolder(folder).find("img.3") == f"{CLASSES[3]}/img.3.JPEG"
    )


def test_a_class_whose_name_is_a_stop_word_or_no_word_is_a_class(tmp_path):
    for name in ("canon", "12", "are", "a"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "x.jpg").write_bytes(jpeg(0))
    manifest = make_class_shards(tmp_path / "images", tmp_path / "out")
    assert manifest["num_images"] == 4 and manifest["hashtag_counts"] == [1, 1, 1, 1]


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(ShardError, match="does not exist"):
        make_class_shards(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ShardError, match="class 'a/abbey' is none of the 1 classes asked for"):
        make_class_shards(folder, tmp_path / "out", vocabulary=class_vocabulary("v", [CLASSES[0]]), files=[
            "a/abbey/img.2.JPEG"
        ])  # fmt: skip
    with pytest.raises(ShardError, match="has no 'x.jpg', nor 0 others"):
        list_images(folder, ["x.jpg"])
    with pytest.raises(ShardError, match="lies outside of any class; give the folder"):
        list_images(folder / "a" / "abbey")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match="holds no image"):
        list_images(tmp_path / "empty")


def test_fine_tuning_through_the_tools(folder, datasets, tmp_path):
    names = [image.name for image in list_images(folder)[0]]
    (tmp_path / "train.txt").write_text("\n".join(names[::2]) + "\n")
    for split, extra in (
        ("train", ["--files", tmp_path / "train.txt"]),
        ("val", ["--classes-of", tmp_path / "d/train"]),
    ):
        printed = wsl_d2("data", "from-folders", folder, "--output", tmp_path / "d" / split, *extra)
    assert "24 labeled images in 1 shards" in printed and "classes: 4" in printed
    train(datasets, tmp_path / "pretrained", SOLVER__TOTAL_IMAGES=48)
    folders = "[['c_train', 'd/train'], ['c_val', 'd/val']]"
    options = {"DATASETS__HASHTAG_FOLDERS": folders, "DATASETS__TRAIN": "('c_train',)", "DATASETS__TEST": "('c_val',)"}
    options |= {"DATALOADER__RESAMPLING__MODE": "natural", "SOLVER__TOTAL_IMAGES": 48}
    weights = str(tmp_path / "pretrained" / "backbone.pth")
    train(tmp_path, tmp_path / "out", MODEL__WEIGHTS=weights, **options)
    assert merged_records(tmp_path / "out")["hashtag/num_images"] == 24
