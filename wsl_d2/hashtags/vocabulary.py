"""The classes of hashtag pretraining: WordNet merges hashtags that name the same thing into one label.

A vocabulary is a list of noun synsets, its labels, each with the hashtags that stand for it. Hashtags of one
synset are synonyms ("brownbear" and "ursusarctos") and share its label.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wsl_d2.errors import VocabularyError
from wsl_d2.files import write_atomically

from .counts import Counts
from .lemma_table import LemmaTable, load_lemma_table
from .mapping import HashtagMapping, rules_checksum
from .normalize import normalize_hashtag
from .policy import EXACT, MappingPolicy
from .wordnet import WORDNET_VERSION, synset_to_wnid, wnid_to_synset

FORMAT = "wsl_d2 vocabulary"
FORMAT_VERSION = 2
# Built-in vocabularies, and the hypernym steps that they allow by default: the most that left the measured precision of
# labels as it was (tools/benchmark.py labels).
BUILTIN_NAMES = {"1.5k": 3, "8.5k": 2, "17k": 0, "coco": 4}
NUM_MOST_FREQUENT = 8500  # labels of "8.5k"

_IMAGENET_1K_FILE = Path(__file__).with_name("imagenet1k_synsets.txt")
_COCO_FILE = Path(__file__).with_name("coco_synsets.tsv")


class Match(NamedTuple):
    """The label that a hashtag was mapped to.

    Attributes:
        label: class index in [0, len(vocabulary)).
        synset: the label's WordNet id, such as "n02084071".
        distance: hypernym steps from the hashtag's own synset up to the label's; 0 for a synonym.
    """

    label: int
    synset: str
    distance: int


class Vocabulary:
    """An ordered set of noun synsets with the hashtags that name them, and the policy by which hashtags find them.

    Make one with `Vocabulary.build` or `Vocabulary.load`; it does not change afterwards. It alone decides the label of
    every hashtag.

    Attributes:
        name: "1.5k", "8.5k", "17k", "coco" or a free name.
        synsets: WordNet ids in label order, which is their sorted order.
        hashtags: for each label, the normalized hashtags that stand for it.
        policy: how a hashtag becomes a label.
        rules: version of the mapping's own rules that it was built for, see `rules_checksum`.
        checksum: SHA-256 (hexadecimal) of all that decides a label; the name does not enter.
        built_with: how it was built, for people to read.
    """

    def __init__(
        self,
        name: str,
        synsets: Sequence[str],
        hashtags: Sequence[Sequence[str]],
        built_with: Mapping[str, Any] | None = None,
        policy: MappingPolicy | None = None,
        rules: str | None = None,
    ) -> None:
        """Most callers want `build` or `load`.

        Raises:
            VocabularyError: no labels at all, or lists that contradict each other: lengths differ, a label
                has no hashtag, a synset or hashtag occurs twice, a hashtag is not in normalized form.
        """
        self.name = name
        self.synsets = tuple(synsets)
        self.hashtags = tuple(tuple(group) for group in hashtags)
        self.built_with = dict(built_with or {})
        self.policy = (policy or MappingPolicy()).check()
        self.rules = rules if rules is not None else "" if self.policy.matching == EXACT else rules_checksum()
        if not self.synsets:
            raise VocabularyError(f"vocabulary {name!r} has no labels; it needs at least one synset")
        if len(self.synsets) != len(self.hashtags):
            raise VocabularyError(
                f"vocabulary {name!r} has {len(self.synsets)} synsets but {len(self.hashtags)} groups of hashtags"
            )
        label_of_hashtag: dict[str, int] = {}
        for label, group in enumerate(self.hashtags):
            if not group:
                raise VocabularyError(f"vocabulary {name!r}: label {label} ({self.synsets[label]}) has no hashtag")
            for hashtag in group:
                if normalize_hashtag(hashtag) != hashtag or not hashtag:
                    raise VocabularyError(
                        f"vocabulary {name!r}: hashtag {hashtag!r} of label {label} is not in normalized "
                        f"form ({normalize_hashtag(hashtag)!r})"
                    )
                other = label_of_hashtag.setdefault(hashtag, label)
                if other != label:
                    raise VocabularyError(f"vocabulary {name!r}: hashtag {hashtag!r} has labels {other} and {label}")
        if twice := [wnid for wnid, count in Counter(self.synsets).items() if count > 1]:
            raise VocabularyError(f"vocabulary {name!r}: synsets occur twice: {', '.join(sorted(twice)[:5])}")
        self.checksum = _checksum(self.synsets, self.hashtags, WORDNET_VERSION, self.policy, self.rules)
        self._mapping: HashtagMapping | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_mapping": None}

    @property
    def mapping(self) -> HashtagMapping:
        """The mapping from hashtags to labels, opened when it is first asked for.

        Raises:
            WordNetError: WordNet 3.0 was not found.
            VocabularyError: the vocabulary was built for other rules than those of this version.
        """
        if self._mapping is None:
            self._mapping = HashtagMapping(self)
        return self._mapping

    @classmethod
    def build(
        cls,
        name: str,
        wordnet: Any,
        counts: Counts | None = None,
        synsets: Iterable[str] | None = None,
        *,
        max_distance: int | None = None,
        ambiguous: str = "most_frequent",
        min_images: int = 1,
        max_labels: int | None = None,
    ) -> "Vocabulary":
        """Builds a vocabulary from WordNet.

        Each synset's hashtags are its lemma names, normalized. A hashtag that names several synsets of the
        vocabulary goes to its most frequent sense, by WordNet's order of senses (then to the smaller id):
        "crane" is the machine in "1.5k". (Where that order is wrong for photos, two tables of preferred senses
        correct it.) Of synsets that are chosen one by one ("1.5k", "coco", a free name), one that loses all its
        hashtags this way gets a compound with the nearest more general word, "cranebird";
        `built_with["disambiguated"]` lists them. In "17k" and "8.5k" it is dropped: no image could carry it.

        Args:
            name: "1.5k": the 1,000 synsets of ImageNet-1k. "coco": COCO's 80 categories. "17k": all noun synsets; with
                `counts`, those that the mapping gives to any counted hashtag. "8.5k": the 8,500 of these that most
                images carry. Any other name, with `synsets`.
            wordnet: the reader that `load_wordnet()` returns.
            counts: hashtag, as people write it -> number of images: a dict, or a
                :class:`~wsl_d2.hashtags.counts.HashtagCounts`, which takes no memory. "8.5k" needs them, "17k" can use
                them, other names ignore them.
            synsets: WordNet ids such as "n02084071", in any order, for a free name only.
            max_distance, ambiguous: see `MappingPolicy`; by default the distance of `BUILTIN_NAMES`, 0 for a free name.
            min_images, max_labels: of "17k" and "8.5k", leave out labels on fewer counted images, and keep the most
                frequent ones; "8.5k" keeps 8,500 by default.

        Returns:
            The vocabulary; labels follow the sorted ids, so the order of the input does not matter.

        Raises:
            ValueError: counts missing for "8.5k", or without any hashtag of WordNet; a free name without
                `synsets` or a built-in one with them; a synset id that WordNet 3.0 does not have; an unknown policy.
        """
        if name in BUILTIN_NAMES and synsets is not None:
            raise VocabularyError(
                f"vocabulary {name!r} is built in and chooses its own synsets; give another name with synsets="
            )
        if name not in BUILTIN_NAMES and synsets is None:
            raise VocabularyError(
                f"unknown vocabulary {name!r}; choose one of {', '.join(BUILTIN_NAMES)}, or give "
                "synsets=[...] for a name of your own"
            )
        if (min_images > 1 or max_labels is not None) and (counts is None or name not in ("17k", "8.5k")):
            raise VocabularyError("min_images and max_labels choose among the labels of '17k' or '8.5k' by counts")
        if name == "8.5k" and counts is None:
            raise VocabularyError(
                "vocabulary '8.5k' is the most frequent 8,500 labels of '17k' and needs counts (hashtag -> "
                "number of images), --counts FILE"
            )
        distance = BUILTIN_NAMES.get(name, 0) if max_distance is None else max_distance
        policy = MappingPolicy(max_distance=distance, ambiguous=ambiguous).check()
        table = load_lemma_table(str(wordnet.root))
        members: dict[str, Any]
        chosen_one_by_one = name not in ("17k", "8.5k")
        if chosen_one_by_one:
            builtin = {"1.5k": imagenet_1k_synsets, "coco": coco_synsets}
            wnids = sorted(set(builtin[name]() if synsets is None else synsets))
            members = {wnid: wnid_to_synset(wordnet, wnid) for wnid in wnids}
        else:
            members = dict.fromkeys(table.synsets())
        merged = _merge_synonyms(table, list(members))
        built_with: dict[str, Any] = {"num_synsets_given": len(members)}
        if chosen_one_by_one:
            lost = [synset for wnid, synset in members.items() if wnid not in merged]
            built_with["disambiguated"] = _disambiguate(lost, merged)
        elif counts is not None:
            everything = cls(name, sorted(merged), [merged[wnid] for wnid in sorted(merged)], policy=policy)
            image_counts, num_counted = count_labels(everything, counts)
            frequent = [wnid for wnid, number in image_counts.items() if number >= min_images]
            kept = sorted(frequent, key=lambda wnid: (-image_counts[wnid], wnid))
            kept = kept[: max_labels or (NUM_MOST_FREQUENT if name == "8.5k" else None)]
            if not kept:
                raise VocabularyError(
                    f"none of the {num_counted:,} counted hashtags is a noun of WordNet on at least {min_images} "
                    "images; counts must map hashtags such as 'brownbear' to numbers of images"
                )
            merged = {wnid: merged[wnid] for wnid in kept}
            built_with["num_hashtags_counted"] = num_counted
            built_with["smallest_image_count"] = image_counts[kept[-1]]
        wnids = sorted(merged)
        vocabulary = cls(name, wnids, [merged[wnid] for wnid in wnids], built_with, policy)
        if chosen_one_by_one:
            vocabulary.built_with["unreachable"] = vocabulary._unreachable()
        return vocabulary

    def _unreachable(self) -> list[str]:
        """The synsets whose spellings are all given to another label or dropped."""
        reached = {label for group in self.hashtags for label in self.labels(group).tolist()}
        return [synset for label, synset in enumerate(self.synsets) if label not in reached]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """Reads a vocabulary file; needs no WordNet.

        Raises:
            VocabularyError: the file is not a vocabulary, of another format or WordNet version, or its
                checksum disagrees with its content; the message names the file and both values.
        """
        path = Path(path)
        content = _read_content(path)
        synsets, hashtags = content.get("synsets"), content.get("hashtags")
        if not isinstance(synsets, list) or not _all_strings(synsets):
            raise VocabularyError(f"{path}: 'synsets' must be a list of strings")
        if not isinstance(hashtags, list) or not all(isinstance(x, list) and _all_strings(x) for x in hashtags):
            raise VocabularyError(f"{path}: 'hashtags' must be a list of lists of strings")
        try:
            policy = MappingPolicy(**content.get("policy", {})).check()
        except (TypeError, ValueError) as error:
            raise VocabularyError(f"{path}: 'policy' cannot be read ({error})") from error
        rules = str(content.get("rules"))
        actual = _checksum(synsets, hashtags, content["wordnet_version"], policy, rules)
        if content.get("checksum") != actual:
            raise VocabularyError(
                f"{path} is damaged or was edited: it states checksum {content.get('checksum')!r}, but its "
                f"content has {actual!r}; build it again or restore it from where it came"
            )
        try:
            return cls(str(content.get("name")), synsets, hashtags, content.get("built_with") or {}, policy, rules)
        except VocabularyError as error:
            raise VocabularyError(f"{path}: {error}") from error

    @staticmethod
    def read_name_and_checksum(path: str | os.PathLike[str]) -> tuple[str, str]:
        """Returns what a vocabulary file states about itself, for those who do not need the rest.

        Raises:
            VocabularyError: the file is not a vocabulary, or of another format or WordNet version.
        """
        content = _read_content(Path(path))
        return str(content.get("name")), str(content.get("checksum"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the vocabulary as JSON; a kill at any moment leaves the old file or the new one, whole."""
        path = Path(path)
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "wordnet_version": WORDNET_VERSION,
            "policy": self.policy._asdict(),
            "rules": self.rules,
            "built_with": self.built_with,
            "checksum": self.checksum,
            "synsets": self.synsets,
            "hashtags": self.hashtags,
        }
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "{\n" + lines + "\n}\n")

    def __len__(self) -> int:
        """The number of labels, which is the number of classes of a classifier."""
        return len(self.synsets)

    def __repr__(self) -> str:
        return (
            f"Vocabulary({self.name!r}, {len(self)} labels, {sum(map(len, self.hashtags))} hashtags, "
            f"checksum {self.checksum[:8]})"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.checksum == other.checksum

    def __hash__(self) -> int:
        return hash(self.checksum)

    def match(self, hashtag: str) -> Match | None:
        """Maps a hashtag, in any spelling, to its closest synset in the vocabulary; see `wsl_d2.hashtags.mapping`.

        Returns:
            The match, with the most frequent sense where the policy admits several; None if the hashtag has no label.
        """
        mapped = self.mapping.map(hashtag)
        label = mapped.labels[0] if len(mapped.labels) == 1 else self.mapping.best(hashtag)
        return None if label is None else Match(label, self.synsets[label], mapped.distance)

    def labels(self, hashtags: Iterable[str]) -> np.ndarray:
        """Maps an image's hashtags to its labels.

        Args:
            hashtags: any number, in any spelling; those that have no label are left out.

        Returns:
            (K,) int64, sorted, each label once; empty if no hashtag has a label.
        """
        found = {label for hashtag in hashtags for label in self.mapping.map(hashtag).labels}
        return np.array(sorted(found), dtype=np.int64)


def imagenet_1k_synsets() -> list[str]:
    """The 1,000 WordNet ids of ImageNet-1k, sorted, which is the order of its labels."""
    return _IMAGENET_1K_FILE.read_text(encoding="ascii").split()


def coco_synsets() -> list[str]:
    """The WordNet ids of COCO's 80 categories, in COCO's order."""
    lines = _COCO_FILE.read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[0] for line in lines if not line.startswith("#")]


def _read_content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VocabularyError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # malformed JSON or UTF-8
        raise VocabularyError(f"{path} is not a vocabulary file: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise VocabularyError(f"{path} is not a vocabulary file: its format is {found!r}, expected {FORMAT!r}")
    for key, expected in (("format_version", FORMAT_VERSION), ("wordnet_version", WORDNET_VERSION)):
        if content.get(key) != expected:
            raise VocabularyError(
                f"{path} has {key} {content.get(key)!r}, but this version of wsl_d2 reads {expected!r}; "
                "build the vocabulary again"
            )
    return content


def _all_strings(items: Iterable[object]) -> bool:
    return all(isinstance(item, str) for item in items)


def _checksum(
    synsets: Sequence[str],
    hashtags: Sequence[Sequence[str]],
    wordnet_version: str,
    policy: MappingPolicy,
    rules: str,
) -> str:
    content = {
        "hashtags": hashtags,
        "synsets": synsets,
        "wordnet_version": wordnet_version,
        "policy": policy._asdict(),
        "rules": rules,
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _merge_synonyms(table: LemmaTable, members: Sequence[str]) -> dict[str, list[str]]:
    """Gives each spelling to its most frequent sense among ``members``; leaves synsets without any out."""
    among = set(members)
    owner: dict[str, str] = {}
    merged = {}
    for wnid in members:
        own = []
        for key in table.lemmas(wnid):
            if key not in owner:
                owner[key] = next(sense for sense in table.senses(key) if sense in among)
            if owner[key] == wnid:
                own.append(key)
        if own:
            merged[wnid] = own
    for key, wnid in owner.items():
        if key not in merged.get(wnid, ()):  # "parks" are several of one thing before they are a person
            merged.setdefault(wnid, []).append(key)
    return merged


def _disambiguate(lost: Iterable[Any], merged: dict[str, list[str]]) -> dict[str, str]:
    """Gives each synset a hashtag in ``merged``: its name and that of the nearest hypernym of a one-word name."""
    taken = {hashtag for group in merged.values() for hashtag in group}
    given = {}
    for synset in lost:
        for above in reversed(min(synset.hypernym_paths(), key=len)[:-1]):
            word = above.lemma_names()[0]
            hashtag = normalize_hashtag(synset.lemma_names()[0] + word)
            if "_" not in word and hashtag not in taken:
                taken.add(hashtag)
                merged[synset_to_wnid(synset)] = [hashtag]
                given[synset_to_wnid(synset)] = hashtag
                break
    return given


def count_labels(vocabulary: Vocabulary, counts: Counts) -> tuple[dict[str, int], int]:
    """Counts the images of labels by those of hashtags.

    Args:
        vocabulary: any.
        counts: hashtag -> number of images. An image that carries two spellings of a label counts twice.

    Returns:
        synset -> number of images, for the labels that the mapping gives to any of the hashtags; and how many hashtags
        there are.
    """
    images: Counter[str] = Counter()
    number = 0
    for hashtag, count in counts.items():
        number += 1
        for label in vocabulary.mapping.map(hashtag).labels:
            images[vocabulary.synsets[label]] += count
    return {wnid: count for wnid, count in images.items() if count > 0}, number
