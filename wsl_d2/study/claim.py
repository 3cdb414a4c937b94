"""A folder of results belongs to the arguments of the call that began it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from wsl_d2.errors import UserError
from wsl_d2.files import write_atomically


def claim_folder(output: Path, arguments: Mapping, what: str, hint: str = "") -> None:
    """Notes in ``arguments.json`` what a folder of results is for, or checks that it is for the same.

    Args:
        output: made if it does not exist.
        arguments: name -> value, as JSON has it.
        what: "pretraining".
        hint: a last sentence for whoever has changed an argument.

    Raises:
        UserError: it holds the results of other arguments, or other files.
    """
    path = output / "arguments.json"
    if not path.is_file():
        if output.exists() and any(output.iterdir()):
            raise UserError(f"{output} exists and holds no {what}; choose another --output, or remove it.")
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(arguments, indent=1))
        return
    noted = json.loads(path.read_text())
    for name, value in arguments.items():
        if noted.get(name) != value:
            raise UserError(
                f"{output} holds a {what} with {name} {noted.get(name)}, and this one has {value}; choose another "
                f"--output, or repeat the call that began it. {hint}".strip()
            )
