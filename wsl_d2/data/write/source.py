"""What a dataset is made from: recorded in its folder before anything else is written, compared at every later call.

So a call with the wrong folder is refused before it changes anything, and an interrupted call can be repeated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wsl_d2.data.format.manifest import MANIFEST
from wsl_d2.errors import ShardError
from wsl_d2.files import write_atomically

_NAME = "source.json"


def claim_folder(folder: str | Path, facts: dict[str, Any]) -> None:
    """Reserves a folder for one dataset.

    Args:
        folder: of the dataset to be made; created if it is not there.
        facts: all that decides the dataset, as JSON.

    Raises:
        ShardError: the folder holds a dataset of other facts, or shards that no call of this kind began.
    """
    folder = Path(folder)
    path = folder / _NAME
    facts = json.loads(json.dumps(facts))
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        differences = [
            f"{name} {_short(found.get(name))}, not {_short(facts.get(name))}"
            for name in dict.fromkeys([*facts, *found])
            if found.get(name) != facts.get(name)
        ]
        if differences:
            raise ShardError(
                f"{folder} is the place of another dataset: {'; '.join(differences)}. Nothing was written; choose "
                "another folder."
            )
        return
    if folder.exists() and not folder.is_dir():
        raise ShardError(f"{folder} is not a folder; choose another one.")
    for found_path in (*sorted(folder.glob("*.tar")), folder / MANIFEST):
        if found_path.exists() or found_path.is_symlink():
            raise ShardError(
                f"{folder} holds {found_path.name}, which is of another dataset. Nothing was written; choose an empty "
                "folder."
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(facts, indent=1) + "\n")


def read_source(folder: str | Path) -> dict[str, Any]:
    """Returns the facts of :func:`claim_folder`, an empty dict where there are none."""
    path = Path(folder) / _NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if len(text) == 66:  # a SHA-256 in quotes
        return text[1:13]
    return text if len(text) <= 100 else f"{text[:97]}..."
