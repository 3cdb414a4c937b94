"""Datasets whose images lie in a folder for each class, as ImageNet's, CUB's and Places365's -> shards.

A class is a folder that holds images, by its path below the root; the root may also be a tar of such folders, or of one
tar for each class, as ILSVRC2012_img_train.tar. Nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from wsl_d2.data.read.decode import DamagedImageError, open_image
from wsl_d2.data.shards import ShardError, finish_dataset, index_shard, read_index, write_shard
from wsl_d2.hashtags import Vocabulary
from wsl_d2.hashtags.normalize import normalize_hashtag

_IMAGE_NAMES = (".jpg", ".jpeg", ".png", ".webp")


class ClassImage(NamedTuple):
    """One image: its class, its name below the root, and where its bytes are."""

    label: str
    name: str
    path: str
    offset: int = 0
    size: int = -1  # the whole file

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def list_images(root: str | Path, files: Iterable[str] | None = None) -> list[ClassImage]:
    """Lists the images of all classes, sorted by name.

    Args:
        root: a folder or a tar.
        files: names below the root; only these are taken. All must be there.

    Raises:
        ShardError: there is no image, an image lies outside of any class, or one of ``files`` is missing.
    """
    root = Path(root)
    if not root.exists():
        raise ShardError(f"{root} does not exist.")
    found = {image.name: image for image in (_in_tar(root) if root.is_file() else _in_folder(root))}
    if files is not None:
        wanted = {name.removeprefix("./") for name in files}
        if missing := sorted(wanted - found.keys()):
            raise ShardError(f"{root} has no {missing[0]!r}, nor {len(missing) - 1} others of the files asked for.")
        found = {name: found[name] for name in wanted}
    if not found:
        raise ShardError(f"{root} holds no image ({', '.join(_IMAGE_NAMES)}) in a folder of its class.")
    if outside := [image.name for image in found.values() if not image.label]:
        raise ShardError(f"{root}: {min(outside)!r} lies outside of any class; give the folder that holds the classes.")
    return [found[name] for name in sorted(found)]


def _in_folder(root: Path) -> Iterator[ClassImage]:
    for folder, _, names in os.walk(root, followlinks=True):
        label = Path(folder).relative_to(root).as_posix().removeprefix(".")
        for name in names:
            if name.lower().endswith(_IMAGE_NAMES):
                yield ClassImage(label, f"{label}/{name}".lstrip("/"), os.path.join(folder, name))


def _in_tar(root: Path) -> Iterator[ClassImage]:
    try:
        with tarfile.open(root, "r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if not member.isreg():
                    continue
                if name.lower().endswith(_IMAGE_NAMES):
                    label = name.rpartition("/")[0]
                    yield ClassImage(label, name, str(root), member.offset_data, member.size)
                elif name.endswith(".tar"):
                    label = name.removesuffix(".tar")
                    with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                        for one in inner:
                            if one.isreg() and one.name.lower().endswith(_IMAGE_NAMES):
                                offset = member.offset_data + one.offset_data
                                yield ClassImage(label, f"{label}/{one.name}", str(root), offset, one.size)
    except tarfile.TarError as error:
        raise ShardError(f"{root}: not a readable tar ({error}).") from error


def class_vocabulary(name: str, classes: Iterable[str]) -> Vocabulary:
    """Returns a vocabulary with one label for each class, in sorted order, known by its folder's name."""
    synsets = sorted(set(classes))
    tokens: list[str] = []
    for place, label in enumerate(synsets):
        token = normalize_hashtag(label)
        tokens.append(token if token and token not in tokens else f"{token}class{place}")
    return Vocabulary(name, synsets, [[token] for token in tokens], {"classes": "names of folders"})


class _Job(NamedTuple):
    tar: Path
    images: list[ClassImage]
    keys: list[str]
    vocabulary: Vocabulary

    @property
    def source(self) -> str:
        return hashlib.sha256(json.dumps([self.images, self.vocabulary.checksum]).encode()).hexdigest()


def _run(job: _Job) -> list[dict]:
    """Writes one shard unless it is there; returns the images that cannot be used."""
    rejected: list[dict] = []

    def samples() -> Iterator[tuple[str, bytes, dict]]:
        for image, key in zip(job.images, job.keys, strict=True):
            data = image.read()
            try:
                open_image(data)
            except DamagedImageError as error:
                rejected.append({"file": image.name, "reason": str(error)})
                continue
            token = job.vocabulary.hashtags[job.vocabulary.synsets.index(image.label)][0]
            yield key, data, {"hashtags": [token], "class": image.label, "file": image.name}

    notes = job.tar.with_suffix(".rejected.json")
    try:
        if read_index(job.tar, job.vocabulary.checksum).source == job.source and job.tar.exists():
            return json.loads(notes.read_text()) if notes.exists() else []
    except ShardError:
        pass  # it is not there yet, or of another call
    write_shard(job.tar, samples())
    notes.unlink(missing_ok=True)
    if rejected:
        notes.write_text(json.dumps(rejected))
    index_shard(job.tar, job.vocabulary, source=job.source)
    return rejected


def make_class_shards(
    root: str | Path,
    output: str | Path,
    *,
    vocabulary: Vocabulary | None = None,
    files: Iterable[str] | None = None,
    images_per_shard: int = 5_000,
    workers: int | None = None,
) -> dict:
    """Writes class folders as a dataset of shards, in a random order that mixes the classes; can be repeated.

    Args:
        root, files: see :func:`list_images`.
        output: folder to write.
        vocabulary: of the training set, for a validation set, whose labels must be the same.
        images_per_shard: images.
        workers: processes.

    Returns:
        The manifest; "rejected" counts images that cannot be decoded, listed in ``rejected.jsonl``.

    Raises:
        ShardError: see :func:`list_images`; or a class is not in ``vocabulary``.
    """
    images = list_images(root, files)
    vocabulary = vocabulary or class_vocabulary(Path(root).name, (image.label for image in images))
    if unknown := sorted({image.label for image in images} - set(vocabulary.synsets)):
        raise ShardError(f"{root}: class {unknown[0]!r} is none of the {len(vocabulary)} classes asked for.")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    vocabulary.save(output / "vocabulary.json")
    order = np.random.Generator(np.random.Philox(0)).permutation(len(images))
    keys = [f"{number:08d}-{re.sub('[^A-Za-z0-9_-]', '_', image.name)}" for number, image in enumerate(images)]
    jobs = []
    for number, start in enumerate(range(0, len(images), images_per_shard)):
        chosen = order[start : start + images_per_shard]
        tar = output / f"shard-{number:06d}.tar"
        jobs.append(_Job(tar, [images[i] for i in chosen], [keys[i] for i in chosen], vocabulary))
    for leftover in set(output.glob("*.tar")) - {job.tar for job in jobs}:
        raise ShardError(f"{leftover} is of another dataset; choose an empty folder.")
    with ProcessPoolExecutor(workers) as pool:
        rejected = [
            row for rows in tqdm(pool.map(_run, jobs), total=len(jobs), unit="shard", disable=None) for row in rows
        ]
    (output / "rejected.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rejected))
    return finish_dataset(output, vocabulary, {"rejected": len(rejected)})
