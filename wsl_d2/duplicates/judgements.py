"""pairs.csv, in which a person judges pairs, read as spreadsheets save it; and what the judgements are for."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from wsl_d2.errors import UserError
from wsl_d2.files import write_atomically

COLUMNS = ("evaluation", "pretraining", "score", "hash_distance", "cosine", "id", "judged")
_NEEDED = ("evaluation", "pretraining", "judged")
_ANSWERS = {"": "", "yes": "yes", "y": "yes", "true": "yes", "no": "no", "n": "no", "false": "no"}
# Images, options, pair: a text to every spreadsheet, while keys such as 000012 may come back as numbers.
_ID = re.compile("([0-9a-f]{8})-[0-9a-f]{8}-([0-9a-f]{12})")

Row = dict[str, str]


def digest(value: Any, digits: int) -> str:
    """Returns the first hex digits of the SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]


def read_rows(path: str | Path) -> Iterator[tuple[int, Row]]:
    """Yields (number of the row, its cells by column) of every pair; "judged" is "yes", "no" or empty.

    The file may have commas, semicolons or tabs, a byte-order mark, other columns, and columns in any order.

    Raises:
        UserError: it is no such table; names row and column.
    """
    data = Path(path).read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, row {row} is not UTF-8; save the table as CSV in UTF-8.") from error
    first, _, rest = text.partition("\n")
    if first.lower().startswith("sep="):
        text, first = rest, rest.partition("\n")[0]
    table = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
    number = 0
    try:
        names = [name.strip().lower() for name in next(table, [])]
        _check_names(path, names)
        for number, cells in enumerate(table, start=2):
            if any(cell.strip() for cell in cells):
                yield number, _checked(f"{path}, row {number}", names, cells)
    except csv.Error as error:
        raise UserError(f"{path}, row {number + 1} cannot be read: {error}.") from error


def _check_names(path: str | Path, names: Sequence[str]) -> None:
    for name in _NEEDED:
        if name not in names:
            has = f"it has {', '.join(map(repr, filter(None, names)))}" if any(names) else "it is empty"
            raise UserError(f"{path} has no column {name!r}; {has}.")
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{path} has two columns {twice[0]!r}; rename one of them.")


def _checked(place: str, names: Sequence[str], cells: Sequence[str]) -> Row:
    for column, cell in enumerate(cells):
        if cell.strip() and not (column < len(names) and names[column]):
            raise UserError(f"{place}, column {column + 1}: {cell!r} stands under no name.")
    row = dict.fromkeys(filter(None, names), "") | dict(zip(names, cells, strict=False))
    row.pop("", None)
    for name in _NEEDED[:2]:
        if not row[name].strip():
            raise UserError(f"{place}, column {name} is empty.")
    answer = _ANSWERS.get(row["judged"].strip().lower())
    if answer is None:
        raise UserError(f"{place}, column judged: {row['judged']!r} is neither yes nor no; write one, or nothing.")
    return row | {"judged": answer}


def _by_pair(path: Path, images: str = "") -> dict[str, Row]:
    """pair -> row; with ``images`` the rows must be of these. A row without an id is known by its keys."""
    found: dict[str, tuple[int, Row]] = {}
    for number, row in read_rows(path):
        own_id = _ID.fullmatch(row.get("id", "").strip())
        if own_id and images and own_id[1] != images:
            raise UserError(
                f"{path}, row {number}, column id: a pair of other images than these. Nothing was written; choose "
                "another --output, or move this file."
            )
        pair = own_id[2] if own_id else digest([row["evaluation"], row["pretraining"]], 12)
        before, other = found.setdefault(pair, (number, row))
        if other["judged"] != row["judged"]:
            raise UserError(f"{path}, rows {before} and {number} judge the same pair differently.")
    return {pair: row for pair, (_, row) in found.items()}


def read_judgements(paths: Iterable[Path], images: str) -> dict[str, Row]:
    """Returns pair -> row, of the pairs of which a person wrote anything: a judgement, or into a column of their own.

    Args:
        paths: tables, of which the last that knows a pair counts; those that are not there are passed over.
        images: digest of the two sets of images.

    Raises:
        UserError: see :func:`read_rows`; or a table has pairs of other images, or contradicts itself.
    """
    rows: dict[str, Row] = {}
    for path in paths:
        if path.is_file():
            rows |= _by_pair(path, images)
    return {pair: row for pair, row in rows.items() if any(row[n] for n in row if n == "judged" or n not in COLUMNS)}


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes a table, "judged" as its last column."""
    others = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*COLUMNS[:-1], *others, COLUMNS[-1]], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def duplicated_images(path: str | Path) -> set[str]:
    """Returns the evaluation images of ``pairs.csv`` with a pair that nobody has judged "no"."""
    return {row["evaluation"] for row in _by_pair(Path(path)).values() if row["judged"] != "no"}


def read_correct(path: str | Path, evaluation: Iterable[str] | None = None) -> dict[str, bool]:
    """Reads a JSON object of evaluation key -> whether it was classified correctly.

    Args:
        path: of the file.
        evaluation: the keys of the evaluation set, if they are known.

    Raises:
        UserError: it is none; a value is neither true nor false; or a key is not in the evaluation set.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [key for key, number in Counter(key for key, _ in pairs).items() if number > 1]:
            raise ValueError(f"{twice[0]!r} occurs twice")
        return dict(pairs)

    try:
        correct = json.loads(Path(path).read_bytes(), object_pairs_hook=unique)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(correct, dict):
        raise UserError(f"{path} holds no JSON object of evaluation key -> true or false.")
    if wrong := [key for key, value in correct.items() if not isinstance(value, bool)]:
        raise UserError(f"{path}: {_first(wrong)} is {json.dumps(correct[wrong[0]])}, neither true nor false.")
    if evaluation is not None and (unknown := sorted(correct.keys() - set(evaluation))):
        raise UserError(f"{path}: {_first(unknown)} is no evaluation image of that search.")
    return correct


def lower_bound_accuracy(correct: dict[str, bool], duplicated: set[str]) -> tuple[float, float, int]:
    """Returns (accuracy, accuracy with every duplicated evaluation image counted as wrong, duplicated images).

    Raises:
        UserError: no image was evaluated, or a duplicated one was not.
    """
    if not correct:
        raise UserError("no evaluation image has a result.")
    if missing := sorted(duplicated - correct.keys()):
        raise UserError(
            f"{_first(missing)} is duplicated and has no result. If a spreadsheet changed the key, as from 007 to 7, "
            "the search's own command puts it right."
        )
    plain = 100 * sum(correct.values()) / len(correct)
    bound = 100 * sum(right and key not in duplicated for key, right in correct.items()) / len(correct)
    return plain, bound, len(duplicated)


def _first(keys: Sequence[str]) -> str:
    return repr(keys[0]) + (f" (as {len(keys) - 1:,} more)" if len(keys) > 1 else "")
