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
    known = _words_and_beginnings().get
    logs: list[float | None] = [0.0, *[None] * len(text)]  # by end: of the best split up to there
    starts = [0] * (len(text) + 1)  # of the last word of that split
    for start in range(len(text)):
        before = logs[start]
        if before is None:
            continue
        for end in range(start + 1, len(text) + 1):
            log = known(text[start:end], 0.0)
            if log == 0.0:
                break
            if log is not None:
                best, found = logs[end], before + log
                if best is None or best < found:
                    logs[end], starts[end] = found, start
    if logs[-1] is None:
        return []
    words, end = [], len(text)
    while end:
        words.append(text[starts[end] : end])
        end = starts[end]
    return words[::-1]
