"""The contact sheet: pairs as pictures, to judge by eye, as wide as a phone."""

from __future__ import annotations

import io
from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

from wsl_d2.data.read.decode import decode_image
from wsl_d2.duplicates.finder import Pair
from wsl_d2.duplicates.images import Images
from wsl_d2.duplicates.judgements import Row

WIDTH = 400  # pixels: a phone shows it unscaled
_GAP = 8  # pixels
_SIDE = (WIDTH - 3 * _GAP) // 2  # of the square into which a picture fits
_TEXT, _LINE = 13, 17  # pixels: size of the letters, distance of the lines


def contact_sheet(pairs: Iterable[tuple[Pair, Row]], evaluation: Images, pretraining: Images) -> bytes:
    """Draws pairs below each other as a PNG, and under each what finds it in pairs.csv.

    Args:
        pairs: with their rows, in the order of pairs.csv, whose second row is the first pair.
        evaluation, pretraining: the images.
    """
    font = ImageFont.load_default(_TEXT)
    parts = []
    for number, (pair, row) in enumerate(pairs, start=2):
        pictures = [
            _fit(images[place][1]) for images, place in zip((evaluation, pretraining), pair.numbers, strict=True)
        ]
        names = [_wrap(key, font) for key in (pair.evaluation, pair.pretraining)]
        top = 2 * _GAP + max(picture.height for picture in pictures)
        part = Image.new("RGB", (WIDTH, top + _LINE * (1 + max(map(len, names))) + _GAP), "white")
        draw = ImageDraw.Draw(part)
        judged = f", judged {row['judged']}" if row["judged"] else ""
        draw.text((_GAP, top), f"row {number}, score {pair.score:.4f}{judged}", "black", font)
        for column, (picture, lines) in enumerate(zip(pictures, names, strict=True)):
            left = _GAP + column * (_SIDE + _GAP)
            part.paste(picture, (left, _GAP))
            for place, line in enumerate(lines, start=1):
                draw.text((left, top + place * _LINE), line, "black", font)
        parts.append(part)
    sheet = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _wrap(key: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Breaks a key into lines as wide as a picture; what no font shows becomes a question mark."""
    lines = [""]
    for letter in (letter if letter.isprintable() else "?" for letter in key):
        if font.getlength(lines[-1] + letter) > _SIDE:
            lines.append("")
        lines[-1] += letter
    return lines


def _fit(data: bytes) -> Image.Image:
    picture = decode_image(data)
    scale = _SIDE / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
