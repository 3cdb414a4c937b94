"""Images stored smaller."""

import io

import numpy as np
import pytest
from command_line import wsl_d2
from PIL import Image
from sklearn.datasets import load_sample_image
from toy_data import jpeg

from wsl_d2.data import HashtagDataset, ShardError, make_shards
from wsl_d2.data.read.decode import DamagedImageError, decode, open_image
from wsl_d2.data.read.shrink import Shrinking, shrink
from wsl_d2.errors import UserError

PHOTO = load_sample_image("china.jpg")  # 427 x 640


def encoded(pixels, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **({"format": "JPEG", "quality": 95} | options))
    return file.getvalue()


def test_a_large_image_has_that_short_side_and_looks_as_before():
    data = encoded(PHOTO)
    small = shrink(open_image(data), Shrinking(100, 90))
    pixels = decode(open_image(small)).astype(float)
    assert pixels.shape == (100, 150, 3) and len(small) < len(data) / 4
    expected = np.asarray(Image.fromarray(PHOTO).resize((150, 100), Image.Resampling.BICUBIC))
    of_pillow = decode(open_image(encoded(expected, quality=90))).astype(float)
    assert np.abs(pixels - expected).mean() < 1.1 * np.abs(of_pillow - expected).mean()
    assert len(shrink(open_image(data), Shrinking(100, 50))) < len(small)


def test_a_small_image_stays_as_it_is():
    data = encoded(PHOTO)
    assert shrink(open_image(data), Shrinking(427, 90)) is data and shrink(open_image(data), Shrinking()) is data


def test_it_is_upright_and_without_transparency():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = shrink(open_image(encoded(PHOTO, exif=exif)), Shrinking(50, 90))
    image = open_image(turned)
    assert image.size == (50, 75) and image.orientation == 1
    transparent = np.zeros((80, 90, 4), np.uint8)
    white = decode(open_image(shrink(open_image(encoded(transparent, format="PNG")), Shrinking(40, 90))))
    assert white.shape == (40, 45, 3) and white.min() > 250


def test_what_cannot_be_decoded_and_numbers_out_of_range_are_refused():
    with pytest.raises(DamagedImageError):
        shrink(open_image(encoded(PHOTO)[:2000]), Shrinking(50, 90))
    for values in ((0, 90), (400, 0), (400, 101)):
        with pytest.raises(UserError, match="quality of 1 to 100"):
            Shrinking(*values)


def test_datasets_know_how_their_images_are_stored(tmp_path, toy_vocabulary):
    folder = tmp_path / "photos" / "dogs"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(encoded(PHOTO))
    (folder / "b.jpg").write_bytes(jpeg(0))
    (tmp_path / "posts.csv").write_text("key,hashtags\na,dog\nb,dog\n")
    toy_vocabulary.save(tmp_path / "vocabulary.json")
    posts, options = tmp_path / "posts.csv", ["--short-side", 60, "--quality", 80]
    made, vocabulary = tmp_path / "made", tmp_path / "vocabulary.json"
    wsl_d2("data", "make", posts, "--images", folder, "--vocabulary", vocabulary, "--output", made, *options)
    wsl_d2("data", "from-folders", tmp_path / "photos", "--output", tmp_path / "classes", *options)
    for place in (made, tmp_path / "classes"):
        dataset = HashtagDataset(place)
        assert (dataset.manifest["short_side"], dataset.manifest["quality"]) == (60, 80)
        sizes = {open_image(dataset._read(image)[1]).size for image in range(2)}
        assert (90, 60) in sizes and len(sizes) == 2
    with pytest.raises(ShardError, match="short_side 60, not"):
        make_shards([str(posts)], str(folder), toy_vocabulary, made)
    refused = wsl_d2("data", "from-folders", tmp_path / "photos", "--output", tmp_path / "c", "--quality", 0, code=2)
    assert "quality of 1 to 100" in refused and not (tmp_path / "c").exists()
