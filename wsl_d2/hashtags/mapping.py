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
noun in WordNet is not what people mean ("#canon", "#lit") are listed, with the reason, in stop_hashtags.tsv; what first
means one person ("#johnston") mostly is another one's name; a compound with a brand in it, or whose head photos do not
show (a state, a message, an amount), says something else than its head.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import emoji

from wsl_d2.errors import VocabularyError

from .lemma_table import load_lemma_table
from .normalize import normalize_hashtag
from .policy import EXACT, MappingPolicy
from .splitter import known_words, split_words
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
    "name of a person",  # of one in WordNet, and so mostly of another one
    "no noun",  # WordNet knows it as a verb, adjective or adverb only
    "phrase",  # a compound without a head noun, or with words that are no names of things
    "not in WordNet",
    "not in the vocabulary",  # a noun, but neither it nor, within max_distance, anything above it is a label
    "ambiguous",  # several labels, and the policy is to drop such hashtags
)

_RULES = 6  # raise it whenever the code of this module would give some hashtag another label
_REMEMBERED = 500_000  # hashtags, or nouns, of which a mapping remembers the labels; twice as many at the most
_STOP_FILE = Path(__file__).with_name("stop_hashtags.tsv")
_SHORT_NOUNS = frozenset({"ox", "tv", "uk", "dj", "cd", "pc"})
_MAX_LETTERS = 100
_MIN_COMPOUND, _MAX_COMPOUND = 6, 40  # letters of a hashtag worth splitting
_ANIMAL = "n00015388"
_LINKS = frozenset({"of"})
_NEGATIONS = frozenset({"no", "not", "non", "without", "never", "anti", "zero"})
# Words of a compound that make it something else than a picture of its head noun.
_FUNCTION_WORDS = frozenset(
    "a an and are as at be but by can do does for from get go got had has have he her him his how i if im in is it its "
    "just let like love me my now on or our out she so than that the their them then there these they this those to up "
    "us via was we were what when where which while who why will with yes you your".split()
)
_WORDS_OF_PHRASES = _FUNCTION_WORDS | _NEGATIONS
_SMALL_WORDS = _WORDS_OF_PHRASES | _LINKS
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
_DIGITS = "0123456789"
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


_NOT_THERE, _NOT_IN_WORDNET, _PHRASE, _PERSON = (
    _Found("", "not in the vocabulary"),
    _Found("", "not in WordNet"),
    _Found("", "phrase"),
    _Found("", "name of a person"),
)


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
        self._mapped_nouns: dict[tuple[str, bool], Mapped] = {}
        self._recent: dict[str, Mapped] = {}
        self._older: dict[str, Mapped] = {}
        if self.policy.matching != EXACT:
            self._table = load_lemma_table()
            self._words = self._table.words
            self._label_of_synset = {synset: label for label, synset in enumerate(self.vocabulary.synsets)}
            self._stop_hashtags = stop_hashtags()
            self._brands = frozenset(word for word, reason in self._stop_hashtags.items() if reason == "brand")

    def __getstate__(self) -> dict:
        return {"vocabulary": self.vocabulary, "policy": self.policy}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def map(self, hashtag: str) -> Mapped:
        """Returns the labels of a hashtag, with or without its '#', or the reason why it has none."""
        mapped = self._recent.get(hashtag)
        if mapped is None:
            mapped = self._older.get(hashtag) or self._map(hashtag)
            if len(self._recent) >= _REMEMBERED:
                self._older, self._recent = self._recent, {}
            self._recent[hashtag] = mapped
        return mapped

    def _map(self, hashtag: str) -> Mapped:
        found = self._find(hashtag)
        if not found.key:
            return _dropped(found.step)
        mapped = self._mapped_nouns.get((found.key, found.is_head))
        if mapped is None:
            if len(self._mapped_nouns) >= _REMEMBERED:
                self._mapped_nouns.clear()
            candidates, reason = self._resolve(found)
            mapped = Mapped(tuple(sorted(candidates.labels)), reason, candidates.distance)
            self._mapped_nouns[found.key, found.is_head] = mapped
        return mapped

    def map_all(self, hashtags: Sequence[str]) -> list[tuple[int, ...]]:
        """Returns the labels of each of many hashtags; faster than :meth:`map` where most were seen before."""
        seen, one = self._recent.get, self.map
        return [(seen(hashtag) or one(hashtag))[0] for hashtag in hashtags]

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
        senses = self._table.senses(found.key) if self.policy.matching != EXACT else []
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
        candidates = self._candidates(found.key, found.is_head)
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
        senses = self._table.senses(key)
        own = self._label_of_key.get(key)
        if own is not None and is_head and senses and self.vocabulary.synsets[own] != senses[0]:
            own = None
        labels = [own] if own is not None else []
        possible = senses[:1] if is_head else senses
        label_of = self._label_of_synset.get
        labels += [label for synset in possible if (label := label_of(synset)) is not None]
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
        return self._words.get(key, -1) >= 0 or key in self._label_of_key

    def _names_a_person(self, key: str) -> bool:
        """Whether a noun is first a person, and is not the vocabulary's spelling of something else."""
        if not self._table.names_a_person(key):
            return False
        own = self._label_of_key.get(key)
        return own is None or self.vocabulary.synsets[own] == self._table.senses(key)[0]

    def _find(self, hashtag: str) -> _Found:
        text = _without_sign(hashtag)
        key = normalize_hashtag(text)
        if self.policy.matching == EXACT:
            return _Found(key, "as it stands") if key in self._label_of_key else _NOT_THERE
        if not any(map(str.isalpha, key)):
            return self._find_emoji(text)
        if len(key) > _MAX_LETTERS:
            return _Found("", "too long")
        reason = ""
        for candidate, step in self._spellings(key):
            if candidate in self._stop_hashtags:
                return _Found("", self._stop_hashtags[candidate])
            if len(candidate) <= 2 and candidate.isascii() and candidate not in _SHORT_NOUNS:
                reason = reason or "too short"
            elif self._is_noun(candidate):
                return _PERSON if self._names_a_person(candidate) else _Found(candidate, step)
            elif candidate in self._words:
                reason = reason or "no noun"
        if reason:
            return _Found("", reason)
        return self._find_compound(text, key)

    def _spellings(self, key: str) -> Iterator[tuple[str, str]]:
        """Candidates for a single word, each with the step that made it."""
        singulars = self._table.singulars
        yield key, "as it stands"
        for one in singulars(key):
            yield one, "plural"
        plain = shorter = key.rstrip(_DIGITS)
        if shorter != key:
            yield shorter, "digits at the end removed"
            for one in singulars(shorter):
                yield one, "digits at the end removed, plural"
        if not key.isascii():
            plain = _without_accents(shorter)
            if plain != shorter and len(plain) >= 4:
                yield plain, "accents removed"
                for one in singulars(plain):
                    yield one, "accents removed, plural"
        for one in _without_runs(plain):
            for noun in (one, *singulars(one)):
                if self._is_noun(noun):
                    yield noun, "repeated letters"

    def _find_compound(self, text: str, key: str) -> _Found:
        words = self._split(text, key)
        if not words:
            return _NOT_IN_WORDNET
        for link in _LINKS.intersection(words):
            if words.count(link) != 1 or words.index(link) == 0:
                return _PHRASE
            words = words[: words.index(link)]
        if not words or not _WORDS_OF_PHRASES.isdisjoint(words):
            return _PHRASE
        if not self._brands.isdisjoint(words):
            return _PHRASE
        # The longest noun at the end: "new york city" before "city". All words together were looked up as a single one.
        for start in range("".join(words) in (key, key.rstrip(_DIGITS)), len(words)):
            head = "".join(words[start:])
            for candidate in (head, *self._table.singulars(head)):
                if start and candidate in _ATTITUDES:
                    return _PHRASE
                if candidate in self._stop_hashtags or not self._is_noun(candidate):
                    continue
                if self._names_a_person(candidate):
                    return _PERSON
                if start and self._table.is_unseen(candidate):
                    return _PHRASE
                if len(candidate) > 3 or candidate in _SHORT_HEADS:
                    return _Found(candidate, f"head of the compound '{' '.join(words)}'", is_head=start > 0)
        return _PHRASE

    def _split(self, text: str, key: str) -> list[str]:
        """The words of a compound, or nothing if some of them are no words."""
        if text == key:  # neither case nor signs tell words apart
            parts = [key]
        else:
            parts = [normalize_hashtag(word) for chunk in _SEPARATORS.split(text) for word in _split_case(chunk)]
            parts = [part for part in parts if part and not part.isdecimal()]
        is_split = len(parts) < 2
        if is_split:
            shorter = key.rstrip(_DIGITS)
            if not (_MIN_COMPOUND <= len(shorter) <= _MAX_COMPOUND and shorter.isascii() and shorter.isalpha()):
                return []
            parts = split_words(shorter)
        if len(parts) < 2:
            return []
        content = [part for part in parts if part not in _SMALL_WORDS]
        if is_split:
            # Short pieces are how a splitter cuts up what it does not know: "dogstagram" is no "dogs tag ram".
            if 2 * sum(map(len, content)) < 7 * len(content):
                return []
            content = [part for part in content if len(part) < 4]  # the splitter knows the others
        return parts if all(map(self._is_word, content)) else []

    def _is_word(self, part: str) -> bool:
        """Whether a piece of a compound is a word; short ones of the splitter's list are mostly none."""
        return len(part) >= 3 and (
            part in self._words
            or part in self._label_of_key
            or (len(part) >= 4 and part in known_words())
            or bool(self._table.singulars(part))
        )

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
        if not words or not set(words).isdisjoint(_SMALL_WORDS | {"button", "symbol", "sign"}):
            return ""
        if words[-1] == "face" and len(words) > 1:
            animal = "".join(words[:-1])
            senses = self._table.senses(animal)
            is_animal = any(self._table.is_a(synset, _ANIMAL) for synset in senses[:2])
            return animal if is_animal else ""
        if words[-1] in _GESTURES:
            return ""
        for start in range(len(words)):
            head = "".join(words[start:])
            for candidate in (head, *self._table.singulars(head)):
                if candidate not in self._stop_hashtags and self._is_noun(candidate) and len(candidate) > 2:
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
def _dropped(reason: str) -> Mapped:
    return Mapped((), reason)


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
