"""Letters without spaces -> the likeliest English words: "homemadepizza" -> "homemade", "pizza"."""

from __future__ import annotations

import functools
import importlib.resources
import math

_WORD_LIST = "frequency_dictionary_en_82_765.txt"  # of symspellpy: a word, a blank, how often it occurs
# Words of hashtags that the list lacks, so that it does not cut them to pieces.
_MORE_WORDS = (
    "instagram", "insta", "instadaily", "instamood", "vsco", "gopro", "flickr", "tumblr", "tiktok", "youtube",
    "selfie", "selfies", "natgeo", "stagram", "gram", "iphone", "nikon", "canon", "sony", "crossfit", "airbnb",
    "colorful", "mom",
)  # fmt: skip
_MORE_COUNT = 1_000_000_000


@functools.cache
def known_words() -> dict[str, float]:
    """Returns the words that a text is split into -> the logarithm of how likely each is."""
    text = importlib.resources.files("symspellpy").joinpath(_WORD_LIST).read_text(encoding="utf-8")
    counts = {word: int(count) for word, count in map(str.split, text.splitlines())}
    counts.update(dict.fromkeys(_MORE_WORDS, _MORE_COUNT))
    total = sum(counts.values())
    return {word: math.log(count / total) for word, count in counts.items()}


@functools.cache
def _words_and_beginnings() -> dict[str, float | None]:
    """The known words and, with None, what they begin with: no longer text can be a word where this ends."""
    beginnings = {word[:end]: None for word in known_words() for end in range(1, len(word))}
    return beginnings | known_words()


class _Heads(dict[str, tuple[list[tuple[int, float]], bool]]):
    """The first three letters of a text -> (length, logarithm) of the words that end in them, the shortest first, and
    whether a longer word can begin with them; all who ask for the same letters share one answer."""

    def __missing__(self, letters: str) -> tuple[list[tuple[int, float]], bool]:
        known = _words_and_beginnings()
        ends = range(1, len(letters) + 1)
        words = [(end, log) for end in ends if (log := known.get(letters[:end])) is not None]
        self[letters] = found = words, len(letters) == _HEAD and letters in known
        return found


_HEAD = 3
_heads = _Heads()


def split_words(text: str) -> list[str]:
    """Returns the words of a text whose product of probabilities is the greatest; none if it is not all words."""
    known = _words_and_beginnings().get
    size = len(text)
    logs: list[float | None] = [0.0, *[None] * size]  # by end: of the best split up to there
    starts = [0] * (size + 1)  # of the last word of that split
    for start in range(size):
        before = logs[start]
        if before is None:
            continue
        short, is_longer = _heads[text[start : start + _HEAD]]
        for length, log in short:
            best, found = logs[start + length], before + log
            if best is None or best < found:
                logs[start + length], starts[start + length] = found, start
        if not is_longer:
            continue
        for end in range(start + _HEAD + 1, size + 1):
            longer = known(text[start:end], 0.0)
            if longer == 0.0:
                break
            if longer is not None:
                best, found = logs[end], before + longer
                if best is None or best < found:
                    logs[end], starts[end] = found, start
    if logs[-1] is None:
        return []
    words, end = [], size
    while end:
        words.append(text[starts[end] : end])
        end = starts[end]
    return words[::-1]
