"""Planted copies of real photographs are found, different pictures are not, and the numbers that follow."""

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from wsl_d2.duplicates import finder as finder_module
from wsl_d2.duplicates.finder import DuplicateFinder, decoded_batches, describe, join
from wsl_d2.errors import UserError


def finder_of(images, extractor=None, **options):
    return DuplicateFinder(join(describe(enumerate(images), {}, extractor)), extractor, **options)


def recompressed(image, rng):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=30)
    return Image.open(buffer).convert("RGB")


def cropped(image, rng):
    left, top = rng.uniform(0, 0.1) * image.width, rng.uniform(0, 0.1) * image.height
    return image.crop((int(left), int(top), int(left + 0.9 * image.width), int(top + 0.9 * image.height)))


def recolored(image, rng):
    scaled = np.asarray(image) * np.array([rng.uniform(0.7, 1.3) for _ in range(3)])
    image = Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
    return ImageEnhance.Color(ImageEnhance.Contrast(image).enhance(rng.uniform(0.7, 1.3))).enhance(
        rng.uniform(0.4, 1.6)
    )


COPIES = {
    "rescaled": lambda image, rng: image.resize((image.width // 2, image.height // 2)),
    "cropped": cropped,
    "recompressed": recompressed,
    "mirrored": lambda image, rng: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "recolored": recolored,
}


def test_planted_copies_of_photographs(photos, encoded):
    keys = sorted(photos)
    indexed, others = {key: photos[key] for key in keys[::2]}, {key: photos[key] for key in keys[1::2]}
    assert len(indexed) >= 15 and len(others) >= 15
    finder = finder_of((key, encoded[key]) for key in indexed)
    rng = random.Random(0)
    copies = {f"{name}/{key}": change(image, rng) for name, change in COPIES.items() for key, image in indexed.items()}
    pairs = finder.find(list(copies), list(copies.values()))
    right = [pair for pair in pairs if pair.pretraining.split("/")[1] == pair.evaluation]
    assert len(right) / len(copies) >= 0.95
    assert len(pairs) - len(right) <= 0.01 * len(pairs)
    assert finder.find(list(others), list(others.values())) == []
    assert all(0.85 <= pair.score <= 1 and 0 <= pair.hash_distance <= 14 for pair in pairs)


def test_features_find_what_the_hash_does_not(photos, encoded):
    """An extractor that recognizes pictures by their key color brings candidates; pixels still decide."""
    key = "1_256_106"  # of the flower: smooth enough for its parts to look like the whole
    image = photos[key]
    part = image.crop((0, 0, int(image.width * 0.9), int(image.height * 0.9)))

    def extractor(pictures):
        return np.stack([np.asarray(picture.resize((8, 8)), np.float32).ravel() for picture in pictures])

    finder = finder_of([(key, encoded[key])], extractor, max_hash_distance=-1)
    (pair,) = finder.find(["part"], [part])
    assert (pair.evaluation, pair.pretraining, pair.hash_distance) == (key, "part", -1) and pair.cosine > 0.8
    other = next(image for name, image in photos.items() if name != key)
    assert finder.find(["other"], [other]) == []


def test_flat_pictures_are_nobodys_duplicates():
    gray = Image.new("RGB", (64, 64), (120, 120, 120))
    buffer = io.BytesIO()
    gray.save(buffer, "JPEG")
    finder = finder_of([("gray", buffer.getvalue())])
    assert finder.find(["same"], [gray]) == []


def test_a_key_that_occurs_twice_is_refused(encoded):
    data = next(iter(encoded.values()))
    with pytest.raises(UserError, match="two evaluation images have the key 'a'"):
        finder_of([("b", data), ("a", data), ("a", data)])


def test_encoded_images_are_let_go(encoded):
    """Neither what is compared nor its batches hold what was read."""

    class Data(bytes):
        alive = most = 0

        def __init__(self, _):
            Data.alive += 1
            Data.most = max(Data.most, Data.alive)

        def __del__(self):
            Data.alive -= 1

    finder_of((key, Data(data)) for key, data in encoded.items())
    assert Data.most <= 3 and len(encoded) > 30


def test_a_batch_holds_few_large_pictures(encoded, monkeypatch):
    monkeypatch.setattr(finder_module, "_BATCH_PIXELS", 3 * 128 * 106)
    batches = list(decoded_batches(enumerate(encoded.items()), {}))
    assert {len(batch.keys) for batch in batches[:-1]} == {3}
    assert [number for batch in batches for number in batch.numbers] == list(range(len(encoded)))
