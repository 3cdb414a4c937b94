"""What a pretraining gives on anybody's detection dataset: twin configs, their learning rates, and the study of both.

A folder of results::

    arguments.json              of the call that began it
    base.yaml                   the detector: data, classes, masks, schedule, image size
    imagenet.yaml  wsl.yaml     base.yaml and an initialization with its pixel statistics, nothing else
    sweep.yaml  sweep/          runs with each learning rate, on training images alone: a part is held out to choose by
    gain.yaml   detect/         runs with the best rate of each side, on all training images, one for each seed
    report/                     the comparison
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from wsl_d2.analysis.study import best_of_sweep
from wsl_d2.checkpoint import IncompleteLoadError, WeightFile
from wsl_d2.checkpoint.catalog import describe_public
from wsl_d2.checkpoint.convert import shape_of
from wsl_d2.checkpoint.weight_file import MissingFileError, missing_file
from wsl_d2.coco import GroundTruth, read_coco
from wsl_d2.config import find_config_file, load_config
from wsl_d2.data.read.detection_check import SECONDS_AT_START, check_detection, compare_datasets
from wsl_d2.errors import ConfigError, FaultsError
from wsl_d2.files import sha256_of, write_atomically
from wsl_d2.modeling import RESNEXT_ARCHITECTURES, count_complexity
from wsl_d2.study.claim import claim_folder
from wsl_d2.study.study import Study

SCRATCH = "scratch"
_SWEEP_SEED = 1000  # which no result uses
_RATES = (1.0, 0.5, 0.25, 0.125)  # of the config's, which is one for ImageNet weights
_HELD_OUT = 0.2  # of the training images, to choose the learning rate by
# The 1x schedule: 90,000 steps of 16 images, 12.3 epochs of COCO. Smaller datasets get as many epochs, but enough steps
# for heads that start from random weights.
_EPOCHS, _LEAST_IMAGES = 12.3, 48_000
_FLOPS = {"cpu": 2e10, "cuda": 2e13}  # operations a second of a core or a GPU, for a first guess at the cost
_STARTING, _OVERHEAD = 15.0, 0.03  # seconds of a run, and of an image
_HEADS = 1.5  # multiply-adds of a detector, those of its backbone being 1


@dataclass(frozen=True)
class Question:
    """What `wsl-d2 gain` is asked.

    Args:
        train, val: annotations in COCO's format.
        train_images, val_images: the folders of their images.
        baseline, candidate: (name, weights as MODEL.WEIGHTS takes them, or "scratch").
        config_file: of a detector that both sides share.
        architecture: of the backbone; that of the weights if None, and if they have none, the config's.
        budget: length of a training, 1 as the 1x schedule.
        iterations: the length in steps instead.
        batch_size: images a step; the config's if None.
        short_side: pixels; the config's if None.
        mask: "auto" trains masks if all objects of both datasets have one, "on", "off".
        rates: learning rates to try; by the config's if empty, and a single one is not swept.
        num_gpus: of each run; 0 for the CPU.
        overrides: further config keys for both sides, KEY VALUE ....
    """

    train: Path
    val: Path
    train_images: Path
    val_images: Path
    baseline: tuple[str, str]
    candidate: tuple[str, str]
    config_file: str = "Base-RCNN-FPN.yaml"
    architecture: str | None = None
    budget: float = 1.0
    iterations: int | None = None
    batch_size: int | None = None
    short_side: int | None = None
    mask: str = "auto"
    rates: tuple[float, ...] = ()
    num_gpus: int = 0
    overrides: tuple[str, ...] = ()

    @property
    def sides(self) -> dict[str, str]:
        """Name -> weights, of the baseline first."""
        return dict([self.baseline, self.candidate])


@dataclass
class GainStudy:
    """A question worked out.

    Attributes:
        output: folder of all results.
        lines: what was found and decided, for people.
        rates: learning rates to try.
        tasks: "box AP" and maybe "mask AP" -> key in metrics.json.
    """

    question: Question
    output: Path
    lines: list[str] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    tasks: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def sweep(self) -> Path:
        """The study of the learning rates."""
        return self.output / "sweep.yaml"

    def write_sweep(self) -> Path:
        """Writes and returns the study of the learning rates."""
        axes = {"arm": dict.fromkeys(self.question.sides, []), "lr": self.rates}
        command = [
            *("SEED", str(_SWEEP_SEED), "SOLVER.BASE_LR", "{lr}"),
            *("DATASETS.TRAIN", "('gain_sweep_train',)", "DATASETS.TEST", "('gain_sweep_val',)"),
        ]
        results = {task: {"stage": "detect", "file": "metrics.json", "key": key} for task, key in self.tasks.items()}
        title = f"Learning rates of {' and '.join(self.question.sides)}"
        return self._write(self.sweep, title, axes, command, [], results)

    def read_sweep(self) -> list[dict]:
        """Returns a row of the sweep's results for each side and rate.

        Raises:
            StudyError: runs are not finished.
        """
        return Study.load(self.sweep).read_results(self.output / "sweep")

    def write_study(self, rates: Mapping[str, float], num_seeds: int, seed_sd: float | None = None) -> Path:
        """Writes and returns the study of both sides with the rates that were chosen for them.

        Args:
            rates: side -> learning rate.
            num_seeds: trainings of each side.
            seed_sd: see :func:`wsl_d2.analysis.compare_runs`.
        """
        axes = {
            "arm": {side: ["SOLVER.BASE_LR", rates[side]] for side in self.question.sides},
            "seed": list(range(num_seeds)),
        }
        report: dict = {
            "kind": "comparison",
            "stage": "detect",
            "arms": "arm",
            "baselines": [self.question.baseline[0]],
            "ground_truth": _literal(self.question.val.resolve()),
            "images": _literal(self.question.val_images.resolve()),
        }
        if seed_sd is not None:
            report["seed_sd"] = seed_sd
        val = self.question.val
        title = f"What {self.question.candidate[0]} adds to {self.question.baseline[0]} on {val.parent.name}/{val.name}"
        return self._write(self.output / "gain.yaml", title, axes, ["SEED", "{seed}", "@arm"], [report], {})

    def _write(
        self, path: Path, title: str, axes: dict, arguments: Sequence[str], report: list[dict], results: dict
    ) -> Path:
        gpus = self.question.num_gpus
        command = ["wsl-d2", "train", "--config-file", f"{_literal(self.output)}/{{arm}}.yaml", "--resume"]
        command += ["--num-gpus", str(max(1, gpus)), *map(_literal, self.question.overrides), *arguments]
        stage = {
            "axes": list(axes),
            "command": shlex.join([*command, "OUTPUT_DIR", "{folder}"]),
            "done": "{folder}/record.json",
            "seconds": self.seconds,
            "all_cores": gpus > 0,  # one run at a time has the GPUs
            "may_diverge": path == self.sweep,
        }
        content = {"title": title, "axes": axes, "stages": {"detect": stage}, "results": results, "report": report}
        write_atomically(path, yaml.safe_dump(content, sort_keys=False, width=1000))
        return path


def prepare(question: Question, output: str | Path, is_plan: bool = False) -> GainStudy:
    """Checks both datasets, decides what the question leaves open, and writes the twin configs.

    Args:
        question: what is asked.
        output: folder of all results; an earlier call with the same question goes on there.
        is_plan: nothing will be trained yet, and public weights are not downloaded.

    Raises:
        FaultsError: a dataset has errors, one line each.
        UserError: another input cannot be used, or the folder belongs to another question.
    """
    output = Path(output).resolve()
    if question.mask not in ("auto", "on", "off"):
        raise ConfigError(f"mask is {question.mask!r}; it must be auto, on or off.")
    if len(question.sides) < 2:
        raise ConfigError(f"both sides are called {question.baseline[0]!r}; name them, as in --candidate NAME=WEIGHTS.")
    lines = _check(question)
    train, val = read_coco(question.train, say=False), read_coco(question.val, say=False)
    has_masks = all("segm" in truth.iou_types for truth in (train, val))
    masks = question.mask == "on" or (question.mask == "auto" and has_masks)
    cfg = load_config(question.config_file, list(question.overrides))
    files = {side: _read(weights, is_plan) for side, weights in question.sides.items()}
    architecture = question.architecture or _shared_architecture(files)
    if not architecture and cfg.MODEL.BACKBONE.NAME == get_cfg().MODEL.BACKBONE.NAME:
        raise ConfigError("the weights do not tell their architecture; name it by --architecture, or by --config-file.")
    if architecture and architecture not in RESNEXT_ARCHITECTURES:
        raise ConfigError(f"unknown architecture {architecture!r}; choose one of {', '.join(RESNEXT_ARCHITECTURES)}.")
    _check_architecture(files, architecture or re.sub("^build_|(_fpn)?_backbone$", "", cfg.MODEL.BACKBONE.NAME))
    batch = question.batch_size or cfg.SOLVER.IMS_PER_BATCH
    usual = cfg.SOLVER.BASE_LR * batch / cfg.SOLVER.IMS_PER_BATCH
    total = question.budget * max(_LEAST_IMAGES, _EPOCHS * len(train.imgs))
    iterations = question.iterations or math.ceil(total / batch)
    twins = {side: _initialization(file, cfg, question.num_gpus) for side, file in files.items()}
    described = {
        name: str(value.resolve()) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in vars(question).items()
        if name != "rates"
    }
    digests = {f"SHA-256 of {path.name}": sha256_of(path) for path in (question.train, question.val)}
    claim_folder(
        output, described | digests, "comparison", work=["sweep", "detect"], stages=["sweep.yaml", "gain.yaml"]
    )

    numbers = sorted(train.imgs)
    held_out = set(random.Random(0).sample(numbers, max(1, round(_HELD_OUT * len(numbers)))))
    contents = json.loads(question.train.read_text(encoding="utf-8-sig"))
    _write_part(contents, train, set(numbers) - held_out, output / "sweep_train.json")
    _write_part(contents, train, held_out, output / "sweep_val.json")
    base = _detector(question, output, cfg, train, masks, architecture, batch, iterations)
    write_atomically(output / "base.yaml", yaml.safe_dump(base, sort_keys=False))
    for name, twin in twins.items():
        write_atomically(output / f"{name}.yaml", yaml.safe_dump({"_BASE_": "base.yaml"} | twin, sort_keys=False))
    cfg = load_config(str(output / f"{question.candidate[0]}.yaml"), list(question.overrides))
    name, side = cfg.MODEL.BACKBONE.NAME, cfg.INPUT.MIN_SIZE_TEST
    if question.mask == "auto":
        lines += [f"no masks: {truth.left_out['segm']}" for truth in (train, val) if "segm" in truth.left_out]
    lines.append(
        f"{name.removeprefix('build_')}, boxes{' and masks' if cfg.MODEL.MASK_ON else ''}, {len(train.cats)} classes, "
        f"{iterations:,} steps of {batch} images ({iterations * batch / len(train.imgs):.1f} epochs), short side {side}"
    )
    rates = question.rates or tuple(float(f"{usual * factor:.4g}") for factor in _RATES)
    tasks = {"box AP": "bbox/AP"} | ({"mask AP": "segm/AP"} if cfg.MODEL.MASK_ON else {})
    seconds = _STARTING + iterations * batch * _seconds_per_image(name, side, question.num_gpus)
    return GainStudy(question, output, lines, sorted(rates), tasks, round(seconds, 1))


def _detector(
    question: Question,
    output: Path,
    cfg: CfgNode,
    train: GroundTruth,
    masks: bool,
    architecture: str | None,
    batch: int,
    iterations: int,
) -> dict:
    """The config that both sides share."""
    rows: list = [
        ("gain_train", question.train, question.train_images),
        ("gain_val", question.val, question.val_images),
        *((f"gain_sweep_{part}", output / f"sweep_{part}.json", question.train_images) for part in ("train", "val")),
    ]
    base: dict = {
        "_BASE_": os.path.abspath(find_config_file(question.config_file)),
        "MODEL": {
            "DEVICE": "cuda" if question.num_gpus else "cpu",
            "MASK_ON": masks,
            "ROI_HEADS": {"NUM_CLASSES": len(train.cats)},
            "RETINANET": {"NUM_CLASSES": len(train.cats)},
        },
        "INPUT": {"MASK_FORMAT": _mask_format(train)},
        "DATASETS": {
            "COCO_FOLDERS": [[name, *(str(path.resolve()) for path in paths)] for name, *paths in rows],
            "TRAIN": ["gain_train"],
            "TEST": ["gain_val"],
        },
        "SOLVER": {
            "IMS_PER_BATCH": batch,
            "MAX_ITER": iterations,
            "STEPS": sorted({iterations * 2 // 3, iterations * 8 // 9} - {0}),
            "WARMUP_ITERS": min(1000, iterations // 10),
            "CHECKPOINT_PERIOD": max(20, iterations // 10),
            "LOG_PERIOD": max(1, min(20, iterations // 20)),
        },
    }
    if architecture:
        base["MODEL"]["BACKBONE"] = {"NAME": f"build_{architecture}_fpn_backbone"}
    if side := question.short_side:
        scale = side / cfg.INPUT.MIN_SIZE_TEST
        longest = round(cfg.INPUT.MAX_SIZE_TEST * scale)
        base["INPUT"] |= {"MIN_SIZE_TRAIN": [side], "MAX_SIZE_TRAIN": longest, "MIN_SIZE_TEST": side}
        base["INPUT"]["MAX_SIZE_TEST"] = longest
        anchors = [[size * scale for size in sizes] for sizes in cfg.MODEL.ANCHOR_GENERATOR.SIZES]
        base["MODEL"]["ANCHOR_GENERATOR"] = {"SIZES": anchors}
    if not question.num_gpus:
        base["DATALOADER"] = {"NUM_WORKERS": 0}
    return base


def choose_rates(
    rows: Sequence[dict], sides: Iterable[str], rates: Sequence[float]
) -> tuple[dict[str, float], list[str]]:
    """Chooses each side's best learning rate: the highest mean of its APs.

    Args:
        rows: of :meth:`GainStudy.read_sweep`.
        sides: their names.
        rates: all that were tried, rising.

    Returns:
        (side -> rate, lines for people).

    Raises:
        ConfigError: a side diverged with all of them.
    """
    whole = []
    for row in rows:
        values = [value for name, value in row.items() if name.endswith(" AP")]
        found = [0.0 if math.isnan(value) else value for value in values if value is not None]
        whole.append({**row, "AP": None if None in values else sum(found) / len(found)})
    item = {"series": "arm", "x": "lr", "y": "AP"}
    chosen, lines = {}, []
    for line in best_of_sweep(item, {"arm": list(sides), "lr": list(rates)}, whole)["lines"]:
        side, points = line["series"], line["points"]
        if line["best"] is None:
            raise ConfigError(
                f"{side}: the loss was not finite with any learning rate of {list(rates)}; give lower ones."
            )
        chosen[side] = line["best"]
        tried = ", ".join(f"{p['x']:g}: " + ("diverged" if p["diverged"] else f"{p['mean']:.1f}") for p in points)
        lines.append(f"{side}: learning rate {chosen[side]:g} (mean AP on held-out training images {tried})")
        if not any(point["mean"] > 0 for point in points):
            lines.append("  no rate led to a detector that finds anything; give longer trainings")
        elif line["at_end"]:
            lines.append(f"  the {line['at_end']} that was tried is the best; others may be better: --learning-rates")
    return chosen, lines


def _check(question: Question) -> list[str]:
    """Checks both datasets; returns the warnings."""
    train, val = (
        check_detection(path, folder, seconds=SECONDS_AT_START, for_training=is_train, keep=True)
        for path, folder, is_train in (
            (question.train, question.train_images, True),
            (question.val, question.val_images, False),
        )
    )
    compare_datasets(train, val)
    if errors := [*train.errors, *val.errors]:
        raise FaultsError(errors)
    return [*train.warnings, *val.warnings]


class _Weights(NamedTuple):
    path: str
    architecture: str | None
    statistics: Mapping | None


def _read(weights: str, is_plan: bool) -> _Weights | None:
    if weights == SCRATCH:
        return None
    if is_plan and (public := describe_public(weights)):
        return _Weights(weights, *public)
    path = weights if "://" in weights else str(Path(weights).resolve())
    try:
        file = WeightFile.read(path)
    except MissingFileError:
        if re.match("(wsl|torchvision|timm)://", path):
            raise
        raise missing_file(path, SCRATCH) from None
    return _Weights(file.path, architecture_of(file.backbone().tensors), file.statistics())


def architecture_of(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Returns the key of RESNEXT_ARCHITECTURES that a backbone's tensors, by Detectron2's names, are of; or None."""
    try:
        shape = shape_of("", tensors)
    except IncompleteLoadError:
        return None
    is_whole = sum(name.endswith(".conv2.weight") for name in tensors) == sum(shape.trunk.blocks_per_stage)
    return shape.architecture if is_whole else None


def _shared_architecture(files: Mapping[str, _Weights | None]) -> str | None:
    found = {side: file.architecture for side, file in files.items() if file}
    if len(set(found.values())) > 1:
        sides = ", ".join(f"{side} of {name or 'no known ResNeXt'}" for side, name in found.items())
        raise ConfigError(f"the weights are of different architectures ({sides}); compare weights of one.")
    return next(iter(found.values()), None)


def _check_architecture(files: Mapping[str, _Weights | None], architecture: str) -> None:
    """Refuses weights that do not fill the backbone; those of a config's own builder are checked when it is built."""
    if architecture not in RESNEXT_ARCHITECTURES:
        return
    for side, file in files.items():
        if file and file.architecture != architecture:
            found = file.architecture
            choose = f", or --architecture {found} with weights of it on both sides" if found else ""
            raise ConfigError(
                f"{side}: {file.path} holds a backbone of {found or 'no known ResNeXt'}, and {architecture} "
                f"is to be trained; give weights of {architecture}{choose}."
            )


def _initialization(file: _Weights | None, cfg: CfgNode, num_gpus: int) -> dict:
    """The part of a config that is a side's own."""
    if file is None:  # random weights leave nothing to freeze
        norm = cfg.MODEL.RESNETS.NORM if cfg.MODEL.RESNETS.NORM != "FrozenBN" else "SyncBN" if num_gpus else "BN"
        return {"MODEL": {"WEIGHTS": "", "BACKBONE": {"FREEZE_AT": 0}, "RESNETS": {"NORM": norm}}}
    own: dict = {"MODEL": {"WEIGHTS": file.path}}
    if statistics := file.statistics:
        own["MODEL"] |= {"PIXEL_MEAN": statistics["pixel_mean"], "PIXEL_STD": statistics["pixel_std"]}
        own["INPUT"] = {"FORMAT": statistics["input_format"]}
    return own


def _mask_format(train: GroundTruth) -> str:
    kinds = {type(row.get("segmentation")) for row in train.anns.values() if not row["iscrowd"]}
    return "bitmask" if dict in kinds else "polygon"


def _write_part(contents: dict, truth: GroundTruth, numbers: set[int], path: Path) -> None:
    """Writes the entries of some images as they are in the file."""
    part = {
        key: [row for row in contents[key] if truth.images.number(row.get(name)) in numbers]
        for key, name in (("images", "id"), ("annotations", "image_id"))
    }
    write_atomically(path, json.dumps(contents | part))


def _seconds_per_image(backbone: str, side: int, num_gpus: int) -> float:
    architecture = backbone.removeprefix("build_").removesuffix("_fpn_backbone")
    known = architecture if architecture in RESNEXT_ARCHITECTURES else "resnext50_32x4d"
    multiply_adds = count_complexity(known).multiply_adds * side * side * 4 / 3 / 224**2
    rate = _FLOPS["cuda"] * num_gpus if num_gpus else _FLOPS["cpu"]
    return _OVERHEAD + 3 * 2 * _HEADS * multiply_adds / rate  # forward, and twice as much backward


def _literal(text: object) -> str:
    """Text that str.format leaves as it is."""
    return str(text).replace("{", "{{").replace("}", "}}")
