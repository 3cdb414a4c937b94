"""Near-duplicates between pretraining and evaluation images, which would make a transfer look better than it is.

The evaluation images are indexed, the pretraining images streamed past them: memory depends on the former alone.
A pair becomes a candidate by a perceptual hash, or by the nearest neighbours of deep features where an extractor is
given, and is then verified by its pixels: the best correlation of the two pictures over mirroring and crops.

The hash has 64 bits: the signs, about their median, of the lowest 8 x 8 frequencies of a 32 x 32 grey picture. Each
evaluation image is hashed as it is, mirrored, and in crops; each pretraining image as it is and in crops.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.fft import dct
from tqdm import tqdm

from wsl_d2.data.read.dataset import HashtagDataset
from wsl_d2.data.read.decode import DamagedImageError, decode_image

# images -> (n, D) features; see tools/find_duplicates.py for one made of a backbone
Extractor = Callable[[list[Image.Image]], np.ndarray]

THUMBNAIL = 72  # pixels, both sides; the aspect ratio is not kept
_HASHED = 32  # pixels, both sides
_COMPARED = 24  # pixels, both sides
# Crops that are hashed: fractions (left, top, side).
_CROPS = [(0.0, 0.0, 1.0)] + [(x * (1 - s), y * (1 - s), s) for s in (0.9,) for x in (0, 0.5, 1) for y in (0, 0.5, 1)]
_FLAT = 3.0  # grey levels of standard deviation below which a picture has no structure to tell
_BATCH = 256  # pretraining images at a time


class DuplicateError(ValueError):
    """Images, options or an output folder with which no duplicates can be searched for."""


@dataclass(frozen=True)
class Pair:
    """A pretraining image that shows the same picture as an evaluation image.

    Attributes:
        evaluation, pretraining: the keys.
        score: correlation of the two pictures after mirroring and cropping, in [-1, 1].
        hash_distance: bits in which the closest hashes differ, of 64; -1 if the pair came from features alone.
        cosine: of the features; None if the pair came from hashes alone.
    """

    evaluation: str
    pretraining: str
    score: float
    hash_distance: int
    cosine: float | None


def images_of_dataset(folder: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yields (key, encoded image) of the labelled images of a folder of shards, in order."""
    dataset = HashtagDataset(folder)
    for number in range(len(dataset)):
        sample = dataset[number]
        yield sample["key"], sample["image"]


def images_of_folder(folder: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yields (path below the folder, encoded image) of every JPEG, PNG and WebP in a folder and those below, sorted."""
    folder = Path(folder)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"):
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def images_of_coco(annotations: str | Path, folder: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yields (file name, encoded image) of the images that a COCO annotation file lists.

    Raises:
        DuplicateError: a file name leads out of the folder.
    """
    folder = Path(folder).resolve()
    for image in json.loads(Path(annotations).read_text())["images"]:
        path = (folder / image["file_name"]).resolve()
        if not path.is_relative_to(folder):
            raise DuplicateError(f"{annotations}: file name {image['file_name']!r} leads out of {folder}; refused.")
        yield image["file_name"], path.read_bytes()


def thumbnail(image: Image.Image) -> np.ndarray:
    """Returns a (72, 72) float32 picture of an image, the mean of its channels."""
    small = np.asarray(image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.float32)
    return small.mean(axis=2)


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
    """Hashes (n, 32, 32) grey pictures to (n, 8) uint8, 64 bits each."""
    frequencies = dct(dct(small, axis=1, norm="ortho"), axis=2, norm="ortho")[:, :8, :8].reshape(len(small), 64)
    frequencies[:, 0] = 0  # brightness
    return np.packbits(frequencies > np.median(frequencies[:, 1:], axis=1, keepdims=True), axis=1)


def _hashes(pictures: np.ndarray, mirror: bool) -> np.ndarray:
    """(n, variants, 8) uint8: the crops of each picture, and with ``mirror`` those of its mirror image."""
    variants = [pictures, pictures[:, :, ::-1]] if mirror else [pictures]
    return np.stack([perceptual_hash(_crop(v, *crop, _HASHED)) for v in variants for crop in _CROPS], axis=1)


def _normalised(pictures: np.ndarray) -> np.ndarray:
    """(n, ...) -> (n, d) of mean 0 and norm 1: brightness and contrast do not matter."""
    flat = pictures.reshape(len(pictures), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def _windows(picture: np.ndarray) -> np.ndarray:
    """(m, 24 * 24) normalised crops of one (72, 72) picture at several scales and places, the whole of it first."""
    crops = [_crop(picture[None], 0, 0, 1, _COMPARED)]
    for side in (0.95, 0.9, 0.85):
        starts = np.linspace(0, 1 - side, 5)
        sampling = np.concatenate([_sampling(start, side, _COMPARED) for start in starts.tolist()])
        grid = (sampling @ picture @ sampling.T).reshape(5, _COMPARED, 5, _COMPARED)
        crops.append(grid.transpose(0, 2, 1, 3).reshape(25, _COMPARED, _COMPARED))
    return _normalised(np.concatenate(crops))


def verify(evaluation: np.ndarray, pretraining: np.ndarray) -> float:
    """Returns the best correlation of two thumbnails over mirroring and crops of either.

    Args:
        evaluation, pretraining: (72, 72) grey.
    """
    own = _windows(evaluation)
    best = -1.0
    for other in (_windows(pretraining), _windows(np.ascontiguousarray(pretraining[:, ::-1]))):
        best = max(best, float((own @ other[0]).max()), float((other @ own[0]).max()))
    return best


class DuplicateFinder:
    """The evaluation images, ready to be compared with.

    Args:
        images: (key, encoded image); those that cannot be decoded are listed in ``damaged``.
        extractor: deep features; hashes alone if None.
        num_neighbours: candidates of each kind per pretraining image.
        max_hash_distance: bits of 64 in which a candidate's hash may differ.
        min_score: correlation from which a candidate is a duplicate.

    Raises:
        DuplicateError: there is no image, or a key occurs twice.
    """

    def __init__(
        self,
        images: Iterable[tuple[str, bytes]],
        extractor: Extractor | None = None,
        *,
        num_neighbours: int = 21,
        max_hash_distance: int = 14,
        min_score: float = 0.85,
    ):
        import faiss

        self.extractor = extractor
        self.num_neighbours = num_neighbours
        self.max_hash_distance = max_hash_distance
        self.min_score = min_score
        self.damaged: list[str] = []
        self.keys: list[str] = []
        thumbnails, features = [], []
        for keys, pictures in _batches(tqdm(images, unit="image", desc="evaluation", disable=None), self.damaged):
            self.keys += keys
            thumbnails.append(np.stack([thumbnail(picture) for picture in pictures]))
            if extractor:
                features.append(_unit(extractor(pictures)))
        if not self.keys:
            raise DuplicateError("there is no evaluation image that can be decoded.")
        if len(set(self.keys)) != len(self.keys):
            raise DuplicateError("two evaluation images have the same key; keys must be unique.")
        self.thumbnails = np.concatenate(thumbnails)
        self.is_flat = self.thumbnails.std(axis=(1, 2)) < _FLAT
        hashes = _hashes(self.thumbnails, mirror=True)
        self._variants = hashes.shape[1]
        self._hash_index = faiss.IndexBinaryFlat(64)
        self._hash_index.add(np.ascontiguousarray(hashes.reshape(-1, 8)))
        self._feature_index = None
        if extractor:
            everything = np.concatenate(features)
            self._feature_index = faiss.IndexFlatIP(everything.shape[1])
            self._feature_index.add(everything)

    def find(self, keys: Sequence[str], pictures: Sequence[Image.Image]) -> list[Pair]:
        """Returns the pairs of some pretraining images, best first."""
        thumbnails = np.stack([thumbnail(picture) for picture in pictures])
        # (evaluation, pretraining) -> [hash distance, cosine]; 65 and -2 stand for none
        candidates: dict[tuple[int, int], list[float]] = {}
        queries = _hashes(thumbnails, mirror=False)
        per_image = queries.shape[1]
        neighbours = min(self.num_neighbours, self._hash_index.ntotal)
        distances, found = self._hash_index.search(np.ascontiguousarray(queries.reshape(-1, 8)), neighbours)
        for query, near in zip(*np.nonzero(distances <= self.max_hash_distance), strict=True):
            pair = (int(found[query, near]) // self._variants, int(query) // per_image)
            entry = candidates.setdefault(pair, [65.0, -2.0])
            entry[0] = min(entry[0], float(distances[query, near]))
        if self._feature_index is not None and self.extractor is not None:
            for mirrored in (False, True):
                turned = (
                    [p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in pictures] if mirrored else list(pictures)
                )
                neighbours = min(self.num_neighbours, len(self.keys))
                cosines, found = self._feature_index.search(_unit(self.extractor(turned)), neighbours)
                for image in range(len(pictures)):
                    for cosine, other in zip(cosines[image], found[image], strict=True):
                        entry = candidates.setdefault((int(other), image), [65.0, -2.0])
                        entry[1] = max(entry[1], float(cosine))
        flat = thumbnails.std(axis=(1, 2)) < _FLAT
        pairs = []
        for (evaluation, image), (distance, cosine) in candidates.items():
            if flat[image] or self.is_flat[evaluation]:
                continue
            score = verify(self.thumbnails[evaluation], thumbnails[image])
            if score >= self.min_score:
                bits = int(distance) if distance <= 64 else -1
                pairs.append(
                    Pair(
                        self.keys[evaluation],
                        keys[image],
                        round(score, 4),
                        bits,
                        round(cosine, 4) if cosine > -2 else None,
                    )
                )
        return sorted(pairs, key=lambda pair: (-pair.score, pair.evaluation, pair.pretraining))


def _unit(features: np.ndarray) -> np.ndarray:
    features = np.ascontiguousarray(features, np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _batches(images: Iterable[tuple[str, bytes]], damaged: list[str]) -> Iterator[tuple[list[str], list[Image.Image]]]:
    keys: list[str] = []
    pictures: list[Image.Image] = []
    for key, data in images:
        try:
            picture = decode_image(data)
        except DamagedImageError:
            damaged.append(key)
            continue
        keys.append(key)
        pictures.append(picture if isinstance(picture, Image.Image) else Image.fromarray(picture))
        if len(keys) == _BATCH:
            yield keys, pictures
            keys, pictures = [], []
    if keys:
        yield keys, pictures


def search(
    finder: DuplicateFinder, images: Iterable[tuple[str, bytes]], output: str | Path, total: int | None = None
) -> list[Pair]:
    """Streams pretraining images past the finder and writes ``pairs.csv``; an interrupted call goes on where it was.

    Args:
        finder: the evaluation images.
        images: (key, encoded image) in an order that is the same every time.
        output: a folder, for these two sets alone.
        total: images, for the progress bar.

    Returns:
        All pairs, best first.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    progress = output / "progress.json"
    state: dict[str, Any] = {"done": 0, "damaged": [], "pairs": []}
    if progress.is_file():
        state = json.loads(progress.read_text())
    pairs = [Pair(**pair) for pair in state["pairs"]]
    done, damaged = state["done"], list(state["damaged"])
    remaining = (image for number, image in enumerate(images) if number >= done)
    with tqdm(total=total, initial=done, unit="image", desc="pretraining", disable=None) as bar:
        before = len(damaged)
        for keys, pictures in _batches(remaining, damaged):
            pairs += finder.find(keys, pictures)
            seen = len(keys) + len(damaged) - before
            before = len(damaged)
            done += seen
            bar.update(seen)
            bar.set_postfix(pairs=len(pairs), refresh=False)
            content = {"done": done, "damaged": damaged, "pairs": [asdict(pair) for pair in pairs]}
            partial = progress.with_name("progress.json.partial")
            partial.write_text(json.dumps(content))
            os.replace(partial, progress)
    pairs.sort(key=lambda pair: (-pair.score, pair.evaluation, pair.pretraining))
    with open(output / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*(field.name for field in fields(Pair)), "judged"])
        writer.writeheader()
        writer.writerows(asdict(pair) | {"judged": ""} for pair in pairs)
    return pairs


def read_pairs(path: str | Path) -> list[Pair]:
    """Reads ``pairs.csv``, leaving out pairs that somebody has judged "no" in its last column.

    Raises:
        DuplicateError: a judgement is neither empty, "yes" nor "no".
    """
    kept = []
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            judged = row.pop("judged").strip().lower()
            if judged not in ("", "yes", "no"):
                raise DuplicateError(f"{path}, line {number}: judged is {judged!r}; write yes, no or nothing.")
            if judged != "no":
                cosine = float(row["cosine"]) if row["cosine"] else None
                bits = int(row["hash_distance"])
                kept.append(Pair(row["evaluation"], row["pretraining"], float(row["score"]), bits, cosine))
    return kept


def lower_bound_accuracy(correct: dict[str, bool], pairs: Iterable[Pair]) -> tuple[float, float, int]:
    """Returns (accuracy, accuracy with every duplicated evaluation image counted as wrong, duplicated images).

    Args:
        correct: evaluation key -> whether it was classified correctly.
        pairs: duplicates.

    Raises:
        DuplicateError: no image was evaluated, or a duplicated one was not.
    """
    duplicated = {pair.evaluation for pair in pairs}
    if not correct:
        raise DuplicateError("no evaluation image has a result.")
    if missing := sorted(duplicated - correct.keys()):
        raise DuplicateError(f"{len(missing)} duplicated images have no result, the first {missing[0]!r}.")
    plain = 100 * sum(correct.values()) / len(correct)
    bound = 100 * sum(right and key not in duplicated for key, right in correct.items()) / len(correct)
    return plain, bound, len(duplicated)


def contact_sheet(
    pairs: Sequence[Pair], evaluation: dict[str, bytes], pretraining: dict[str, bytes], path: str | Path
) -> None:
    """Draws pairs side by side to a PNG to judge by eye: 5 pairs a row, in the order of pairs.csv."""
    size, columns = 128, 5
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * (2 * size + 12), max(1, rows) * (size + 12)), "white")
    for number, pair in enumerate(pairs):
        left, top = number % columns * (2 * size + 12), number // columns * (size + 12)
        for offset, data in ((0, evaluation[pair.evaluation]), (size + 2, pretraining[pair.pretraining])):
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            scale = size / max(picture.size)
            picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
            sheet.paste(picture, (left + offset, top))
    sheet.save(path)
