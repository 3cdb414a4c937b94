"""A folder of results belongs to the arguments of the call that began it, from the first training on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from wsl_d2.errors import UserError
from wsl_d2.files import write_atomically


def claim_folder(output: Path, arguments: Mapping, what: str, *, work: Sequence[str], stages: Sequence[str]) -> None:
    """Notes in ``arguments.json`` what a folder of results is for, or checks that it is for the same.

    Until a training has begun, a call with other arguments takes the folder over: it may be the correction of one that
    failed, or that showed a plan.

    Args:
        output: made if it does not exist.
        arguments: name -> value, as JSON has it.
        what: "pretraining".
        work: names of files and folders in it that are there once a training has begun.
        stages: names of those that depend on the arguments, and are removed when others take the folder over.

    Raises:
        UserError: a training of other arguments has begun in it, or it holds other files.
    """
    path = output / "arguments.json"
    arguments = json.loads(json.dumps(arguments))
    if path.is_file():
        noted = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in dict.fromkeys([*arguments, *noted]) if noted.get(name) != arguments.get(name)]
        if not changed:
            return
        if any((output / name).exists() for name in work):
            differences = "; ".join(f"{name} {noted.get(name)}, now {arguments.get(name)}" for name in changed)
            raise UserError(
                f"{output} holds a {what} that was begun with other arguments ({differences}); repeat those to go on "
                "with it, choose another --output, or delete the folder."
            )
        for name in stages:
            shutil.rmtree(output / name) if (output / name).is_dir() else (output / name).unlink(missing_ok=True)
    elif output.exists() and any(output.iterdir()):
        raise UserError(f"{output} exists and holds no {what}; choose another --output, or remove it.")
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(arguments, indent=1))
