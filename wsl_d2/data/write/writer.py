"""The one writer of datasets: samples in, tars with their indexes and labels out; parallel, resumable, every sample
accounted for.

Of each shard, the tar is written first, then the list of rejected samples, the index, and last the labels, which mark
it as complete. Nothing is read again after it was written.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsl_d2.data.format.index import index_path, make_index, read_facts, write_index
from wsl_d2.data.format.labels import label_index, labels_path, read_labels, write_labels
from wsl_d2.data.format.stamps import has_content, note_stamp, read_stamps
from wsl_d2.data.format.tar import check_key, write_tar
from wsl_d2.data.read.store import ShardStore
from wsl_d2.data.remote import StoreBusyError
from wsl_d2.data.runner import Workers, run_parts
from wsl_d2.errors import EmptyDatasetError, ShardError
from wsl_d2.files import write_atomically
from wsl_d2.hashtags import Vocabulary

_INCOMPLETE = " incomplete"  # behind the source of a shard that lacks samples which a later call may get
_READS_AT_A_TIME = 16

Sample = tuple[str, bytes, dict]


class TemporarilyRejected(ValueError):
    """The reason why a sample is not available now; a later call tries again."""


@dataclass(frozen=True)
class ShardPart:
    """One shard to be written.

    Args:
        name: of the tar.
        items: what the samples are loaded from, in their order.
        rejected: (key, reason) of items that were rejected already.
    """

    name: str
    items: list[Any]
    rejected: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Writing:
    """What all shards of a dataset share; sent to every process once.

    Args:
        load: item -> sample; ValueError is the reason for rejecting it, :class:`TemporarilyRejected` one that may pass.
        key_of: item -> key.
        facts_of: item -> what of it decides the sample.
        vocabulary: labels the hashtags.
        identity: of everything that decides the samples, beside the items.
        store: where the shards go.
        remote: whether loading waits for a network, so that several items are worth loading at a time.
    """

    load: Callable[[Any], Sample]
    key_of: Callable[[Any], str]
    facts_of: Callable[[Any], Any]
    vocabulary: Vocabulary
    identity: str
    store: ShardStore
    remote: bool = False

    def source_of(self, part: ShardPart) -> str:
        """Returns a digest of all that decides what a shard holds, but for the content of the image files."""
        items = [self.facts_of(item) for item in part.items]
        facts = json.dumps([self.identity, items, part.rejected, self.vocabulary.checksum])
        return hashlib.sha256(facts.encode()).hexdigest()


def rejected_path(tar_path: Path) -> Path:
    """Returns the table of a shard's rejected samples, JSON lines of key and reason; not there if none was rejected."""
    return tar_path.with_suffix(".rejected.jsonl")


def write_part(writing: Writing, part: ShardPart) -> Counter:
    """Writes one shard, unless it is there already.

    Returns:
        How many items were "written", and how many were rejected for each reason.

    Raises:
        ShardError: the folder has this shard from other items.
        StoreUnreachableError: the store of the images does not answer.
    """
    source, path, store = writing.source_of(part), writing.store.folder / part.name, writing.store
    beside = [rejected_path(path).name, index_path(path).name, labels_path(path).name]
    for name in beside if store.is_remote else ():
        if store.stamp(name)[0] >= 0:
            store.path(name)
        else:
            (store.folder / name).unlink(missing_ok=True)
    if not _is_there(store, path, source, writing.vocabulary):
        store.remove(*beside[::-1])  # what marks it as complete first
        _write(writing, part, path, source)
        store.upload(part.name, *[name for name in beside if (path.parent / name).is_file()])
        if store.is_remote:
            path.unlink()
    reasons: Counter = Counter()
    if rejected_path(path).is_file():
        for line in rejected_path(path).read_bytes().splitlines():
            reasons[json.loads(line)["reason"]] += 1
    return reasons + Counter({"written": len(part.items) + len(part.rejected) - reasons.total()})


def _is_there(store: ShardStore, path: Path, source: str, vocabulary: Vocabulary) -> bool:
    if not index_path(path).is_file():
        return False
    try:
        facts = read_facts(path)
    except ShardError:
        return False
    if facts["source"].removesuffix(_INCOMPLETE) != source:
        raise ShardError(
            f"{store.place(path.name)} was made from other posts or images, or with other options; choose another "
            "folder."
        )
    if facts["source"] != source:
        return False
    if store.is_remote:
        if store.stamp(path.name)[0] != facts["tar_bytes"]:
            return False
    elif not path.is_file() or not has_content(path, facts["tar_sha256"], read_stamps(path.parent)):
        return False
    try:
        labels = read_labels(path)
    except ShardError:
        return False
    return (labels.tar_sha256, labels.vocabulary_checksum) == (facts["tar_sha256"], vocabulary.checksum)


def _write(writing: Writing, part: ShardPart, path: Path, source: str) -> None:
    rejected = list(part.rejected)
    incomplete = False
    seen: set[str] = set()

    def load(item: Any) -> Sample | ValueError:
        try:
            check_key(writing.key_of(item))
            return writing.load(item)
        except ValueError as reason:
            return reason

    def samples() -> Iterator[Sample]:
        nonlocal incomplete
        for item, found in zip(part.items, _loaded(load, part.items, writing.remote), strict=True):
            key = writing.key_of(item)
            if not isinstance(found, ValueError) and key in seen:
                found = ValueError("repeated key")
            if isinstance(found, ValueError):
                rejected.append((key, str(found)))
                incomplete |= isinstance(found, TemporarilyRejected)
                continue
            seen.add(key)
            yield found

    content = write_tar(path, samples())
    if rejected:
        lines = (json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in rejected)
        write_atomically(rejected_path(path), "".join(lines))
    index = make_index(content, "hashtags", source + _INCOMPLETE * incomplete)
    write_index(path, index)
    note_stamp(path, index.tar_sha256)
    write_labels(path, label_index(index, writing.vocabulary))


def _loaded(load: Callable, items: list, remote: bool) -> Iterator:
    if not remote:
        yield from map(load, items)
        return
    with ThreadPoolExecutor(_READS_AT_A_TIME, thread_name_prefix="load") as pool:
        for start in range(0, len(items), 4 * _READS_AT_A_TIME):
            yield from pool.map(load, items[start : start + 4 * _READS_AT_A_TIME])


def write_dataset(
    writing: Writing, parts: Iterable[ShardPart], workers: Workers, *, total: int | None = None
) -> Counter:
    """Writes the shards of a dataset; the same input gives the same bytes, whoever works on the parts.

    Returns:
        The account: how many items were written, and how many rejected for each reason.

    Raises:
        ShardError: see :func:`write_part`; or the folder holds tars of something else.
    """
    account: Counter = Counter()
    names: set[str] = set()
    store = writing.store

    def noted() -> Iterator[ShardPart]:
        for part in parts:
            names.add(part.name)
            yield part

    for counts in run_parts(write_part, noted(), writing, workers=workers, unit="shard", total=total):
        account += counts
    if surplus := set(store.tars()) - names:
        raise ShardError(f"{store.place(min(surplus))} is not a shard of this dataset; choose an empty folder.")
    if not account["written"]:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(account.items())) or "there was none"
        raise EmptyDatasetError(f"{store.location}: 0 images could be written ({reasons}).")
    return account


class SeenKeys:
    """Which keys have come before, by 64-bit hashes: 8 bytes of memory a key."""

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []  # of falling sizes

    def add(self, keys: list[str]) -> np.ndarray:
        """Returns (n,) bool, whether each key came in an earlier call, and notes them all."""
        digests = (hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys)
        hashes = np.frombuffer(b"".join(digests), np.uint64)
        seen = np.zeros(len(hashes), bool)
        for part in self._sorted:
            place = np.minimum(np.searchsorted(part, hashes), len(part) - 1)
            seen |= part[place] == hashes
        fresh = np.unique(hashes[~seen])
        while self._sorted and len(self._sorted[-1]) <= len(fresh):
            fresh = np.union1d(self._sorted.pop(), fresh)
        if len(fresh):
            self._sorted.append(fresh)
        return seen


def load_image(place: str, reader: Callable[[str], bytes]) -> bytes:
    """Reads an image for a sample; every failure that concerns this image alone is a reason for rejecting it.

    Raises:
        ValueError: there is no image, or it cannot be read.
        TemporarilyRejected: its store is busy or denies access.
        StoreUnreachableError: its store does not answer, which concerns all images.
    """
    try:
        return reader(place)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError("no image") from None
    except IsADirectoryError:
        raise ValueError("the image is a folder") from None
    except PermissionError:
        raise TemporarilyRejected("access denied") from None
    except StoreBusyError as error:
        raise TemporarilyRejected(f"store busy ({str(error).rpartition(': ')[2]})") from None
    except ConnectionError:
        raise
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise
        raise ValueError(f"no image ({error.strerror or error})") from None


_DISK_ERRORS = (5, 24, 28, 116, 121)  # EIO, EMFILE, ENOSPC, ESTALE, EREMOTEIO: of the machine, not of one image
