"""Encoded image -> uint8 crop. Randomness comes from the generator given, so a crop is a function of its seed.

Shapes: H = W = the crop's size in pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from wsl_d2.data.read.decode import DamagedImageError, EncodedImage, dct_scale, decode, decode_image, open_image
from wsl_d2.data.read.device_decode import EncodedCrop

__all__ = ["DECODINGS", "DamagedImageError", "HashtagMapper", "decode_image", "sample_crop"]

DECODINGS = ("fast", "exact", "device")
Box = tuple[int, int, int, int]  # left, top, right, bottom


def sample_crop(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Samples the box of a RandomResizedCrop, as torchvision's ``get_params``: ten tries, then a center crop.

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


def crop_fast(encoded: EncodedImage, box: Box, size: int) -> np.ndarray:
    """Crops ``box`` and resizes it, with JPEG decoded at the smallest DCT scaling that keeps ``size`` pixels.

    The box is rounded to the pixels of the scaled image. Returns (3, size, size) uint8.
    """
    left, top, right, bottom = box
    scale = dct_scale(right - left, bottom - top, size) if encoded.has_dct_scaling else 8
    pixels = decode(encoded, scale)
    left, top = round(left * scale / 8), round(top * scale / 8)
    right, bottom = max(left + 1, round(right * scale / 8)), max(top + 1, round(bottom * scale / 8))
    crop = pixels[top:bottom, left:right]
    if min(crop.strides) < 0:
        crop = np.ascontiguousarray(crop)
    tensor = torch.from_numpy(crop).permute(2, 0, 1)[None]
    # torch's 8-bit kernel is 2.5 times as fast as Pillow's and differs from it by 1 at most.
    resized = torch.nn.functional.interpolate(tensor, (size, size), mode="bilinear", antialias=True)
    return resized[0].numpy()


def crop_exact(encoded: EncodedImage, box: Box, size: int) -> np.ndarray:
    """Crops ``box`` and resizes it, bit for bit as torchvision's ``resized_crop`` of a Pillow image."""
    left, top, right, bottom = box
    crop = Image.fromarray(decode(encoded)[top:bottom, left:right])
    return _planes(crop.resize((size, size), Image.Resampling.BILINEAR))


def center_exact(encoded: EncodedImage, short_side: int, size: int) -> np.ndarray:
    """Resizes the short side and crops the center, bit for bit as torchvision does with a Pillow image."""
    image = TF.resize(Image.fromarray(decode(encoded)), [short_side], TF.InterpolationMode.BILINEAR)
    return _planes(TF.center_crop(image, [size, size]))


def _planes(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class HashtagMapper:
    """Decodes and crops one image.

    Args:
        is_train: RandomResizedCrop and horizontal flip; otherwise resize of the short side and center crop.
        image_format: "RGB" or "BGR" (``INPUT.FORMAT``).
        size: side of the crop in pixels.
        scale, ratio: area fraction and aspect range of the training crop.
        short_side: pixels; length of the short side before the test's center crop.
        decoding: "exact" equals torchvision's transforms of Pillow images bit for bit. "fast" trains on crops whose
            JPEG is shrunk while decoding, and tests as "exact". "device" leaves plain JPEG of training for
            :func:`wsl_d2.data.read.device_decode.decode_batch`, and is "exact" for all else.

    Raises:
        ValueError: unknown ``image_format`` or ``decoding``, or ``short_side`` below ``size``.
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
        decoding: str = "fast",
    ):
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT must be RGB or BGR for hashtag images, got {image_format!r}.")
        if decoding not in DECODINGS:
            raise ValueError(f"INPUT.DECODING must be one of {', '.join(DECODINGS)}, got {decoding!r}.")
        if short_side < size:
            raise ValueError(
                f"INPUT.TEST_RESIZE_SHORT_SIDE is {short_side}, but must be at least INPUT.RANDOM_RESIZED_CROP.SIZE, "
                f"{size}."
            )
        self.is_train = is_train
        self.image_format = image_format
        self.size = size
        self.scale = (scale[0], scale[1])
        self.ratio = (ratio[0], ratio[1])
        self.short_side = short_side
        self.decoding = decoding

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
            decoding=cfg.INPUT.DECODING,
        )

    @property
    def settings(self) -> dict:
        """Everything that determines a crop, beside its seed."""
        return dict(vars(self))

    def __call__(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray | EncodedCrop:
        """Returns the crop as (3, H, W) uint8, or what device_decode.py makes it from.

        Args:
            data: the encoded image.
            rng: of the crop; needed in training only.

        Raises:
            DamagedImageError: the bytes are no usable image.
        """
        encoded = open_image(data)
        pixels = (
            self._training_crop(encoded, rng) if self.is_train else center_exact(encoded, self.short_side, self.size)
        )
        if isinstance(pixels, EncodedCrop):
            return pixels
        if self.image_format == "BGR":
            pixels = pixels[::-1]
        return np.ascontiguousarray(pixels)

    def _training_crop(self, encoded: EncodedImage, rng: np.random.Generator | None) -> np.ndarray | EncodedCrop:
        assert rng is not None
        box = sample_crop(rng, *encoded.size, self.scale, self.ratio)
        flip = rng.random() < 0.5
        if self.decoding == "device" and encoded.is_plain:
            return EncodedCrop(encoded.data, box, self.size, flip, self.image_format == "BGR")
        crop = {"fast": crop_fast, "exact": crop_exact, "device": crop_exact}[self.decoding]
        pixels = crop(encoded, box, self.size)
        # torch mirrors 8-bit images several times faster than numpy copies a mirrored view.
        return torch.from_numpy(pixels).flip(2).numpy() if flip else pixels
