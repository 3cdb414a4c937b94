"""What is in a vocabulary, on one page, as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from wsl_d2.files import write_atomically
from wsl_d2.hashtags.report import format_description
from wsl_d2.report.page import escape, page, panels, paragraph, table
from wsl_d2.report.plots import QUIET, draw_ranks, panel, style_of


def write_description(facts: dict[str, Any], folder: str | Path) -> None:
    """Writes ``vocabulary.html``, ``vocabulary.txt`` and ``vocabulary_facts.json``.

    Args:
        facts: of :func:`wsl_d2.hashtags.report.describe_vocabulary`.
        folder: is made if it is not there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "vocabulary.txt", format_description(facts) + "\n")
    write_atomically(folder / "vocabulary_facts.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / "vocabulary.html", vocabulary_page(facts))


def vocabulary_page(facts: dict[str, Any]) -> str:
    """Builds the page of a vocabulary; without counts of a corpus it is short."""
    size = f"{facts['num_labels']:,} labels, {facts['num_hashtags']:,} hashtags"
    parts = [paragraph(f"{size}, checksum {facts['checksum'][:12]}.", "quiet")]
    if facts["paper_size"]:
        told = f"The paper's has about {facts['paper_size']:,} hashtags; {facts['why_different']}."
        parts.append(paragraph(told, "quiet"))
    if "num_pairs" in facts:
        parts = [*_corpus(facts), *parts]
    rows = [
        [f"#{key}", ", ".join(f"{synset} #{hashtag}" for synset, hashtag in senses.items())]
        for key, senses in facts["ambiguous"].items()
    ]
    if rows:
        told = f"{facts['num_ambiguous']:,} hashtags have several senses among the labels; the first {len(rows)}:"
        parts += ["<h2>Ambiguous hashtags</h2>", paragraph(told), table(["hashtag", "senses"], rows, {1})]
    return page(f"Vocabulary {facts['name']}", *parts)


def _corpus(facts: dict[str, Any]) -> list[str]:
    total = max(1, facts["num_pairs"])
    answer = (
        f"{facts['mapped_pairs'] / total:.1%} of {facts['num_pairs']:,} pairs of image and hashtag have a label, of "
        f"{facts['num_labels_seen']:,} of the {facts['num_labels']:,} labels."
    )
    plots: list[str] = []
    if facts["num_labels_seen"]:
        with panel(plots, "Images of each label") as axis:
            draw_ranks(axis, {"images": np.array(facts["images_per_label"])}, "images")
    reasons = {"mapped": facts["mapped_pairs"]} | facts["dropped_pairs"]
    settings = {"xlabel": "% of pairs of image and hashtag"}
    with panel(plots, "What became of the hashtags", 0.9 + 0.3 * len(reasons), **settings) as axis:
        colors = [style_of(0)[0] if name == "mapped" else QUIET for name in reasons]
        axis.barh(list(reasons), [100 * number / total for number in reasons.values()], color=colors)
        axis.invert_yaxis()
    dropped = [
        [
            reason,
            f"{number:,}",
            f"{number / total:.1%}",
            " ".join(f"#{tag[:40]}" for tag, _ in facts["dropped_examples"][reason]),
        ]
        for reason, number in facts["dropped_pairs"].items()
    ]
    parts = [paragraph(answer, "headline"), panels(plots)]
    if dropped:
        parts += ["<h2>Dropped</h2>", table(["reason", "pairs", "share", "the most frequent"], dropped, {3})]
    for part, title in (("head", "Most frequent labels"), ("tail", "Least frequent labels")):
        rows = [
            [
                f"#{row['hashtags'][0]} ({row['synset']})",
                f"{row['images']:,}",
                " ".join(f"#{tag}" for tag in row["hashtags"][1:]),
            ]
            for row in facts[part]
        ]
        if rows:
            parts += [f"<h2>{escape(title)}</h2>", table(["label", "images", "other hashtags"], rows, {2})]
    return parts
