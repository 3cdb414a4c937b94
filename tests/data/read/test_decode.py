"""Decoding of odd and damaged files, orientations, shrinking and limits."""

import io
import resource

import numpy as np
import pytest
from odd_images import bomb, corpus, exif_bytes, jpeg, picture, stored_for
from PIL import Image

from wsl_d2.data.read import decode as decode_module
from wsl_d2.data.read.decode import DCT_SCALES, DamagedImageError, dct_scale, decode, open_image, upright
from wsl_d2.data.read.device_decode import EncodedBatch
from wsl_d2.data.read.mapper import DECODINGS, HashtagMapper

CORPUS = corpus()
IN_WORKERS = [decoding for decoding in DECODINGS if decoding != "device"]


def test_the_corpus_has_forty_files_of_distinct_names():
    assert len({odd.name for odd in CORPUS}) == len(CORPUS) >= 40


@pytest.mark.parametrize("odd", CORPUS, ids=lambda odd: odd.name)
def test_odd_files(odd):
    if odd.reason is not None:
        for mapper in [HashtagMapper(train, size=8, decoding=d) for train in (True, False) for d in IN_WORKERS]:
            with pytest.raises(DamagedImageError) as error:
                mapper(odd.data, np.random.default_rng(0))
            assert error.value.reason == odd.reason
        return
    encoded = open_image(odd.data)
    pixels = decode(encoded)
    assert pixels.dtype == np.uint8 and pixels.shape == odd.pixels.shape == (*encoded.size[::-1], 3)
    assert np.abs(pixels.astype(int) - odd.pixels).max() <= odd.tolerance
    for decoding in DECODINGS:
        for train in (True, False):
            mapper = HashtagMapper(train, size=8, short_side=9, decoding=decoding)
            crop = mapper(odd.data, np.random.default_rng(0))
            crop = crop if isinstance(crop, np.ndarray) else EncodedBatch([crop]).decode("cpu")[0][0].numpy()
            assert crop.shape == (3, 8, 8) and crop.dtype == np.uint8 and crop.flags.c_contiguous


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_bombs_cost_no_memory(format):
    data = bomb(format)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10):
        with pytest.raises(DamagedImageError, match="too large"):
            decode(open_image(data))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_agrees_with_pillow(orientation):
    from PIL import ImageOps

    stored = stored_for(orientation, picture())
    image = Image.open(io.BytesIO(jpeg(stored, exif=exif_bytes(orientation))))
    expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(upright(np.asarray(image.convert("RGB")), orientation), expected)


@pytest.mark.parametrize("options", [{"subsampling": s, "progressive": p} for s in (0, 1, 2) for p in (False, True)])
def test_whole_jpegs_equal_pillows(options):
    noise = np.random.default_rng(0).integers(0, 256, (53, 75, 3), dtype=np.uint8)
    data = jpeg(noise, **options)
    assert np.array_equal(decode(open_image(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("scale", DCT_SCALES)
def test_dct_scaling_gives_the_mean_of_blocks(scale):
    pixels = picture(160, 96)
    shrunk = decode(open_image(jpeg(pixels)), scale)
    side = 8 // scale
    means = pixels.reshape(96 // side, side, 160 // side, side, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - means).max() < 4


def test_shrunk_sizes_are_rounded_up():
    assert decode(open_image(jpeg(picture(75, 53))), 2).shape == (14, 19, 3)


@pytest.mark.parametrize("width, height, expected", [(1792, 1792, 1), (1791, 3000, 2), (896, 896, 2), (448, 500, 4)])
def test_the_crop_keeps_its_pixels(width, height, expected):
    assert dct_scale(width, height, 224) == expected
    assert dct_scale(447, 9000, 224) == 8
    assert dct_scale(10, 10, 224) == 8


def test_what_pillow_decodes_is_not_shrunk():
    odd = next(odd for odd in CORPUS if odd.name == "rgba png")
    assert not open_image(odd.data).has_dct_scaling
    assert decode(open_image(odd.data), 4).shape == odd.pixels.shape
    assert not open_image(next(odd for odd in CORPUS if odd.name == "adobe cmyk jpeg").data).has_dct_scaling


def test_memory_is_reused_and_large_images_take_their_own(monkeypatch):
    first = decode(open_image(jpeg(picture(64, 64))))
    second = decode(open_image(jpeg(picture(32, 32))))
    assert np.shares_memory(first, second)
    monkeypatch.setattr(decode_module, "_SCRATCH_BYTES", 100)
    assert not np.shares_memory(second, decode(open_image(jpeg(picture(32, 32)))))


def test_crops_do_not_live_in_the_reused_memory():
    for decoding in IN_WORKERS:
        mapper = HashtagMapper(True, size=32, scale=(1, 1), ratio=(1, 1), decoding=decoding)
        first = mapper(jpeg(picture(32, 32)), np.random.default_rng(0))
        copy = first.copy()
        mapper(jpeg(255 - picture(32, 32)), np.random.default_rng(0))
        assert np.array_equal(first, copy)


def test_random_damage_never_escapes_the_error_type():
    rng = np.random.default_rng(0)
    sources = [odd.data for odd in CORPUS if odd.pixels is not None and max(odd.pixels.shape) < 200]
    mapper = HashtagMapper(True, size=8)
    refused = 0
    for _ in range(600):
        data = bytearray(sources[rng.integers(len(sources))])
        for at in rng.integers(0, len(data), rng.integers(1, 6)):
            data[at] = rng.integers(256)
        try:
            mapper(bytes(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data), rng)
        except DamagedImageError:
            refused += 1
    assert 0 < refused < 600
