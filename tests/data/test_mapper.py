import io

import numpy as np
import pytest
from PIL import Image

from wsl_d2.data.mapper import DamagedImageError, HashtagMapper, decode_image, sample_crop


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
    monkeypatch.setattr("wsl_d2.data.mapper.MAX_IMAGE_PIXELS", 10)
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


def test_test_time_crop_is_the_centre():
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
