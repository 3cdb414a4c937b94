"""Errors that a user can fix. The command line shows them as one line, without a traceback, and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" of the known word that is nearest, "" where none is near; for messages."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


class UserError(Exception):
    """An error that a user can fix; the message names the file or key, the value, what is allowed, and what to do."""


class LostProcessError(UserError, RuntimeError):
    """Other processes of the run have died or hang."""


class FaultsError(UserError):
    """Several faults.

    Args:
        lines: one for each.
    """

    def __init__(self, lines: list[str]):
        super().__init__("\n".join(lines))
        self.lines = lines


class MissingPackageError(UserError, ImportError):
    """A package is not installed that this needs; the message says how to get it."""


NO_DETECTRON2 = (
    "wsl_d2 needs detectron2, which is not published on PyPI under its own name. Either run `make setup` in a clone of "
    "this repository, or install it from source after torch:\n"
    "  pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2'"
)


class ShardError(UserError, ValueError):
    """A shard, its index, its labels or the manifest is missing, incomplete or inconsistent."""


class EmptyDatasetError(ShardError):
    """Nothing came of a dataset: no image, no label, or fewer images than asked for."""


class VocabularyError(UserError, ValueError):
    """A vocabulary file is damaged, of another version, or not a vocabulary at all."""


class ConfigError(UserError, ValueError):
    """A configuration key has a value that cannot be used."""
