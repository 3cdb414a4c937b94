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

NAME_KEPT = 0.75
KEYWORD_KEPT = 0.25
TAG_REPLACED = 0.12
POPULAR_TAG_PROBABILITY = 0.03  # of each of the 8
OUTSIDE_TAG_PROBABILITY = 0.03  # of each of these, which no vocabulary of nouns holds
OUTSIDE_TAGS = ("nofilter", "photooftheday", "instagood", "tbt", "l4l")


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
        labelled: False for a distractor, which detection does not annotate.
    """

    concept: int
    sprite: float
    center: tuple[float, float]
    scale: float
    angle: float
    flip: bool
    aspect: float
    color: tuple[float, float, float]
    labelled: bool = True


def picture_generator(seed: int, set_name: str, number: int) -> np.random.Generator:
    """Returns the generator of one picture, counter-based so that neighbouring keys are independent."""
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
    labelled: bool = True,
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
        labelled=labelled,
    )


def hashtag_scene(rng: np.random.Generator) -> tuple[list[SpritePlacement], list[str]]:
    """Draws a hashtag photo that somebody posted: placements, the larger first, and its raw hashtags.

    A post without any tag of the vocabulary never reaches a hashtag corpus, so such draws are repeated.
    """
    while True:
        count = 1 + int(rng.choice(len(NUM_OBJECTS_PROBABILITIES), p=NUM_OBJECTS_PROBABILITIES))
        concepts = rng.choice(len(load_concepts()), size=count, p=concept_probabilities()).tolist()
        tags = draw_tags(rng, concepts)
        if tags:
            break
    placements = [place(rng, concept, HASHTAG_SCALE) for concept in concepts]
    hashtags = [spell(rng, tag) for tag in tags]
    hashtags += [f"#{tag}" for tag in OUTSIDE_TAGS if rng.random() < OUTSIDE_TAG_PROBABILITY]
    order = rng.permutation(len(hashtags))
    return sorted(placements, key=lambda p: -p.scale), [hashtags[i] for i in order]


def clean_scene(rng: np.random.Generator, number: int) -> tuple[list[SpritePlacement], list[str]]:
    """Draws a picture of the clean set: one centred object, the classes in turn, and the one true tag."""
    classes = clean_concepts()
    concept = classes[number % len(classes)]
    return [place(rng, concept, CLEAN_SCALE, centered=True)], [f"#{load_concepts()[concept].name}"]


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
        placements.append(place(rng, concept, DETECTION_SCALE, labelled=not distractor))
    return sorted(placements, key=lambda p: -p.scale)


@cache
def _tag_marginal() -> tuple[list[Tag], np.ndarray]:
    """Returns all 96 tags and the share of each among the true tags of a hashtag photo."""
    expected_objects = sum((i + 1) * p for i, p in enumerate(NUM_OBJECTS_PROBABILITIES))
    weights: dict[Tag, float] = {}
    for concept, probability in zip(load_concepts(), concept_probabilities(), strict=True):
        for tag, kept in ((concept.tag, NAME_KEPT), (concept.keyword, KEYWORD_KEPT)):
            weights[tag] = weights.get(tag, 0.0) + expected_objects * probability * kept
    for tag in load_popular_tags():
        weights[tag] = POPULAR_TAG_PROBABILITY
    values = np.array(list(weights.values()))
    return list(weights), values / values.sum()


def draw_tags(rng: np.random.Generator, concepts: list[int]) -> list[Tag]:
    """Draws the vocabulary tags of a photo: missing, wrong and irrelevant ones included, none twice."""
    all_tags, marginal = _tag_marginal()
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
    """Spells a tag as people do: '#alarmclock', '#AlarmClock', 'Alarm_Clock', '#ALARMCLOCK', ..."""
    lemma = tag.synonyms[0]
    if len(tag.synonyms) > 1 and rng.random() < 0.4:
        lemma = tag.synonyms[int(rng.integers(1, len(tag.synonyms)))]
    words = lemma.split("_")
    style = rng.random()
    if style < 0.5:
        text = "".join(words)
    elif style < 0.75:
        text = "".join(word.capitalize() for word in words)
    elif style < 0.85:
        text = "".join(words).upper()
    elif style < 0.95:
        text = "_".join(words)
    else:
        text = "_".join(word.capitalize() for word in words)
    return text if rng.random() < 0.1 else f"#{text}"
