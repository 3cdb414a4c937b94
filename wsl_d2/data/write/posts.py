"""Tables of posts + image files -> shards, and tars that exist already -> a dataset; in parallel, resumable."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import fsspec
import numpy as np
from tqdm import tqdm

from wsl_d2.data.posts.readers import detect_post_format, read_posts
from wsl_d2.data.read.decode import DamagedImageError, decode, open_image
from wsl_d2.data.read.store import is_url
from wsl_d2.data.shards import (
    MAX_IMAGE_BYTES,
    ShardError,
    finish_dataset,
    index_path,
    index_shard,
    read_index,
    write_atomically,
    write_shard,
)
from wsl_d2.hashtags import Vocabulary

IMAGE_CHECKS = ("none", "header", "full")


@dataclass(frozen=True)
class ShardJob:
    """One shard to be written: its posts, and how their images are found and checked."""

    path: Path
    posts: list[tuple[str, list[str]]]
    images: str
    vocabulary: Path
    check: str
    only_labelled: bool

    @property
    def source(self) -> str:
        """A digest of all that decides what the shard holds, but for the image files."""
        facts = [self.posts, self.images, Vocabulary.load(self.vocabulary).checksum, self.check, self.only_labelled]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def rejected(self) -> Path:
        """A table of the posts that are not in the shard: key, reason."""
        return self.path.with_suffix(".rejected.tsv")


@lru_cache(maxsize=1)
def _vocabulary(path: Path) -> Vocabulary:
    return Vocabulary.load(path)


def _read_image(place: str) -> bytes:
    if is_url(place):
        with fsspec.open(place, "rb") as file:
            return file.read()
    return Path(place).read_bytes()


def _usable_image(job: ShardJob, key: str, hashtags: list[str]) -> bytes:
    """Returns the encoded image of a post; ValueError is the reason for rejecting it."""
    if not key or "." in key or "/" in key:
        raise ValueError("the key is empty or has a '.' or '/'")
    if job.only_labelled and not len(_vocabulary(job.vocabulary).labels(hashtags)):
        raise ValueError("no label")
    try:
        data = _read_image(job.images.format(key=key))
    except FileNotFoundError as error:
        raise ValueError("no image") from error
    if len(data) > MAX_IMAGE_BYTES:
        raise ValueError("too large")
    if job.check != "none":
        try:
            image = open_image(data)
            if job.check == "full":
                decode(image)
        except DamagedImageError as error:
            raise ValueError(error.reason) from error
    return data


def write_one(job: ShardJob) -> Counter:
    """Writes and indexes one shard, unless it is there already.

    Returns:
        How many posts were "written", and how many were rejected for each reason.

    Raises:
        ShardError: the folder has this shard from other posts or options.
    """
    source = job.source
    if job.path.is_file() and index_path(job.path).is_file():
        if read_index(job.path).source != source:
            raise ShardError(f"{job.path} was made from other posts or with other options; choose another folder.")
    else:
        rejected: list[tuple[str, str]] = []
        seen: set[str] = set()

        def samples() -> Iterator[tuple[str, bytes, dict]]:
            for key, hashtags in job.posts:
                try:
                    if key in seen:
                        raise ValueError("repeated key")
                    image = _usable_image(job, key, hashtags)
                except ValueError as reason:
                    rejected.append((key, str(reason)))
                    continue
                seen.add(key)
                yield key, image, {"hashtags": hashtags}

        write_shard(job.path, samples())
        lines = "".join(f"{json.dumps(key, ensure_ascii=False)}\t{reason}\n" for key, reason in rejected)
        write_atomically(job.rejected, lines.encode())
        index_shard(job.path, _vocabulary(job.vocabulary), source=source)  # last: the sign that all is there
    reasons = Counter(line.rsplit("\t", 1)[1] for line in job.rejected.read_text(encoding="utf-8").splitlines())
    return reasons + Counter({"written": len(job.posts) - reasons.total()})


def _posts(paths: Iterable[str], kind: str | None, account: Counter, options: dict) -> Iterator[tuple[str, list[str]]]:
    for path in paths:
        for chunk in read_posts(path, kind or detect_post_format(path), **options):
            account["rows"] += chunk.num_rows
            for reason, count in chunk.skipped.items():
                account[reason] += count
            for _, reason, _ in chunk.quarantined:
                account[reason] += 1
            yield from zip(chunk.keys.to_pylist(), chunk.hashtags.to_pylist(), strict=True)


def make_shards(
    posts: Iterable[str],
    images: str,
    vocabulary: Vocabulary,
    output: str | Path,
    *,
    images_per_shard: int = 10_000,
    workers: int = 1,
    kind: str | None = None,
    check: str = "header",
    only_labelled: bool = False,
    key_column: str = "key",
    hashtags_column: str = "hashtags",
) -> dict:
    """Writes posts and their images as shards, indexes them and finishes the dataset.

    The same input gives the same bytes, whatever the number of workers. A call that was interrupted can be repeated:
    shards that are there are kept. Every post is accounted for: it is in a shard, or in ``*.rejected.tsv`` beside it
    with the reason, or, if its row cannot be read, counted by reason. Keys must be unique in the whole dataset; 8 bytes
    of memory a post see to it.

    Args:
        posts: files or URLs that :func:`wsl_d2.data.posts.readers.read_posts` reads.
        images: where the image of a key lies, such as ``photos/{key}.jpg`` or ``s3://bucket/{key:.3}/{key}.jpg``.
        vocabulary: labels the hashtags.
        output: folder to write to.
        images_per_shard: posts of each shard.
        workers: processes.
        kind: format of the posts, by their names if None.
        check: "none", "header" (format and size) or "full" (decodes every image).
        only_labelled: leave out posts without a label of the vocabulary; by default they are kept, for another one.
        key_column, hashtags_column: names in the posts.

    Returns:
        The manifest; "posts" in it is the account.

    Raises:
        ShardError: two posts have the same key, or the folder holds something else.
        CorpusError: a file of posts cannot be read.
        ValueError: a value is out of range.
    """
    if check not in IMAGE_CHECKS or images_per_shard < 1 or "{key" not in images:
        raise ValueError(
            f"check is one of {', '.join(IMAGE_CHECKS)}, images_per_shard is positive and images has {{key}} in it; "
            f"got {check!r}, {images_per_shard} and {images!r}."
        )
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    vocabulary.save(output / "vocabulary.json")
    account: Counter = Counter()
    hashes: list[np.ndarray] = []
    rows = _posts(posts, kind, account, {"key_column": key_column, "hashtags_column": hashtags_column})

    def jobs() -> Iterator[ShardJob]:
        batch: list[tuple[str, list[str]]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == images_per_shard:
                yield job(batch)
                batch = []
        if batch:
            yield job(batch)

    def job(batch: list[tuple[str, list[str]]]) -> ShardJob:
        path = output / f"shard-{len(hashes):06d}.tar"
        hashes.append(_key_hashes([key for key, _ in batch]))
        return ShardJob(path, batch, images, output / "vocabulary.json", check, only_labelled)

    for counts in _run_all(write_one, jobs(), workers, "shards"):
        account += counts
    _refuse_repeated_keys(hashes, images_per_shard)
    surplus = {path.name for path in output.glob("*.tar")} - {f"shard-{i:06d}.tar" for i in range(len(hashes))}
    if surplus:
        raise ShardError(f"{output / min(surplus)} is no shard of these posts; choose an empty folder.")
    return finish_dataset(output, vocabulary, {"posts": dict(sorted(account.items()))})


def _key_hashes(keys: list[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def _refuse_repeated_keys(hashes: list[np.ndarray], images_per_shard: int) -> None:
    """Within a shard, repeated keys were rejected already; here those of different shards are looked for."""
    everything = np.concatenate([np.unique(part) for part in hashes]) if hashes else np.zeros(0, np.uint64)
    values, counts = np.unique(everything, return_counts=True)
    if (counts > 1).any():
        shards = [number for number, part in enumerate(hashes) if (part == values[counts > 1][0]).any()]
        raise ShardError(
            f"{(counts > 1).sum()} keys occur in more than one shard, the first in shards {shards[0]} and {shards[1]} "
            f"(rows from {shards[0] * images_per_shard} and from {shards[1] * images_per_shard} of the usable posts); "
            "keys must be unique in a dataset. Remove the repeated posts, and choose an empty folder."
        )


def _run_all(work: Callable, items: Iterable, workers: int, unit: str) -> Iterator:
    """Results of ``work`` over items in processes, few items being ahead of the work; with a progress bar."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, tqdm(unit=unit, disable=None) as bar:
        pending: set[Future] = set()
        try:
            for item in items:
                pending.add(pool.submit(work, item))
                while len(pending) > 2 * workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        bar.update()
                        yield future.result()
            for future in pending:
                yield future.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _index_one(tar: Path, vocabulary: Path, hashtags_column: str) -> str | None:
    """Indexes a tar unless its index is newer and of this vocabulary; returns what is wrong, or None."""
    try:
        found = index_path(tar)
        if found.is_file() and found.stat().st_mtime_ns > tar.stat().st_mtime_ns:
            try:
                read_index(tar, _vocabulary(vocabulary).checksum)
                return None
            except ShardError:
                pass
        index_shard(tar, _vocabulary(vocabulary), hashtags_column)
    except ShardError as error:
        return str(error)
    return None


def index_shards(
    folder: str | Path, vocabulary: Vocabulary, *, workers: int = 1, hashtags_column: str = "hashtags"
) -> dict:
    """Indexes the WebDataset tars of a folder in place and finishes the dataset; the tars are not touched.

    Indexes that are there and newer than their tar are kept, so that an interrupted call can be repeated.

    Returns:
        The manifest.

    Raises:
        ShardError: lists every tar that cannot be used.
    """
    folder = Path(folder)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ShardError(f"{folder}: no *.tar shards here.")
    vocabulary.save(folder / "vocabulary.json")
    work = partial(_index_one, vocabulary=folder / "vocabulary.json", hashtags_column=hashtags_column)
    problems = sorted(problem for problem in _run_all(work, tars, workers, "shards") if problem)
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ShardError(
            f"{len(problems)} of {len(tars)} tars cannot be used:\n  {shown}\nMend them or move them elsewhere."
        )
    return finish_dataset(folder, vocabulary)
