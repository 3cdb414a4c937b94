"""Planted copies of real photographs are found, different pictures are not, and the numbers that follow."""

import importlib.util
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from wsl_d2.duplicates.duplicates import (
    DuplicateError,
    DuplicateFinder,
    Pair,
    images_of_coco,
    lower_bound_accuracy,
    read_pairs,
    search,
)

ROOT = Path(__file__).parents[2]


def encoded(image, quality=92):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def cropped(image, rng):
    left, top = rng.uniform(0, 0.1) * image.width, rng.uniform(0, 0.1) * image.height
    return image.crop((int(left), int(top), int(left + 0.9 * image.width), int(top + 0.9 * image.height)))


def recoloured(image, rng):
    scaled = np.asarray(image) * np.array([rng.uniform(0.7, 1.3) for _ in range(3)])
    image = Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
    return ImageEnhance.Color(ImageEnhance.Contrast(image).enhance(rng.uniform(0.7, 1.3))).enhance(
        rng.uniform(0.4, 1.6)
    )


COPIES = {
    "rescaled": lambda image, rng: image.resize((image.width // 2, image.height // 2)),
    "cropped": cropped,
    "recompressed": lambda image, rng: Image.open(io.BytesIO(encoded(image, 30))).convert("RGB"),
    "mirrored": lambda image, rng: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "recoloured": recoloured,
}


@pytest.fixture(scope="module")
def photos():
    """Parts of two photographs, none of which overlap."""
    parts = {}
    for number, pixels in enumerate(load_sample_images().images):
        for x in range(0, 640 - 127, 128):
            for y in range(0, 427 - 105, 106):
                parts[f"{number}_{x}_{y}"] = Image.fromarray(pixels[y : y + 106, x : x + 128])
    return {key: part for key, part in parts.items() if np.asarray(part).std() > 20}


def test_planted_copies_of_photographs(photos):
    keys = sorted(photos)
    indexed, others = {key: photos[key] for key in keys[::2]}, {key: photos[key] for key in keys[1::2]}
    assert len(indexed) >= 15 and len(others) >= 15
    finder = DuplicateFinder((key, encoded(image)) for key, image in indexed.items())
    rng = random.Random(0)
    copies = {f"{name}/{key}": change(image, rng) for name, change in COPIES.items() for key, image in indexed.items()}
    pairs = finder.find(list(copies), list(copies.values()))
    right = [pair for pair in pairs if pair.pretraining.split("/")[1] == pair.evaluation]
    assert len(right) / len(copies) >= 0.95
    assert len(pairs) - len(right) <= 0.01 * len(pairs)
    assert finder.find(list(others), list(others.values())) == []
    assert all(0.85 <= pair.score <= 1 and 0 <= pair.hash_distance <= 14 for pair in pairs)


def test_features_find_what_the_hash_does_not(photos):
    """An extractor that recognises pictures by their key colour brings candidates; pixels still decide."""
    key = "1_256_106"  # of the flower: smooth enough for its parts to look like the whole
    image = photos[key]
    part = image.crop((0, 0, int(image.width * 0.9), int(image.height * 0.9)))

    def extractor(pictures):
        return np.stack([np.asarray(picture.resize((8, 8)), np.float32).ravel() for picture in pictures])

    finder = DuplicateFinder([(key, encoded(image))], extractor, max_hash_distance=-1)
    (pair,) = finder.find(["part"], [part])
    assert (pair.evaluation, pair.pretraining, pair.hash_distance) == (key, "part", -1) and pair.cosine > 0.8
    other = next(image for name, image in photos.items() if name != key)
    assert finder.find(["other"], [other]) == []


def test_flat_pictures_are_nobodys_duplicates():
    grey = Image.new("RGB", (64, 64), (120, 120, 120))
    finder = DuplicateFinder([("grey", encoded(grey))])
    assert finder.find(["same"], [grey]) == []


def test_search_goes_on_after_an_interruption(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("wsl_d2.duplicates.duplicates._BATCH", 4)
    items = [(key, encoded(image)) for key, image in sorted(photos.items())]
    finder = DuplicateFinder(items[:6])
    damaged = ("damaged", b"no picture")

    def interrupted():
        yield from items[:10]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(finder, interrupted(), tmp_path / "a")
    assert json.loads((tmp_path / "a" / "progress.json").read_text())["done"] == 8
    seen = []
    monkeypatch.setattr(
        finder, "find", lambda keys, pictures, find=finder.find: seen.extend(keys) or find(keys, pictures)
    )
    resumed = search(finder, [*items, damaged], tmp_path / "a")
    assert len(seen) == len(items) - 8
    assert resumed == search(finder, [*items, damaged], tmp_path / "b")
    assert {pair.evaluation for pair in resumed} == {key for key, _ in items[:6]}
    assert json.loads((tmp_path / "a" / "progress.json").read_text())["damaged"] == ["damaged"]


def test_judgements_and_the_lower_bound(tmp_path, photos):
    items = [(key, encoded(image)) for key, image in sorted(photos.items())][:5]
    pairs = search(DuplicateFinder(items), items, tmp_path)
    path = tmp_path / "pairs.csv"
    assert read_pairs(path) == pairs and len(pairs) == 5
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1] + "no", *lines[2:]]) + "\n")
    assert read_pairs(path) == pairs[1:]
    correct = {key: True for key, _ in items} | {"x": True, "y": False, "z": True}
    assert lower_bound_accuracy(correct, read_pairs(path)) == (87.5, 37.5, 4)
    path.write_text(path.read_text().replace("no", "maybe", 1))
    with pytest.raises(DuplicateError, match="line 2: judged is 'maybe'"):
        read_pairs(path)
    with pytest.raises(DuplicateError, match="1 duplicated images have no result, the first 'q'"):
        lower_bound_accuracy({"a": True}, [Pair("q", "p", 1.0, 0, 0.0)])


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(DuplicateError, match="no evaluation image that can be decoded"):
        DuplicateFinder([("a", b"")])
    (tmp_path / "coco.json").write_text('{"images": [{"file_name": "../../etc/passwd"}]}')
    with pytest.raises(DuplicateError, match="leads out of"):
        list(images_of_coco(tmp_path / "coco.json", tmp_path / "images"))


def test_the_tool(tmp_path, photos, capsys):
    for name, change in (("evaluation", lambda image: image), ("pretraining", lambda image: image.resize((90, 70)))):
        (tmp_path / name).mkdir()
        for key, image in list(photos.items())[:6]:
            change(image).save(tmp_path / name / f"{key}.jpg")
    spec = importlib.util.spec_from_file_location("find_duplicates", ROOT / "tools" / "find_duplicates.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    folders = ["--pretraining", str(tmp_path / "pretraining"), "--evaluation", str(tmp_path / "evaluation")]
    tool.main([*folders, "--output", str(tmp_path / "out")])
    assert "6 of 6 evaluation images have a duplicate" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "contact_sheet.png").width > 1000
    (tmp_path / "correct.json").write_text(json.dumps({f"{key}.jpg": True for key in list(photos)[:12]}))
    tool.main(["--judged", str(tmp_path / "out" / "pairs.csv"), "--correct", str(tmp_path / "correct.json")])
    assert "accuracy 100.00; at least 50.00 with the 6 duplicated images" in capsys.readouterr().out
