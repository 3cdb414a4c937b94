"""Encoded image -> pixels. JPEG goes through libjpeg-turbo, which can scale in the DCT domain; the rest through Pillow.

Shapes: an image of H x W pixels is an (H, W, 3) uint8 array, RGB. Color profiles are ignored, as torchvision and
Detectron2 do; transparent pixels are composited on white; 16-bit values are scaled to 8 bits; of an animation the
first frame is used.
"""

from __future__ import annotations

import io
import math
import threading
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageChops

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_PIXELS = 64_000_000
BACKGROUND = (255, 255, 255)  # under transparent pixels
# libjpeg-turbo scales the DCT by n/8 for n = 1..8, but only these have vector code: 5/8 to 7/8 take longer than 8/8.
DCT_SCALES = (1, 2, 4, 8)
_EXIF_ORIENTATION = 0x0112
_SCRATCH_BYTES = 16_000_000
_scratch = threading.local()


class DamagedImageError(ValueError):
    """An encoded image cannot be used; ``reason`` is a short word for the kind of damage."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass
class EncodedImage:
    """An image whose header alone has been read.

    Args:
        data: the encoded bytes.
        image: Pillow's view of them, not decoded.
        orientation: of EXIF, 1 to 8; 1 where there is none or it cannot be read.
    """

    data: bytes
    image: Image.Image
    orientation: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the upright image."""
        width, height = self.image.size
        return (height, width) if self.orientation >= 5 else (width, height)

    @property
    def has_dct_scaling(self) -> bool:
        """Whether :func:`decode` can scale it in the DCT domain: gray or color JPEG, but not CMYK."""
        return self.image.format in ("JPEG", "MPO") and self.image.mode in ("L", "RGB")

    @property
    def is_plain(self) -> bool:
        """Whether any JPEG decoder gives the same upright image: gray or color, not to be rotated, not truncated."""
        return self.has_dct_scaling and self.orientation == 1 and not _is_truncated(self.data)


def open_image(data: bytes) -> EncodedImage:
    """Reads the header of JPEG, PNG or WebP bytes.

    Raises:
        DamagedImageError: "empty", "unknown format", "bad header", "truncated", or "too large" (over 64 megapixels by
            the header; nothing of that size is allocated).
    """
    if not data:
        raise DamagedImageError("empty", "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, whose limit here is lower, and of broken metadata
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise DamagedImageError("too large", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise DamagedImageError("unknown format", f"allowed are {', '.join(IMAGE_FORMATS)}") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise DamagedImageError("truncated" if _is_truncated(data) else "bad header", str(error)) from error
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise DamagedImageError("too large", f"{image.width} x {image.height} pixels, allowed are {MAX_IMAGE_PIXELS}")
    return EncodedImage(data, image, exif_orientation(image))


def exif_orientation(image: Image.Image) -> int:
    """Returns EXIF's orientation, 1 to 8; 1 where there is none or it cannot be read."""
    if "exif" not in image.info and "xmp" not in image.info and "Raw profile type exif" not in image.info:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # metadata is free-form, and the pixels may be fine whatever is wrong with it
        return 1
    return orientation if orientation in range(1, 9) else 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns a view of (H, W, 3) pixels rotated as EXIF ``orientation`` (1 to 8) says; 5 to 8 swap H and W."""
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    return pixels.swapaxes(0, 1) if orientation >= 5 else pixels


def dct_scale(width: int, height: int, size: int) -> int:
    """Returns the n of the smallest DCT scaling n/8 that leaves a ``width`` x ``height`` box at least ``size`` pixels
    on both sides, 8 if there is none."""
    return next((n for n in DCT_SCALES if min(width, height) * n >= 8 * size), 8)


def decode(encoded: EncodedImage, scale: int = 8) -> np.ndarray:
    """Decodes an image to upright (H, W, 3) uint8 RGB.

    Args:
        encoded: from :func:`open_image`.
        scale: n in 1..8; an image that :attr:`EncodedImage.has_dct_scaling` is decoded to ceil(n/8) of its size, others
            to the whole.

    Returns:
        Pixels that are valid until the next call in this thread, which uses the same memory (to allocate it for each
        image takes a fifth of the time of decoding).

    Raises:
        DamagedImageError: "truncated" or "corrupt".
    """
    pixels = _decode_jpeg(encoded, scale) if encoded.has_dct_scaling else _decode_with_pillow(encoded)
    return upright(pixels, encoded.orientation)


def _decode_jpeg(encoded: EncodedImage, scale: int) -> np.ndarray:
    width, height = (math.ceil(side * scale / 8) for side in encoded.image.size)
    try:
        return simplejpeg.decode_jpeg(
            encoded.data, "RGB", min_width=width, min_height=height, buffer=_buffer(3 * width * height)
        )
    except ValueError as error:
        message = str(error)
    # Strict decoding also refuses a few stray bytes between intact data and the end marker, which cameras and web
    # services write: the image is complete, so Pillow decodes it.
    if "extraneous bytes before marker 0xd9" not in message:
        raise DamagedImageError("truncated" if _is_truncated(encoded.data) else "corrupt", message)
    return _decode_with_pillow(encoded)


def _buffer(num_bytes: int) -> bytearray | None:
    if num_bytes > _SCRATCH_BYTES:
        return None
    if not hasattr(_scratch, "buffer") or len(_scratch.buffer) < num_bytes:
        _scratch.buffer = bytearray(num_bytes)
    return _scratch.buffer


def _is_truncated(data: bytes) -> bool:
    return is_truncated(data[:8], data[-4096:], len(data))


def is_truncated(head: bytes, tail: bytes, num_bytes: int) -> bool:
    """Whether the end that JPEG, PNG or WebP data must have is missing; of the first 8 bytes, the last ones (of JPEG
    they may be zeros), and the length."""
    if head.startswith(b"\xff\xd8"):
        return not tail.rstrip(b"\0\r\n").endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG"):
        return b"IEND" not in tail[-64:]
    return head.startswith(b"RIFF") and int.from_bytes(head[4:8], "little") + 8 > num_bytes


def _decode_with_pillow(encoded: EncodedImage) -> np.ndarray:
    image = encoded.image
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DamagedImageError("truncated" if _is_truncated(encoded.data) else "corrupt", str(error)) from error
    if has_16_bits(image):
        return np.repeat(to_8_bits(image)[:, :, None], 3, axis=2)
    if image.mode == "CMYK" and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow takes all CMYK for Adobe's, whose values are inverted
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image)
    return np.array(image.convert("RGB"))


def has_16_bits(image: Image.Image) -> bool:
    """Whether a gray image has more than 8 bits a pixel; Pillow itself reduces 16-bit color."""
    return image.mode.startswith("I")


def to_8_bits(image: Image.Image) -> np.ndarray:
    """Returns (H, W) uint8 of an image that :func:`has_16_bits`: 65535 becomes 255."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    return ((values + 128) // 257).astype(np.uint8)


def decode_image(data: bytes) -> Image.Image:
    """Decodes JPEG, PNG or WebP bytes to an upright RGB image that Pillow owns.

    Raises:
        DamagedImageError: see :func:`open_image` and :func:`decode`.
    """
    return Image.fromarray(decode(open_image(data)))
