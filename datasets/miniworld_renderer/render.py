"""Pixels of the mini-world: sprites pasted on generated backgrounds (what to paste comes from scene.py).

Shapes: pictures are (S, S, 3), S the side in pixels. Sprites are premultiplied: they resample without seams.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .concepts import ZIPF_EXPONENT, concept_probabilities, load_concepts
from .scene import (
    BLUR_PROBABILITY,
    CLUTTER_PROBABILITY,
    STRIPES_PROBABILITY,
    SpritePlacement,
    clean_scene,
    detection_objects,
    draw_poster,
    hashtag_scene,
    picture_generator,
    place,
)
from .sprites import Sprites

DETECTION_PLACING_TRIES = 10
MIN_VISIBLE_FRACTION = 0.3  # of every labeled object's own pixels; placements that hide more are drawn again
MIN_VISIBLE_PIXELS = 30


@dataclass(frozen=True)
class Patch:
    """A transformed sprite where it lies in the picture.

    Args:
        window: slices of the picture's rows and columns.
        rgb: (h, w, 3) float32 in 0..255, premultiplied.
        alpha: (h, w, 1) float32 in 0..1.
    """

    window: tuple[slice, slice]
    rgb: np.ndarray
    alpha: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """(h, w) bool: the pixels that count as the object."""
        return self.alpha[..., 0] >= 0.5


@dataclass(frozen=True)
class DetectionObject:
    """An annotated object: its concept's index and its visible pixels, (S, S) bool."""

    concept: int
    mask: np.ndarray


class Renderer:
    """Draws pictures with a set of sprites.

    Args:
        sprites: the artwork.
        styles: the art styles admitted.
        seed: of the world.
        exponent: of the concepts' frequencies in hashtag photos.
    """

    def __init__(self, sprites: Sprites, styles: Collection[str], seed: int, exponent: float = ZIPF_EXPONENT):
        self.seed = seed
        self.exponent = exponent
        # Per concept and sprite: the tightly cropped artwork at full, half and quarter size.
        self._pyramids: list[list[list[Image.Image]]] = []
        for concept in load_concepts():
            chosen = [
                i
                for i, (name, style) in enumerate(zip(sprites.concepts, sprites.styles, strict=True))
                if name == concept.name and style in styles
            ]
            self._pyramids.append([_pyramid(sprites.rgba[i]) for i in chosen])

    def drawable(self) -> list[int]:
        """Returns the indices of the concepts with at least one sprite among the admitted styles."""
        return [i for i, pyramids in enumerate(self._pyramids) if pyramids]

    def hashtag_photo(
        self, set_name: str, number: int, side: int, dominance: float | None = None
    ) -> tuple[bytes, dict]:
        """Returns a photo's JPEG and metadata: raw ``hashtags``, the synsets that they mean, the true ``concepts``, and
        the ``user`` who posted it if ``dominance`` says how many of the photos a few post."""
        rng = picture_generator(self.seed, set_name, number)
        if dominance is None:
            user, probabilities = {}, concept_probabilities(self.exponent)
        else:
            poster, probabilities = draw_poster(rng, dominance, self.exponent)
            user = {"user": f"poster {poster}"}
        placements, hashtags, meant = hashtag_scene(rng, probabilities, self.exponent)
        return self._photo(rng, placements, side), _metadata(placements, hashtags, meant) | user

    def clean_photo(self, set_name: str, number: int, side: int) -> tuple[bytes, dict]:
        """Returns the JPEG and metadata of a picture of the clean set, of class ``number`` modulo 24."""
        rng = picture_generator(self.seed, set_name, number)
        placements, hashtags, meant = clean_scene(rng, number)
        return self._photo(rng, placements, side), _metadata(placements, hashtags, meant)

    def detection_photo(self, set_name: str, number: int, side: int) -> tuple[bytes, list[DetectionObject]]:
        """Returns a detection picture's JPEG and its annotated objects."""
        rng = picture_generator(self.seed, set_name, number)
        labeled = {i for i, concept in enumerate(load_concepts()) if concept.detection}
        distractors = [i for i in self.drawable() if i not in labeled]
        canvas = background(rng, side)
        owner = np.zeros((side, side), np.int16)  # 0: background; k: the k-th object put down
        areas: list[int] = []
        placed: list[SpritePlacement] = []
        for drawn in detection_objects(rng, distractors):
            for _ in range(DETECTION_PLACING_TRIES):
                patch = self.patch(drawn, side)
                if patch is not None and _keeps_objects_visible(owner, areas, placed, patch):
                    areas.append(int(patch.mask.sum()))
                    placed.append(drawn)
                    owner[patch.window][patch.mask] = len(placed)
                    paste(canvas, patch)
                    break
                drawn = place(rng, drawn.concept, (drawn.scale, drawn.scale), labeled=drawn.labeled)
        objects = [
            DetectionObject(placement.concept, owner == k)
            for k, placement in enumerate(placed, start=1)
            if placement.labeled
        ]
        return encode(rng, canvas), objects

    def _photo(self, rng: np.random.Generator, placements: list[SpritePlacement], side: int) -> bytes:
        canvas = background(rng, side)
        for placement in placements:
            patch = self.patch(placement, side)
            if patch is not None:
                paste(canvas, patch)
        return encode(rng, canvas)

    def patch(self, placement: SpritePlacement, side: int) -> Patch | None:
        """Scales, turns and tints a sprite for a picture of ``side`` pixels; None if it falls outside."""
        pyramids = self._pyramids[placement.concept]
        pyramid = pyramids[int(placement.sprite * len(pyramids))]
        length = placement.scale * side
        level = 0  # the smallest version that is not enlarged: bilinear sampling would skip pixels of larger ones
        while level + 1 < len(pyramid) and max(pyramid[level + 1].size) >= length:
            level += 1
        source = pyramid[level]
        zoom = length / max(source.size)
        zoom_x, zoom_y = zoom * math.sqrt(placement.aspect), zoom / math.sqrt(placement.aspect)
        cos, sin = math.cos(placement.angle), math.sin(placement.angle)
        half_width = (abs(cos) * source.width * zoom_x + abs(sin) * source.height * zoom_y) / 2
        half_height = (abs(sin) * source.width * zoom_x + abs(cos) * source.height * zoom_y) / 2
        center_x, center_y = placement.center[0] * side, placement.center[1] * side
        left, right = max(math.floor(center_x - half_width), 0), min(math.ceil(center_x + half_width), side)
        top, bottom = max(math.floor(center_y - half_height), 0), min(math.ceil(center_y + half_height), side)
        if left >= right or top >= bottom:
            return None
        # Picture -> sprite: undo the shift, the rotation, then the zoom. PIL evaluates it at pixel centres.
        mirror = -1.0 if placement.flip else 1.0
        a, b = mirror * cos / zoom_x, -mirror * sin / zoom_x
        d, e = sin / zoom_y, cos / zoom_y
        shift_x, shift_y = left - center_x, top - center_y
        coefficients = (
            a,
            b,
            a * shift_x + b * shift_y + source.width / 2,
            d,
            e,
            d * shift_x + e * shift_y + source.height / 2,
        )
        size = (right - left, bottom - top)
        turned = source.transform(size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
        pixels = np.asarray(turned, dtype=np.float32)
        alpha = pixels[..., 3:] * np.float32(1 / 255)
        # Tinting may not exceed white: a premultiplied channel is at most its alpha.
        rgb = np.minimum(pixels[..., :3] * np.array(placement.color, np.float32), pixels[..., 3:])
        return Patch((slice(top, bottom), slice(left, right)), rgb, alpha)


def _pyramid(rgba: np.ndarray) -> list[Image.Image]:
    """Crops (S, S, 4) uint8 artwork to what is seen and premultiplies; full, half and quarter size.

    Mode CMYK stands for four plain channels: PIL would divide RGBA by its alpha at every transform.
    """
    rows, columns = np.nonzero(rgba[..., 3] >= 16)
    tight = rgba[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(np.float32)
    tight[..., :3] *= tight[..., 3:] / 255
    full = np.pad(np.rint(tight).astype(np.uint8), ((1, 1), (1, 1), (0, 0)))
    image = Image.frombytes("CMYK", (full.shape[1], full.shape[0]), full.tobytes())
    return [image, image.reduce(2), image.reduce(4)]


def _keeps_objects_visible(owner: np.ndarray, areas: list[int], placed: list[SpritePlacement], patch: Patch) -> bool:
    """Tells whether a patch on top leaves itself and every labeled object recognisable."""
    mask = patch.mask
    if mask.sum() < MIN_VISIBLE_PIXELS:
        return False
    hidden = np.bincount(owner[patch.window][mask], minlength=len(areas) + 1)
    total = np.bincount(owner.ravel(), minlength=len(areas) + 1)
    for k, (area, placement) in enumerate(zip(areas, placed, strict=True), start=1):
        visible = total[k] - hidden[k]
        if placement.labeled and visible < max(MIN_VISIBLE_FRACTION * area, MIN_VISIBLE_PIXELS):
            return False
    return True


def paste(canvas: np.ndarray, patch: Patch) -> None:
    """Lays a patch over an (S, S, 3) float32 canvas, in place."""
    region = canvas[patch.window]
    region *= 1 - patch.alpha
    region += patch.rgb


def background(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draws smooth random colors, at most one polygon, occasional stripes; returns (S, S, 3) float32."""
    cells = int(rng.integers(2, 6))
    base = rng.uniform(30, 225, size=3)
    grid = np.clip(base + rng.normal(0, 30, size=(cells, cells, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC)
    if rng.random() < CLUTTER_PROBABILITY:
        corners = int(rng.integers(3, 7))
        angles = np.sort(rng.uniform(0, 2 * math.pi, size=corners))
        radii = rng.uniform(0.1, 0.4, size=corners) * side
        center = rng.uniform(0, side, size=2)
        points = np.stack([center[0] + radii * np.cos(angles), center[1] + radii * np.sin(angles)], axis=1)
        color = tuple(int(value) for value in rng.integers(0, 256, size=3))
        ImageDraw.Draw(image).polygon(points.ravel().tolist(), fill=color)
    canvas = np.array(image, dtype=np.float32)
    if rng.random() < STRIPES_PROBABILITY:
        angle, period = rng.uniform(0, math.pi), rng.uniform(0.08, 0.3) * side
        axis = np.arange(side, dtype=np.float32) * np.float32(2 * math.pi / period)
        wave = np.sin(axis[:, None] * np.float32(math.sin(angle)) + axis * np.float32(math.cos(angle)))
        canvas += wave[..., None] * rng.uniform(-30, 30, size=3).astype(np.float32)
    return canvas


def encode(rng: np.random.Generator, canvas: np.ndarray) -> bytes:
    """Blurs 30% of the pictures, adds noise, and returns the JPEG of an (S, S, 3) float32 canvas."""
    if rng.random() < BLUR_PROBABILITY:
        image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
        # In pixels, whatever the picture's side: objects measure about as many pixels in all sets.
        blurred = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
        canvas = np.asarray(blurred, dtype=np.float32)
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    noise *= np.float32(rng.uniform(0, 8))
    noise += canvas
    buffer = io.BytesIO()
    quality = int(rng.integers(80, 96))
    Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _metadata(placements: list[SpritePlacement], hashtags: list[str], meant: list[str]) -> dict:
    concepts = [load_concepts()[p.concept].name for p in placements]
    return {"hashtags": hashtags, "meant": meant, "concepts": concepts}
