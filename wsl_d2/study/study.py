"""Studies: a grid of runs described by one YAML file, run as far as it is missing, and read back as a table.

A study file::

    title: Number of hashtag images
    axes:                             # every combination of the axes' values is a cell
      num_images: [1000, 10000]
      backbone: {small: [MODEL.BACKBONE.NAME, build_a_backbone], large: [...]}   # named lists of arguments
      seed: [0, 1, 2]
    stages:                           # each is run once for every combination of *its* axes
      subset:
        axes: [num_images]
        command: wsl-d2 data view datasets/x {folder}/train --num-images {num_images}
        done: "{folder}/train/manifest.json"
        seconds: 5                    # a first guess at its cost on one core
      pretrain:
        axes: [num_images, backbone, seed]
        needs: [subset]
        command: tools/train_net.py ... OUTPUT_DIR {folder} SEED {seed} @backbone
        done: "{folder}/backbone.pth"
        seconds: 300
    results:
      top1: {stage: probe, file: probe.json, key: top1}
    report:
      - {kind: scaling, x: num_images, series: backbone, y: top1}
      - {kind: levels, x: noise, baseline: 0, y: top1}

In commands ``{folder}`` is the folder of the run, ``{output}`` that of the study, ``{studies}`` the one above it, which
several studies can share, ``{<stage>}`` that of a needed stage, ``{<axis>}`` a value, and a word ``@<axis>`` stands for
the arguments of a named value.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

from wsl_d2.analysis.records import read_metrics
from wsl_d2.errors import UserError

_STAGE_KEYS = {"axes", "needs", "command", "done", "seconds", "all_cores"}
_REPORT_KEYS = {"scaling": {"kind", "x", "series", "y"}, "levels": {"kind", "x", "baseline", "y"}}


class StudyError(UserError, ValueError):
    """A study file is wrong, or a folder holds runs of another study."""


@dataclass(frozen=True)
class Cell:
    """One run of one stage.

    Attributes:
        name: unique in the study, e.g. "pretrain/num_images=1000,seed=0".
        stage: the stage's name.
        values: axis -> value (its name, for named values) of the stage's axes.
        folder: where the run writes.
        command: arguments of Python.
        needs: names of the cells that must be finished before.
        done: the file that exists once it is finished.
        expected_seconds: on one core.
        all_cores: whether it runs alone.
    """

    name: str
    stage: str
    values: dict
    folder: Path
    command: tuple[str, ...]
    needs: tuple[str, ...]
    done: Path
    expected_seconds: float
    all_cores: bool

    @property
    def record(self) -> Path:
        """Where the finished run's command and seconds are noted."""
        return self.folder / "study_cell.json"

    def is_finished(self) -> bool:
        """Whether its result is there, and was made by this very command.

        Raises:
            StudyError: the folder holds a run of another command.
        """
        if self.record.is_file():
            other = json.loads(self.record.read_text())["command"]
            if other != list(self.command):
                raise StudyError(
                    f"{self.folder} holds a run of another command:\n  was {shlex.join(other)}\n  is  "
                    f"{shlex.join(self.command)}\nChoose another --output, or remove that folder."
                )
            return self.done.is_file() and json.loads(self.record.read_text())["seconds"] is not None
        return False

    def note(self, seconds: float | None) -> None:
        """Notes the command, and once it is finished the seconds it took."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.record.with_name(f"{self.record.name}.partial")
        partial.write_text(json.dumps({"command": list(self.command), "seconds": seconds}) + "\n")
        os.replace(partial, self.record)

    def seconds_taken(self) -> float | None:
        """Seconds of the finished run; None before."""
        return json.loads(self.record.read_text())["seconds"] if self.record.is_file() else None


@dataclass
class Study:
    """A study file, read and checked; see the module's docstring for the format."""

    path: Path
    title: str
    description: str
    axes: dict[str, dict]  # axis -> value or its name -> arguments
    stages: dict[str, dict]
    results: dict[str, dict]
    report: list[dict]

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """Reads a study file.

        Raises:
            StudyError: it is no YAML, lacks a part, or names a stage, axis or key that does not exist.
        """
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise StudyError(f"{path}: not a readable study file ({error}).") from error
        if not isinstance(content, dict):
            raise StudyError(f"{path}: a study file is a mapping with title, axes, stages, results and report.")
        allowed = {"title", "description", "axes", "stages", "results", "report"}
        if missing := sorted((allowed - {"description"}) - content.keys()):
            raise StudyError(f"{path}: {', '.join(missing)} missing.")
        if unknown := sorted(content.keys() - allowed):
            raise StudyError(f"{path}: unknown {', '.join(unknown)}; allowed are {', '.join(sorted(allowed))}.")
        axes = {}
        for axis, values in content["axes"].items():
            if not isinstance(values, list | dict) or not values:
                raise StudyError(f"{path}: axis {axis} needs a list of values or a mapping of name -> arguments.")
            named = values if isinstance(values, dict) else dict.fromkeys(values, ())
            axes[axis] = {name: tuple(map(str, arguments or ())) for name, arguments in named.items()}
        study = cls(
            path,
            content["title"],
            content.get("description", ""),
            axes,
            content["stages"],
            content["results"],
            content["report"],
        )
        study._check()
        return study

    def _check(self) -> None:
        def refuse(text: str) -> None:
            raise StudyError(f"{self.path}: {text}")

        seen: set[str] = set()
        for name, stage in self.stages.items():
            if unknown := sorted(stage.keys() - _STAGE_KEYS):
                refuse(f"stage {name}: unknown {', '.join(unknown)}; allowed are {', '.join(sorted(_STAGE_KEYS))}.")
            for key in ("command", "done", "seconds"):
                if key not in stage:
                    refuse(f"stage {name} has no {key}.")
            if unknown := sorted(set(stage.get("axes", [])) - self.axes.keys()):
                refuse(f"stage {name}: no axis {', '.join(unknown)}; there are {', '.join(self.axes)}.")
            for need in stage.get("needs", []):
                if need not in seen:
                    refuse(f"stage {name} needs {need!r}, which is no earlier stage.")
                if extra := sorted(set(self.stages[need].get("axes", [])) - set(stage.get("axes", []))):
                    refuse(f"stage {name} needs {need}, whose axis {', '.join(extra)} it does not have.")
            seen.add(name)
        for name, result in self.results.items():
            if result.keys() != {"stage", "file", "key"} or result["stage"] not in self.stages:
                refuse(f"result {name} needs stage (one of {', '.join(self.stages)}), file and key.")
        for item in self.report:
            kind = item.get("kind")
            if kind not in _REPORT_KEYS or item.keys() != _REPORT_KEYS[kind]:
                refuse(
                    f"report {item}: kind is one of "
                    + "; ".join(f"{k} with {sorted(v)}" for k, v in _REPORT_KEYS.items())
                )
            for key in ("x", "series"):
                if key in item and item[key] not in self.axes:
                    refuse(f"report: {key} {item[key]!r} is no axis; there are {', '.join(self.axes)}.")
            if item["y"] not in self.results:
                refuse(f"report: y {item['y']!r} is no result; there are {', '.join(self.results)}.")
            if kind == "levels" and item["baseline"] not in self.axes[item["x"]]:
                refuse(f"report: baseline {item['baseline']!r} is no value of {item['x']}.")

    def cells(self, output: str | Path) -> list[Cell]:
        """Returns every run of every stage, those that others need first.

        Raises:
            StudyError: a command names something that does not exist.
        """
        output = Path(output)
        cells = []
        for stage, description in self.stages.items():
            axes = description.get("axes", [])
            for combination in itertools.product(*(self.axes[axis] for axis in axes)):
                cells.append(self._cell(output, stage, dict(zip(axes, combination, strict=True))))
        return cells

    def _cell(self, output: Path, stage: str, values: dict) -> Cell:
        description = self.stages[stage]
        folders = {need: self._folder(output, need, values) for need in description.get("needs", [])}
        folder = self._folder(output, stage, values)
        fields = {**values, **folders, "folder": folder, "output": output, "studies": output.parent}

        def fill(text: str) -> str:
            try:
                return text.format(**fields)
            except (KeyError, IndexError, ValueError) as error:
                raise StudyError(
                    f"{self.path}: stage {stage}: {text!r} names {error}; known are {', '.join(map(str, fields))}."
                ) from error

        command: list[str] = []
        for word in shlex.split(description["command"]):
            if word.startswith("@"):
                if word[1:] not in values:
                    raise StudyError(f"{self.path}: stage {stage}: {word} names no axis of the stage.")
                command += [fill(argument) for argument in self.axes[word[1:]][values[word[1:]]]]
            else:
                command.append(fill(word))
        return Cell(
            name=str(folder.relative_to(output)),
            stage=stage,
            values=values,
            folder=folder,
            command=tuple(command),
            needs=tuple(str(f.relative_to(output)) for f in folders.values()),
            done=Path(fill(description["done"])),
            expected_seconds=float(description["seconds"]),
            all_cores=bool(description.get("all_cores", False)),
        )

    def _folder(self, output: Path, stage: str, values: dict) -> Path:
        own = [f"{axis}={values[axis]}" for axis in self.stages[stage].get("axes", [])]
        return output / stage / ",".join(own) if own else output / stage

    def read_results(self, output: str | Path) -> list[dict]:
        """Returns one row per combination of the axes of a result's stage: the axes' values and the results there.

        Raises:
            StudyError: a run is unfinished or lacks its result; the message names it.
        """
        rows: dict[tuple, dict] = {}
        cells = self.cells(output)
        for name, result in self.results.items():
            for cell in cells:
                if cell.stage != result["stage"]:
                    continue
                if not cell.is_finished():
                    raise StudyError(f"{cell.name} is not finished; run the study on.")
                row = rows.setdefault(tuple(cell.values.items()), dict(cell.values))
                row[name] = _read_result(cell.folder / result["file"], result["key"])
        return list(rows.values())


def _read_result(path: Path, key: str) -> float:
    if path.name == "metrics.json":
        metrics = read_metrics(path.parent)
        if key not in metrics:
            raise StudyError(f"{path} has no {key!r}; it has {', '.join(sorted(metrics))}.")
        return float(metrics[key][1][-1])
    content = json.loads(path.read_text())
    if key not in content:
        raise StudyError(f"{path} has no {key!r}; it has {', '.join(sorted(content))}.")
    return float(content[key])
