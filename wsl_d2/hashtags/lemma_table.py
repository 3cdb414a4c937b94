"""WordNet's nouns as a few compact arrays: which synsets a spelling can mean, and what is above each synset.

The table is compiled once from nltk's reader, which takes some seconds, and kept in the cache; loading takes a
fraction of a second, and no look-up touches nltk.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from wsl_d2.files import cache_folder, write_atomically

from .normalize import normalize_hashtag
from .wordnet import find_wordnet, load_wordnet, preferred_senses, synset_to_wnid

_FORMAT = 1  # raise it when the content of the arrays changes

_ENDING = 3  # letters of the shortest irregular plural
# morphy's rules for nouns (morphy(7WN)), on spellings without spaces
_PLURAL_RULES = (
    ("ses", "s"),
    ("ves", "f"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("men", "man"),
    ("ies", "y"),
    ("s", ""),
)


class LemmaTable:
    """Noun spellings, their senses, irregular plurals and hypernyms; made by :func:`load_lemma_table`.

    Attributes:
        words: normalised spelling of every lemma -> number of the noun; -1 for verbs, adjectives and adverbs that are
            no nouns.
        plurals: normalised irregular plural -> normalised singulars ("geese" -> ("goose",)).
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self._offsets = arrays["offsets"]
        self._parents, self._parents_start = arrays["parents"], arrays["parents_start"]
        self._senses, self._senses_start = arrays["senses"], arrays["senses_start"]
        nouns = _lines(arrays["keys"])
        self.words = dict.fromkeys(_lines(arrays["other_words"]), -1)
        self.words.update(zip(nouns, range(len(nouns)), strict=True))
        self.plurals: dict[str, tuple[str, ...]] = {}
        lengths = defaultdict(set)
        for line in _lines(arrays["plurals"]):
            plural, *singulars = line.split(" ")
            self.plurals[plural] = tuple(singulars)
            lengths[plural[-_ENDING:]].add(len(plural))
        # by their last letters, how long irregular plurals are, the longest first
        self._plural_lengths = {ending: sorted(found, reverse=True) for ending, found in lengths.items()}

    def senses(self, key: str) -> list[str]:
        """Returns the WordNet ids of the senses of a normalised noun, the most frequent first; empty for others."""
        row = self.words.get(key, -1)
        if row < 0:
            return []
        places = self._senses[self._senses_start[row] : self._senses_start[row + 1]]
        return [f"n{offset:08d}" for offset in self._offsets[places].tolist()]

    def parents(self, wnid: str) -> list[str]:
        """Returns the ids of a synset's hypernyms and instance hypernyms, sorted."""
        place = int(np.searchsorted(self._offsets, int(wnid[1:])))
        above = self._parents[self._parents_start[place] : self._parents_start[place + 1]]
        return [f"n{offset:08d}" for offset in self._offsets[above].tolist()]

    def is_a(self, wnid: str, ancestor: str) -> bool:
        """Whether ``ancestor`` is the synset itself or anywhere above it."""
        level, seen = [wnid], {wnid}
        while level:
            if ancestor in level:
                return True
            level = [above for one in level for above in self.parents(one) if above not in seen and not seen.add(above)]  # type: ignore[func-returns-value]
        return False

    def singulars(self, key: str) -> list[str]:
        """Returns the known singulars of a spelling: irregular ones first, then by morphy's rules.

        Compounds count by their last part: "canadageese" has the singular "canadagoose".
        """
        found = []
        for length in self._plural_lengths.get(key[-_ENDING:], ()):
            if key[-length:] in self.plurals and length <= len(key):
                found += [key[:-length] + singular for singular in self.plurals[key[-length:]]]
        if key.endswith(("s", "men")) and len(key) > 3 and not key.endswith("ss"):
            found += [key[: -len(end)] + new for end, new in _PLURAL_RULES if key.endswith(end)]
        if not found:
            return found
        return [one for one in dict.fromkeys(found) if self.words.get(one, -1) >= 0 and one != key]


def _lines(text: np.ndarray) -> list[str]:
    return bytes(text).decode().split("\n")


def _compile(wordnet: Any, exceptions: Path) -> dict[str, np.ndarray]:
    synsets = sorted(wordnet.all_synsets("n"), key=lambda synset: synset.offset())
    position = {synset.offset(): i for i, synset in enumerate(synsets)}
    parents, parents_start = [], [0]
    for synset in synsets:
        above = sorted(synset.hypernyms() + synset.instance_hypernyms(), key=synset_to_wnid)
        parents += [position[one.offset()] for one in above]
        parents_start.append(len(parents))
    ranked: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
    for lemma in sorted(wordnet.all_lemma_names("n")):
        key = normalize_hashtag(lemma)
        for rank, synset in enumerate(wordnet.synsets(lemma, "n")):
            claim = (rank, synset.offset())
            ranked[key][synset.offset()] = min(ranked[key].get(synset.offset(), claim), claim)
    ranked.pop("", None)
    for key, wnid in preferred_senses().items():
        ranked[key][int(wnid[1:])] = (-1, int(wnid[1:]))
    keys = sorted(ranked)
    senses, senses_start = [], [0]
    for key in keys:
        senses += [position[offset] for offset in sorted(ranked[key], key=ranked[key].__getitem__)]
        senses_start.append(len(senses))
    plurals = {}
    for line in exceptions.read_text(encoding="utf-8").splitlines():
        plural, *singulars = (normalize_hashtag(word) for word in line.split())
        plurals[plural] = [singular for singular in singulars if singular in ranked]
    lines = [" ".join([plural, *singulars]) for plural, singulars in sorted(plurals.items()) if singulars]
    others = {normalize_hashtag(lemma) for pos in "vasr" for lemma in wordnet.all_lemma_names(pos)} - ranked.keys()
    return {
        "offsets": np.array([synset.offset() for synset in synsets], np.int32),
        "parents": np.array(parents, np.int32),
        "parents_start": np.array(parents_start, np.int32),
        "keys": np.frombuffer("\n".join(keys).encode(), np.uint8),
        "senses": np.array(senses, np.int32),
        "senses_start": np.array(senses_start, np.int32),
        "plurals": np.frombuffer("\n".join(lines).encode(), np.uint8),
        "other_words": np.frombuffer("\n".join(sorted(others)).encode(), np.uint8),
    }


@functools.lru_cache(maxsize=2)
def _load(folder: Path) -> LemmaTable:
    with open(folder / "data.noun", "rb") as file:
        content = file.read() + json.dumps(preferred_senses(), sort_keys=True).encode()
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = cache_folder() / f"lemma_table-{_FORMAT}-{digest}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return LemmaTable(dict(arrays))
    except Exception:  # absent, or damaged in one of the many ways of zip files: compile it again
        arrays = _compile(load_wordnet(folder), folder / "noun.exc")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    except OSError:
        pass  # a cache that cannot be written only costs the next process some seconds
    return LemmaTable(arrays)


def load_lemma_table(path: str | Path | None = None) -> LemmaTable:
    """Returns the table of WordNet 3.0's nouns; compiles it where the cache has none or a damaged one.

    Args:
        path: folder of WordNet 3.0; see :func:`wsl_d2.hashtags.wordnet.find_wordnet`.

    Raises:
        WordNetError: WordNet 3.0 was not found or is another version.
    """
    return _load(find_wordnet(path))
