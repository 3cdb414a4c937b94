"""A search and its folder of results, which belongs to two sets of images and to the options.

progress.json: what was compared, with which images and options, and the pairs found. pairs.csv: those of at least the
score asked for, to be judged. judgements.csv: all that a person ever wrote into pairs.csv, also of pairs that are no
longer in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from wsl_d2.duplicates.finder import DuplicateFinder, Extractor, Pair, by_score, decoded_batches, nothing_decoded
from wsl_d2.duplicates.images import Images
from wsl_d2.duplicates.judgements import COLUMNS, Row, digest, read_judgements, write_rows
from wsl_d2.errors import UserError
from wsl_d2.files import write_atomically

PROGRESS, PAIRS, JUDGEMENTS = "progress.json", "pairs.csv", "judgements.csv"
_VERSION = 2
_SAVE_SECONDS = 60.0


class Features(NamedTuple):
    """Deep features: all that decides them, as JSON, and what makes the extractor."""

    facts: dict[str, Any]
    load: Callable[[], Extractor]


@dataclass
class Progress:
    """What a search has done.

    Attributes:
        facts: of both sets of images and of the features.
        min_score: of the pairs that were kept.
        done: pretraining images compared.
        keys: of the evaluation images that can be decoded.
        damaged: "evaluation", "pretraining" -> key -> reason, of images that cannot be decoded.
        pairs: (evaluation, pretraining) -> pair.
    """

    facts: dict[str, Any]
    min_score: float
    done: int = 0
    keys: list[str] = field(default_factory=list)
    damaged: dict[str, dict[str, str]] = field(default_factory=lambda: {"evaluation": {}, "pretraining": {}})
    pairs: dict[tuple[str, str], Pair] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        content = {**vars(self), "version": _VERSION, "pairs": [asdict(pair) for pair in self.pairs.values()]}
        write_atomically(path, json.dumps(content))

    @classmethod
    def load(cls, path: Path) -> Progress:
        """Raises UserError for a file that is none."""
        try:
            content = json.loads(path.read_bytes())
            if content.pop("version") != _VERSION:
                raise ValueError("another version")
            pairs = [Pair(**row | {"numbers": tuple(row["numbers"])}) for row in content.pop("pairs")]
            return cls(**content, pairs={(pair.evaluation, pair.pretraining): pair for pair in pairs})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged, or of another version of wsl_d2. Nothing was written; choose another --output, or "
                "remove this file to search again: judgements are kept."
            ) from error


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        pairs: best first, as in pairs.csv.
        judged: of each of them "yes", "no" or "".
        duplicated: evaluation images with a pair that was not.
        kept_aside: judgements of other pairs.
        progress: of the search.
    """

    pairs: list[Pair]
    judged: list[str]
    duplicated: int
    kept_aside: int
    progress: Progress


def find_duplicates(
    evaluation: Images,
    pretraining: Images,
    output: str | Path,
    *,
    min_score: float = 0.85,
    features: Features | None = None,
) -> Found:
    """Compares two sets of images and writes the results; an interrupted call goes on where it was.

    Args:
        evaluation, pretraining: the images.
        output: folder of results; judgements in it are kept.
        min_score: correlation from which a pair is a duplicate.
        features: bring further candidates.

    Raises:
        UserError: the folder has results of other images or options, or a table that cannot be read (nothing was
            written); or no image of a set can be decoded.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is no folder; choose another --output.")
    facts = {
        "evaluation": evaluation.fingerprint,
        "pretraining": pretraining.fingerprint,
        "features": features.facts if features else None,
    }
    images = digest([facts["evaluation"], facts["pretraining"]], 8)
    tables = output / JUDGEMENTS, output / PAIRS
    path = output / PROGRESS
    progress = Progress.load(path) if path.is_file() else Progress(facts, min_score)
    _check(output, progress, facts, min_score)
    read_judgements(tables, images)
    if progress.done < len(pretraining):
        finder = DuplicateFinder(evaluation, features.load() if features else None, min_score=progress.min_score)
        progress.keys, progress.damaged["evaluation"] = finder.keys, finder.damaged
        output.mkdir(parents=True, exist_ok=True)
        progress.save(path)
        search(finder, pretraining, progress, path)
    if len(progress.damaged["pretraining"]) == len(pretraining):
        raise nothing_decoded(pretraining.place, progress.damaged["pretraining"])
    pairs = sorted((pair for pair in progress.pairs.values() if pair.score >= min_score), key=by_score)
    judgements = read_judgements(tables, images)  # once more: the search may have taken days
    rows = {}
    for pair, row in _rows(pairs, f"{images}-{digest([facts['features'], min_score], 8)}"):
        rows[pair] = {"judged": ""} | judgements.get(pair, {}) | row
    if judgements or tables[0].is_file():
        write_rows(tables[0], [rows.get(pair, row) for pair, row in judgements.items()])
    write_rows(tables[1], list(rows.values()))
    accepted = {row["evaluation"] for row in rows.values() if row["judged"] != "no"}
    judged = [row["judged"] for row in rows.values()]
    return Found(pairs, judged, len(accepted), len(judgements.keys() - rows.keys()), progress)


def _check(output: Path, progress: Progress, facts: dict[str, Any], min_score: float) -> None:
    for name, what in (("evaluation", "evaluation images"), ("pretraining", "pretraining images"), ("features",) * 2):
        if progress.facts.get(name) != facts[name]:
            raise UserError(
                f"{output} holds results of other {what}: {_tell(progress.facts.get(name))}, not {_tell(facts[name])}. "
                "Nothing was written; choose another --output."
            )
    if min_score < progress.min_score:
        raise UserError(
            f"{output} holds pairs with a score of at least {progress.min_score}; those from {min_score} were not "
            "kept. Nothing was written; choose another --output, and copy pairs.csv there to keep its judgements."
        )


def _tell(facts: dict[str, Any] | None) -> str:
    return ", ".join(f"{name} {str(value)[:12]}" for name, value in (facts or {}).items()) or "none"


def _rows(pairs: Sequence[Pair], search_id: str) -> Iterator[tuple[str, Row]]:
    """Yields (pair, its row of pairs.csv but for the judgement)."""
    for found in pairs:
        pair = digest([found.evaluation, found.pretraining], 12)
        row = {name: "" if value is None else str(value) for name, value in asdict(found).items() if name in COLUMNS}
        yield pair, row | {"id": f"{search_id}-{pair}"}


def search(finder: DuplicateFinder, images: Images, progress: Progress, path: Path) -> None:
    """Streams pretraining images past the finder from where the progress ends, and saves it now and then.

    Args:
        finder: the evaluation images.
        images: the pretraining images.
        progress: is brought up to date; of images with the same key the best pair counts.
        path: of its file.
    """
    remaining = ((number, images[number]) for number in range(progress.done, len(images)))
    saved = time.monotonic()
    try:
        with tqdm(total=len(images), initial=progress.done, unit="image", desc="pretraining", disable=None) as bar:
            for batch in decoded_batches(remaining, progress.damaged["pretraining"]):
                for pair in finder.find(batch.keys, batch.pictures, batch.numbers):
                    known = progress.pairs.setdefault((pair.evaluation, pair.pretraining), pair)
                    if pair.score > known.score:
                        progress.pairs[pair.evaluation, pair.pretraining] = pair
                progress.done = batch.numbers[-1] + 1
                bar.update(progress.done - bar.n)
                bar.set_postfix(pairs=len(progress.pairs), refresh=False)
                if time.monotonic() - saved >= _SAVE_SECONDS:
                    progress.save(path)
                    saved = time.monotonic()
        progress.done = len(images)
    finally:
        progress.save(path)


def evaluation_keys(folder: str | Path) -> list[str] | None:
    """Returns the keys of the evaluation images of the search in a folder, None if there is none."""
    path = Path(folder) / PROGRESS
    try:
        progress = Progress.load(path) if path.is_file() else None
    except UserError:  # of another program
        return None
    return [*progress.keys, *progress.damaged["evaluation"]] if progress else None
