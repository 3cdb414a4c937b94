"""Studies: a grid of runs described by one YAML file, run as far as it is missing, and read back as a table.

A study file::

    title: Number of hashtag images
    axes:                             # every combination of the axes' values is a cell
      num_images: [1000, 10000]
      arm: {scratch: [], wsl: [MODEL.WEIGHTS, "{pretrain}/backbone.pth"]}   # named lists of arguments
      seed: [0, 1, 2]
    select: {seed: [0]}               # values that are run if the command line does not name others
    stages:                           # each is run once for every combination of *its* axes
      subset:
        axes: [num_images]
        command: wsl-d2 data view datasets/x {folder}/train --num-images {num_images}
        done: "{folder}/train/manifest.json"
        seconds: 5                    # a first guess at its cost on one core
      pretrain:
        axes: [num_images, arm, seed]
        only: {arm: [wsl]}            # and for these values alone
        needs: [subset]
        command: wsl-d2 train --config-file ... --resume OUTPUT_DIR {folder} SEED {seed}
        environment: {DETECTRON2_DATASETS: "{studies}/datasets"}
        done: "{folder}/backbone.pth"
        seconds: 300
        all_cores: true               # runs alone
        may_diverge: true             # a loss that is not finite is a result and not the end
    results:
      top1: {stage: probe, file: probe.json, key: top1}
    labels: {top1: "top-1 accuracy, %"}   # of results and axes, with units, for tables and plots
    report:
      - {kind: scaling, x: num_images, series: backbone, y: top1}
      - {kind: levels, x: noise, baseline: 0, y: top1}
      - {kind: sweep, x: lr, series: arm, y: AP}    # the best x of each series; higher is better, diverged runs show
      - {kind: comparison, stage: detect, arms: arm, baselines: [scratch], ground_truth: "{world}/val.json",
         images: "{world}/val", curves: pretrain, pages: [num_images]}   # wsl-d2 compare; a page for each world and
                                        # number of images, its seeds together; curves and pages may be left out

In commands ``{folder}`` is the folder of the run, ``{output}`` that of the study, ``{studies}`` the one above it, which
several studies can share, ``{<stage>}`` that of a needed stage, ``{<axis>}`` a value, and a word ``@<axis>`` stands for
the arguments of a named value. A command begins with ``wsl-d2`` or with a Python script of the repository.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from wsl_d2.analysis.records import read_metrics
from wsl_d2.errors import UserError
from wsl_d2.files import write_atomically

_STAGE_KEYS = {"axes", "only", "needs", "command", "environment", "done", "seconds", "all_cores", "may_diverge"}
_REPORT_KEYS = {
    "scaling": {"kind", "x", "series", "y"},
    "levels": {"kind", "x", "baseline", "y"},
    "sweep": {"kind", "x", "series", "y"},
    "comparison": {"kind", "stage", "arms", "baselines", "ground_truth", "images", "curves", "pages", "seed_sd"},
}
_OPTIONAL_KEYS = {"curves", "pages", "seed_sd"}


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
        environment: variables it is given.
        needs: names of the cells that must be finished before.
        done: the file that exists once it is finished.
        expected_seconds: on one core.
        all_cores: whether it runs alone.
        may_diverge: whether it may end without its result because its loss is not finite.
    """

    name: str
    stage: str
    values: dict
    folder: Path
    command: tuple[str, ...]
    environment: dict[str, str]
    needs: tuple[str, ...]
    done: Path
    expected_seconds: float
    all_cores: bool
    may_diverge: bool

    @property
    def record(self) -> Path:
        """Where the finished run's command and seconds are noted."""
        return self.folder / "study_cell.json"

    def is_finished(self) -> bool:
        """Whether its result is there, and was made by this very command.

        Raises:
            StudyError: the folder holds a run of another command.
        """
        if not self.record.is_file():
            return False
        noted = self._noted()
        if (other := noted["command"]) != list(self.command):
            raise StudyError(
                f"{self.folder} holds a run of another command; it was `{shlex.join(other)}` and is now "
                f"`{shlex.join(self.command)}`. Choose another --output, or remove that folder."
            )
        return noted["seconds"] is not None and (self.done.is_file() or self.has_diverged())

    def has_diverged(self) -> bool:
        """Whether it ended because its loss was not finite."""
        return bool(self._noted().get("diverged"))

    def note(self, seconds: float | None, *, seconds_so_far: float = 0.0, diverged: bool = False) -> None:
        """Notes what the run is, and once it is finished the seconds it took, with those of all its starts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        what = {"stage": self.stage, "values": self.values, "command": list(self.command), "seconds": seconds}
        more = {"seconds_so_far": seconds_so_far} if seconds is None else {"diverged": True} if diverged else {}
        write_atomically(self.record, json.dumps(what | more) + "\n")

    def seconds_taken(self) -> float | None:
        """Seconds of the finished run; None before."""
        return self._noted().get("seconds")

    def seconds_so_far(self) -> float:
        """Seconds that an unfinished run was at work before it was cut off."""
        return self._noted().get("seconds_so_far", 0.0)

    def _noted(self) -> dict:
        return json.loads(self.record.read_text()) if self.record.is_file() else {}


def _with_baselines(item: dict, known: Mapping[str, Mapping], chosen: Mapping[str, Mapping]) -> dict:
    """Returns an item of a report without the baselines of a comparison that the study knows and does not run."""
    if item.get("kind") != "comparison" or item.get("arms") not in known or not isinstance(item.get("baselines"), list):
        return item
    arms = item["arms"]
    kept = [value for value in item["baselines"] if value in chosen[arms] or value not in known[arms]]
    return item | {"baselines": kept or item["baselines"]}


@dataclass
class Study:
    """A study file, read and checked; see the module's docstring for the format."""

    path: Path
    title: str
    description: str
    axes: dict[str, dict]  # axis -> value or its name -> arguments, of the values that are run
    stages: dict[str, dict]
    results: dict[str, dict]
    report: list[dict]
    labels: dict[str, str] = field(default_factory=dict)  # axis or result -> its name and unit on pages

    @classmethod
    def load(cls, path: str | Path, select: Mapping[str, Sequence] | None = None) -> Study:
        """Reads a study file.

        Args:
            path: of the file.
            select: axis -> the values to run, in place of the file's own selection. Of an axis with named values they
                are among these; of another axis they may be new ones.

        Raises:
            StudyError: there is none, it is no YAML, lacks a part, or names a stage, axis, value or key that is none.
        """
        path = Path(path)
        if not path.is_file():
            raise StudyError(f"{path} does not exist, or is no file; studies of the mini-world are in configs/Studies.")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise StudyError(f"{path}: not a readable study file ({error}).") from error
        if not isinstance(content, dict):
            raise StudyError(f"{path}: a study file is a mapping with title, axes, stages, results and report.")
        allowed = {"title", "description", "axes", "select", "stages", "results", "labels", "report"}
        if missing := sorted({"title", "axes", "stages", "report"} - content.keys()):
            raise StudyError(f"{path}: {', '.join(missing)} missing.")
        if unknown := sorted(content.keys() - allowed):
            raise StudyError(f"{path}: unknown {', '.join(unknown)}; allowed are {', '.join(sorted(allowed))}.")
        axes: dict[str, dict] = {}
        for axis, values in content["axes"].items():
            if not isinstance(values, list | dict) or not values:
                raise StudyError(f"{path}: axis {axis} needs a list of values or a mapping of name -> arguments.")
            named = values if isinstance(values, dict) else dict.fromkeys(values, ())
            axes[axis] = {name: tuple(map(str, arguments or ())) for name, arguments in named.items()}
        known = dict(axes)
        for axis, chosen in {**content.get("select", {}), **(select or {})}.items():
            if axis not in axes:
                raise StudyError(f"{path}: there is no axis {axis} to select from; there are {', '.join(axes)}.")
            if any(axes[axis].values()) and (new := [value for value in chosen if value not in axes[axis]]):
                raise StudyError(f"{path}: {axis} has no value {new[0]!r}; choose among {_list(axes[axis])}.")
            axes[axis] = {value: axes[axis].get(value, ()) for value in chosen}
        study = cls(
            path,
            content["title"],
            content.get("description", ""),
            axes,
            content["stages"],
            content.get("results", {}),
            [_with_baselines(item, known, axes) for item in content["report"]],
            content.get("labels", {}),
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
            if unknown := sorted(stage.get("only", {}).keys() - set(stage.get("axes", []))):
                refuse(f"stage {name}: only names {', '.join(unknown)}, which is none of its axes.")
            for need in stage.get("needs", []):
                if need not in seen:
                    refuse(f"stage {name} needs {need!r}, which is no earlier stage.")
                if extra := sorted(set(self.stages[need].get("axes", [])) - set(stage.get("axes", []))):
                    refuse(f"stage {name} needs {need}, whose axis {', '.join(extra)} it does not have.")
            seen.add(name)
        for name, result in self.results.items():
            if result.keys() != {"stage", "file", "key"} or result["stage"] not in self.stages:
                refuse(f"result {name} needs stage (one of {', '.join(self.stages)}), file and key.")
        if unknown := sorted(self.labels.keys() - self.axes.keys() - self.results.keys()):
            refuse(f"labels: {unknown[0]!r} is no axis or result; there are {_list([*self.axes, *self.results])}.")
        for item in self.report:
            kind = item.get("kind")
            allowed = _REPORT_KEYS.get(str(kind), set())
            if not allowed - _OPTIONAL_KEYS <= item.keys() <= allowed:
                refuse(
                    f"report {item}: kind is one of "
                    + "; ".join(f"{k} with {sorted(v)}" for k, v in _REPORT_KEYS.items())
                )
            for key in ("x", "series", "arms"):
                if key in item and item[key] not in self.axes:
                    refuse(f"report: {key} {item[key]!r} is no axis; there are {', '.join(self.axes)}.")
            for key in ("stage", "curves"):
                if key in item and item[key] not in self.stages:
                    refuse(f"report: {key} {item[key]!r} is no stage; there are {', '.join(self.stages)}.")
            for axis in item.get("pages", []):
                others = [name for name in self.stages[item["stage"]].get("axes", []) if name != item["arms"]]
                if axis not in others:
                    refuse(
                        f"report: pages {axis!r} is no axis of stage {item['stage']} but the arms'; {_list(others)}."
                    )
            if "y" in item and item["y"] not in self.results:
                refuse(f"report: y {item['y']!r} is no result; there are {', '.join(self.results)}.")
            x, baselines = (
                (item["arms"], item["baselines"]) if kind == "comparison" else (item["x"], [item.get("baseline")])
            )
            if kind in ("scaling", "sweep") and not all(
                isinstance(value, int | float) and value > 0 for value in self.axes[item["x"]]
            ):
                refuse(
                    f"report: {kind} needs an axis of numbers above 0; {item['x']} has {_list(self.axes[item['x']])}."
                )
            if kind not in ("scaling", "sweep") and (
                unknown := [value for value in baselines if value not in self.axes[x]]
            ):
                refuse(f"report: baseline {unknown[0]!r} is no value of {x}; there are {_list(self.axes[x])}.")

    def cells(self, output: str | Path) -> list[Cell]:
        """Returns every run of every stage, those that others need first.

        Raises:
            StudyError: a command names something that does not exist.
        """
        output = Path(output)
        cells = []
        for stage, description in self.stages.items():
            axes, only = description.get("axes", []), description.get("only", {})
            for combination in itertools.product(*(self.axes[axis] for axis in axes)):
                values = dict(zip(axes, combination, strict=True))
                if all(values[axis] in chosen for axis, chosen in only.items()):
                    cells.append(self._cell(output, stage, values))
        exist = {cell.name for cell in cells}
        return [replace(cell, needs=tuple(need for need in cell.needs if need in exist)) for cell in cells]

    def fill(self, text: str, output: Path, stage: str, values: dict) -> str:
        """Returns a text of the study file with the names in braces filled in, as for a run of a stage.

        Raises:
            StudyError: it names something that does not exist.
        """
        folders = {need: self._folder(output, need, values) for need in self.stages[stage].get("needs", [])}
        folder = self._folder(output, stage, values)
        fields = {**values, **folders, "folder": folder, "output": output, "studies": output.parent}
        try:
            return text.format(**fields)
        except (KeyError, IndexError, ValueError) as error:
            raise StudyError(
                f"{self.path}: stage {stage}: {text!r} names {error}; known are {', '.join(map(str, fields))}."
            ) from error

    def _cell(self, output: Path, stage: str, values: dict) -> Cell:
        description = self.stages[stage]
        folder = self._folder(output, stage, values)
        needs = [self._folder(output, need, values) for need in description.get("needs", [])]

        def fill(text: str) -> str:
            return self.fill(text, output, stage, values)

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
            environment={name: fill(str(value)) for name, value in description.get("environment", {}).items()},
            needs=tuple(str(need.relative_to(output)) for need in needs),
            done=Path(fill(description["done"])),
            expected_seconds=float(description["seconds"]),
            all_cores=bool(description.get("all_cores", False)),
            may_diverge=bool(description.get("may_diverge", False)),
        )

    def _folder(self, output: Path, stage: str, values: dict) -> Path:
        own = [f"{axis}={values[axis]}" for axis in self.stages[stage].get("axes", [])]
        return output / stage / ",".join(own) if own else output / stage

    def check_finished(self, cell: Cell) -> None:
        """Raises:
        StudyError: a run is not finished."""
        if not cell.is_finished():
            raise StudyError(f"{cell.name} is not finished; run the study on.")

    def read_results(self, output: str | Path) -> list[dict]:
        """Returns one row per combination of the axes of a result's stage: the axes' values and the results of the runs
        there, None of one that diverged.

        Raises:
            StudyError: a run is unfinished or lacks its result; the message names it.
        """
        rows: dict[tuple, dict] = {}
        cells = self.cells(output)
        for name, result in self.results.items():
            for cell in cells:
                if cell.stage != result["stage"]:
                    continue
                self.check_finished(cell)
                row = rows.setdefault(tuple(cell.values.items()), dict(cell.values))
                diverged = cell.has_diverged()
                row[name] = None if diverged else _read_result(cell.folder / result["file"], result["key"])
        return list(rows.values())


def _list(values: Iterable) -> str:
    return ", ".join(map(str, values))


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
