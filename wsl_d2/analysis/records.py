"""Reads run folders: record.json, config.yaml, metrics.json, inference/coco_instances_results.json."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from wsl_d2.errors import UserError
from wsl_d2.run_keys import (
    KEYS_OF_INITIALIZATION,
    KEYS_OF_PLACE_AND_SPEED,
    KEYS_OF_RANDOM_WEIGHTS,
    flatten,
    is_among,
    same_spelling,
)

_NOT_THERE = "not there"


class RunError(UserError, ValueError):
    """A run folder lacks something, or two runs cannot be compared."""


@dataclass(frozen=True)
class Run:
    """A finished detection run.

    Args:
        folder: the run's OUTPUT_DIR.
        config: dotted key -> the value as text, as :func:`wsl_d2.run_keys.flatten` spells it; from record.json, of what
            was run, or where that has none from config.yaml.
        results: path of the detections.
        data: facts about the data, such as checksums of annotations, from record.json.
        changed: keys that count and differ in config.yaml -> its value.
    """

    folder: Path
    config: dict[str, str]
    results: Path
    data: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)

    def value(self, key: str):
        """Returns the value of a config key, None where it is absent."""
        text = self.config.get(key, "None")
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text


def read_metrics(folder: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """Returns metric -> (iterations, values), sorted; where a resumed run repeats an iteration the last one counts.

    Raises:
        RunError: there is no metrics.json.
    """
    path = Path(folder) / "metrics.json"
    if not path.is_file():
        raise RunError(f"{path} does not exist; is {folder} the OUTPUT_DIR of a training?")
    values: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line a killed run was writing; its resumed successor wrote it again
        if not isinstance(record, dict) or "iteration" not in record:
            continue
        iteration = record.pop("iteration")
        for name, value in record.items():
            values.setdefault(name, {})[iteration] = value
    return {name: (sorted(series), [series[i] for i in sorted(series)]) for name, series in values.items()}


def read_run(folder: str | Path) -> Run:
    """Opens a finished detection run.

    Raises:
        RunError: a file is missing or cannot be read; the message says which, and what to run.
    """
    folder = Path(folder)
    record, written = _read_record(folder / "record.json"), _read_config(folder / "config.yaml")
    results = folder / "inference" / "coco_instances_results.json"
    config = same_spelling(_texts(record.get("config"))) or written
    for path, is_there in ((folder / "config.yaml", config), (results, results.is_file())):
        if not is_there:
            raise RunError(
                f"{path} does not exist; finish the run with `wsl-d2 train --config-file ... --resume OUTPUT_DIR "
                f"{folder}`."
            )
    changed = {key: value for key, value in written.items() if _counts(key) and config.get(key, value) != value}
    return Run(folder, config, results, _texts(record.get("data")), changed)


def _read_record(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} cannot be read ({error}); remove it to go by config.yaml.") from error
    return record if isinstance(record, dict) else {}


def _texts(entry) -> dict[str, str]:
    return {str(key): str(value) for key, value in entry.items()} if isinstance(entry, dict) else {}


def _read_config(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise RunError(f"{path} holds no config; it must be the one that Detectron2 wrote.")
    return flatten(config)


def _counts(key: str) -> bool:
    """Whether runs that differ in a key cannot be compared."""
    return not is_among(key, KEYS_OF_PLACE_AND_SPEED + KEYS_OF_INITIALIZATION)


def differences_of(runs: dict[str, list[Run]]) -> list[str]:
    """Returns one sentence for each difference between runs, and inside a run, that makes them incomparable.

    Every key of the config counts, but those of place and speed and those of the initialization
    (:mod:`wsl_d2.run_keys`); so does each fact about the data that both runs have. What random weights decide is
    compared among the runs that start from them, and among the others.
    """
    (first_name, first_runs), *_ = runs.items()
    first = (first_name, first_runs[0])
    firsts_alike: dict[bool, tuple[str, Run]] = {}
    found = []
    for name, members in runs.items():
        for run in members:
            first_alike = firsts_alike.setdefault(bool(run.value("MODEL.WEIGHTS")), (name, run))
            for key in sorted(run.config.keys() | first[1].config.keys()):
                their_name, their = first_alike if is_among(key, KEYS_OF_RANDOM_WEIGHTS) else first
                theirs, ours = their.config.get(key, _NOT_THERE), run.config.get(key, _NOT_THERE)
                if _counts(key) and ours != theirs:
                    found.append(_difference(key, (their_name, their, theirs), (name, run, ours)))
            for key in sorted(run.data.keys() & first[1].data.keys()):
                if run.data[key] != first[1].data[key]:
                    found.append(_difference(key, (*first, first[1].data[key]), (name, run, run.data[key])))
            for key, value in sorted(run.changed.items()):
                found.append(
                    f"{key}: {run.config[key]} in {run.folder / 'record.json'}, {value} in config.yaml, which was "
                    "changed after the run (also by evaluating with other options)"
                )
    return found


def _difference(key: str, first: tuple[str, Run, str], second: tuple[str, Run, str]) -> str:
    there, here = (f"{value} in {name} ({run.folder})" for name, run, value in (first, second))
    return f"{key}: {there}, {here}"


def check_comparable(runs: dict[str, list[Run]]) -> None:
    """Refuses runs that differ in more than initialization, learning rate and seed.

    Raises:
        RunError: listing every difference with both values and folders.
    """
    if found := differences_of(runs):
        raise RunError(
            f"the runs cannot be compared, they differ in more than their initialization: {'; '.join(found)}. Use "
            "--force to compare them all the same."
        )


def initialization_of(runs: dict[str, list[Run]]) -> dict[str, dict[str, list]]:
    """Returns the keys that runs may differ in, and do -> initialization -> the value of each run."""
    found = {}
    for key in KEYS_OF_INITIALIZATION + KEYS_OF_RANDOM_WEIGHTS:
        values = {name: [run.value(key) for run in members] for name, members in runs.items()}
        if len({repr(value) for members in values.values() for value in members}) > 1:
            found[key] = values
    return found


def without_nan(value):
    """Returns the same with None for NaN and infinities, which JSON lacks (the AP of a size without objects)."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
