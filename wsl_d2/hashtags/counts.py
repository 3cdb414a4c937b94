"""How many images carry each hashtag of a corpus: read from a file, line by line where it has millions of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from wsl_d2.errors import VocabularyError


class Counts(Protocol):
    """A dict of hashtag -> number of images, or anything with such items."""

    def items(self) -> Iterable[tuple[str, int]]:
        """Returns (hashtag, number of images); a hashtag may come again, the numbers add up."""


class HashtagCounts:
    """A file of counts, read anew at each use, so that it may be larger than memory.

    Args:
        path: JSON, one object of hashtag -> number of images, which is read at once; or, under any name not ending in
            .json, text with one `hashtag<TAB>number` a line.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    def items(self) -> Iterator[tuple[str, int]]:
        """Gives (hashtag, number of images) in the order of the file.

        Raises:
            VocabularyError: a line or entry is not of that form, or there is none; the message names the file and the
                line.
        """
        read = self._json_entries if self.path.suffix == ".json" else self._lines
        empty = True
        try:
            for place, hashtag, count in read():
                if not hashtag or not isinstance(count, int) or isinstance(count, bool) or count < 0:
                    raise VocabularyError(
                        f"{self.path}, {place}: expected a hashtag, a tab and its number of images, 0 or more"
                    )
                empty = False
                yield hashtag, count
        except (OSError, UnicodeDecodeError) as error:
            raise VocabularyError(f"{self.path} cannot be read: {error}") from error
        if empty:
            raise VocabularyError(f"{self.path}: there is no hashtag in it")

    def _lines(self) -> Iterator[tuple[str, str, object]]:
        with open(self.path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    hashtag, _, count = line.rstrip("\r\n").rpartition("\t")
                    yield f"line {number}", hashtag, int(count) if count.strip().isdecimal() else None

    def _json_entries(self) -> Iterator[tuple[str, str, object]]:
        text = self.path.read_text(encoding="utf-8-sig")
        try:
            content = json.loads(text)
        except ValueError as error:
            raise VocabularyError(f"{self.path}: not valid JSON ({error})") from error
        if not isinstance(content, dict):
            raise VocabularyError(f"{self.path}: expected a JSON object of hashtag -> number of images")
        for hashtag, count in content.items():
            yield f"entry {hashtag!r}", hashtag, count


def read_hashtag_counts(path: str | os.PathLike[str]) -> dict[str, int]:
    """Reads a file of counts into memory; see :class:`HashtagCounts`.

    Raises:
        VocabularyError: the file cannot be read, or is not of that form.
    """
    counts: dict[str, int] = {}
    for hashtag, count in HashtagCounts(path).items():
        counts[hashtag] = counts.get(hashtag, 0) + count
    return counts
