"""Near-duplicates between pretraining and evaluation images, which would make a transfer look better than it is.

The evaluation images are indexed, the pretraining images streamed past them: memory depends on the former alone.
A pair becomes a candidate by a perceptual hash, or by the nearest neighbors of deep features where an extractor is
given, and is then verified by its pixels: the best correlation of the two pictures over mirroring and crops.

The hash has 64 bits: the signs, about their median, of the lowest 8 x 8 frequencies of a 32 x 32 gray picture. Each
evaluation image is hashed as it is, mirrored, and in crops; each pretraining image as it is and in crops.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dct

from wsl_d2.data.read.decode import DamagedImageError, decode_image
from wsl_d2.errors import UserError

# images -> (n, D) features; see features.py for one made of a backbone
Extractor = Callable[[list[Image.Image]], np.ndarray]

THUMBNAIL = 72  # pixels, both sides; the aspect ratio is not kept
_HASHED = 32  # pixels, both sides
_COMPARED = 24  # pixels, both sides
# Crops that are hashed: fractions (left, top, side).
_CROPS = [(0.0, 0.0, 1.0)] + [(x * (1 - s), y * (1 - s), s) for s in (0.9,) for x in (0, 0.5, 1) for y in (0, 0.5, 1)]
_FLAT = 9.0  # standard deviation of a thumbnail below which a picture has no structure to tell
_BATCH, _BATCH_PIXELS = 256, 64_000_000  # most images at a time, and pixels from which on there are fewer


@dataclass(frozen=True)
class Pair:
    """A pretraining image that shows the same picture as an evaluation image.

    Attributes:
        evaluation, pretraining: the keys.
        score: correlation of the two pictures after mirroring and cropping, in [-1, 1].
        hash_distance: bits in which the closest hashes differ, of 64; -1 if the pair came from features alone.
        cosine: of the features; None if the pair came from hashes alone.
        numbers: of the two images in their sets.
    """

    evaluation: str
    pretraining: str
    score: float
    hash_distance: int
    cosine: float | None
    numbers: tuple[int, int] = (-1, -1)


class Batch(NamedTuple):
    """Decoded images: their numbers in the set, keys, and pictures."""

    numbers: list[int]
    keys: list[str]
    pictures: list[Image.Image]


def thumbnail(image: Image.Image) -> np.ndarray:
    """Returns a (72, 72) uint16 picture of an image, the sum of its channels."""
    small = np.asarray(image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    return small.sum(axis=2, dtype=np.uint16)


@functools.cache
def _sampling(start: float, side: float, size: int) -> np.ndarray:
    """(size, 72) float32: averages over the size equal parts of [start, start + side], in fractions of a thumbnail."""
    edges = (start + np.arange(size + 1) / size * side) * THUMBNAIL
    pixels = np.arange(THUMBNAIL)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    overlap = np.maximum(overlap, 0)
    return (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)


def _crop(pictures: np.ndarray, left: float, top: float, side: float, size: int) -> np.ndarray:
    """(n, 72, 72) -> (n, size, size): a square part, in fractions of the picture, averaged over areas."""
    return _sampling(top, side, size) @ pictures @ _sampling(left, side, size).T


def perceptual_hash(small: np.ndarray) -> np.ndarray:
    """Hashes (n, 32, 32) gray pictures to (n, 8) uint8, 64 bits each."""
    frequencies = dct(dct(small, axis=1, norm="ortho"), axis=2, norm="ortho")[:, :8, :8].reshape(len(small), 64)
    frequencies[:, 0] = 0  # brightness
    return np.packbits(frequencies > np.median(frequencies[:, 1:], axis=1, keepdims=True), axis=1)


def _hashes(pictures: np.ndarray, mirror: bool) -> np.ndarray:
    """(n, variants, 8) uint8: the crops of each picture, and with ``mirror`` those of its mirror image."""
    variants = [pictures, pictures[:, :, ::-1]] if mirror else [pictures]
    return np.stack([perceptual_hash(_crop(v, *crop, _HASHED)) for v in variants for crop in _CROPS], axis=1)


def _is_flat(pictures: np.ndarray) -> np.ndarray:
    """(n, 72, 72) -> (n,): which pictures have no structure."""
    return pictures.std(axis=(1, 2)) < _FLAT


def _normalized(pictures: np.ndarray) -> np.ndarray:
    """(n, ...) -> (n, d) of mean 0 and norm 1: brightness and contrast do not matter."""
    flat = pictures.reshape(len(pictures), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


@functools.cache
def _five_places(side: float) -> np.ndarray:
    """(5 * 24, 72) float32: what samples windows of a side, in fractions of a thumbnail, from one edge to the other."""
    return np.concatenate([_sampling(start, side, _COMPARED) for start in np.linspace(0, 1 - side, 5).tolist()])


def _windows(picture: np.ndarray) -> np.ndarray:
    """(m, 24 * 24) normalized crops of one (72, 72) picture at several scales and places, the whole of it first."""
    crops = [_crop(picture[None], 0, 0, 1, _COMPARED)]
    for side in (0.95, 0.9, 0.85):
        sampling = _five_places(side)
        grid = (sampling @ picture @ sampling.T).reshape(5, _COMPARED, 5, _COMPARED)
        crops.append(grid.transpose(0, 2, 1, 3).reshape(25, _COMPARED, _COMPARED))
    return _normalized(np.concatenate(crops))


def _both_ways(picture: np.ndarray) -> list[np.ndarray]:
    """The windows of a (72, 72) picture, and those of its mirror image."""
    return [_windows(picture), _windows(np.ascontiguousarray(picture[:, ::-1]))]


def _best_correlation(own: np.ndarray, others: list[np.ndarray]) -> float:
    """Of the whole picture on either side with a window of the other."""
    return max(float(one.max()) for other in others for one in (own @ other[0], other @ own[0]))


class Pictures(NamedTuple):
    """Images as they are compared; n of them.

    Attributes:
        numbers, keys: of those that can be decoded.
        thumbnails: (n, 72, 72) uint16.
        hashes: (n, variants, 8) uint8.
        is_flat: (n,) bool, of those that are too even to be told apart.
        features: (n, D) float32 of norm 1; None without an extractor.
    """

    numbers: list[int]
    keys: list[str]
    thumbnails: np.ndarray
    hashes: np.ndarray
    is_flat: np.ndarray
    features: np.ndarray | None


def describe(
    images: Iterable[tuple[int, tuple[str, bytes]]], damaged: dict[str, str], extractor: Extractor | None = None
) -> list[Pictures]:
    """Decodes (number, (key, encoded image)) of evaluation images; notes the keys of damaged ones with the reason."""
    found = []
    for batch in decoded_batches(images, damaged):
        thumbnails = np.stack([thumbnail(picture) for picture in batch.pictures])
        features = _unit(extractor(batch.pictures)) if extractor else None
        hashes, is_flat = _hashes(thumbnails, mirror=True), _is_flat(thumbnails)
        found.append(Pictures(batch.numbers, batch.keys, thumbnails, hashes, is_flat, features))
    return found


def join(parts: Sequence[Pictures]) -> Pictures:
    """Returns the pictures of several parts, at least one, as one.

    Raises:
        UserError: a key occurs twice.
    """
    keys = [key for part in parts for key in part.keys]
    if twice := [key for key, times in Counter(keys).items() if times > 1]:
        raise UserError(f"two evaluation images have the key {twice[0]!r}; keys must be unique.")
    return Pictures(
        [number for part in parts for number in part.numbers],
        keys,
        np.concatenate([part.thumbnails for part in parts]),
        np.concatenate([part.hashes for part in parts]),
        np.concatenate([part.is_flat for part in parts]),
        None if parts[0].features is None else np.concatenate([part.features for part in parts]),
    )


def load_faiss() -> Any:
    """Returns the module; raises UserError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("the search for duplicates needs faiss: pip install faiss-cpu.") from error
    return faiss


class DuplicateFinder:
    """The evaluation images, ready to be compared with.

    Args:
        evaluation: the images, of :func:`join`.
        extractor: deep features; hashes alone if None.
        num_neighbors: candidates of each kind per pretraining image.
        max_hash_distance: bits of 64 in which a candidate's hash may differ.
        min_score: correlation, of four decimals, from which a candidate is a duplicate.
    """

    def __init__(
        self,
        evaluation: Pictures,
        extractor: Extractor | None = None,
        *,
        num_neighbors: int = 21,
        max_hash_distance: int = 14,
        min_score: float = 0.85,
    ):
        faiss = load_faiss()
        self.extractor = extractor
        self.num_neighbors = num_neighbors
        self.max_hash_distance = max_hash_distance
        self.min_score = min_score
        self.keys, self.numbers, self.thumbnails = evaluation.keys, evaluation.numbers, evaluation.thumbnails
        self._is_flat = evaluation.is_flat
        self._variants = evaluation.hashes.shape[1]
        self._hash_index = faiss.IndexBinaryFlat(64)
        self._hash_index.add(np.ascontiguousarray(evaluation.hashes.reshape(-1, 8)))
        self._feature_index = None
        if evaluation.features is not None:
            self._feature_index = faiss.IndexFlatIP(evaluation.features.shape[1])
            self._feature_index.add(np.ascontiguousarray(evaluation.features))

    def find(
        self, keys: Sequence[str], pictures: Sequence[Image.Image], numbers: Sequence[int] | None = None
    ) -> list[Pair]:
        """Returns the pairs of some pretraining images, with their numbers if they are given, best first."""
        thumbnails = np.stack([thumbnail(picture) for picture in pictures])
        # (evaluation, pretraining) -> [hash distance, cosine]; 65 and -2 stand for none
        candidates: dict[tuple[int, int], list[float]] = {}
        queries = _hashes(thumbnails, mirror=False)
        per_image = queries.shape[1]
        neighbors = min(self.num_neighbors, self._hash_index.ntotal)
        distances, found = self._hash_index.search(np.ascontiguousarray(queries.reshape(-1, 8)), neighbors)
        for query, near in zip(*np.nonzero(distances <= self.max_hash_distance), strict=True):
            pair = (int(found[query, near]) // self._variants, int(query) // per_image)
            entry = candidates.setdefault(pair, [65.0, -2.0])
            entry[0] = min(entry[0], float(distances[query, near]))
        if self._feature_index is not None and self.extractor is not None:
            neighbors = min(self.num_neighbors, len(self.keys))
            for turned in (list(pictures), [p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in pictures]):
                cosines, found = self._feature_index.search(_unit(self.extractor(turned)), neighbors)
                for image in range(len(pictures)):
                    for cosine, other in zip(cosines[image], found[image], strict=True):
                        entry = candidates.setdefault((int(other), image), [65.0, -2.0])
                        entry[1] = max(entry[1], float(cosine))
        flat = _is_flat(thumbnails)
        pairs = []
        windows = functools.lru_cache(1)(lambda image: _both_ways(thumbnails[image]))
        for (evaluation, image), (distance, cosine) in sorted(candidates.items(), key=lambda found: found[0][1]):
            if flat[image] or self._is_flat[evaluation]:
                continue
            score = round(_best_correlation(_windows(self.thumbnails[evaluation]), windows(image)), 4)
            if score >= self.min_score:
                bits = int(distance) if distance <= 64 else -1
                places = self.numbers[evaluation], numbers[image] if numbers else -1
                seen = round(cosine, 4) if cosine > -2 else None
                pairs.append(Pair(self.keys[evaluation], keys[image], score, bits, seen, places))
        return sorted(pairs, key=by_score)


def by_score(pair: Pair) -> tuple:
    """Sorts pairs, the best first."""
    return -pair.score, pair.evaluation, pair.pretraining


def nothing_decoded(place: str, damaged: dict[str, str]) -> UserError:
    """Returns the error that all images of a set are damaged, or that there are none."""
    first = next((f", the first {key!r} ({reason})" for key, reason in damaged.items()), "")
    return UserError(f"{place}: none of its {len(damaged)} images can be decoded{first}.")


def _unit(features: np.ndarray) -> np.ndarray:
    features = np.ascontiguousarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def decoded_batches(images: Iterable[tuple[int, tuple[str, bytes]]], damaged: dict[str, str]) -> Iterator[Batch]:
    """Decodes (number, (key, encoded image)), some at a time; notes the keys of damaged ones with the reason."""
    batch, pixels = Batch([], [], []), 0
    for number, (key, data) in images:
        try:
            picture = decode_image(data)
        except DamagedImageError as error:
            damaged[key] = str(error)
            continue
        batch.numbers.append(number)
        batch.keys.append(key)
        batch.pictures.append(picture)
        pixels += picture.width * picture.height
        if len(batch.keys) == _BATCH or pixels >= _BATCH_PIXELS:
            yield batch
            batch, pixels = Batch([], [], []), 0
    if batch.keys:
        yield batch
