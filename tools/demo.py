#!/usr/bin/env python3
"""The whole system in miniature: renders a world, pretrains, trains detectors, compares their AP.

    tools/demo.py [--seed 0] [--size small|full] [--output output/demo]

Every stage is a command of this repository, printed before it runs. Finished stages are kept; after Ctrl-C the same
command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from wsl_d2.analysis import read_metrics

ROOT = Path(__file__).resolve().parent.parent
PRETRAINING = "configs/Hashtag-Pretraining/miniworld_{}.yaml"
DETECTION = "configs/COCO-InstanceSegmentation/miniworld_mask_rcnn_X_26_8x4d_FPN_{}.yaml"
# Arms of the comparison: name -> pretraining config. "imagenet" is the clean control at its plateau,
# "imagenet_equal_views" the same control with as many image views as "wsl".
ARMS = {"scratch": None, "imagenet": "imagenet", "imagenet_equal_views": "imagenet_equal_views", "wsl": "wsl"}
DATA_SIZES = (2000, 8000)  # further numbers of hashtag images of --size full; each a subset of the next


@dataclass
class Stage:
    """One command, run once everything it needs is done.

    Args:
        name: unique; also the name of its log file.
        command: arguments of this Python.
        needs: names of stages.
        is_done: whether its results are complete.
        expected_seconds: on one core of a 2-core machine, until its own progress says better.
        metrics, max_iter: where a training's progress is read, and its length.
        uses_all_cores: runs alone.
        may_diverge: a failure is a result (of a learning rate that is too high), not the end.
    """

    name: str
    command: list[str]
    needs: list[str]
    is_done: object
    expected_seconds: float
    metrics: Path | None = None
    max_iter: int = 0
    uses_all_cores: bool = False
    may_diverge: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None
    start: float = 0.0
    first_iteration: int = 0

    def iteration(self) -> int:
        """Iterations finished, 0 before the first record."""
        if not self.metrics or not self.metrics.exists():
            return 0
        for line in reversed(self.metrics.read_text().splitlines()):
            try:
                return json.loads(line)["iteration"] + 1
            except (ValueError, KeyError):
                continue
        return 0

    def remaining_seconds(self) -> float:
        """Estimated seconds left, from its own speed once that is known."""
        if self.process is None:
            left = 1 - self.iteration() / self.max_iter if self.max_iter else 1
            return self.expected_seconds * left
        elapsed = time.monotonic() - self.start
        iteration = self.iteration()
        if self.max_iter and iteration - self.first_iteration > 0.03 * self.max_iter:
            return elapsed / (iteration - self.first_iteration) * (self.max_iter - iteration)
        return max(5.0, self.expected_seconds - elapsed)


def max_iter_of(config: str, opts: list[str]) -> int:
    """The length of a run in iterations, from its config and overrides."""
    from wsl_d2.engine.main import load_config
    from wsl_d2.engine.schedule import resolve_schedule

    cfg = load_config(str(ROOT / config), opts)
    resolve_schedule(cfg, images_per_epoch=0)
    return cfg.SOLVER.MAX_ITER


def has_ap(run: Path) -> bool:
    """Whether a detection run was evaluated to its end."""
    metrics = run / "metrics.json"
    results = run / "inference" / "coco_instances_results.json"
    return results.is_file() and metrics.is_file() and '"bbox/AP"' in metrics.read_text()


def train_stage(name: str, config: str, run: Path, needs: list[str], is_done, seconds: float, opts: list[str]) -> Stage:
    opts = [*opts, "OUTPUT_DIR", str(run)]
    return Stage(
        name=name,
        command=["tools/train_net.py", "--config-file", config, "--resume", *opts],
        needs=needs,
        is_done=is_done,
        expected_seconds=seconds,
        metrics=run / "metrics.json",
        max_iter=max_iter_of(config, opts),
    )


def detection_run(output: Path, arm: str, lr: float | None) -> Path:
    """The run folder of one detector."""
    return output / (f"detection_{arm}" if lr is None else f"detection_{arm}_lr{lr:g}")


def report_stage(name: str, report: Path, seeds: list[Path], world: Path, arms: dict, needs: list[str]) -> Stage:
    """The comparison of all arms against both clean controls, over the given seeds' folders."""
    title = "What hashtags added in the mini-world"
    command = ["tools/compare_ap.py", "--output", str(report), "--title", title]
    command += ["--baseline", "imagenet", "--baseline", "imagenet_equal_views"]
    command += ["--ground-truth", str(world / "detection/annotations/instances_val.json")]
    command += ["--images", str(world / "detection/val")]
    for arm, config in arms.items():
        for folder in seeds:
            command += ["--run", f"{arm}={detection_run(folder, arm, None)}"]
        if config is not None:
            command += ["--curve", f"{arm}={seeds[0] / f'pretrain_{arm}'}"]
    return Stage(name, command, needs, lambda: False, expected_seconds=30, uses_all_cores=True)


def other_finished_seeds(args, arms: dict) -> list[Path]:
    """Folders of other seeds in the same output whose detectors are all evaluated."""
    own = args.output / f"seed{args.seed}"
    folders = sorted(args.output.glob("seed*"))
    return [f for f in folders if f != own and all(has_ap(detection_run(f, arm, None)) for arm in arms)]


def write_sweep(args, path: Path) -> None:
    """Writes every swept learning rate's AP, and the best one of each initialisation by box plus mask AP."""
    output = args.output / f"seed{args.seed}"
    table: dict[str, dict] = {}
    for arm in ARMS:
        rows: dict[str, dict | str] = {}
        for lr in args.sweep_lr:
            run = detection_run(output, arm, lr)
            if not has_ap(run):
                rows[f"{lr:g}"] = "diverged"
                continue
            metrics = read_metrics(run)
            keys = ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50")
            rows[f"{lr:g}"] = {key: round(metrics[key][1][-1], 2) for key in keys}
        finished = [lr for lr, row in rows.items() if row != "diverged"]
        best = max(finished, key=lambda lr: rows[lr]["bbox/AP"] + rows[lr]["segm/AP"])
        table[arm] = {"best": float(best), "swept": rows}
    path.write_text(json.dumps({"world_seed": args.world_seed, "seed": args.seed, "arms": table}, indent=1) + "\n")
    print(f"{path}: " + ", ".join(f"{arm} {row['best']:g}" for arm, row in table.items()))


def plan(args) -> list[Stage]:
    """The stages in the order in which they are preferred when several could run."""
    output = args.output / f"seed{args.seed}"
    world = args.output / "datasets" / "miniworld"
    common = ["SEED", str(args.seed), "MODEL.DEVICE", args.device]
    prepare = ["datasets/prepare_miniworld.py", "--seed", str(args.world_seed)]
    if args.held_out_styles:
        prepare += ["--held-out-styles", args.held_out_styles]
    if args.tiny:
        prepare += ["--tiny"]
    short_pretraining = ["SOLVER.TOTAL_IMAGES", "320", "SOLVER.WARMUP_IMAGES", "64", "SOLVER.IMS_PER_BATCH", "16",
                         "SOLVER.CHECKPOINT_PERIOD", "5", "SOLVER.LOG_PERIOD", "1"] if args.tiny else []  # fmt: skip
    short_detection = ["SOLVER.MAX_ITER", "6", "SOLVER.STEPS", "(4,)", "SOLVER.WARMUP_ITERS", "2",
                       "SOLVER.IMS_PER_BATCH", "2", "SOLVER.LOG_PERIOD", "1"] if args.tiny else []  # fmt: skip

    stages = [
        Stage(
            name="world",
            command=[*prepare, "--output", str(world)],
            needs=[],
            is_done=lambda: (world / "contact_sheet.png").is_file(),
            expected_seconds=90,
            uses_all_cores=True,
        )
    ]
    arms = dict(ARMS)
    overrides: dict[str, list[str]] = {}
    worlds = {}
    for size in DATA_SIZES if args.size == "full" else ():
        arm = f"wsl_{size}_images"
        arms[arm] = "wsl"
        folder = args.output / "datasets" / f"miniworld_{size}"
        worlds[arm] = f"world_{size}"
        stages.append(
            Stage(
                name=worlds[arm],
                command=[*prepare, "--num-hashtag-images", str(size), "--output", str(folder)],
                needs=["world"],
                is_done=lambda folder=folder: (folder / "contact_sheet.png").is_file(),
                expected_seconds=15,
                uses_all_cores=True,
            )
        )
        overrides[arm] = [
            "DATASETS.HASHTAG_FOLDERS",
            str([["miniworld_hashtags_train", f"{folder.name}/hashtags/train"],
                 ["miniworld_hashtags_val", "miniworld/hashtags/val"]]),
        ]  # fmt: skip
    pretraining, detection = [], []
    for arm, config in arms.items():
        needs, weights = ["world"], []
        if config is not None:
            backbone = output / f"pretrain_{arm}" / "backbone.pth"
            pretraining.append(
                train_stage(
                    f"pretrain_{arm}",
                    PRETRAINING.format(config),
                    backbone.parent,
                    [worlds.get(arm, "world")],
                    backbone.is_file,
                    130 if arm == "imagenet" else 400,
                    [*common, *short_pretraining, *overrides.get(arm, [])],
                )
            )
            needs, weights = [f"pretrain_{arm}"], ["MODEL.WEIGHTS", str(backbone)]
        for order, lr in enumerate(args.sweep_lr or [None]):
            run = detection_run(output, arm, lr)
            stage = train_stage(
                run.name,
                DETECTION.format(config or arm),
                run,
                needs,
                lambda run=run: has_ap(run),
                190,
                [*common, *short_detection, *weights, *(["SOLVER.BASE_LR", str(lr)] if lr else [])],
            )
            stage.may_diverge = lr is not None
            detection.append((order, stage))
    pretraining.sort(key=lambda stage: -stage.expected_seconds)
    detectors = [stage for _, stage in sorted(detection, key=lambda pair: pair[0])]
    stages += pretraining + detectors
    if not args.sweep_lr:
        needs = [stage.name for stage in detectors]
        stages.append(report_stage("report", output / "report", [output], world, arms, needs))
        if others := other_finished_seeds(args, arms):
            seeds = sorted([output, *others])
            stages.append(report_stage("report_of_all_seeds", args.output / "report", seeds, world, arms, ["report"]))
    for stage in stages:
        stage.environment = {
            "DETECTRON2_DATASETS": str(args.output / "datasets"),
            "OMP_NUM_THREADS": "1",
        }
    return stages


def time_left(stages: list[Stage], cores: int) -> float:
    """Estimated seconds until everything is done."""
    total = sum(stage.remaining_seconds() / (1 if stage.uses_all_cores else cores) for stage in stages)
    longest = max((stage.remaining_seconds() for stage in stages), default=0.0)
    return max(total, longest)


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def run_stages(stages: list[Stage], cores: int, logs: Path) -> None:
    """Runs all stages, as many at once as there are cores, and prints their progress.

    Raises:
        SystemExit: a stage failed; the message names its log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    done: set[str] = set()
    waiting, running = list(stages), []
    begin = last_line = time.monotonic()

    def say(text: str) -> None:
        left = minutes(time_left(waiting + running, cores))
        print(f"[{minutes(time.monotonic() - begin)}, about {left} left] {text}", flush=True)

    try:
        while waiting or running:
            for stage in list(waiting):
                if stage.is_done():  # type: ignore[operator]
                    waiting.remove(stage)
                    done.add(stage.name)
                    say(f"{stage.name}: done before")
                    continue
                alone = any(other.uses_all_cores for other in running) or (stage.uses_all_cores and running)
                if len(running) >= cores or alone or not set(stage.needs) <= done:
                    continue
                waiting.remove(stage)
                running.append(stage)
                say(f"{stage.name}: {shlex.join(stage.command)}")
                stage.start, stage.first_iteration = time.monotonic(), stage.iteration()
                with open(logs / f"{stage.name}.log", "ab") as log:
                    stage.process = subprocess.Popen(
                        [sys.executable, *stage.command],
                        cwd=ROOT,
                        env=os.environ | stage.environment,
                        stdout=log if not stage.name.startswith("report") else None,
                        stderr=subprocess.STDOUT if not stage.name.startswith("report") else None,
                        start_new_session=True,
                    )
            time.sleep(0.5)
            for stage in list(running):
                assert stage.process is not None
                status = stage.process.poll()
                if status is None:
                    continue
                running.remove(stage)
                log = (logs / f"{stage.name}.log").read_text(errors="replace") if status != 0 else ""
                if stage.may_diverge and "FloatingPointError" in log:
                    done.add(stage.name)
                    say(f"{stage.name}: diverged")
                    continue
                if status != 0:
                    raise SystemExit(
                        f"error: stage {stage.name} ended with status {status}; the end of {logs / stage.name}.log:\n"
                        + "\n".join(log.splitlines()[-15:])
                    )
                done.add(stage.name)
                say(f"{stage.name}: done in {minutes(time.monotonic() - stage.start)}")
            if running and time.monotonic() - last_line > 20:
                last_line = time.monotonic()
                say(", ".join(f"{s.name} {s.iteration()}/{s.max_iter}" if s.max_iter else s.name for s in running))
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the same command goes on from here.") from None
    finally:
        for stage in running:
            assert stage.process is not None
            if stage.process.poll() is None:
                os.killpg(stage.process.pid, signal.SIGTERM)
                stage.process.wait()


def check_settings(args) -> None:
    """Refuses to mix runs of different settings in one output folder."""
    settings = {"world_seed": args.world_seed, "held_out_styles": args.held_out_styles, "tiny": args.tiny}
    path = args.output / "demo.json"
    if path.is_file() and (old := json.loads(path.read_text())) != settings:
        raise SystemExit(
            f"error: {args.output} holds a demo with {old}, asked for {settings}; choose another --output or remove it."
        )
    args.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo")
    parser.add_argument("--seed", type=int, default=0, help="seed of pretraining and detection")
    parser.add_argument("--world-seed", type=int, default=0, help="seed of the rendered images")
    parser.add_argument("--size", choices=("small", "full"), default="small", help="full adds the data-size sweep")
    parser.add_argument("--held-out-styles", default="", help="comma-separated art styles only detection images use")
    parser.add_argument("--tiny", action="store_true", help="a world of a few dozen images, to try the machinery")
    parser.add_argument("--device", default="cpu", help="MODEL.DEVICE of every training")
    parser.add_argument(
        "--sweep-lr",
        type=float,
        nargs="+",
        help="instead of the comparison, train every detector at each of these SOLVER.BASE_LR and write lr_sweep.json",
    )
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="stages run at once, one thread each")
    parser.add_argument("--plan", action="store_true", help="print the stages and their commands, run nothing")
    args = parser.parse_args()
    args.output = args.output.resolve()
    if args.plan:
        for stage in plan(args):
            print(f"{stage.name}: {shlex.join(stage.command)}")
        return
    check_settings(args)
    report = args.output / f"seed{args.seed}" / "report" / "report.html"
    run_stages(plan(args), args.cores, args.output / f"seed{args.seed}" / "logs")
    if args.sweep_lr:
        write_sweep(args, args.output / "lr_sweep.json")
    else:
        print(f"\nThe page: {report}")
        if (args.output / "report" / "report.html").is_file():
            print(f"The page of all seeds: {args.output / 'report' / 'report.html'}")


if __name__ == "__main__":
    main()
