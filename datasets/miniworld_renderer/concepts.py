"""The things of the mini-world and the words for them, read from ``concepts.csv`` and ``popular_tags.csv``.

Both files are hand-checked: a synset is the sense that the artwork shows, every synonym one of its lemmas.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
# Zipf's law with an offset, so that the rarest of 48 concepts is 4 times rarer than the first, not 22 times.
ZIPF_OFFSET = 10
ZIPF_EXPONENT = 0.8


@dataclass(frozen=True)
class Tag:
    """A label of the world: a WordNet 3.0 noun synset and the lemmas under which photos carry it.

    Args:
        synset: "n02084071".
        synonyms: lemmas of the synset, the most usual first, words joined by underscores.
        emoji: of the thing, "" if it has none.
    """

    synset: str
    synonyms: tuple[str, ...]
    emoji: str = ""


@dataclass(frozen=True)
class Concept:
    """A thing that can be seen in the world's photos.

    Args:
        name: unique, e.g. "alarm_clock".
        tag: its name as a label.
        keyword: an associated label, e.g. morning; two concepts may share one.
        clean, detection: whether it is a class of the clean and of the detection set.
        icons: art style -> icon name in that style's package.
    """

    name: str
    tag: Tag
    keyword: Tag
    clean: bool
    detection: bool
    icons: dict[str, str]


@cache
def load_concepts() -> tuple[Concept, ...]:
    """Returns the 48 concepts, the most frequent first; the order was drawn once at random."""
    fixed = (
        "name",
        "synset",
        "synonyms",
        "keyword",
        "keyword_synset",
        "keyword_synonyms",
        "emoji",
        "clean",
        "detection",
    )
    concepts = []
    with open(FOLDER / "concepts.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            concepts.append(
                Concept(
                    name=row["name"],
                    tag=Tag(row["synset"], tuple(row["synonyms"].split("|")), row["emoji"]),
                    keyword=Tag(row["keyword_synset"], tuple(row["keyword_synonyms"].split("|"))),
                    clean=row["clean"] == "1",
                    detection=row["detection"] == "1",
                    icons={style: icon for style, icon in row.items() if style not in fixed and icon},
                )
            )
    return tuple(concepts)


@cache
def load_popular_tags() -> tuple[Tag, ...]:
    """Returns the 8 popular tags that say nothing about a photo."""
    with open(FOLDER / "popular_tags.csv", newline="", encoding="utf-8") as file:
        return tuple(Tag(row["synset"], tuple(row["synonyms"].split("|"))) for row in csv.DictReader(file))


@cache
def concept_probabilities(exponent: float = ZIPF_EXPONENT) -> np.ndarray:
    """Returns (48,) float64: each concept's probability, as 1 / (rank + 10) ** exponent, rank from 0."""
    weights = (np.arange(len(load_concepts())) + ZIPF_OFFSET) ** -exponent
    return weights / weights.sum()


def hashtag_synsets() -> tuple[str, ...]:
    """Returns the synsets of the hashtag photos' 96 labels: names, keywords (each once), popular tags."""
    concepts = load_concepts()
    tags = [c.tag for c in concepts] + [c.keyword for c in concepts] + list(load_popular_tags())
    return tuple(dict.fromkeys(tag.synset for tag in tags))


@cache
def clean_concepts() -> tuple[int, ...]:
    """Returns the indices of the clean set's 24 classes."""
    return tuple(i for i, concept in enumerate(load_concepts()) if concept.clean)


@cache
def detection_concepts() -> tuple[int, ...]:
    """Returns the indices of the detection set's 12 classes; category id k is the k-th of them, from 1."""
    return tuple(i for i, concept in enumerate(load_concepts()) if concept.detection)
