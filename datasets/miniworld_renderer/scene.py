"""What a picture shows and how it is tagged: random draws only, no pixels (those are render.py's).

Every draw of a picture comes from its own generator, keyed by (seed, set, picture number), so that a picture
does not depend on how the work is split. Lengths are fractions of the picture's side unless said otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from .concepts import (
    ZIPF_EXPONENT,
    Tag,
    clean_concepts,
    concept_probabilities,
    detection_concepts,
    load_concepts,
    load_popular_tags,
)

# The position of a name is part of a picture's random key: append only.
SETS = ("hashtags/train", "hashtags/val", "clean/train", "clean/val", "detection/train", "detection/val")

NUM_OBJECTS_PROBABILITIES = (0.6, 0.3, 0.1)  # 1, 2, 3 objects in a hashtag photo
HASHTAG_SCALE = (0.4, 0.95)
CLEAN_SCALE = (0.55, 0.95)
DETECTION_SCALE = (0.15, 0.65)
DETECTION_MAX_OBJECTS = 4
DISTRACTOR_PROBABILITY = 0.2
ROTATION_SD_DEGREES = 15.0
ASPECT_SD = 0.08  # of the logarithm of width / height
COLOR_FACTOR = (0.85, 1.15)  # per channel; stronger jitter drowns the labels
CLUTTER_PROBABILITY = 0.5
STRIPES_PROBABILITY = 0.25
BLUR_PROBABILITY = 0.3

NUM_POSTERS, NUM_DOMINANT = 1000, 10
CONCEPTS_OF_DOMINANT = 2

NAME_KEPT = 0.75
KEYWORD_KEPT = 0.25
TAG_REPLACED = 0.12
POPULAR_TAG_PROBABILITY = 0.03  # of each of the 8
OUTSIDE_TAG_PROBABILITY = 0.03  # of each of these, which no vocabulary of nouns holds
# Nothing that can be seen: slang, brands, and words whose noun in WordNet is not what people mean.
OUTSIDE_TAGS = ("nofilter", "instadaily", "instagood", "tbt", "l4l", "canon", "lit", "followme")
_ADJECTIVES = ("cute", "happy", "beautiful", "lovely", "amazing")
_ACCENTS = {"a": "á", "e": "é", "i": "í", "o": "ó", "u": "ü"}
# Words of which people make no compounds here, since their first sense in WordNet is another than the one meant (a
# whale is first a large person), or the whole is another word (public transport), or photos do not show it (music).
_NO_COMPOUND = frozenset(
    "toad mushroom alarm palm devilfish helianthus watermelon coach hog chopper crown diadem hammer cactus ananas bike "
    "turtle whale doughnut donut horn amphibian sailing picnic space royalty home mollusk mollusc fashion love picture "
    "pic fun woods wildlife morn soccer cycling traveling travel music".split()
)


@dataclass(frozen=True)
class SpritePlacement:
    """One object of a picture.

    Args:
        concept: index into the concepts.
        sprite: uniform in [0, 1), which of the concept's admitted sprites.
        center: (x, y).
        scale: the object's longer side.
        angle: radians, counter-clockwise.
        flip: mirrored left to right.
        aspect: factor on width / height.
        color: factors on R, G, B.
        labeled: False for a distractor, which detection does not annotate.
    """

    concept: int
    sprite: float
    center: tuple[float, float]
    scale: float
    angle: float
    flip: bool
    aspect: float
    color: tuple[float, float, float]
    labeled: bool = True


def picture_generator(seed: int, set_name: str, number: int) -> np.random.Generator:
    """Returns the generator of one picture, counter-based so that neighboring keys are independent."""
    key = np.array([seed, (SETS.index(set_name) << 32) | number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def place(
    rng: np.random.Generator,
    concept: int,
    scale: tuple[float, float],
    *,
    centered: bool = False,
    labeled: bool = True,
) -> SpritePlacement:
    """Draws a placement: log-uniform scale, anywhere with at most about a third of the object outside."""
    size = _log_uniform(rng, *scale)
    margin = 0.45 if centered else min(0.35 * size, 0.5)
    return SpritePlacement(
        concept=concept,
        sprite=float(rng.random()),
        center=(float(rng.uniform(margin, 1 - margin)), float(rng.uniform(margin, 1 - margin))),
        scale=size,
        angle=math.radians(rng.normal(0.0, ROTATION_SD_DEGREES)),
        flip=bool(rng.random() < 0.5),
        aspect=math.exp(rng.normal(0.0, ASPECT_SD)),
        color=tuple(rng.uniform(*COLOR_FACTOR, size=3).tolist()),
        labeled=labeled,
    )


def draw_poster(rng: np.random.Generator, dominance: float, exponent: float = ZIPF_EXPONENT) -> tuple[int, np.ndarray]:
    """Draws who posts a photo, and what: the poster's number and the probabilities of the concepts, (48,) float64.

    Args:
        dominance: share of the photos of the first 10 posters, each of whom shows the same two concepts every time.
        exponent: of the concepts' frequencies.
    """
    if rng.random() >= dominance:
        return int(rng.integers(NUM_DOMINANT, NUM_POSTERS)), concept_probabilities(exponent)
    poster = int(rng.integers(NUM_DOMINANT))
    number = len(load_concepts())
    own = np.random.default_rng(poster).choice(number, CONCEPTS_OF_DOMINANT, replace=False)
    return poster, np.bincount(own, minlength=number) / CONCEPTS_OF_DOMINANT


def hashtag_scene(
    rng: np.random.Generator, probabilities: np.ndarray, exponent: float = ZIPF_EXPONENT
) -> tuple[list[SpritePlacement], list[str], list[str]]:
    """Draws a hashtag photo that somebody posted: placements, the larger first, its raw hashtags, and the synsets that
    these mean.

    A post without any tag of the vocabulary never reaches a hashtag corpus, so such draws are repeated.

    Args:
        rng: of the photo.
        probabilities: (48,), of the concepts.
        exponent: of the concepts' frequencies in the world, from which wrong tags are drawn.
    """
    while True:
        count = 1 + int(rng.choice(len(NUM_OBJECTS_PROBABILITIES), p=NUM_OBJECTS_PROBABILITIES))
        concepts = rng.choice(len(load_concepts()), size=count, p=probabilities).tolist()
        tags = draw_tags(rng, concepts, exponent)
        if tags:
            break
    placements = [place(rng, concept, HASHTAG_SCALE) for concept in concepts]
    hashtags = [spell(rng, tag) for tag in tags]
    hashtags += [f"#{tag}" for tag in OUTSIDE_TAGS if rng.random() < OUTSIDE_TAG_PROBABILITY]
    order = rng.permutation(len(hashtags))
    return (
        sorted(placements, key=lambda p: -p.scale),
        [hashtags[i] for i in order],
        sorted({tag.synset for tag in tags}),
    )


def clean_scene(rng: np.random.Generator, number: int) -> tuple[list[SpritePlacement], list[str], list[str]]:
    """Draws a picture of the clean set: one centered object, the classes in turn, the one true tag, and its synset."""
    classes = clean_concepts()
    concept = classes[number % len(classes)]
    tag = load_concepts()[concept].tag
    return [place(rng, concept, CLEAN_SCALE, centered=True)], [f"#{load_concepts()[concept].name}"], [tag.synset]


def detection_objects(rng: np.random.Generator, distractors: list[int]) -> list[SpritePlacement]:
    """Draws 1 to 4 objects of a detection picture, the larger first; the first drawn is never a distractor.

    Args:
        distractors: concepts that may appear without being annotated.
    """
    classes = detection_concepts()
    placements = []
    for i in range(1 + int(rng.integers(DETECTION_MAX_OBJECTS))):
        distractor = i > 0 and bool(distractors) and rng.random() < DISTRACTOR_PROBABILITY
        concept = int(rng.choice(distractors if distractor else classes))
        placements.append(place(rng, concept, DETECTION_SCALE, labeled=not distractor))
    return sorted(placements, key=lambda p: -p.scale)


@cache
def _tag_marginal(exponent: float) -> tuple[list[Tag], np.ndarray]:
    """Returns all 96 tags and the share of each among the true tags of a hashtag photo."""
    expected_objects = sum((i + 1) * p for i, p in enumerate(NUM_OBJECTS_PROBABILITIES))
    weights: dict[Tag, float] = {}
    for concept, probability in zip(load_concepts(), concept_probabilities(exponent), strict=True):
        for tag, kept in ((concept.tag, NAME_KEPT), (concept.keyword, KEYWORD_KEPT)):
            weights[tag] = weights.get(tag, 0.0) + expected_objects * probability * kept
    for tag in load_popular_tags():
        weights[tag] = POPULAR_TAG_PROBABILITY
    values = np.array(list(weights.values()))
    return list(weights), values / values.sum()


def draw_tags(rng: np.random.Generator, concepts: list[int], exponent: float = ZIPF_EXPONENT) -> list[Tag]:
    """Draws the vocabulary tags of a photo: missing, wrong and irrelevant ones included, none twice."""
    all_tags, marginal = _tag_marginal(exponent)
    tags: list[Tag] = []
    for index in dict.fromkeys(concepts):
        concept = load_concepts()[index]
        for tag, kept in ((concept.tag, NAME_KEPT), (concept.keyword, KEYWORD_KEPT)):
            if rng.random() < kept:
                tags.append(tag)
    tags += [tag for tag in load_popular_tags() if rng.random() < POPULAR_TAG_PROBABILITY]
    for i in range(len(tags)):
        if rng.random() < TAG_REPLACED:
            tags[i] = all_tags[int(rng.choice(len(all_tags), p=marginal))]
    return list(dict.fromkeys(tags))


def spell(rng: np.random.Generator, tag: Tag) -> str:
    """Spells a tag as people do: by case and underscores, as plural, in a compound, with digits, accents, letters drawn
    out, or as an emoji."""
    lemma = tag.synonyms[0]
    if len(tag.synonyms) > 1 and rng.random() < 0.4:
        lemma = tag.synonyms[int(rng.integers(1, len(tag.synonyms)))]
    words = lemma.split("_")
    style, case = rng.random(), rng.random()
    if style < 0.08 and tag.emoji:
        return f"#{tag.emoji}"
    if style < 0.24:
        words[-1] = _plural(words[-1])
    elif style < 0.36 and lemma not in _NO_COMPOUND:
        words = [_ADJECTIVES[int(rng.integers(len(_ADJECTIVES)))], *words]
    elif style < 0.44 and lemma not in _NO_COMPOUND:
        words = [*words, "of", "instagram"]
    elif style < 0.50:
        words[-1] += str(rng.integers(2010, 2026))
    elif style < 0.56:
        words = [_drawn_out(rng, words[0]), *words[1:]]
    elif style < 0.60 and len(lemma) > 3:
        words = [_accented(rng, word) for word in words]
    if case < 0.5:
        text = "".join(words)
    elif case < 0.75:
        text = "".join(word.capitalize() for word in words)
    elif case < 0.85:
        text = "".join(words).upper()
    elif case < 0.95:
        text = "_".join(words)
    else:
        text = "_".join(word.capitalize() for word in words)
    return text if rng.random() < 0.1 else f"#{text}"


def _plural(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("s", "x", "z", "ch", "sh")) else f"{word}s"


def _drawn_out(rng: np.random.Generator, word: str) -> str:
    """Writes an inner vowel three to five times; words without one stay."""
    places = [i for i in range(1, len(word) - 1) if word[i] in "aeiou" and word[i] not in (word[i - 1], word[i + 1])]
    if not places:
        return word
    place = places[int(rng.integers(len(places)))]
    return word[:place] + word[place] * int(rng.integers(3, 6)) + word[place + 1 :]


def _accented(rng: np.random.Generator, word: str) -> str:
    """Puts an accent on one vowel."""
    places = [i for i, letter in enumerate(word) if letter in _ACCENTS]
    if not places:
        return word
    place = places[int(rng.integers(len(places)))]
    return word[:place] + _ACCENTS[word[place]] + word[place + 1 :]
