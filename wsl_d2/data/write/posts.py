"""Tables of posts + image files -> a dataset of shards."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path

from wsl_d2.data.format.folders import is_left_by_a_system, walk_once
from wsl_d2.data.format.origin import Origin
from wsl_d2.data.format.tar import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES
from wsl_d2.data.posts.files import find_files
from wsl_d2.data.posts.readers import detect_post_format, read_posts
from wsl_d2.data.posts.table_images import TableImages
from wsl_d2.data.read.decode import DamagedImageError, decode, open_image
from wsl_d2.data.read.shrink import UNCHANGED, Shrinking, shrink
from wsl_d2.data.read.store import ShardStore
from wsl_d2.data.remote import is_url, read_bytes
from wsl_d2.data.runner import Workers
from wsl_d2.data.write.source import finish_store, reserved_folder
from wsl_d2.data.write.writer import Sample, SeenKeys, ShardPart, Writing, load_image, write_dataset
from wsl_d2.errors import ShardError, UserError
from wsl_d2.hashtags import Vocabulary

IMAGE_CHECKS = ("none", "header", "full")

COLUMN = "column:"  # before the name of a column that holds the images

Post = tuple[str, list[str], Origin, str, int]  # key, hashtags, who, when and where, file, and of Parquet its row


def _key_of(post: Post) -> str:
    """The key of a post's image in the shards: that of the post, which may be the image's file name with its ending."""
    stem, ending = os.path.splitext(post[0])
    return stem if ending.lower().lstrip(".") in IMAGE_EXTENSIONS else post[0]


def _facts_of(post: Post) -> tuple:
    return post[:3] if any(post[2]) else post[:2]


def load_post(
    post: Post,
    images: str,
    found: ImageFolder | TableImages | None,
    check: str,
    only_labeled: Vocabulary | None,
    shrinking: Shrinking,
) -> Sample:
    """Returns the sample of a post; ValueError is the reason for rejecting it.

    Args:
        post: with key, hashtags and origin.
        images: a pattern with {key} in it, or the folder of ``found``.
        found: the images in that folder, or in a column of the table.
        check: one of ``IMAGE_CHECKS``.
        only_labeled: rejects posts that have no label of this vocabulary.
        shrinking: how large images are stored.
    """
    key, hashtags, origin, table, row = post
    if only_labeled is not None and not len(only_labeled.labels(hashtags)):
        raise ValueError("no label")
    if isinstance(found, TableImages):
        data = found.read(table, row)
    else:
        place = images.format(key=key) if found is None else os.path.join(images, found.find(_key_of(post)))
        data = load_image(place, read_bytes)
    if len(data) > MAX_IMAGE_BYTES:
        raise ValueError("too large")
    try:
        if check != "none" or shrinking != UNCHANGED:
            image = open_image(data)
            if check == "full":
                decode(image)
            data = shrink(image, shrinking)
    except DamagedImageError as error:
        raise ValueError(error.reason) from error
    return _key_of(post), data, {"hashtags": hashtags} | origin.metadata()


def make_shards(
    posts: Iterable[str],
    images: str,
    vocabulary: Vocabulary,
    output: str | Path,
    *,
    images_per_shard: int = 10_000,
    workers: Workers = 1,
    kind: str | None = None,
    check: str = "header",
    only_labeled: bool = False,
    key_column: str = "key",
    hashtags_column: str = "hashtags",
    caption_column: str | None = None,
    user_column: str = "",
    time_column: str = "",
    place_column: str = "",
    max_images_per_user: int | None = None,
    shrinking: Shrinking = UNCHANGED,
) -> dict:
    """Writes posts and their images as shards, indexes them and finishes the dataset.

    The same input gives the same bytes, whatever the number of workers. A call that was interrupted can be repeated:
    shards that are there are kept. Every post is accounted for: it is in a shard, or in ``*.rejected.jsonl`` beside it
    with the reason, or, if its row cannot be read, counted by reason. Of posts with the same key the first one counts;
    8 bytes of memory a post see to it. Posts whose image a busy store did not give are tried again by a repeated call.

    Args:
        posts: files, folders, glob patterns or URLs; see :func:`wsl_d2.data.posts.files.find_files`.
        images: where the image of a key lies, such as ``photos/{key}.jpg`` or ``s3://bucket/{key:.3}/{key}.jpg``; or a
            folder, in which each key is the name of an image without its ending; or ``column:NAME`` for the column of
            Parquet files with the encoded images.
        vocabulary: labels the hashtags.
        output: folder to write to, or its URL.
        images_per_shard: posts of each shard.
        workers: processes, or a cluster.
        kind: format of the posts, by their names if None.
        check: "none", "header" (format and size) or "full" (decodes every image).
        only_labeled: leave out posts without a label of the vocabulary; by default they are kept, for another one.
        key_column, hashtags_column, caption_column: names in the posts; hashtags come from the caption if it is given.
        user_column, time_column, place_column: who posted each image, when and where, which is kept as
            :mod:`wsl_d2.data.format.origin` tells; two columns of coordinates are "longitude,latitude". YFCC100M's are
            known.
        max_images_per_user: only so many posts of a poster are taken, the first ones; a post without an image counts.
        shrinking: how large images are stored.

    Returns:
        The manifest; "account" in it says what became of the posts.

    Raises:
        ShardError: the folder is another dataset's, or no post could be written.
        PostsError: a file of posts cannot be read.
        UserError: a value is out of range, or the images' store does not answer.
    """
    _check_options(images, check, images_per_shard, max_images_per_user)
    posts = list(find_files(posts))
    formats = [kind or detect_post_format(path) for path in posts]
    found: ImageFolder | TableImages | None = ImageFolder(images) if os.path.isdir(images) else None
    if images.startswith(COLUMN):
        found = TableImages(images.removeprefix(COLUMN))
        for path, form in zip(posts, formats, strict=True):
            if form != "parquet":
                raise UserError(f"{path}: {COLUMN} takes images from Parquet files; this is {form}.")
            found.check(path)
    if max_images_per_user is not None and not user_column and set(formats) != {"yfcc100m"}:
        raise UserError("a limit of images per user needs the column that says who posted them: --user-column NAME.")
    origin = {"user_column": user_column, "time_column": time_column, "place_column": place_column}
    facts = {
        "made_by": "data make",
        "posts": [[os.path.basename(path), os.path.getsize(path) if os.path.isfile(path) else None] for path in posts],
        "images": images,
        "vocabulary": vocabulary.checksum,
        "images_per_shard": images_per_shard,
        "check": check,
        "only_labeled": only_labeled,
        "columns": [key_column, caption_column or hashtags_column, *filter(None, origin.values())],
        "max_images_per_user": max_images_per_user,
        **shrinking.facts(),
    }
    account: Counter = Counter()
    options = {"key_column": key_column, "hashtags_column": hashtags_column, "caption_column": caption_column}
    options |= origin
    rows = _rows(posts, formats, account, options)
    first = next(rows, None)  # the first file is read before anything is written
    if first is None:
        counted = ", ".join(f"{name}: {count:,}" for name, count in account.items())
        raise ShardError(f"{', '.join(posts)}: 0 posts can be used ({counted or 'the files are empty'}).")
    vocabulary.mapping  # noqa: B018  (an error of it comes before anything is written)
    store = ShardStore(output)
    load: Callable[[Post], Sample] = partial(
        load_post,
        images=images,
        found=found,
        check=check,
        only_labeled=vocabulary if only_labeled else None,
        shrinking=shrinking,
    )
    identity = json.dumps([images, check, only_labeled, *shrinking.facts().values()])
    writing = Writing(load, _key_of, _facts_of, vocabulary, identity, store, is_url(images))
    with reserved_folder(store, facts):
        account += write_dataset(writing, _parts(_chain(first, rows), images_per_shard, max_images_per_user), workers)
        return finish_store(store, vocabulary, {"account": dict(sorted(account.items())), **shrinking.facts()})


def _check_options(images: str, check: str, images_per_shard: int, max_images_per_user: int | None) -> None:
    if max_images_per_user is not None and max_images_per_user < 1:
        raise UserError(f"max_images_per_user is 1 or more, got {max_images_per_user}.")
    if check not in IMAGE_CHECKS or images_per_shard < 1:
        raise UserError(
            f"check is one of {', '.join(IMAGE_CHECKS)} and images_per_shard is positive; got {check!r} and "
            f"{images_per_shard}."
        )
    if os.path.isdir(images) or images.startswith(COLUMN):
        return
    try:
        differs = images.format(key="a") != images.format(key="b")
    except (KeyError, IndexError, ValueError, AttributeError):
        differs = False
    if not differs:
        raise UserError(
            f"images is a folder, or has {{key}} in it, such as 'photos/{{key}}.jpg', and no other braces, or is "
            f"{COLUMN}NAME of Parquet files; got {images!r}."
        )


class ImageFolder:
    """The images in a folder and in those below, by their names without ending, alone or with the folders before it.

    Args:
        folder: as a path.

    Raises:
        ShardError: there is no image, or two differ in nothing but their ending.
    """

    def __init__(self, folder: str | Path):
        self._paths = _find_images(folder)  # path without ending -> path
        self._by_name: dict[str, str | None] = {}
        for path in self._paths.values():
            name = os.path.splitext(os.path.basename(path))[0]
            self._by_name[name] = None if name in self._by_name else path

    def find(self, key: str) -> str:
        """Returns the path of a key's image below the folder; ValueError is the reason for rejecting the key."""
        path = self._paths.get(key) or self._by_name.get(key, "")
        if path is None:
            raise ValueError("several images of this name")
        if not path:
            raise ValueError("no image")
        return path


def _find_images(folder: str | Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for root, _, names in walk_once(folder, Counter()):
        for name in sorted(names):
            ending = os.path.splitext(name)[1]
            if ending.lower().lstrip(".") not in IMAGE_EXTENSIONS or is_left_by_a_system(name):
                continue
            path = os.path.relpath(os.path.join(root, name), folder)
            if (other := found.setdefault(os.path.splitext(path)[0], path)) != path:
                raise ShardError(f"{folder}: {other} and {path} are images of one key; keys must be unique.")
    if not found:
        raise ShardError(f"{folder} holds no image ({', '.join(IMAGE_EXTENSIONS)}).")
    return found


def _rows(posts: list[str], formats: list[str], account: Counter, options: dict) -> Iterator[Post]:
    for path, kind in zip(posts, formats, strict=True):
        for chunk in read_posts(path, kind, **options):
            account["rows"] += chunk.num_rows
            for reason, count in chunk.skipped.items():
                account[reason] += count
            for _, reason, _ in chunk.rejected:
                account[reason] += 1
            origins = chunk.origins or repeat(Origin(), len(chunk.keys))
            places = repeat(-1, len(chunk.keys)) if chunk.rows is None else chunk.rows.tolist()
            tables = repeat(path, len(chunk.keys))
            yield from zip(chunk.keys.to_pylist(), chunk.hashtags.to_pylist(), origins, tables, places, strict=True)


def _chain(first: Post, rows: Iterator[Post]) -> Iterator[Post]:
    yield first
    yield from rows


def _parts(rows: Iterator[Post], images_per_shard: int, max_images_per_user: int | None) -> Iterator[ShardPart]:
    seen = SeenKeys()
    of_user: Counter[int] = Counter()
    batch: list[Post] = []
    number = 0

    def part() -> ShardPart:
        nonlocal number
        items: list[Post] = []
        rejected: list[tuple[str, str]] = []
        for post, again in zip(batch, seen.add([_key_of(post) for post in batch]), strict=True):
            user = post[2].user
            if again:
                rejected.append((post[0], "repeated key"))
            elif user and max_images_per_user and of_user[user] >= max_images_per_user:
                rejected.append((post[0], f"more than {max_images_per_user:,} of one user"))
            else:
                items.append(post)
                if max_images_per_user:
                    of_user[user] += 1
        number += 1
        return ShardPart(f"shard-{number - 1:06d}.tar", items, tuple(rejected))

    for row in rows:
        batch.append(row)
        if len(batch) == images_per_shard:
            yield part()
            batch = []
    if batch:
        yield part()
