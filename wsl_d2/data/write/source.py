"""What a dataset is made from: recorded in its folder before anything else is written, compared at every later call.

So a call with the wrong folder is refused before it changes anything, and an interrupted call can be repeated.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from wsl_d2.data.format.index import index_path
from wsl_d2.data.format.labels import labels_path
from wsl_d2.data.format.manifest import MANIFEST, VOCABULARY, finish_dataset
from wsl_d2.data.format.stamps import STAMPS
from wsl_d2.data.read.store import ShardStore
from wsl_d2.errors import EmptyDatasetError, ShardError
from wsl_d2.files import write_atomically
from wsl_d2.hashtags import Vocabulary

_NAME = "source.json"
_READS_AT_A_TIME = 16


@contextlib.contextmanager
def reserved_folder(folder: str | Path | ShardStore, facts: dict[str, Any]) -> Iterator[None]:
    """Reserves a folder for one dataset while it is made, and lets go of it again if nothing comes of it.

    Then its shards are removed, so that a corrected call can use the folder; the reasons for rejected samples stay.

    Args:
        folder: of the dataset to be made, or a store; created if it is not there.
        facts: all that decides the dataset, as JSON.

    Raises:
        ShardError: the folder holds a dataset of other facts, or shards that no call of this kind began; or another
            process is at work in it.
    """
    store = folder if isinstance(folder, ShardStore) else ShardStore(folder)
    _reserve(store, facts)
    place = store.folder / ".lock"
    lock = FileLock(place, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ShardError(
            f"{store.location} is being written by another process; wait until it has ended, and repeat this."
        ) from error
    except (OSError, NotImplementedError):  # a file system that cannot lock files
        pass
    try:
        yield
    except EmptyDatasetError:
        names = store.names()
        if MANIFEST not in names:
            tars = {name for name in names if name.endswith(".tar")}
            beside = {path(name).name for name in tars for path in (index_path, labels_path)}
            store.remove(*sorted(names & (tars | beside | {STAMPS})), _NAME)
        raise
    finally:
        lock.release()
        place.unlink(missing_ok=True)


def _reserve(store: ShardStore, facts: dict[str, Any]) -> None:
    if store.folder.exists() and not store.folder.is_dir():
        raise ShardError(f"{store.location} is not a folder; choose another one.")
    there = store.names() if store.folder.is_dir() else set()
    facts = json.loads(json.dumps(facts))
    if _NAME in there:
        found = json.loads(store.path(_NAME, fresh=True).read_text(encoding="utf-8"))
        differences = [
            f"{name} {_short(found.get(name))}, not {_short(facts.get(name))}"
            for name in dict.fromkeys([*facts, *found])
            if found.get(name) != facts.get(name)
        ]
        if differences:
            raise ShardError(
                f"{store.location} is the place of another dataset: {'; '.join(differences)}. Nothing was written; "
                "choose another folder."
            )
        return
    if others := [*sorted(name for name in there if name.endswith(".tar")), *({MANIFEST} & there)]:
        raise ShardError(
            f"{store.location} holds {others[0]}, which is of another dataset. Nothing was written; choose an empty "
            "folder."
        )
    store.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(store.folder / _NAME, json.dumps(facts, indent=1) + "\n")
    store.upload(_NAME)


def finish_store(store: ShardStore, vocabulary: Vocabulary, extra: dict | None = None) -> dict:
    """Finishes the dataset of a folder or a store; see :func:`wsl_d2.data.format.manifest.finish_dataset`."""
    names = store.tars()
    if store.is_remote:  # what was written may have been written elsewhere
        beside = [path(name).name for name in names for path in (index_path, labels_path)]
        with ThreadPoolExecutor(_READS_AT_A_TIME) as pool:
            list(pool.map(partial(store.path, fresh=True), beside))
    manifest = finish_dataset(store.folder, vocabulary, extra, names)
    store.upload(VOCABULARY, MANIFEST)
    return manifest


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if len(text) == 66:  # a SHA-256 in quotes
        return text[1:13]
    return text if len(text) <= 100 else f"{text[:97]}..."
