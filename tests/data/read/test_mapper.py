import io

import numpy as np
import pytest
from odd_images import jpeg
from PIL import Image, ImageOps
from torchvision.transforms import functional as TF

from wsl_d2.data.read.decode import decode
from wsl_d2.data.read.mapper import DECODINGS, DamagedImageError, HashtagMapper, decode_image, sample_crop


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK"])
def test_all_modes_become_rgb(mode):
    format = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(Image.new(mode, (6, 4)), format)).mode == "RGB"


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(image, "JPEG", exif=exif)).size == (4, 6)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"<html>not found</html>", "unknown format"),
        (encoded(Image.new("RGB", (8, 8)), "GIF"), "unknown format"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:700], "truncated"),
    ],
)
def test_damage_has_a_reason(data, reason):
    with pytest.raises(DamagedImageError) as error:
        decode_image(data)
    assert error.value.reason == reason


def test_too_large_images_are_refused(monkeypatch):
    monkeypatch.setattr("wsl_d2.data.read.decode.MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DamagedImageError, match="too large: 6 x 4 pixels"):
        decode_image(encoded(Image.new("RGB", (6, 4))))


def test_crop_boxes_lie_inside_and_have_the_asked_area_and_aspect():
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, right, bottom = sample_crop(rng, 120, 80, (0.2, 0.6), (0.75, 4 / 3))
        assert 0 <= left < right <= 120 and 0 <= top < bottom <= 80
        width, height = right - left, bottom - top
        assert 0.17 < width * height / (120 * 80) < 0.65
        assert 0.70 < width / height < 1.42


def test_test_time_crop_is_the_center():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 20:40] = 200
    crop = HashtagMapper(False, size=20, short_side=40)(encoded(Image.fromarray(pixels)))
    assert crop.shape == (3, 20, 20) and (crop == 200).all()


def test_bgr_is_the_reverse_of_rgb():
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)))
    rgb = HashtagMapper(False, size=20, short_side=20)(data)
    bgr = HashtagMapper(False, size=20, short_side=20, image_format="BGR")(data)
    assert np.array_equal(rgb[::-1], bgr)
    with pytest.raises(ValueError, match="must be RGB or BGR.*got 'YUV-BT.601'"):
        HashtagMapper(False, image_format="YUV-BT.601")


def photo(width: int, height: int, seed: int = 0) -> bytes:
    """Smooth regions with edges and some noise, as a JPEG."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    pixels[height // 3 : height // 2, width // 4 :] *= 0.6
    return jpeg((pixels + rng.normal(0, 4, (height, width, 1))).clip(0, 255).astype(np.uint8), subsampling=2)


def torchvision_crop(data: bytes, seed: int, size: int) -> np.ndarray:
    """The training crop by torchvision's own functions of a Pillow image, from the same draws."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    rng = np.random.default_rng(seed)
    left, top, right, bottom = sample_crop(rng, *image.size, (0.08, 1.0), (3 / 4, 4 / 3))
    image = TF.resized_crop(image, top, left, bottom - top, right - left, [size, size])
    if rng.random() < 0.5:
        image = TF.hflip(image)
    return TF.pil_to_tensor(image).numpy()


@pytest.mark.parametrize("orientation", [1, 2, 3, 6])
@pytest.mark.parametrize("width, height", [(500, 375), (90, 200), (640, 641)])
def test_exact_training_crops_equal_torchvisions_to_the_bit(width, height, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.open(io.BytesIO(photo(width, height))), "JPEG", quality=90, exif=exif)
    mapper = HashtagMapper(True, size=64, decoding="exact")
    for seed in range(6):
        assert np.array_equal(mapper(data, np.random.default_rng(seed)), torchvision_crop(data, seed, 64))


@pytest.mark.parametrize("decoding", ["exact", "fast"])
def test_test_crops_equal_torchvisions_to_the_bit(decoding):
    for width, height in [(500, 375), (300, 401), (90, 77)]:
        data = photo(width, height)
        image = TF.center_crop(TF.resize(Image.open(io.BytesIO(data)), [73]), [64, 64])
        crop = HashtagMapper(False, size=64, short_side=73, decoding=decoding)(data)
        assert np.array_equal(crop, TF.pil_to_tensor(image).numpy())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_fast_crops_are_close_to_exact_ones(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.open(io.BytesIO(photo(700, 500))), "JPEG", quality=90, exif=exif)
    fast, exact = (HashtagMapper(True, size=64, decoding=decoding) for decoding in ("fast", "exact"))
    for seed in range(12):
        difference = fast(data, np.random.default_rng(seed)).astype(int) - exact(data, np.random.default_rng(seed))
        assert np.abs(difference).mean() < 4  # the box is rounded to shrunken pixels; a wrong turn gives tens


def test_fast_crops_without_shrinking_differ_by_one_at_most():
    data = encoded(Image.open(io.BytesIO(photo(300, 200))))
    fast, exact = (HashtagMapper(True, size=64, decoding=decoding) for decoding in ("fast", "exact"))
    for seed in range(8):
        difference = fast(data, np.random.default_rng(seed)).astype(int) - exact(data, np.random.default_rng(seed))
        assert np.abs(difference).max() <= 1


def test_fast_crops_shrink_while_decoding(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "wsl_d2.data.read.mapper.decode", lambda image, scale=8: seen.append(scale) or decode(image, scale)
    )
    mapper = HashtagMapper(True, size=32, scale=(0.9, 1.0), ratio=(0.99, 1.01))
    for side in (32, 80, 160, 300):
        mapper(photo(side, side), np.random.default_rng(0))
    assert seen == [8, 4, 2, 1]


@pytest.mark.parametrize("decoding", [decoding for decoding in DECODINGS if decoding != "device"])
def test_a_crop_is_a_function_of_its_seed(decoding):
    mapper, data = HashtagMapper(True, size=32, decoding=decoding), photo(200, 150)
    crops = [mapper(data, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(crops[0], crops[1]) and not np.array_equal(crops[0], crops[2])


def test_decoding_comes_from_the_config():
    from detectron2.config import get_cfg

    from wsl_d2 import add_wsl_config

    cfg = get_cfg()
    add_wsl_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.DECODING = "exact"
    assert HashtagMapper.from_config(cfg, is_train=True).decoding == "exact"
    with pytest.raises(ValueError, match="INPUT.DECODING must be one of fast, exact, device, got 'quick'"):
        HashtagMapper(True, decoding="quick")
