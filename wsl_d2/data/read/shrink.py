"""Large images stored smaller, once, so that no epoch reads and decodes pixels that its crops do not use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from wsl_d2.data.read.decode import EncodedImage, decode
from wsl_d2.errors import UserError


@dataclass(frozen=True)
class Shrinking:
    """How large images are stored.

    Args:
        short_side: pixels that the short side is shrunk to; None stores every image as it is.
        quality: of the JPEG, 1 to 100.

    Raises:
        UserError: a number is out of range.
    """

    short_side: int | None = None
    quality: int = 90

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100 or (self.short_side is not None and self.short_side < 1):
            raise UserError(
                "images are stored with a short side of 1 pixel or more and a quality of 1 to 100; got "
                f"{self.short_side} and {self.quality}."
            )

    def facts(self) -> dict[str, int]:
        """What a dataset notes of it."""
        return {} if self.short_side is None else {"short_side": self.short_side, "quality": self.quality}


UNCHANGED = Shrinking()


def shrink(image: EncodedImage, shrinking: Shrinking) -> bytes:
    """Returns the bytes of an image: where its short side is longer than asked, at that size, upright, as a JPEG with
    4:2:0; else as they are.

    Raises:
        DamagedImageError: the image cannot be decoded.
    """
    short_side = shrinking.short_side
    if short_side is None or min(image.size) <= short_side:
        return image.data
    width, height = (round(side * short_side / min(image.size)) for side in image.size)
    small = Image.fromarray(np.ascontiguousarray(decode(image))).resize((width, height), Image.Resampling.BICUBIC)
    return simplejpeg.encode_jpeg(np.asarray(small), shrinking.quality, colorsubsampling="420", fastdct=False)
