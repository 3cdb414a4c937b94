"""The resume fingerprint: the config keys that change a run's numbers, and facts of its data."""

from __future__ import annotations

import json
import logging
import os
import time

from detectron2.config import CfgNode

from wsl_d2.errors import ConfigError
from wsl_d2.run_keys import KEYS_OF_EVALUATION, KEYS_OF_PLACE_AND_SPEED, KEYS_OF_TOLERANCE, flatten, is_among

_KEYS_THAT_CHANGE_WHAT_IS_SAVED = ("TEST.PRECISE_BN",)


def resume_fingerprint(cfg: CfgNode, data: dict | None = None) -> dict[str, str]:
    """Returns name -> value, as text, of everything that a run's numbers depend on.

    Args:
        cfg: of the run, with its schedule resolved.
        data: further facts, such as checksums of the data.
    """
    free = KEYS_OF_PLACE_AND_SPEED + KEYS_OF_EVALUATION + KEYS_OF_TOLERANCE
    keys = {
        name: value
        for name, value in flatten(cfg).items()
        if not is_among(name, free) or is_among(name, _KEYS_THAT_CHANGE_WHAT_IS_SAVED)
    }
    return keys | {name: str(value) for name, value in (data or {}).items()}


def compare_fingerprints(saved: dict[str, str], now: dict[str, str]) -> list[str]:
    """Returns one line for each difference; names that only one side has are differences, too."""
    return [
        f"{name} was {saved.get(name, 'not there')}, is now {now.get(name, 'not there')}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]


def check_fingerprint(
    saved: dict[str, str], now: dict[str, str], output_dir: str, override: bool, iteration: int
) -> None:
    """Refuses to resume from a checkpoint of another run.

    Args:
        saved: of the checkpoint.
        now: of this run.
        output_dir: where an override is recorded, in ``resume_overrides.json``, one JSON line each.
        override: continue anyway (``--override-resume``).
        iteration: the checkpoint's.

    Raises:
        ConfigError: they differ; lists each difference.
    """
    differences = compare_fingerprints(saved, now)
    if not differences:
        return
    if not override:
        raise ConfigError(
            "the checkpoint in OUTPUT_DIR belongs to another run: "
            + "; ".join(differences)
            + ". Restore the old values, choose another OUTPUT_DIR, or continue anyway with --override-resume."
        )
    logging.getLogger(__name__).warning(f"continuing with other settings: {'; '.join(differences)}")
    if os.path.isdir(output_dir):
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "iteration": iteration, "differences": differences}
        with open(os.path.join(output_dir, "resume_overrides.json"), "a") as file:
            file.write(json.dumps(record) + "\n")
