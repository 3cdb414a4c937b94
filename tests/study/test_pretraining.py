"""`wsl-d2 pretrain`: from photos and posts to a backbone, stopped at every stage, and what it refuses."""

import hashlib
import json

import pytest
from command_line import wsl_d2
from toy_data import jpeg

from wsl_d2 import pretrain
from wsl_d2.data.posts.count import CountOptions
from wsl_d2.errors import UserError

OPTIONS = {
    "architecture": "resnext26_8x4d",
    "vocabulary": "17k",
    "held_out": 0.2,
    "image_size": 32,
    "total_images": 64,
    "batch_size": 16,
    "workers": 1,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 photos of dogs, cats and cars, as people tag them, and a table of the posts."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "photos" / "inside").mkdir(parents=True)
    rows = ["key,hashtags"]
    for i in range(60):
        name = f"inside/{i}" if i % 2 else str(i)
        (folder / "photos" / f"{name}.jpg").write_bytes(jpeg(i))
        rows.append(f'{name},"{("#Dogs", "catsofinstagram,#love", "car")[i % 3]}"')
    (folder / "posts.csv").write_text("\n".join(rows) + "\n")
    return folder


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Stopped(Exception):
    pass


def test_stopped_at_every_stage_it_goes_on_to_the_same_backbone(photos, tmp_path):
    whole = pretrain(photos / "photos", str(photos / "posts.csv"), output=tmp_path / "whole", **OPTIONS)
    stages = []
    while True:

        def stop_at_a_new_stage(text):
            if text not in stages:
                stages.append(text)
                raise Stopped

        try:
            again = pretrain(
                photos / "photos",
                str(photos / "posts.csv"),
                output=tmp_path / "parts",
                say=stop_at_a_new_stage,
                **OPTIONS,
            )
            break
        except Stopped:
            continue
    told = " ".join(stages)
    for stage in ("counts", "vocabulary.json", "/shards", "/train", "/val", "pretrain.yaml", "training:", "top-1"):
        assert stage in told, told
    assert digest(again) == digest(whole)
    record = json.loads((tmp_path / "whole" / "run" / "record.json").read_text())
    assert record["results"]["hashtag/num_images"] == pytest.approx(12, abs=8)


def test_another_call_into_the_same_folder_is_refused(photos, tmp_path):
    output = tmp_path / "out"

    def stop(text):
        raise Stopped

    with pytest.raises(Stopped):
        pretrain(photos / "photos", str(photos / "posts.csv"), output=output, say=stop, **OPTIONS)
    (output / "run").mkdir()  # the training has begun
    for change, words in (
        ({"vocabulary": "1.5k"}, r"begun with other arguments \(vocabulary 17k, now 1.5k\); repeat those .* or delete"),
        ({"architecture": "resnext50_32x4d"}, "architecture resnext26_8x4d, now resnext50_32x4d"),
        ({"seed": 1, "columns": CountOptions(key_column="id")}, "key column key, now id; seed 0, now 1"),
    ):
        with pytest.raises(UserError, match=words):
            pretrain(photos / "photos", str(photos / "posts.csv"), output=output, **OPTIONS | change)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no pretraining; choose another --output"):
        pretrain(photos / "photos", str(photos / "posts.csv"), output=tmp_path / "mine", **OPTIONS)


def test_a_call_that_failed_before_the_training_can_be_corrected(photos, tmp_path):
    call = ["pretrain", photos / "photos", photos / "posts.csv", "--output", tmp_path / "out"]
    wsl_d2(*call, "--hashtags-column", "none", code=2)
    small = ["--architecture", "resnext26_8x4d", "--image-size", 32, "--total-images", 16, "--batch-size", 8]
    wsl_d2(*call, *small)
    assert (tmp_path / "out" / "backbone.pth").exists()


def test_what_cannot_be_used_is_one_line(photos, tmp_path):
    for number, (arguments, words) in enumerate(
        (
            (
                (photos / "none", photos / "posts.csv"),
                "none is no folder; give the folder of the photos, or of their tars.",
            ),
            ((photos / "photos",), "holds no tars; give the table of posts"),
            ((photos / "photos", photos / "none.csv"), "none.csv"),
            (
                (photos / "photos", photos / "posts.csv", "--architecture", "resnet50"),
                "unknown architecture 'resnet50'",
            ),
            ((photos / "photos", photos / "posts.csv", "--key-column", "id"), "id"),
        )
    ):
        printed = wsl_d2("pretrain", *arguments, "--output", tmp_path / str(number), code=2)
        assert words in printed.splitlines()[-1] and printed.splitlines()[-1].startswith("wsl-d2 pretrain: ")
        assert not (tmp_path / str(number) / "vocabulary.json").exists()
