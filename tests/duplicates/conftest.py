"""Parts of real photographs, and two folders of the same pictures."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images


@pytest.fixture(scope="session")
def photos():
    """Parts of two photographs, none of which overlap."""
    parts = {}
    for number, pixels in enumerate(load_sample_images().images):
        for x in range(0, 640 - 127, 128):
            for y in range(0, 427 - 105, 106):
                parts[f"{number}_{x}_{y}"] = Image.fromarray(pixels[y : y + 106, x : x + 128])
    return {key: part for key, part in parts.items() if np.asarray(part).std() > 20}


@pytest.fixture(scope="session")
def encoded(photos):
    """key -> JPEG."""
    files = {}
    for key, image in photos.items():
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=92)
        files[key] = buffer.getvalue()
    return files


@pytest.fixture()
def folders(tmp_path, photos):
    """Folders ev and pre of six pictures; those of pre are smaller and each more cropped than the one before."""
    for name in ("ev", "pre"):
        (tmp_path / name).mkdir()
    for number, image in enumerate(list(photos.values())[:6]):
        image.save(tmp_path / "ev" / f"e{number}.jpg", quality=92)
        image.crop((0, 0, 128 - 2 * number, 106 - 2 * number)).resize((90, 70)).save(
            tmp_path / "pre" / f"p{number}.jpg"
        )
    return tmp_path
