"""The classes of hashtag pretraining: WordNet merges hashtags that name the same thing into one label.

A vocabulary is a list of noun synsets, its labels, each with the hashtags that stand for it. Hashtags of one
synset are synonyms ("brownbear" and "ursusarctos") and share its label.
"""

import functools
import hashlib
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .normalize import normalize_hashtag
from .wordnet import WORDNET_VERSION, load_wordnet, preferred_senses, synset_to_wnid, wnid_to_synset

FORMAT = "wsl_d2 vocabulary"
FORMAT_VERSION = 1
BUILTIN_NAMES = ("1.5k", "8.5k", "17k", "coco")
NUM_MOST_FREQUENT = 8500  # labels of "8.5k"

_IMAGENET_1K_FILE = Path(__file__).with_name("imagenet1k_synsets.txt")
_COCO_FILE = Path(__file__).with_name("coco_synsets.tsv")


class VocabularyError(ValueError):
    """A vocabulary file is damaged, of another version, or not a vocabulary at all."""


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
    """An ordered set of noun synsets with the hashtags that name them; maps hashtags to labels.

    Make one with `Vocabulary.build` or `Vocabulary.load`; it does not change afterwards. Mapping with
    `max_distance=0`, the default, is a dictionary look-up and needs no WordNet.

    Attributes:
        name: "1.5k", "8.5k", "17k" or a free name.
        synsets: WordNet ids in label order, which is their sorted order.
        hashtags: for each label, the normalised hashtags that stand for it.
        checksum: SHA-256 (hexadecimal) of synsets, hashtags and WordNet version; the name does not enter.
        built_with: how it was built, for people to read.
    """

    def __init__(
        self,
        name: str,
        synsets: Sequence[str],
        hashtags: Sequence[Sequence[str]],
        built_with: Mapping[str, Any] | None = None,
    ) -> None:
        """Most callers want `build` or `load`.

        Raises:
            VocabularyError: no labels at all, or lists that contradict each other: lengths differ, a label
                has no hashtag, a synset or hashtag occurs twice, a hashtag is not in normalised form.
        """
        self.name = name
        self.synsets = tuple(synsets)
        self.hashtags = tuple(tuple(group) for group in hashtags)
        self.built_with = dict(built_with or {})
        if not self.synsets:
            raise VocabularyError(f"vocabulary {name!r} has no labels; it needs at least one synset")
        if len(self.synsets) != len(self.hashtags):
            raise VocabularyError(
                f"vocabulary {name!r} has {len(self.synsets)} synsets but {len(self.hashtags)} groups of hashtags"
            )
        self._label_of_hashtag: dict[str, int] = {}
        for label, group in enumerate(self.hashtags):
            if not group:
                raise VocabularyError(f"vocabulary {name!r}: label {label} ({self.synsets[label]}) has no hashtag")
            for hashtag in group:
                if normalize_hashtag(hashtag) != hashtag or not hashtag:
                    raise VocabularyError(
                        f"vocabulary {name!r}: hashtag {hashtag!r} of label {label} is not in normalised "
                        f"form ({normalize_hashtag(hashtag)!r})"
                    )
                other = self._label_of_hashtag.setdefault(hashtag, label)
                if other != label:
                    raise VocabularyError(f"vocabulary {name!r}: hashtag {hashtag!r} has labels {other} and {label}")
        self._label_of_synset = {wnid: label for label, wnid in enumerate(self.synsets)}
        if len(self._label_of_synset) != len(self.synsets):
            twice = sorted({wnid for wnid in self.synsets if self.synsets.count(wnid) > 1})
            raise VocabularyError(f"vocabulary {name!r}: synsets occur twice: {', '.join(twice[:5])}")
        self.checksum = _checksum(self.synsets, self.hashtags, WORDNET_VERSION)

    @classmethod
    def build(
        cls,
        name: str,
        wordnet: Any,
        counts: Mapping[str, int] | None = None,
        synsets: Iterable[str] | None = None,
    ) -> "Vocabulary":
        """Builds a vocabulary from WordNet.

        Each synset's hashtags are its lemma names, normalised. A hashtag that names several synsets of the
        vocabulary goes to its most frequent sense, by WordNet's order of senses (then to the smaller id):
        "crane" is the machine in "1.5k". (Where that order is arbitrary and wrong for photos, preferred_senses.tsv
        corrects it.) Of synsets that are chosen one by one ("1.5k", "coco", a free name), one that loses all its
        hashtags this way gets a compound with the nearest more general word, "cranebird";
        `built_with["disambiguated"]` lists them. In "17k" and "8.5k" it is dropped: no image could carry it.

        Args:
            name: "1.5k": the 1,000 synsets of ImageNet-1k. "coco": COCO's 80 categories. "17k": all noun synsets; with
                `counts`, those seen at least once. "8.5k": the 8,500 labels of "17k" that most images carry. Any other
                name, with `synsets`.
            wordnet: the reader that `load_wordnet()` returns.
            counts: hashtag -> number of images; spellings that normalise alike are added up. "8.5k" needs
                them, "17k" can use them, other names ignore them.
            synsets: WordNet ids such as "n02084071", in any order, for a free name only.

        Returns:
            The vocabulary; labels follow the sorted ids, so the order of the input does not matter.

        Raises:
            ValueError: counts missing for "8.5k", or without any hashtag of WordNet; a free name without
                `synsets` or a built-in one with them; a synset id that WordNet 3.0 does not have.
        """
        if name in BUILTIN_NAMES and synsets is not None:
            raise ValueError(
                f"vocabulary {name!r} is built in and chooses its own synsets; give another name with synsets="
            )
        if name not in BUILTIN_NAMES and synsets is None:
            raise ValueError(
                f"unknown vocabulary {name!r}; choose one of {', '.join(BUILTIN_NAMES)}, or give "
                "synsets=[...] for a name of your own"
            )
        if name == "8.5k" and counts is None:
            raise ValueError(
                "vocabulary '8.5k' is the most frequent 8,500 labels of '17k' and needs counts (hashtag -> "
                "number of images); tools/build_vocabulary.py takes them with --counts FILE"
            )
        if name in ("17k", "8.5k"):
            members = list(wordnet.all_synsets("n"))
        else:
            builtin = {"1.5k": imagenet_1k_synsets, "coco": coco_synsets}
            wnids = sorted(set(builtin[name]() if synsets is None else synsets))
            members = [wnid_to_synset(wordnet, wnid) for wnid in wnids]
        merged = _merge_synonyms(wordnet, members)

        built_with: dict[str, Any] = {"num_synsets_given": len(members)}
        if name not in ("17k", "8.5k"):
            lost = [synset for synset in members if synset_to_wnid(synset) not in merged]
            built_with["disambiguated"] = _disambiguate(lost, merged)
        if name in ("17k", "8.5k") and counts is not None:
            image_counts = _count_labels(merged, counts)
            if not image_counts:
                raise ValueError(
                    f"none of the {len(counts)} counted hashtags is a noun of WordNet; counts must map "
                    "hashtags such as 'brownbear' to numbers of images"
                )
            kept = sorted(image_counts, key=lambda wnid: (-image_counts[wnid], wnid))
            if name == "8.5k":
                kept = kept[:NUM_MOST_FREQUENT]
            merged = {wnid: merged[wnid] for wnid in kept}
            built_with["num_hashtags_counted"] = len(counts)
            built_with["smallest_image_count"] = image_counts[kept[-1]]
        wnids = sorted(merged)
        return cls(name, wnids, [merged[wnid] for wnid in wnids], built_with)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """Reads a vocabulary file; needs no WordNet.

        Raises:
            VocabularyError: the file is not a vocabulary, of another format or WordNet version, or its
                checksum disagrees with its content; the message names the file and both values.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # malformed JSON or UTF-8
            raise VocabularyError(f"{path} is not a vocabulary file: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise VocabularyError(f"{path} is not a vocabulary file: its format is {found!r}, expected {FORMAT!r}")
        for key, expected in (("format_version", FORMAT_VERSION), ("wordnet_version", WORDNET_VERSION)):
            if content.get(key) != expected:
                raise VocabularyError(
                    f"{path} has {key} {content.get(key)!r}, but this version of wsl_d2 reads {expected!r}; "
                    "build the vocabulary again with tools/build_vocabulary.py"
                )
        synsets, hashtags = content.get("synsets"), content.get("hashtags")
        if not isinstance(synsets, list) or not _all_strings(synsets):
            raise VocabularyError(f"{path}: 'synsets' must be a list of strings")
        if not isinstance(hashtags, list) or not all(isinstance(x, list) and _all_strings(x) for x in hashtags):
            raise VocabularyError(f"{path}: 'hashtags' must be a list of lists of strings")
        actual = _checksum(synsets, hashtags, content["wordnet_version"])
        if content.get("checksum") != actual:
            raise VocabularyError(
                f"{path} is damaged or was edited: it states checksum {content.get('checksum')!r}, but its "
                f"content has {actual!r}; build it again or restore it from where it came"
            )
        try:
            return cls(str(content.get("name")), synsets, hashtags, content.get("built_with") or {})
        except VocabularyError as error:
            raise VocabularyError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the vocabulary as JSON; a kill at any moment leaves the old file or the new one, whole."""
        path = Path(path)
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "wordnet_version": WORDNET_VERSION,
            "built_with": self.built_with,
            "checksum": self.checksum,
            "synsets": self.synsets,
            "hashtags": self.hashtags,
        }
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write("{\n" + lines + "\n}\n")
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes files that other users of the dataset could not read
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def __len__(self) -> int:
        """The number of labels, which is the number of classes of a classifier."""
        return len(self.synsets)

    def __repr__(self) -> str:
        return (
            f"Vocabulary({self.name!r}, {len(self)} labels, {len(self._label_of_hashtag)} hashtags, "
            f"checksum {self.checksum[:8]})"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.checksum == other.checksum

    def __hash__(self) -> int:
        return hash(self.checksum)

    def match(self, hashtag: str, max_distance: int = 0) -> Match | None:
        """Maps a hashtag to its closest synset in the vocabulary.

        An exact synonym comes first, at distance 0. Otherwise the nearest hypernym (more general concept) of
        any of the hashtag's noun senses that is in the vocabulary; of equally near ones, that of the more
        frequent sense, then the smaller id.

        Args:
            hashtag: in any spelling; it is normalised.
            max_distance: hypernym steps allowed. 0, the default, is the strict merge of arXiv 1805.00932 and
                needs no WordNet; more opens WordNet with `load_wordnet()` at the first hashtag that is no
                synonym.

        Returns:
            The match, or None if the vocabulary has nothing close enough.

        Raises:
            ValueError: `max_distance` is negative.
        """
        if max_distance < 0:
            raise ValueError(f"max_distance is a number of hypernym steps, 0 or more; got {max_distance}")
        key = normalize_hashtag(hashtag)
        label = self._label_of_hashtag.get(key)
        if label is not None:
            return Match(label, self.synsets[label], 0)
        if max_distance == 0 or not key:
            return None
        return self._nearest_hypernym(key, max_distance)

    def labels(self, hashtags: Iterable[str], max_distance: int = 0) -> np.ndarray:
        """Maps an image's hashtags to its labels.

        Args:
            hashtags: any number, in any spelling; those that match nothing are left out.
            max_distance: see `match`.

        Returns:
            (K,) int64, sorted, each label once; empty if no hashtag matches.
        """
        matches = (self.match(hashtag, max_distance) for hashtag in hashtags)
        return np.array(sorted({match.label for match in matches if match is not None}), dtype=np.int64)

    def _nearest_hypernym(self, key: str, max_distance: int) -> Match | None:
        wordnet = load_wordnet()
        level = list(_senses(wordnet, key))
        seen = set(level)
        for distance in range(max_distance + 1):
            for synset in level:
                label = self._label_of_synset.get(synset_to_wnid(synset))
                if label is not None:
                    return Match(label, self.synsets[label], distance)
            above = []
            for synset in level:
                for hypernym in sorted(synset.hypernyms() + synset.instance_hypernyms(), key=synset_to_wnid):
                    if hypernym not in seen:
                        seen.add(hypernym)
                        above.append(hypernym)
            level = above
        return None


def imagenet_1k_synsets() -> list[str]:
    """The 1,000 WordNet ids of ImageNet-1k, sorted, which is the order of its labels."""
    return _IMAGENET_1K_FILE.read_text(encoding="ascii").split()


def coco_synsets() -> list[str]:
    """The WordNet ids of COCO's 80 categories, in COCO's order."""
    lines = _COCO_FILE.read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[0] for line in lines if not line.startswith("#")]


def read_hashtag_counts(path: str | os.PathLike[str]) -> dict[str, int]:
    """Reads how many images carry each hashtag.

    Args:
        path: JSON, one object of hashtag -> number of images; or, under any name not ending in .json, text
            with one `hashtag<TAB>number` a line.

    Raises:
        ValueError: a line or entry is not of that form; the message names the file and the line.
    """
    path = Path(path)
    counts: dict[str, int] = {}
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected a JSON object of hashtag -> number of images")
        entries = [(f"entry {hashtag!r}", hashtag, count) for hashtag, count in content.items()]
    else:
        entries = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                hashtag, _, count = line.rpartition("\t")
                entries.append((f"line {number}", hashtag, int(count) if count.strip().isdecimal() else None))
    for place, hashtag, count in entries:
        if not hashtag or not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"{path}, {place}: expected a hashtag and its number of images, 0 or more")
        counts[hashtag] = counts.get(hashtag, 0) + count
    return counts


def _all_strings(items: Iterable[object]) -> bool:
    return all(isinstance(item, str) for item in items)


def _checksum(synsets: Sequence[str], hashtags: Sequence[Sequence[str]], wordnet_version: str) -> str:
    content = {"hashtags": hashtags, "synsets": synsets, "wordnet_version": wordnet_version}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _merge_synonyms(wordnet: Any, members: Iterable[Any]) -> dict[str, list[str]]:
    """Gives each hashtag to its most frequent sense among `members`; leaves synsets without any out."""
    claims: dict[str, tuple[int, str]] = {}  # hashtag -> (rank of the sense, wnid) of the best claim so far
    lemma_order: dict[str, list[str]] = {}
    ranks: dict[str, dict[int, int]] = {}  # lemma -> offset -> rank
    for synset in members:
        wnid = synset_to_wnid(synset)
        lemma_order[wnid] = []
        for lemma in synset.lemma_names():
            hashtag = normalize_hashtag(lemma)
            if not hashtag:
                continue
            lemma = lemma.lower()  # WordNet's index, and so its order of senses, ignores case
            if lemma not in ranks:
                senses = wordnet.synsets(lemma, "n")
                ranks[lemma] = {sense.offset(): rank for rank, sense in reversed(list(enumerate(senses)))}
            rank = (
                -1 if preferred_senses().get(hashtag) == wnid else ranks[lemma].get(synset.offset(), len(ranks[lemma]))
            )
            claim = (rank, wnid)
            claims[hashtag] = min(claims.get(hashtag, claim), claim)
            lemma_order[wnid].append(hashtag)
    merged = {}
    for wnid, hashtags in lemma_order.items():
        own = list(dict.fromkeys(hashtag for hashtag in hashtags if claims[hashtag][1] == wnid))
        if own:
            merged[wnid] = own
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


def _count_labels(merged: Mapping[str, Sequence[str]], counts: Mapping[str, int]) -> dict[str, int]:
    """Number of images per synset, for the synsets that have any."""
    normalised: dict[str, int] = defaultdict(int)
    for hashtag, count in counts.items():
        normalised[normalize_hashtag(hashtag)] += count
    sums = {wnid: sum(normalised.get(hashtag, 0) for hashtag in group) for wnid, group in merged.items()}
    return {wnid: count for wnid, count in sums.items() if count > 0}


@functools.lru_cache(maxsize=2)
def _lemmas_by_hashtag(wordnet: Any) -> dict[str, list[str]]:
    """Normalised hashtag -> noun lemmas written so ("recreation": also "re-creation")."""
    lemmas = defaultdict(list)
    for lemma in sorted(wordnet.all_lemma_names("n")):
        lemmas[normalize_hashtag(lemma)].append(lemma)
    return dict(lemmas)


def _senses(wordnet: Any, key: str) -> list[Any]:
    """Noun synsets that a normalised hashtag can mean, the most frequent sense first."""
    ranked: dict[Any, tuple[int, str]] = {}
    for lemma in _lemmas_by_hashtag(wordnet).get(key, ()):
        for rank, synset in enumerate(wordnet.synsets(lemma, "n")):
            claim = (rank, synset_to_wnid(synset))
            ranked[synset] = min(ranked.get(synset, claim), claim)
    return sorted(ranked, key=ranked.__getitem__)
