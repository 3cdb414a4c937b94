"""Tars that exist already, such as img2dataset's -> a dataset, in place; the tars are not touched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wsl_d2.data.format.index import CAPTION, index_path, read_index
from wsl_d2.data.format.labels import label_index, labels_path, read_labels, write_labels
from wsl_d2.data.format.manifest import (
    MANIFEST,
    VOCABULARY,
    index_shard,
    read_manifest,
    same_dataset,
    shorten_list,
)
from wsl_d2.data.format.stamps import has_content, note_stamp, read_stamps
from wsl_d2.data.read.store import ShardStore
from wsl_d2.data.runner import Workers, run_parts
from wsl_d2.data.write.source import finish_store
from wsl_d2.errors import ShardError, UserError
from wsl_d2.hashtags import Vocabulary


@dataclass(frozen=True)
class _Indexing:
    store: ShardStore
    vocabulary: Vocabulary
    hashtags_column: str
    stamps: dict[str, tuple[str, list]]
    found: dict[str, list]


def _index_one(indexing: _Indexing, name: str) -> str | None:
    """Indexes and labels a tar, unless that was done; returns what is wrong, or None."""
    store, vocabulary, column = indexing.store, indexing.vocabulary, indexing.hashtags_column
    tar = store.folder / name
    beside = [index_path(name).name, labels_path(name).name]
    try:
        try:
            for one in beside if store.is_remote else ():
                if one in indexing.found:
                    store.path(one)
            index = read_index(tar)
            is_right = column in index.hashtags and _has_content(indexing, tar, index.tar_sha256)
        except ShardError:
            is_right = False
        if not is_right:
            index_shard(store.path(name, fresh=True), vocabulary, column)
            if store.is_remote:
                note_stamp(tar, read_index(tar, with_hashtags=False).tar_sha256, indexing.found[name])
            store.upload(*beside)
            return None
        try:
            labels = read_labels(tar)
            found = labels.tar_sha256, labels.vocabulary_checksum, labels.hashtags_column
        except ShardError:
            found = "", "", ""
        if found != (index.tar_sha256, vocabulary.checksum, column):
            write_labels(tar, label_index(index, vocabulary, column))
            store.upload(beside[1])
    except (ShardError, OSError) as error:
        return str(error).replace(str(tar), store.place(name))
    return None


def _has_content(indexing: _Indexing, tar: Path, sha256: str) -> bool:
    if not indexing.store.is_remote:
        return has_content(tar, sha256, indexing.stamps)
    stamp = indexing.found[tar.name]
    return "" not in stamp and indexing.stamps.get(tar.name) == (sha256, stamp)


def index_shards(
    folder: str | Path,
    vocabulary: Vocabulary,
    *,
    workers: Workers = 1,
    hashtags_column: str = "hashtags",
    caption_column: str | None = None,
) -> dict:
    """Indexes the WebDataset tars of a folder in place and finishes the dataset; the tars are not touched.

    Indexes that are there and whose tar has not changed are kept, so that an interrupted call can be repeated.

    Args:
        folder: of the tars, or its URL.
        vocabulary: that decides the labels.
        workers: see :func:`wsl_d2.data.runner.run_parts`.
        hashtags_column, caption_column: of the JSON; hashtags are the #words of the caption if it is given.

    Returns:
        The manifest.

    Raises:
        ShardError: the folder cannot be read, or is a finished dataset of another vocabulary or column; or lists every
            tar that cannot be used; or no image has a label.
    """
    if caption_column is not None:
        hashtags_column = CAPTION + caption_column
    store = ShardStore(folder)
    found = store.list_files() if store.is_remote else {}
    there = found.keys() if store.is_remote else store.names() if store.folder.is_dir() else set()
    tars = sorted(name for name in there if name.endswith(".tar"))
    if not tars:
        raise ShardError(f"{folder}: no *.tar shards here.")
    if MANIFEST in there:
        try:
            for name in (MANIFEST, VOCABULARY):
                store.path(name, fresh=True)
            manifest = read_manifest(store.folder)
        except UserError:  # of an older version, or damaged: it is made anew
            manifest = None
        if manifest and (difference := same_dataset(manifest, vocabulary, hashtags_column)):
            raise ShardError(
                f"{folder} is a finished dataset of {difference}. Nothing was changed. Make a view of it with what you "
                f"asked for, which reads no tar; or remove its {MANIFEST} first."
            )
    vocabulary.mapping  # noqa: B018  (an error of it is one line here, not one from each process)
    shared = _Indexing(store, vocabulary, hashtags_column, read_stamps(store.folder), found)
    done = run_parts(_index_one, tars, shared, workers=workers, unit="shard", total=len(tars))
    if problems := sorted(problem for problem in done if problem):
        raise ShardError(
            f"{len(problems)} of {len(tars)} tars cannot be used: {shorten_list(problems)} Repair them or move "
            "them elsewhere."
        )
    return finish_store(store, vocabulary)
