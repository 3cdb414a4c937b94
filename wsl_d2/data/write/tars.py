"""Tars that exist already, such as img2dataset's -> a dataset, in place; the tars are not touched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wsl_d2.data.format.index import read_index
from wsl_d2.data.format.labels import label_index, read_labels, write_labels
from wsl_d2.data.format.manifest import (
    MANIFEST,
    finish_dataset,
    index_shard,
    read_manifest,
    same_dataset,
    shorten_list,
)
from wsl_d2.data.format.stamps import has_content, read_stamps
from wsl_d2.data.runner import Workers, run_parts
from wsl_d2.errors import ShardError, UserError
from wsl_d2.hashtags import Vocabulary


@dataclass(frozen=True)
class _Indexing:
    vocabulary: Vocabulary
    hashtags_column: str
    stamps: dict[str, tuple[str, list[int]]]


def _index_one(indexing: _Indexing, tar: Path) -> str | None:
    """Indexes and labels a tar, unless that was done; returns what is wrong, or None."""
    vocabulary, column = indexing.vocabulary, indexing.hashtags_column
    try:
        try:
            index = read_index(tar)
            is_right = column in index.hashtags and has_content(tar, index.tar_sha256, indexing.stamps)
        except ShardError:
            is_right = False
        if not is_right:
            index_shard(tar, vocabulary, column)
            return None
        try:
            labels = read_labels(tar)
            found = labels.tar_sha256, labels.vocabulary_checksum, labels.hashtags_column
        except ShardError:
            found = "", "", ""
        if found != (index.tar_sha256, vocabulary.checksum, column):
            write_labels(tar, label_index(index, vocabulary, column))
    except (ShardError, OSError) as error:
        return str(error)
    return None


def index_shards(
    folder: str | Path, vocabulary: Vocabulary, *, workers: Workers = 1, hashtags_column: str = "hashtags"
) -> dict:
    """Indexes the WebDataset tars of a folder in place and finishes the dataset; the tars are not touched.

    Indexes that are there and whose tar has not changed are kept, so that an interrupted call can be repeated.

    Returns:
        The manifest.

    Raises:
        ShardError: the folder is a finished dataset of another vocabulary or column; or lists every tar that cannot be
            used; or no image has a label.
    """
    folder = Path(folder)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ShardError(f"{folder}: no *.tar shards here.")
    if (folder / MANIFEST).is_file():
        try:
            manifest = read_manifest(folder)
        except UserError:  # of an older version, or damaged: it is made anew
            manifest = None
        if manifest and (difference := same_dataset(manifest, vocabulary, hashtags_column)):
            raise ShardError(
                f"{folder} is a finished dataset of {difference}. Nothing was changed. Make a view of it with what you "
                f"asked for, which reads no tar; or remove its {MANIFEST} first."
            )
    vocabulary.mapping  # noqa: B018  (an error of it is one line here, not one from each process)
    shared = _Indexing(vocabulary, hashtags_column, read_stamps(folder))
    found = run_parts(_index_one, tars, shared, workers=workers, unit="shard", total=len(tars))
    if problems := sorted(problem for problem in found if problem):
        raise ShardError(
            f"{len(problems)} of {len(tars)} tars cannot be used: {shorten_list(problems)} Repair them or move "
            "them elsewhere."
        )
    return finish_dataset(folder, vocabulary)
