"""Folders of image files as people have them: with links, and with what operating systems and editors leave in them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Folders that operating systems, network drives and editors leave among others; so are all that begin with a dot.
_SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"})


def is_left_by_a_system(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or one that operating systems, drives and editors leave."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def walk_once(
    root: str | Path, skipped: Counter[str], of_systems_too: bool = False
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walks as os.walk does, links to folders included, but enters each folder once, by its own path rather than a link
    if it has both, and none that a system left.

    Args:
        skipped: counts the folders that are not entered.
        of_systems_too: enters what :func:`is_left_by_a_system` tells of, too.

    Raises:
        OSError: a folder cannot be listed.
    """
    entered: set[tuple[int, int]] = set()
    waiting = [str(root)]
    while waiting:
        for folder, names, files in os.walk(waiting.pop(0), onerror=_raise):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in entered:
                skipped["folder that is linked more than once"] += 1
                names.clear()
                continue
            entered.add((status.st_dev, status.st_ino))
            if not of_systems_too:
                skipped.update(f"folder {name}" for name in names if is_left_by_a_system(name))
                names[:] = [name for name in names if not is_left_by_a_system(name)]
            names.sort()
            yield folder, names, files
            waiting += [path for path in (os.path.join(folder, name) for name in names) if os.path.islink(path)]


def _raise(error: OSError) -> None:
    raise error
