"""The page of a search for duplicates: pairs as pictures, to judge by eye."""

from __future__ import annotations

import numpy as np

from wsl_d2.data.read.decode import decode_image
from wsl_d2.duplicates.images import Images
from wsl_d2.duplicates.search import Found
from wsl_d2.report.page import page, paragraph, picture, pictures

SHEET = "pairs.html"
SHOWN = 100  # pairs on the page


def duplicates_page(found: Found, evaluation: Images, pretraining: Images) -> str:
    """Builds the page: under each pair what finds it in pairs.csv, whose second row is the first pair.

    Args:
        found: the outcome of the search.
        evaluation, pretraining: the images.
    """
    shown = found.pairs[:SHOWN]
    lead = (
        f"{len(found.pairs):,} pairs; {found.duplicated:,} of {len(found.progress.keys):,} evaluation images have a "
        "duplicate."
    )
    parts = [
        paragraph(lead, "headline"),
        paragraph(
            'Left the evaluation image, right the pretraining image. Write "no" into the last column of pairs.csv, in '
            "the row named below a pair, where they are no duplicates."
        ),
    ]
    if len(shown) < len(found.pairs):
        parts.append(paragraph(f"Shown are the first {len(shown):,} pairs, by falling score."))
    sections = []
    for row, (pair, judged) in enumerate(zip(shown, found.judged, strict=False), start=2):
        members = [
            picture(
                np.asarray(decode_image(images[number][1])), f"{name} image {key}", key, side=320, most_bytes=12_000
            )
            for name, images, number, key in (
                ("evaluation", evaluation, pair.numbers[0], pair.evaluation),
                ("pretraining", pretraining, pair.numbers[1], pair.pretraining),
            )
        ]
        told = f"row {row}, score {pair.score:.4f}" + (f", judged {judged}" if judged else "")
        sections.append(f"<section>{pictures(members, 2)}{paragraph(told)}</section>")
    return page("Near-duplicates", *parts, f'<div class="panels">{"".join(sections)}</div>')
