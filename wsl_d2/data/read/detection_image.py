"""One image of a detection dataset, as detectors see it. Pages show some: Detectron2 is imported when one is read."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from wsl_d2.data.read.decode import exif_orientation, has_16_bits, to_8_bits, upright
from wsl_d2.files import open_regular


@contextlib.contextmanager
def as_8_bits(path: str | Path) -> Iterator[str]:
    """Yields the path of an image file, or, of one with 16 bits a pixel, that of an upright copy with 8.

    Detectron2's reader clips 16-bit values at 255, which is white.
    """
    from detectron2.utils.file_io import PathManager

    pixels = None
    with open_regular(PathManager.get_local_path(str(path))) as file, Image.open(file) as image:
        if has_16_bits(image):
            pixels = upright(to_8_bits(image), exif_orientation(image))
    if pixels is None:
        yield str(path)
        return
    with tempfile.NamedTemporaryFile(suffix=".pgm") as copy:
        Image.fromarray(pixels).save(copy, "PPM")
        copy.flush()
        yield copy.name


def read_detection_image(path: str | Path, input_format: str = "RGB") -> np.ndarray:
    """Returns (H, W, 3) uint8, upright, as detectors are trained on it: Detectron2's ``read_image``, for images of 16
    bits, too.

    Raises:
        OSError: the file is missing or no image.
    """
    from detectron2.data.detection_utils import read_image

    with as_8_bits(path) as readable:
        return read_image(readable, format=input_format)
