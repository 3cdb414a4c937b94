"""What must be the same for a checkpoint to be continued: the config keys that change a run's numbers, and its data."""

from __future__ import annotations

import json
import logging
import os
import time

from detectron2.config import CfgNode

from wsl_d2.engine.schedule import ConfigError
from wsl_d2.run_keys import KEYS_OF_EVALUATION, KEYS_OF_PLACE_AND_SPEED, KEYS_OF_TOLERANCE

_FREE = KEYS_OF_PLACE_AND_SPEED + KEYS_OF_EVALUATION + KEYS_OF_TOLERANCE


def run_identity(cfg: CfgNode, data: dict | None = None) -> dict[str, str]:
    """Returns name -> value, as text, of all that a run's numbers depend on.

    Args:
        cfg: of the run, with its schedule resolved.
        data: further facts, such as checksums of the data.
    """
    return _flat(cfg) | {name: str(value) for name, value in (data or {}).items()}


def _flat(node: CfgNode, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in node.items():
        name = prefix + key
        if name in _FREE:
            continue
        if isinstance(value, CfgNode):
            found |= _flat(value, f"{name}.")
        else:
            found[name] = repr(list(value) if isinstance(value, tuple) else value)
    return found


def compare_identities(saved: dict[str, str], now: dict[str, str]) -> list[str]:
    """Returns one line for each difference; names that only one side has are differences, too."""
    return [
        f"{name} was {saved.get(name, 'not there')}, is now {now.get(name, 'not there')}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]


def check_identity(saved: dict[str, str], now: dict[str, str], output_dir: str, override: bool, iteration: int) -> None:
    """Refuses to continue a checkpoint of another run.

    Args:
        saved: of the checkpoint.
        now: of this run.
        output_dir: where an override is noted, in ``resume_overrides.json``, one line each.
        override: continue all the same (``--override-resume``).
        iteration: the checkpoint's.

    Raises:
        ConfigError: they differ; lists each difference.
    """
    differences = compare_identities(saved, now)
    if not differences:
        return
    if not override:
        raise ConfigError(
            "the checkpoint in OUTPUT_DIR belongs to another run: "
            + "; ".join(differences)
            + ". Restore the old values, choose another OUTPUT_DIR, or continue all the same with --override-resume."
        )
    logging.getLogger(__name__).warning(f"continuing with other settings: {'; '.join(differences)}")
    if os.path.isdir(output_dir):
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "iteration": iteration, "differences": differences}
        with open(os.path.join(output_dir, "resume_overrides.json"), "a") as file:
            file.write(json.dumps(record) + "\n")
