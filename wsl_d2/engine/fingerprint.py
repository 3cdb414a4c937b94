"""The resume fingerprint: the config keys that change a run's numbers, and facts of its data."""

from __future__ import annotations

import json
import logging
import os
import time

from detectron2.config import CfgNode, get_cfg

from wsl_d2.config import add_wsl_config
from wsl_d2.errors import ConfigError
from wsl_d2.run_keys import (
    KEYS_OF_EVALUATION,
    KEYS_OF_PLACE_AND_SPEED,
    KEYS_OF_TOLERANCE,
    VALUES_WHERE_UNKNOWN,
    flatten,
    is_among,
)

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
    """Returns one line for each difference.

    A key that one side does not know, since another version wrote it, has its default there. A fact of the data that
    only one side knows cannot be compared.
    """
    cfg = get_cfg()
    add_wsl_config(cfg)
    defaults = flatten(cfg) | VALUES_WHERE_UNKNOWN
    known = {name for name in saved.keys() | now.keys() if name in saved and name in now or _is_key(name)}
    values = {name: [side.get(name, defaults.get(name, "not there")) for side in (saved, now)] for name in known}
    return [f"{name} was {was}, is now {is_now}" for name, (was, is_now) in sorted(values.items()) if was != is_now]


def _is_key(name: str) -> bool:
    """Whether a name is a key of the config, rather than a fact of the data."""
    return "." in name or name.isupper()


def check_fingerprint(
    saved: dict[str, str], now: dict[str, str], output_dir: str, override: bool, iteration: int, misfit: str = ""
) -> None:
    """Refuses to resume from a checkpoint of another run.

    Args:
        saved: of the checkpoint.
        now: of this run.
        output_dir: where an override is recorded, in ``resume_overrides.json``, one JSON line each.
        override: continue anyway (``--override-resume``).
        iteration: the checkpoint's.
        misfit: what of it does not fit the model and its optimizer, which no override can change.

    Raises:
        ConfigError: they differ; lists each difference. Or there is a misfit.
    """
    differences = compare_fingerprints(saved, now)
    if misfit and (override or not differences):
        raise ConfigError(
            f"the checkpoint in OUTPUT_DIR cannot be continued, also not with --override-resume: {misfit}"
            + (f" ({'; '.join(differences)})" if differences else "")
            + ". To fine-tune its backbone instead, begin a run in another OUTPUT_DIR with this checkpoint as "
            "MODEL.WEIGHTS."
        )
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
