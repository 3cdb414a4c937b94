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

_FORMAT = 4  # raise it when the content of the arrays changes

_PERSON, _UNSEEN, _NAMED = 1, 2, 3  # kinds of synsets: one person, what photos do not show, another proper name
# Of WordNet's 26 groups of nouns those whose members photos do not show.
_UNSEEN_GROUPS = frozenset(
    f"noun.{name}" for name in "attribute communication feeling motive possession quantity relation state".split()
)
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
        words: normalized spelling of every lemma -> number of the noun; -1 for verbs, adjectives and adverbs that are
            no nouns.
        plurals: normalized irregular plural -> normalized singulars ("geese" -> ("goose",)).
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self._offsets = arrays["offsets"]
        self._parents, self._parents_start = arrays["parents"], arrays["parents_start"]
        self._senses, self._senses_start = arrays["senses"], arrays["senses_start"]
        # single numbers of a memoryview come in a fraction of the time
        self._quick_offsets = self._offsets.data
        self._quick_senses, self._quick_senses_start = self._senses.data, self._senses_start.data
        self._first_kinds = arrays["kinds"][self._senses[self._senses_start[:-1]]].tobytes()  # by number of the noun
        self._lemmas, self._lemmas_start = arrays["lemmas"], arrays["lemmas_start"]
        self._nouns = nouns = _lines(arrays["keys"])
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
        """Returns the WordNet ids of the senses of a normalized noun, the most frequent first; empty for others."""
        row = self.words.get(key, -1)
        if row < 0:
            return []
        offsets, start = self._quick_offsets, self._quick_senses_start
        return [f"n{offsets[place]:08d}" for place in self._quick_senses[start[row] : start[row + 1]]]

    def names_a_person(self, key: str) -> bool:
        """Whether the first sense of a noun is one person, such as "einstein"."""
        return self._first_kind(key) == _PERSON

    def is_unseen(self, key: str) -> bool:
        """Whether the first sense of a noun is nothing that photos show, by WordNet's groups: a state, a message."""
        return self._first_kind(key) == _UNSEEN

    def _first_kind(self, key: str) -> int:
        row = self.words.get(key, -1)
        return 0 if row < 0 else self._first_kinds[row]

    def synsets(self) -> list[str]:
        """Returns the ids of all noun synsets, sorted."""
        return [f"n{offset:08d}" for offset in self._offsets.tolist()]

    def lemmas(self, wnid: str) -> list[str]:
        """Returns the normalized spellings of a synset's lemmas, the most usual first."""
        place = self._place(wnid)
        rows = self._lemmas[self._lemmas_start[place] : self._lemmas_start[place + 1]]
        return [self._nouns[row] for row in rows.tolist()]

    def parents(self, wnid: str) -> list[str]:
        """Returns the ids of a synset's hypernyms and instance hypernyms, sorted."""
        place = self._place(wnid)
        above = self._parents[self._parents_start[place] : self._parents_start[place + 1]]
        return [f"n{offset:08d}" for offset in self._offsets[above].tolist()]

    def _place(self, wnid: str) -> int:
        return int(self._offsets.searchsorted(np.int32(int(wnid[1:]))))  # another type would copy the offsets

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


def _kind_of(synset: Any) -> int:
    if synset.instance_hypernyms():
        return _PERSON if synset.lexname() == "noun.person" else _NAMED
    return _UNSEEN if synset.lexname() in _UNSEEN_GROUPS else 0


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
    kinds = [_kind_of(synset) for synset in synsets]
    for claims in ranked.values():
        kind_of = {offset: kinds[position[offset]] for offset in claims}
        if kind_of[min(claims, key=claims.__getitem__)] == _PERSON and 0 in kind_of.values():
            # a "sax" is the instrument and not its inventor
            claims.update({one: (len(claims), one) for one, kind in kind_of.items() if kind == _PERSON})
    keys = sorted(ranked)
    senses, senses_start = [], [0]
    for key in keys:
        senses += [position[offset] for offset in sorted(ranked[key], key=ranked[key].__getitem__)]
        senses_start.append(len(senses))
    row_of = {key: row for row, key in enumerate(keys)}
    lemmas: list[int] = []
    lemmas_start = [0]
    for synset in synsets:
        lemmas += dict.fromkeys(row_of[key] for lemma in synset.lemma_names() if (key := normalize_hashtag(lemma)))
        lemmas_start.append(len(lemmas))
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
        "kinds": np.array(kinds, np.uint8),
        "lemmas": np.array(lemmas, np.int32),
        "lemmas_start": np.array(lemmas_start, np.int32),
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
