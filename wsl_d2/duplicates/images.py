"""Sets of images: a dataset of shards, a folder of image files, or those that a COCO annotation file lists."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsl_d2.data.format.folders import is_left_by_a_system, walk_once
from wsl_d2.data.format.manifest import MANIFEST, VOCABULARY
from wsl_d2.data.format.tar import IMAGE_EXTENSIONS
from wsl_d2.data.remote import is_url
from wsl_d2.data.runner import Workers, run_parts
from wsl_d2.errors import UserError
from wsl_d2.files import open_regular

_PART = 512  # images
_ENDINGS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


class Images(Sequence[tuple[str, bytes]]):
    """(key, encoded image) by number; an image is read when it is asked for.

    Args:
        place: folder, file or URL, for messages.
        sources: what `read` makes an image of, by number.
        read: source -> (key, encoded image); can be sent to other processes.
        digest: of all keys and contents, where one is known without reading them.
        skipped: kind -> number of files and folders that were passed over.
    """

    def __init__(
        self,
        place: str | Path,
        sources: Sequence,
        read: Callable[[Any], tuple[str, bytes]],
        digest: str = "",
        skipped: Mapping[str, int] | None = None,
    ):
        self.place = str(place)
        self.sources = sources
        self.read = read
        self.skipped = dict(sorted((skipped or {}).items()))
        self._digest = digest

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.read(self.sources[number])

    def fingerprint(self, workers: Workers = 1) -> dict[str, Any]:
        """Returns the number of images, and a SHA-256 of their keys and contents."""
        if not self._digest:
            digest = hashlib.sha256()
            for _, lines in map_parts(_checksums, self, self.read, workers):
                digest.update("".join(lines).encode())
            self._digest = digest.hexdigest()
        return {"images": len(self), "sha256": self._digest}


@dataclass(frozen=True)
class Part:
    """Some images of a set, the same ones wherever they are looked at.

    Attributes:
        place: of the set.
        begin: number of the first of them.
        sources: of :class:`Images`.
    """

    place: str
    begin: int
    sources: Sequence

    def __str__(self) -> str:
        return f"{self.place}, images {self.begin} to {self.begin + len(self.sources) - 1}"

    def read(self, read: Callable[[Any], tuple[str, bytes]]) -> Iterator[tuple[int, tuple[str, bytes]]]:
        """Yields (number, (key, encoded image))."""
        return ((number, read(source)) for number, source in enumerate(self.sources, self.begin))


def map_parts(
    work: Callable[[Any, Part], Any], images: Images, shared: Any, workers: Workers, begin: int = 0
) -> Iterator[tuple[int, Any]]:
    """Yields (number behind its last image, ``work(shared, part)``) of every part of a set, in order.

    Args:
        work, shared, workers: of :func:`wsl_d2.data.runner.run_parts`.
        begin: number of the first image.
    """
    starts = range(begin, len(images), _PART)
    parts = (Part(images.place, start, images.sources[start : start + _PART]) for start in starts)
    early: dict[int, tuple[int, Any]] = {}
    for start, *result in run_parts(
        functools.partial(_placed, work), parts, shared, workers=workers, unit="part", total=len(starts)
    ):
        early[start] = tuple(result)
        while begin in early:
            begin, found = early.pop(begin)
            yield begin, found


def _placed(work: Callable[[Any, Part], Any], shared: Any, part: Part) -> tuple[int, int, Any]:
    return part.begin, part.begin + len(part.sources), work(shared, part)


def _checksums(read: Callable[[Any], tuple[str, bytes]], part: Part) -> list[str]:
    return [json.dumps([key, hashlib.sha256(data).hexdigest()]) for _, (key, data) in part.read(read)]


def open_images(folder: str | Path, annotations: str | Path | None = None) -> Images:
    """Opens a folder of shards or its URL, a folder of image files, or the images of a COCO annotation file in it.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if is_url(folder) and not annotations:
        return _images_of_dataset(folder)
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{folder} {'is no folder' if path.exists() else 'does not exist'}.")
    if annotations:
        return _images_of_coco(annotations, path)
    is_dataset = (path / MANIFEST).is_file() and (path / VOCABULARY).is_file()
    return _images_of_dataset(path) if is_dataset else _images_of_folder(path)


def _images_of_dataset(folder: str | Path) -> Images:
    from wsl_d2.data.read.dataset import HashtagDataset  # takes seconds to import

    dataset = HashtagDataset(folder)
    digest = hashlib.sha256(f"{dataset.shards_sha256} {dataset.labels_sha256}".encode()).hexdigest()
    return Images(folder, range(len(dataset)), functools.partial(_read_sample, dataset), digest)


def _read_sample(dataset: Any, number: int) -> tuple[str, bytes]:
    sample = dataset[number]
    return sample["key"], sample["image"]


def _read_file(folder: Path, key: str) -> tuple[str, bytes]:
    with open_regular(folder / key) as file:
        return key, file.read()


def _images_of_folder(folder: Path) -> Images:
    skipped: Counter[str] = Counter()
    keys = sorted(_image_files(folder, skipped))
    if not keys:
        left_out = ", ".join(f"{number:,} {kind}" for kind, number in sorted(skipped.items()))
        raise UserError(
            f"{folder} holds no image ({', '.join(_ENDINGS)}) and is no finished dataset of shards; "
            f"skipped: {left_out or 'nothing'}."
        )
    return Images(folder, keys, functools.partial(_read_file, folder.absolute()), skipped=skipped)


def _image_files(root: Path, skipped: Counter[str]) -> Iterator[str]:
    """Yields paths below a folder."""
    for folder, _, files in walk_once(root, skipped):
        for name in files:
            path = os.path.join(folder, name)
            key = Path(path).relative_to(root).as_posix()
            if reason := _reason_to_skip(path):
                skipped[reason] += 1
            elif key != key.encode("utf-8", "ignore").decode():
                skipped["name that is not UTF-8"] += 1
            else:
                yield key


def _reason_to_skip(path: str) -> str:
    """Why a file is none of the images, "" if it is one."""
    name = os.path.basename(path)
    ending = os.path.splitext(name)[1].lower()
    if is_left_by_a_system(name):
        return "hidden file"
    if not os.path.isfile(path):
        return "broken link" if os.path.islink(path) else "file that is none"
    if ending not in _ENDINGS:
        return f"{ending} file" if ending else "file without an ending"
    return ""


def _images_of_coco(annotations: str | Path, folder: Path) -> Images:
    try:
        listed = json.loads(Path(annotations).read_bytes())["images"]
        names = [image.get("file_name") for image in listed]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{annotations} is no COCO annotation file ({error!r}).") from error
    if not names:
        raise UserError(f"{annotations} lists no image.")
    for number, name in enumerate(names, start=1):
        if not isinstance(name, str):
            raise UserError(f"{annotations}: image {number} of the list has no file_name.")
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise UserError(f"{annotations}: file name {name!r} leads out of {folder}; refused.")
    return Images(folder, names, functools.partial(_read_file, folder.absolute()))
