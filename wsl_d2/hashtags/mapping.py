"""Free-form hashtags -> labels: the only way from a hashtag to a label, with every step that one in the wild needs.

A hashtag is first brought to a noun of WordNet or a spelling of the vocabulary, in a fixed order; the first that gives
one wins:

1. as it stands: "#brown_bear", "#BrownBear", "#brownbear" are one spelling;
2. plural: "#geese", "#brownbears";
3. digits at the end: "#dog2018";
4. accents: "#piñata";
5. letters drawn out, where WordNet knows the shorter word: "#doooog";
6. compound: the words that case, underscores or a word list tell apart; the head noun counts, the last word
   ("#homemadepizza") or the one before "of" ("#catsofinstagram");
7. emoji, by name, where there is no text.

Then the noun's synsets are looked up among the labels: a word may mean any of its senses, the head of a compound its
first one alone. Where none of them is a label, it is the nearest one above the first sense, within the policy's
max_distance. (Both limits were chosen by measured precision: a rare sense is seldom what a photo means.) A hashtag that
gets no label is dropped, with one of `DROP_REASONS`. Precision goes before recall: a few hundred hashtags whose only
noun in WordNet is not what people mean ("#canon", "#lit") are listed, with the reason, in stop_hashtags.tsv.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple, Protocol

import emoji
from symspellpy import SymSpell

from wsl_d2.errors import VocabularyError

from .lemma_table import load_lemma_table
from .normalize import normalize_hashtag
from .policy import EXACT, MappingPolicy
from .wordnet import preferred_senses

DROP_REASONS = (
    "no letters",  # empty, punctuation, digits
    "too short",  # one or two letters
    "too long",  # more than 100 letters
    "emoji names no thing",  # a face, a gesture, a symbol
    "function word",  # from here to "another language": stop_hashtags.tsv
    "adjective or adverb",
    "verb",
    "slang",
    "brand",
    "another language",
    "no noun",  # WordNet knows it as a verb, adjective or adverb only
    "phrase",  # a compound without a head noun, or with words that are no names of things
    "not in WordNet",
    "not in the vocabulary",  # a noun, but neither it nor, within max_distance, anything above it is a label
    "ambiguous",  # several labels, and the policy is to drop such hashtags
)

_RULES = 4  # raise it whenever the code of this module would give some hashtag another label
_REMEMBERED = 1_000_000  # hashtags of which a mapping remembers the labels
_STOP_FILE = Path(__file__).with_name("stop_hashtags.tsv")
_SHORT_NOUNS = frozenset({"ox", "tv", "uk", "dj", "cd", "pc"})
_MAX_LETTERS = 100
_MIN_COMPOUND, _MAX_COMPOUND = 6, 40  # letters of a hashtag worth splitting
_ANIMAL = "n00015388"
# Words of hashtags that the word list lacks, so that it does not cut them to pieces.
_MORE_WORDS = (
    "instagram", "insta", "instadaily", "instamood", "vsco", "gopro", "flickr", "tumblr", "tiktok", "youtube",
    "selfie", "selfies", "natgeo", "stagram", "gram", "iphone", "nikon", "canon", "sony", "crossfit", "airbnb",
)  # fmt: skip
_LINKS = frozenset({"of"})
_NEGATIONS = frozenset({"no", "not", "non", "without", "never", "anti", "zero"})
# Words of a compound that make it something else than a picture of its head noun.
_FUNCTION_WORDS = frozenset(
    "a an and are as at be but by can do does for from get go got had has have he her him his how i if im in is it its "
    "just let like love me my now on or our out she so than that the their them then there these they this those to up "
    "us via was we were what when where which while who why will with yes you your".split()
)
_SHORT_HEADS = frozenset(
    "ant ape arm art bag bar bat bay bed bee bib boa bow box boy bra bug bun bus cab cap car cat cow cub cup cut "
    "day dog ear eel egg elk elm emu ewe eye fan fig fir fly fox gem gnu gun gym ham hat hen hut ice inn ivy jam "
    "jar jaw jay jet jug keg kid kit koi lab lid lip log man map mat mom mop mud mug nut oak oar oil owl pan paw "
    "pea pen pet pie pig pin pit pod pot pub pug pup ram rat ray rib rod row rug rum rye saw sax sea ski sky son "
    "spa sun tea tie toe top toy tub urn van vet war wax web wig yak zoo".split()
)
# Heads that say what somebody thinks of a thing, not what can be seen.
_ATTITUDES = frozenset(
    "lover fan addict addiction obsession life lifestyle style mood vibe goal love feed daily porn problem crew nation "
    "gang squad nerd geek junkie freak fever inspiration motivation game page blog blogger account post time".split()
)
_GESTURES = frozenset("hand hands finger fingers fist arrow mark lips tongue up down left right".split())
_RUNS = re.compile(r"(.)\1{2,}")
_CASE = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+")
_SEPARATORS = re.compile(r"[\s_\-./+&,;:|]+")


class Mapped(NamedTuple):
    """What became of a hashtag.

    Attributes:
        labels: class indices, sorted; empty if it was dropped.
        reason: one of `DROP_REASONS`, or "" if there are labels.
        distance: hypernym steps from the hashtag's own synset up to the labels'; 0 for a synonym.
    """

    labels: tuple[int, ...]
    reason: str
    distance: int = 0


class _Found(NamedTuple):
    key: str  # a noun spelling of WordNet or of the vocabulary; empty if there is none
    step: str  # how it was found, or the reason why nothing was
    is_head: bool = False  # of a compound


class _Candidates(NamedTuple):
    labels: tuple[int, ...]  # best first
    distance: int


class Labels(Protocol):
    """What a mapping needs of a vocabulary."""

    name: str
    synsets: tuple[str, ...]
    hashtags: tuple[tuple[str, ...], ...]
    policy: MappingPolicy
    rules: str


class HashtagMapping:
    """Maps free-form hashtags to labels; picklable, deterministic, and total: every string has labels or a reason.

    Args:
        vocabulary: the labels, and the policy by which they are found.

    Raises:
        WordNetError: WordNet 3.0 was not found.
        VocabularyError: the vocabulary was built for other rules than those of this version.
    """

    def __init__(self, vocabulary: Labels):
        self.vocabulary = vocabulary
        self.policy = vocabulary.policy
        if self.policy.matching != EXACT and vocabulary.rules != rules_checksum():
            raise VocabularyError(
                f"vocabulary {vocabulary.name!r} was built for the mapping rules {vocabulary.rules}, this version of "
                f"wsl_d2 has {rules_checksum()} and could give hashtags other labels; build the vocabulary again."
            )
        self._open()

    def _open(self) -> None:
        self._label_of_key = {key: label for label, group in enumerate(self.vocabulary.hashtags) for key in group}
        self._candidates_of: dict[tuple[str, bool], _Candidates] = {}
        self._mapped: dict[str, Mapped] = {}
        if self.policy.matching != EXACT:
            self._table = load_lemma_table()
            self._label_of_synset = {synset: label for label, synset in enumerate(self.vocabulary.synsets)}

    def __getstate__(self) -> dict:
        return {"vocabulary": self.vocabulary, "policy": self.policy}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def map(self, hashtag: str) -> Mapped:
        """Returns the labels of a hashtag, with or without its '#', or the reason why it has none."""
        mapped = self._mapped.get(hashtag)
        if mapped is None:
            if len(self._mapped) >= _REMEMBERED:
                self._mapped.clear()
            candidates, reason = self._resolve(self._find(hashtag))
            mapped = self._mapped[hashtag] = Mapped(tuple(sorted(candidates.labels)), reason, candidates.distance)
        return mapped

    def best(self, hashtag: str) -> int | None:
        """Returns the label to take where there can be one only, None if there is none."""
        candidates, _ = self._resolve(self._find(hashtag))
        return candidates.labels[0] if candidates.labels else None

    def explain(self, hashtag: str) -> list[tuple[str, str]]:
        """Returns every step of :meth:`map` as (step, what came out), for people to read."""
        steps = [("hashtag", hashtag), ("spelling", normalize_hashtag(_without_sign(hashtag)) or "(no letters)")]
        found = self._find(hashtag)
        if not found.key:
            return [*steps, ("dropped", found.step)]
        steps.append(("noun", f"{found.key} ({found.step})"))
        senses = self._table.senses.get(found.key, ()) if self.policy.matching != EXACT else ()
        for rank, synset in enumerate(senses, start=1):
            label = self._label_of_synset.get(synset)
            steps.append((f"sense {rank}", synset + (f" is label {label}" if label is not None else "")))
        candidates, reason = self._resolve(found)
        above = f", {candidates.distance} above it" if candidates.distance else ""
        for label in sorted(candidates.labels):
            names = ", ".join(self.vocabulary.hashtags[label][:4])
            steps.append(("label", f"{label}: {self.vocabulary.synsets[label]} ({names}){above}"))
        return steps if candidates.labels else [*steps, ("dropped", reason)]

    def _resolve(self, found: _Found) -> tuple[_Candidates, str]:
        """The labels that the policy gives to a noun, best first, or the reason why it has none."""
        nothing = _Candidates((), 0)
        if not found.key:
            return nothing, found.step
        candidates = self._candidates_of.get((found.key, found.is_head))
        if candidates is None:
            candidates = self._candidates_of[found.key, found.is_head] = self._candidates(found.key, found.is_head)
        if not candidates.labels:
            return nothing, "not in the vocabulary"
        if len(candidates.labels) > 1:
            if self.policy.ambiguous == "drop":
                return nothing, "ambiguous"
            if self.policy.ambiguous == "most_frequent":
                candidates = _Candidates(candidates.labels[:1], candidates.distance)
        return candidates, ""

    def _candidates(self, key: str, is_head: bool) -> _Candidates:
        """The labels a noun can have, best first: synonyms, or else the nearest above its first sense."""
        if self.policy.matching == EXACT:
            return _Candidates((self._label_of_key[key],), 0)
        senses = self._table.senses.get(key, ())
        own = self._label_of_key.get(key)
        if own is not None and is_head and senses and self.vocabulary.synsets[own] != senses[0]:
            own = None
        labels = [own] if own is not None else []
        possible = senses[:1] if is_head else senses
        labels += [self._label_of_synset[synset] for synset in possible if synset in self._label_of_synset]
        level = list(senses[:1])
        seen = set(level)
        distance = 0
        while not labels and level and distance < self.policy.max_distance:
            above = []
            for synset in level:
                for parent in self._table.parents(synset):
                    if parent not in seen:
                        seen.add(parent)
                        above.append(parent)
            level = above
            distance += 1
            labels = [self._label_of_synset[synset] for synset in level if synset in self._label_of_synset]
        return _Candidates(tuple(dict.fromkeys(labels)), distance if labels else 0)

    def _is_noun(self, key: str) -> bool:
        return key in self._table.senses or key in self._label_of_key

    def _find(self, hashtag: str) -> _Found:
        text = _without_sign(hashtag)
        key = normalize_hashtag(text)
        if self.policy.matching == EXACT:
            return _Found(key, "as it stands") if key in self._label_of_key else _Found("", "not in the vocabulary")
        if not any(character.isalpha() for character in key):
            return self._find_emoji(text)
        if len(key) > _MAX_LETTERS:
            return _Found("", "too long")
        reason = ""
        for candidate, step in self._spellings(key):
            if candidate in stop_hashtags():
                return _Found("", stop_hashtags()[candidate])
            if len(candidate) <= 2 and candidate.isascii() and candidate not in _SHORT_NOUNS:
                reason = reason or "too short"
            elif self._is_noun(candidate):
                return _Found(candidate, step)
            elif candidate in self._table.other_words:
                reason = reason or "no noun"
        if reason:
            return _Found("", reason)
        return self._find_compound(text, key)

    def _spellings(self, key: str):
        """Candidates for a single word, each with the step that made it."""
        yield key, "as it stands"
        yield from ((one, "plural") for one in self._table.singulars(key))
        shorter = key.rstrip("0123456789")
        if shorter != key:
            yield shorter, "digits at the end removed"
            yield from ((one, "digits at the end removed, plural") for one in self._table.singulars(shorter))
        plain = _without_accents(shorter)
        if plain != shorter and len(plain) >= 4:
            yield plain, "accents removed"
            yield from ((one, "accents removed, plural") for one in self._table.singulars(plain))
        for one in _without_runs(plain):
            yield from (
                (noun, "repeated letters") for noun in (one, *self._table.singulars(one)) if self._is_noun(noun)
            )

    def _find_compound(self, text: str, key: str) -> _Found:
        words = self._words(text, key)
        if not words:
            return _Found("", "not in WordNet")
        for link in _LINKS.intersection(words):
            if words.count(link) != 1 or words.index(link) == 0:
                return _Found("", "phrase")
            words = words[: words.index(link)]
        if not words or not _FUNCTION_WORDS.union(_NEGATIONS).isdisjoint(words):
            return _Found("", "phrase")
        # The longest noun at the end: "new york city" before "city".
        for start in range(len(words)):
            head = "".join(words[start:])
            for candidate in (head, *self._table.singulars(head)):
                if start and candidate in _ATTITUDES:
                    return _Found("", "phrase")
                if candidate in stop_hashtags() or not self._is_noun(candidate):
                    continue
                if len(candidate) > 3 or candidate in _SHORT_HEADS:
                    return _Found(candidate, f"head of the compound '{' '.join(words)}'", is_head=start > 0)
        return _Found("", "phrase")

    def _words(self, text: str, key: str) -> list[str]:
        """The words of a compound, or nothing if some of them are no words."""
        parts = [normalize_hashtag(word) for chunk in _SEPARATORS.split(text) for word in _split_case(chunk)]
        parts = [part for part in parts if part and not part.isdecimal()]
        is_split = len(parts) < 2
        if is_split:
            shorter = key.rstrip("0123456789")
            if not (_MIN_COMPOUND <= len(shorter) <= _MAX_COMPOUND and shorter.isascii() and shorter.isalpha()):
                return []
            if not self._may_end_in_a_head(shorter):
                return []
            parts = segment(shorter)
        if len(parts) < 2:
            return []
        known = all(
            part in _LINKS | _FUNCTION_WORDS | _NEGATIONS
            or part in _MORE_WORDS
            or (
                len(part) >= 3
                and (self._is_noun(part) or part in self._table.other_words or self._table.singulars(part))
            )
            or (len(part) >= 4 and part in _word_list().words)
            for part in parts
        )
        # Short pieces are how a splitter cuts up what it does not know: "dogstagram" is no "dogs tag ram".
        content = [part for part in parts if part not in _FUNCTION_WORDS | _LINKS | _NEGATIONS]
        if not known or (is_split and 2 * sum(map(len, content)) < 7 * len(content)):
            return []
        return parts

    def _may_end_in_a_head(self, key: str) -> bool:
        """Whether it is worth splitting: an ending is a noun or function word, or "of" or "no" is in it."""
        nouns, plurals = self._table.senses, self._table.plurals
        for start in range(1, len(key) - 1):
            ending = key[start:]
            if ending in _FUNCTION_WORDS or ending in plurals:
                return True
            for noun in (ending, ending[:-1], ending[:-2], ending[:-3] + "y") if ending[-1] == "s" else (ending,):
                if noun in nouns and (len(noun) > 3 or noun in _SHORT_HEADS):
                    return True
        return "of" in key or key.startswith("no")

    def _find_emoji(self, text: str) -> _Found:
        names = [match["emoji"] for match in emoji.emoji_list(text)]
        if not names:
            return _Found("", "no letters")
        for one in names:
            found = self._emoji_noun(emoji.demojize(one).strip(":"))
            if found:
                return _Found(found, f"emoji {emoji.demojize(one)}")
        return _Found("", "emoji names no thing")

    def _emoji_noun(self, name: str) -> str:
        name = re.sub(r"_(light|medium-light|medium|medium-dark|dark)_skin_tone", "", name.replace("’", ""))
        words = [word for word in re.split(r"[_\-:]+", name.lower()) if word]
        words = [normalize_hashtag(word) for word in words]
        if not words or not set(words).isdisjoint(_FUNCTION_WORDS | _LINKS | _NEGATIONS | {"button", "symbol", "sign"}):
            return ""
        if words[-1] == "face" and len(words) > 1:
            animal = "".join(words[:-1])
            senses = self._table.senses.get(animal, ())
            is_animal = any(self._table.is_a(synset, _ANIMAL) for synset in senses[:2])
            return animal if is_animal else ""
        if words[-1] in _GESTURES:
            return ""
        for start in range(len(words)):
            head = "".join(words[start:])
            for candidate in (head, *self._table.singulars(head)):
                if candidate not in stop_hashtags() and self._is_noun(candidate) and len(candidate) > 2:
                    return candidate
        return ""


@functools.cache
def rules_checksum() -> str:
    """Returns a digest of all that decides a label beside the vocabulary and WordNet: this code's version, the stop
    hashtags and the preferred senses."""
    content = repr((_RULES, sorted(stop_hashtags().items()), sorted(preferred_senses().items())))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@functools.cache
def stop_hashtags() -> dict[str, str]:
    """Returns hashtags that are dropped although WordNet has a noun of that spelling, each with its reason."""
    lines = (line for line in _STOP_FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    return dict(line.split("\t") for line in lines if line)


@functools.cache
def _word_list() -> SymSpell:
    splitter = SymSpell(max_dictionary_edit_distance=0, prefix_length=7)
    with importlib.resources.as_file(
        importlib.resources.files("symspellpy") / "frequency_dictionary_en_82_765.txt"
    ) as path:
        splitter.load_dictionary(str(path), term_index=0, count_index=1)
    for word in _MORE_WORDS:
        splitter.create_dictionary_entry(word, 1_000_000_000)
    return splitter


@functools.lru_cache(maxsize=100_000)
def _segment(key: str) -> tuple[str, ...]:
    return tuple(_word_list().word_segmentation(key, max_edit_distance=0).segmented_string.split())


def segment(key: str) -> list[str]:
    """Splits lower-case letters without spaces into the likeliest English words."""
    return list(_segment(key))


def _without_sign(hashtag: str) -> str:
    return hashtag.strip().lstrip("#＃")


def _split_case(chunk: str) -> list[str]:
    """ "BrownBears" -> ["Brown", "Bears"]; a chunk of one case stays whole."""
    if chunk.islower() or chunk.isupper() or chunk.istitle() and " " not in chunk and sum(map(str.isupper, chunk)) == 1:
        return [chunk]
    return _CASE.findall(chunk) if chunk.isascii() else [chunk]


def _without_accents(key: str) -> str:
    decomposed = unicodedata.normalize("NFKD", key)
    return "".join(character for character in decomposed if not unicodedata.combining(character))


def _without_runs(key: str) -> list[str]:
    """Shorter spellings of a key with letters drawn out: each run of three or more as two letters or as one."""
    runs = _RUNS.findall(key)
    if not 0 < len(runs) <= 4:
        return []
    spellings = [""]
    position = 0
    for run in _RUNS.finditer(key):
        before = key[position : run.start()]
        spellings = [one + before + run.group(1) * times for one in spellings for times in (2, 1)]
        position = run.end()
    return [one + key[position:] for one in spellings]
