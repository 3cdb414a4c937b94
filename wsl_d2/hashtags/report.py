"""What is in a vocabulary, and what it covers of a corpus, as JSON and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from .vocabulary import Vocabulary

# Sizes after merging, in hashtags, as arXiv 1805.00932 names its vocabularies, and why ours differ.
_PAPER = {
    "1.5k": (
        1500,
        "the paper kept hashtags that occur on its images; here every lemma of the 1,000 synsets counts, seen or not. "
        "A label is a synset, so there are 1,000 labels",
    ),
    "8.5k": (8500, "by construction the 8,500 most frequent labels, or as many as the counts have"),
    "17k": (
        17000,
        "the paper kept what occurs on its images. Without counts this is every noun of WordNet; with counts those "
        "of them that are counted",
    ),
}
_SHOWN = 15


def describe_vocabulary(vocabulary: Vocabulary, counts: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Gathers the facts of a vocabulary.

    Args:
        vocabulary: any.
        counts: raw hashtag -> number of images of a corpus; coverage, head and tail need them.

    Returns:
        Sizes, the paper's size and the reason for a difference, ambiguous hashtags, and with counts the coverage of
        the corpus (by image-tag pairs and by distinct hashtags), drops by reason, and images per label.
    """
    mapping = vocabulary.mapping
    everything = Vocabulary(
        vocabulary.name, vocabulary.synsets, vocabulary.hashtags, policy=vocabulary.policy._replace(ambiguous="all")
    ).mapping
    hashtags = [hashtag for group in vocabulary.hashtags for hashtag in group]
    ambiguous = {key: labels for key in hashtags if len(labels := everything.map(key).labels) > 1}
    paper = _PAPER.get(vocabulary.name)
    facts: dict[str, Any] = {
        "name": vocabulary.name,
        "checksum": vocabulary.checksum,
        "num_labels": len(vocabulary),
        "num_hashtags": len(hashtags),
        "paper_size": paper[0] if paper else None,
        "why_different": paper[1] if paper else None,
        "policy": vocabulary.policy._asdict(),
        "num_ambiguous": len(ambiguous),
        "ambiguous": {
            key: {vocabulary.synsets[label]: vocabulary.hashtags[label][0] for label in ambiguous[key]}
            for key in sorted(ambiguous)[:100]
        },
        "built_with": vocabulary.built_with,
    }
    if counts is None:
        return facts
    images = np.zeros(len(vocabulary), np.int64)
    dropped: Counter[str] = Counter()
    examples: dict[str, list[tuple[str, int]]] = {}
    mapped_pairs = mapped_distinct = 0
    for hashtag, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        labels, reason, _ = mapping.map(hashtag)
        if labels:
            mapped_pairs += count
            mapped_distinct += 1
            images[list(labels)] += count
        else:
            dropped[reason] += count
            if len(examples.setdefault(reason, [])) < 8:
                examples[reason].append((hashtag, count))
    order = np.argsort(-images, kind="stable")
    seen = order[images[order] > 0]

    def rows(labels: np.ndarray) -> list[dict]:
        return [
            {"synset": vocabulary.synsets[i], "hashtags": list(vocabulary.hashtags[i][:4]), "images": int(images[i])}
            for i in labels.tolist()
        ]

    total = sum(counts.values())
    return facts | {
        "num_pairs": total,
        "num_distinct": len(counts),
        "mapped_pairs": mapped_pairs,
        "mapped_distinct": mapped_distinct,
        "dropped_pairs": dict(dropped.most_common()),
        "dropped_examples": examples,
        "num_labels_seen": len(seen),
        "head": rows(seen[:_SHOWN]),
        "tail": rows(seen[-_SHOWN:]),
        "images_per_label": sorted(images.tolist(), reverse=True),
    }


def format_description(facts: dict[str, Any]) -> str:
    """Returns the facts of :func:`describe_vocabulary` as text."""
    lines = [
        f"vocabulary {facts['name']} ({facts['checksum'][:12]})",
        f"labels {facts['num_labels']:,}, hashtags {facts['num_hashtags']:,}",
    ]
    if facts["paper_size"]:
        lines.append(f"the paper's: about {facts['paper_size']:,} hashtags; {facts['why_different']}.")
    lines.append(f"hashtags with several senses among the labels: {facts['num_ambiguous']:,}, such as")
    for key, senses in list(facts["ambiguous"].items())[:_SHOWN]:
        lines.append(f"  {key}: " + ", ".join(f"{synset} #{hashtag}" for synset, hashtag in senses.items()))
    if "num_pairs" not in facts:
        return "\n".join(lines)
    lines += [
        "",
        f"corpus: {facts['num_pairs']:,} pairs of image and hashtag, {facts['num_distinct']:,} different hashtags",
        f"mapped: {_share(facts['mapped_pairs'], facts['num_pairs'])} of the pairs, "
        f"{_share(facts['mapped_distinct'], facts['num_distinct'])} of the hashtags, to "
        f"{facts['num_labels_seen']:,} of {facts['num_labels']:,} labels",
        "dropped, by reason:",
    ]
    for reason, pairs in facts["dropped_pairs"].items():
        shown = ", ".join(hashtag for hashtag, _ in facts["dropped_examples"][reason][:5])
        lines.append(f"  {reason:24}{pairs:12,}  {shown}")
    for part in ("head", "tail"):
        lines.append(f"{part}:")
        lines += [f"  {row['images']:12,}  {row['synset']} {', '.join(row['hashtags'])}" for row in facts[part]]
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "none"
