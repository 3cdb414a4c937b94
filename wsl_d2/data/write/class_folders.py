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
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wsl_d2.data.format.folders import is_left_by_a_system, walk_once
from wsl_d2.data.format.tar import IMAGE_EXTENSIONS
from wsl_d2.data.read.decode import DamagedImageError, open_image
from wsl_d2.data.read.shrink import UNCHANGED, Shrinking, shrink
from wsl_d2.data.read.store import ShardStore
from wsl_d2.data.runner import Workers
from wsl_d2.data.write.source import finish_store, reserved_folder
from wsl_d2.data.write.writer import Sample, ShardPart, Writing, load_image, write_dataset
from wsl_d2.errors import ShardError
from wsl_d2.files import open_regular
from wsl_d2.hashtags import MappingPolicy, Vocabulary, normalize_hashtag
from wsl_d2.hashtags.policy import EXACT

_IMAGE_NAMES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


class ClassImage(NamedTuple):
    """One image: its class, its name below the root, and where its bytes are."""

    label: str
    name: str
    path: str
    offset: int = 0
    size: int = -1  # the whole file

    def read(self) -> bytes:
        with open_regular(self.path) as file:
            file.seek(self.offset)
            return file.read(self.size)


def list_images(root: str | Path, files: Iterable[str] | None = None) -> tuple[list[ClassImage], dict[str, int]]:
    """Lists the images of all classes, sorted by name.

    Args:
        root: a folder or a tar.
        files: names below the root; only these are taken. All must be there.

    Returns:
        The images, and kind -> number of what was passed over: hidden files and the folders that systems leave.

    Raises:
        ShardError: there is no image, an image lies outside of any class, or one of ``files`` is missing.
    """
    root = Path(root)
    if not root.exists():
        raise ShardError(f"{root} does not exist.")
    skipped: Counter[str] = Counter()
    found = {image.name: image for image in (_in_tar if root.is_file() else _in_folder)(root, skipped)}
    if files is not None:
        wanted = {name.removeprefix("./") for name in files}
        if missing := sorted(wanted - found.keys()):
            raise ShardError(f"{root} has no {missing[0]!r}, nor {len(missing) - 1} others of the files asked for.")
        found = {name: found[name] for name in wanted}
    if not found:
        raise ShardError(f"{root} holds no image ({', '.join(_IMAGE_NAMES)}) in a folder of its class.")
    if outside := [image.name for image in found.values() if not image.label]:
        raise ShardError(f"{root}: {min(outside)!r} lies outside of any class; give the folder that holds the classes.")
    return [found[name] for name in sorted(found)], dict(sorted(skipped.items()))


def _hidden_part(name: str) -> str:
    """The part of a path that a system or editor made, "" if there is none."""
    return next(filter(is_left_by_a_system, name.split("/")), "")


def _is_image(name: str, skipped: Counter[str]) -> bool:
    if not name.lower().endswith(_IMAGE_NAMES):
        return False
    if hidden := _hidden_part(name):
        kind = "in a folder " + hidden if hidden != name.rpartition("/")[2] else "hidden file"
        skipped[f"{kind} (not a class)" if kind != "hidden file" else kind] += 1
    return not hidden


def _in_folder(root: Path, skipped: Counter[str]) -> Iterator[ClassImage]:
    for folder, _, names in walk_once(root, skipped, of_systems_too=True):
        label = Path(folder).relative_to(root).as_posix()
        label = "" if label == "." else label
        for name in names:
            path = f"{label}/{name}".lstrip("/")
            if _is_image(path, skipped):
                yield ClassImage(label, path, os.path.join(folder, name))


def _in_tar(root: Path, skipped: Counter[str]) -> Iterator[ClassImage]:
    try:
        with tarfile.open(root, "r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if not member.isreg():
                    continue
                if _is_image(name, skipped):
                    label = name.rpartition("/")[0]
                    yield ClassImage(label, name, str(root), member.offset_data, member.size)
                elif name.endswith(".tar") and not _hidden_part(name):
                    label = name.removesuffix(".tar")
                    with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                        for one in inner:
                            path = f"{label}/{one.name.removeprefix('./')}"
                            if one.isreg() and _is_image(path, skipped):
                                offset = member.offset_data + one.offset_data
                                yield ClassImage(label, path, str(root), offset, one.size)
    except tarfile.TarError as error:
        raise ShardError(f"{root}: not a readable tar ({error}).") from error


def class_vocabulary(name: str, classes: Iterable[str]) -> Vocabulary:
    """Returns a vocabulary with one label for each class, in sorted order, known by its folder's name alone."""
    synsets = sorted(set(classes))
    tokens: dict[str, None] = {}
    for place, label in enumerate(synsets):
        token = normalize_hashtag(label)
        tokens[token if token and token not in tokens else f"{token}class{place}"] = None
    policy = MappingPolicy(matching=EXACT)
    return Vocabulary(name, synsets, [[token] for token in tokens], {"classes": "names of folders"}, policy)


class _Item(NamedTuple):
    image: ClassImage
    key: str
    token: str


def _key_of(item: _Item) -> str:
    return item.key


def _facts_of(item: _Item) -> list:
    return [item.key, item.image.label, item.image.name]


def _load(item: _Item, shrinking: Shrinking) -> Sample:
    data = load_image(item.image.path, lambda _: item.image.read())
    try:
        data = shrink(open_image(data), shrinking)
    except DamagedImageError as error:
        raise ValueError(str(error)) from error
    return item.key, data, {"hashtags": [item.token], "class": item.image.label, "file": item.image.name}


def make_class_shards(
    root: str | Path,
    output: str | Path,
    *,
    vocabulary: Vocabulary | None = None,
    files: Iterable[str] | None = None,
    images_per_shard: int = 5_000,
    workers: Workers = 1,
    shrinking: Shrinking = UNCHANGED,
) -> dict:
    """Writes class folders as a dataset of shards, in a random order that mixes the classes; can be repeated.

    Args:
        root, files: see :func:`list_images`.
        output: folder to write, or its URL.
        vocabulary: of the training set, for a validation set, whose labels must be the same.
        images_per_shard: images.
        workers: processes, or a cluster.
        shrinking: how large images are stored.

    Returns:
        The manifest; "account" counts the images that were written and rejected, "skipped" those that are of no class.
        Rejected ones are listed in ``*.rejected.jsonl``.

    Raises:
        ShardError: see :func:`list_images`; a class is not in ``vocabulary``; or the folder is another dataset's.
    """
    images, skipped = list_images(root, files)
    vocabulary = vocabulary or class_vocabulary(Path(root).name, (image.label for image in images))
    label_of = {synset: label for label, synset in enumerate(vocabulary.synsets)}
    if unknown := sorted({image.label for image in images} - label_of.keys()):
        raise ShardError(f"{root}: class {unknown[0]!r} is none of the {len(vocabulary)} classes asked for.")
    store = ShardStore(output)
    names = hashlib.sha256(json.dumps([image.name for image in images]).encode()).hexdigest()
    facts = {
        "made_by": "data from-folders",
        "num_images": len(images),
        "names_sha256": names,
        "vocabulary": vocabulary.checksum,
        "images_per_shard": images_per_shard,
        **shrinking.facts(),
    }
    order = np.random.Generator(np.random.Philox(0)).permutation(len(images))
    items = [
        _Item(image, _key(number, image.name), vocabulary.hashtags[label_of[image.label]][0])
        for number, image in enumerate(images)
    ]
    starts = range(0, len(images), images_per_shard)
    parts = (
        ShardPart(f"shard-{number:06d}.tar", [items[i] for i in order[start : start + images_per_shard]])
        for number, start in enumerate(starts)
    )
    identity = ", ".join(["class folders", *map(str, shrinking.facts().values())])
    writing = Writing(partial(_load, shrinking=shrinking), _key_of, _facts_of, vocabulary, identity, store)
    with reserved_folder(store, facts):
        account = write_dataset(writing, parts, workers, total=len(starts))
        extra = {"account": dict(sorted(account.items())), "skipped": skipped} | shrinking.facts()
        return finish_store(store, vocabulary, extra)


def _key(number: int, name: str) -> str:
    return f"{number:08d}-{re.sub('[^A-Za-z0-9_-]', '_', name)}"[:200]
