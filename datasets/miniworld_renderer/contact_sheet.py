"""One picture to look at: hashtag photos with hashtags, clean photos with classes, detection with masks."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

WIDTH = 1440
DETECTION_CELL = 232  # pixels; three pairs fit a row
COLORS = (
    (255, 70, 110),
    (70, 220, 90),
    (255, 225, 25),
    (60, 170, 255),
    (255, 150, 60),
    (215, 110, 255),
    (70, 240, 240),
)
LABEL_FONT = ImageFont.load_default(11)
TEXT_COLOR = (20, 20, 20)


def draw_contact_sheet(output: Path) -> None:
    """Writes ``contact_sheet.png`` from the first images of a prepared world.

    Args:
        output: the world's folder; its training sets must be complete.
    """
    photos = [(image, "\n".join(tags)) for image, tags in _first_samples(output / "hashtags" / "train", 40)]
    clean = [(image, "\n".join(tags)) for image, tags in _first_samples(output / "clean" / "train", 24)]
    detection = _detection_samples(output / "detection", 24)
    sections = [
        _section("hashtag photos and their hashtags as posted (some missing, some wrong)", photos, 96, 60),
        _section("clean set: one centered object, one true hashtag", clean, 96, 16),
        _section(
            "detection: boxes, masks of the visible pixels, classes (distractors carry none)",
            detection,
            DETECTION_CELL,
            6,
        ),
    ]
    sheet = Image.new("RGB", (WIDTH, sum(section.height for section in sections)), "white")
    top = 0
    for section in sections:
        sheet.paste(section, (0, top))
        top += section.height
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    partial = output / "contact_sheet.png.partial"
    partial.write_bytes(buffer.getvalue())
    partial.replace(output / "contact_sheet.png")


def _first_samples(folder: Path, count: int) -> list[tuple[Image.Image, list[str]]]:
    samples: list[tuple[Image.Image, list[str]]] = []
    for tar_path in sorted(folder.glob("*.tar")):
        with tarfile.open(tar_path) as tar:
            images: dict[str, Image.Image] = {}
            for member in tar:
                if len(samples) == count:
                    return samples
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None  # shards hold plain files only
                if extension == "jpg":
                    images[key] = Image.open(io.BytesIO(file.read())).convert("RGB")
                else:
                    samples.append((images[key], json.loads(file.read())["hashtags"]))
    return samples


def _detection_samples(folder: Path, count: int) -> list[tuple[Image.Image, str]]:
    """Each sample is a picture and, to its right, the same with boxes, names and half-transparent masks."""
    document = json.loads((folder / "annotations" / "instances_train.json").read_bytes())
    names = {category["id"]: category["name"] for category in document["categories"]}
    samples = []
    for image in document["images"][:count]:
        plain = Image.open(folder / "train" / image["file_name"]).convert("RGB")
        scale = DETECTION_CELL / plain.height
        size = (round(plain.width * scale), DETECTION_CELL)
        annotations = [a for a in document["annotations"] if a["image_id"] == image["id"]]
        pixels = np.array(plain, dtype=np.float32)
        for k, annotation in enumerate(annotations):
            mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
            pixels[mask] = 0.45 * pixels[mask] + 0.55 * np.array(COLORS[k % len(COLORS)], np.float32)
        shown = Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(shown)
        for k, annotation in enumerate(annotations):
            x, y, width, height = (value * scale for value in annotation["bbox"])
            color = COLORS[k % len(COLORS)]
            draw.rectangle((x, y, x + width - 1, y + height - 1), outline=color, width=2)
            label = names[annotation["category_id"]]
            where = (x + 2, max(y - 13, 0))
            left, top, right, bottom = draw.textbbox(where, label, font=LABEL_FONT)
            draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), fill=color)
            draw.text(where, label, fill="black", font=LABEL_FONT)
        pair = Image.new("RGB", (size[0] * 2 + 4, size[1]), "white")
        pair.paste(plain.resize(size, Image.Resampling.NEAREST), (0, 0))
        pair.paste(shown, (size[0] + 4, 0))
        samples.append((pair, ""))
    return samples


def _section(title: str, samples: list[tuple[Image.Image, str]], cell_height: int, text_height: int) -> Image.Image:
    """Lays samples out in rows under a title; smaller pictures are enlarged to ``cell_height`` pixels."""
    shown = []
    for image, text in samples:
        if image.height < cell_height:
            factor = cell_height / image.height
            image = image.resize((round(image.width * factor), cell_height), Image.Resampling.BICUBIC)
        shown.append((image, text))
    cell_width = max(image.width for image, _ in shown) + 6
    columns = max(1, (WIDTH - 8) // cell_width)
    row_height = cell_height + text_height
    section = Image.new("RGB", (WIDTH, 26 + row_height * -(-len(shown) // columns)), "white")
    draw = ImageDraw.Draw(section)
    draw.text((8, 6), title, fill=TEXT_COLOR, font=ImageFont.load_default(14))
    for k, (image, text) in enumerate(shown):
        left, top = 8 + k % columns * cell_width, 26 + k // columns * row_height
        section.paste(image, (left, top))
        draw.multiline_text((left, top + image.height + 1), text, fill=TEXT_COLOR, font=ImageFont.load_default(10))
    return section
