"""Encoded image -> uint8 crop. Randomness comes from the generator given, so a crop is a function of its seed.

Shapes: H = W = the crop's size in pixels.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageOps

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_PIXELS = 64_000_000


class DamagedImageError(ValueError):
    """An encoded image cannot be used; ``reason`` is a short word for the kind of damage."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def decode_image(data: bytes) -> Image.Image:
    """Decodes JPEG, PNG or WebP bytes to an upright RGB image.

    Raises:
        DamagedImageError: empty, of another format, larger than 64 megapixels, or cut off.
    """
    if not data:
        raise DamagedImageError("empty", "0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.UnidentifiedImageError as error:
        raise DamagedImageError("unknown format", f"allowed are {', '.join(IMAGE_FORMATS)}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DamagedImageError("bad header", str(error)) from error
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise DamagedImageError("too large", f"{image.width} x {image.height} pixels")
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise DamagedImageError("truncated", str(error)) from error
    return upright.convert("RGB")


def sample_crop(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Samples the box of a RandomResizedCrop, as torchvision's ``get_params``: ten tries, then a centre crop.

    Returns:
        (left, top, right, bottom) in pixels.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * ratio[1])) if width / height > ratio[1] else width
    h = min(height, round(width / ratio[0])) if width / height < ratio[0] else height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class HashtagMapper:
    """Decodes and crops one image.

    Args:
        is_train: RandomResizedCrop and horizontal flip; otherwise resize of the short side and centre crop.
        image_format: "RGB" or "BGR" (``INPUT.FORMAT``).
        size: side of the crop in pixels.
        scale, ratio: area fraction and aspect range of the training crop.
        short_side: pixels; length of the short side before the test's centre crop.
    """

    def __init__(
        self,
        is_train: bool,
        *,
        image_format: str = "RGB",
        size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        short_side: int = 256,
    ):
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT must be RGB or BGR for hashtag images, got {image_format!r}.")
        self.is_train = is_train
        self.image_format = image_format
        self.size = size
        self.scale = (scale[0], scale[1])
        self.ratio = (ratio[0], ratio[1])
        self.short_side = short_side

    @classmethod
    def from_config(cls, cfg, is_train: bool) -> HashtagMapper:
        """Builds the mapper from ``INPUT.*``."""
        return cls(
            is_train,
            image_format=cfg.INPUT.FORMAT,
            size=cfg.INPUT.RANDOM_RESIZED_CROP.SIZE,
            scale=cfg.INPUT.RANDOM_RESIZED_CROP.SCALE,
            ratio=cfg.INPUT.RANDOM_RESIZED_CROP.RATIO,
            short_side=cfg.INPUT.TEST_RESIZE_SHORT_SIDE,
        )

    def __call__(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray:
        """Returns the crop as (3, H, W) uint8; ``rng`` is needed in training only.

        Raises:
            DamagedImageError: the bytes are no usable image.
        """
        image = decode_image(data)
        size = (self.size, self.size)
        if self.is_train:
            assert rng is not None
            box = sample_crop(rng, image.width, image.height, self.scale, self.ratio)
            crop = image.resize(size, Image.Resampling.BILINEAR, box=box)
            if rng.random() < 0.5:
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        else:
            side = min(image.width, image.height) * self.size / self.short_side
            left, top = (image.width - side) / 2, (image.height - side) / 2
            crop = image.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        pixels = np.asarray(crop)
        if self.image_format == "BGR":
            pixels = pixels[:, :, ::-1]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
