"""Letters without spaces -> the likeliest English words: "homemadepizza" -> "homemade", "pizza"."""

from __future__ import annotations

import functools
import importlib.resources
import math
from typing import Any

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
def _automaton() -> Any:
    """Finds all known words of a text, as (length, logarithm): by their ends, and at each end the longest first."""
    import ahocorasick  # here: readers of finished datasets need it not

    automaton = ahocorasick.Automaton()
    for word, log in known_words().items():
        automaton.add_word(word, (len(word), log))
    automaton.make_automaton()
    return automaton


def split_words(text: str) -> list[str]:
    """Returns the words of a text whose product of probabilities is the greatest; none if it is not all words."""
    logs: list[float | None] = [0.0, *[None] * len(text)]  # by end: of the best split up to there
    starts = [0] * len(logs)  # of the last word of that split
    for last, (length, log) in _automaton().iter(text):
        end = last + 1
        before = logs[end - length]
        if before is not None:
            log += before
            best = logs[end]
            if best is None or best < log:
                logs[end], starts[end] = log, end - length
    words, end = [], len(text) if logs[-1] is not None else 0
    while end:
        words.append(text[starts[end] : end])
        end = starts[end]
    return words[::-1]
