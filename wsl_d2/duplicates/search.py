"""A search and its folder of results, which belongs to two sets of images and to the options.

progress.json: what was compared, with which images and options, and the pairs found. pairs.csv: those of at least the
score asked for, to be judged. judgements.csv: all that a person ever wrote into pairs.csv, also of pairs that are no
longer in it.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wsl_d2.data.runner import Workers
from wsl_d2.duplicates.finder import (
    DuplicateFinder,
    Extractor,
    Pair,
    Pictures,
    by_score,
    decoded_batches,
    describe,
    join,
    load_faiss,
    nothing_decoded,
)
from wsl_d2.duplicates.images import Images, Part, map_parts
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
    workers: Workers = 1,
) -> Found:
    """Compares two sets of images and writes the results; an interrupted call goes on where it was.

    Args:
        evaluation, pretraining: the images.
        output: folder of results; judgements in it are kept.
        min_score: correlation from which a pair is a duplicate.
        features: bring further candidates.
        workers: processes or a cluster, which read and compare the images; the results are the same.

    Raises:
        UserError: the folder has results of other images or options, or a table that cannot be read (nothing was
            written); or no image of a set can be decoded.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is no folder; choose another --output.")
    facts = {
        "evaluation": evaluation.fingerprint(workers),
        "pretraining": pretraining.fingerprint(workers),
        "features": features.facts if features else None,
    }
    images = digest([facts["evaluation"], facts["pretraining"]], 8)
    tables = output / JUDGEMENTS, output / PAIRS
    path = output / PROGRESS
    progress = Progress.load(path) if path.is_file() else Progress(facts, min_score)
    _check(output, progress, facts, min_score)
    read_judgements(tables, images)
    if progress.done < len(pretraining):
        load_faiss()
        threads = 1 if isinstance(workers, int) and workers > 1 else None
        search = _Search(features.load if features else None, progress.min_score, threads)
        known = _describe_all(search, evaluation, workers, progress.damaged["evaluation"])
        progress.keys = known.keys
        output.mkdir(parents=True, exist_ok=True)
        progress.save(path)
        with tempfile.TemporaryDirectory(prefix=".evaluation-", dir=output.absolute()) as folder:
            _compare_all(search.against(known, folder), pretraining, workers, progress, path)
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


@dataclass
class _Search:
    """What all parts of a search share; a process loads what it needs of it once.

    Attributes:
        load_extractor: of deep features.
        min_score: of the pairs that are kept.
        threads: of a process; None for the libraries' own choice.
        known: numbers and keys of the evaluation images.
        files: name of an array of them -> its file, which the processes of a machine share in memory.
    """

    load_extractor: Callable[[], Extractor] | None
    min_score: float
    threads: int | None
    known: tuple[list[int], list[str]] = ([], [])
    files: dict[str, str] = field(default_factory=dict)

    def against(self, known: Pictures, folder: str) -> _Search:
        """Returns the search with these evaluation images, whose arrays it writes to a folder."""
        files = {}
        for name in ("thumbnails", "hashes", "is_flat", *(["features"] if known.features is not None else [])):
            files[name] = f"{folder}/{name}.npy"
            np.save(files[name], getattr(known, name))
        return replace(self, known=(known.numbers, known.keys), files=files)

    @cached_property
    def extractor(self) -> Extractor | None:
        if self.load_extractor and self.threads:
            import torch

            torch.set_num_threads(self.threads)
        return self.load_extractor() if self.load_extractor else None

    @cached_property
    def finder(self) -> DuplicateFinder:
        if self.threads:
            load_faiss().omp_set_num_threads(self.threads)
        arrays: dict[str, Any] = {"features": None}
        arrays |= {name: np.load(file, mmap_mode="r") for name, file in self.files.items()}
        return DuplicateFinder(Pictures(*self.known, **arrays), self.extractor, min_score=self.min_score)


def _describe_part(shared: tuple[_Search, Callable], part: Part) -> tuple[list[Pictures], dict[str, str]]:
    search, read = shared
    damaged: dict[str, str] = {}
    return describe(part.read(read), damaged, search.extractor), damaged


def _describe_all(search: _Search, images: Images, workers: Workers, damaged: dict[str, str]) -> Pictures:
    found = []
    for _, (pictures, bad) in map_parts(_describe_part, images, (search, images.read), workers):
        found += pictures
        damaged |= bad
    if not found:
        raise nothing_decoded(images.place, damaged)
    return join(found)


def _compare_part(shared: tuple[_Search, Callable], part: Part) -> tuple[list[Pair], dict[str, str]]:
    search, read = shared
    damaged: dict[str, str] = {}
    batches = decoded_batches(part.read(read), damaged)
    return [
        pair for batch in batches for pair in search.finder.find(batch.keys, batch.pictures, batch.numbers)
    ], damaged


def _compare_all(search: _Search, images: Images, workers: Workers, progress: Progress, path: Path) -> None:
    """Compares the images from where the progress ends, and saves it now and then; of the same key the best counts."""
    saved = time.monotonic()
    try:
        for done, (pairs, damaged) in map_parts(_compare_part, images, (search, images.read), workers, progress.done):
            for pair in pairs:
                known = progress.pairs.setdefault((pair.evaluation, pair.pretraining), pair)
                if pair.score > known.score:
                    progress.pairs[pair.evaluation, pair.pretraining] = pair
            progress.damaged["pretraining"] |= damaged
            progress.done = done
            if time.monotonic() - saved >= _SAVE_SECONDS:
                progress.save(path)
                saved = time.monotonic()
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
