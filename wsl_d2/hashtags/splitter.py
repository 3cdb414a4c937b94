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


def split_words(text: str) -> list[str]:
    """Returns the words of a text whose product of probabilities is the greatest; none if it is not all words."""
    known = _words_and_beginnings()
    best: dict[int, tuple[float, int]] = {0: (0.0, 0)}  # by end: the logarithm of a split, the start of its last word
    for start in range(len(text)):
        if start not in best:
            continue
        before = best[start][0]
        for end in range(start + 1, len(text) + 1):
            log = known.get(text[start:end], 0.0)
            if log == 0.0:
                break
            if log is not None and (end not in best or best[end][0] < before + log):
                best[end] = before + log, start
    words, end = [], len(text)
    while end and end in best:
        start = best[end][1]
        words.append(text[start:end])
        end = start
    return words[::-1]
