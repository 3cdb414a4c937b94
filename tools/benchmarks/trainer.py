"""What the trainer adds to a step: against the bare loop, detectron2's trainer and torchvision's reference loop.

All four train the same network on the same batch, which stays in memory, in turns; a ratio is the median over the turns
of a turn's time over the bare loop's of the same turn. The trainer runs with all of its hooks but saving.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarks.start import write_dataset
from detectron2.engine import AMPTrainer, SimpleTrainer, hooks
from detectron2.utils.events import EventStorage
from torch import nn

from wsl_d2.config import load_config
from wsl_d2.data import register_hashtag_dataset
from wsl_d2.data.read.loaders import collate
from wsl_d2.engine.efficiency import peak_flops
from wsl_d2.engine.parallel import build_sgd
from wsl_d2.engine.plan import RunPlan, open_plan
from wsl_d2.engine.trainer import WSLTrainer
from wsl_d2.engine.writers import build_writers
from wsl_d2.modeling.complexity import multiply_adds_per_image

_NEVER = 1 << 40
_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "Base-Hashtag-Pretraining.yaml"


def make_config(args, folder: Path):
    cfg = load_config(str(_CONFIG), [])
    cfg.MODEL.BACKBONE.NAME = f"build_{args.architecture}_backbone"
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.COMPILE.ENABLED = args.compile
    cfg.INPUT.RANDOM_RESIZED_CROP.SIZE = args.size
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("benchmark",), ()
    cfg.SOLVER.IMS_PER_BATCH = cfg.SOLVER.IMS_PER_MICRO_BATCH = args.batch_size
    cfg.SOLVER.MAX_ITER = cfg.SOLVER.CHECKPOINT_PERIOD = _NEVER
    cfg.SOLVER.BASE_LR = 1e-3
    cfg.SOLVER.AMP.ENABLED = torch.cuda.is_available()
    cfg.OUTPUT_DIR = str(folder / "out")
    os.makedirs(cfg.OUTPUT_DIR)
    return cfg


class Repeated:
    """Gives the same batch again and again."""

    def __init__(self, batch: dict):
        self.batch = batch

    def __iter__(self):
        while True:
            yield self.batch


class Driven:
    """Runs a detectron2 trainer some steps at a time, as its ``train`` does."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.storage = EventStorage(0)
        trainer.iter = trainer.start_iter = 0
        trainer.max_iter = _NEVER
        trainer.storage = self.storage
        with self.storage:
            trainer.before_train()

    def __call__(self, steps: int) -> None:
        with self.storage:
            for _ in range(steps):
                self.trainer.before_step()
                self.trainer.run_step()
                self.trainer.after_step()
                self.trainer.iter += 1


def ours(plan: RunPlan, batch: dict) -> Driven:
    trainer = WSLTrainer(plan)
    trainer._trainer.reset_data_loader(lambda: Repeated(batch))
    return Driven(trainer)


def detectron2s(cfg, batch: dict) -> Driven:
    model = WSLTrainer.build_model(cfg).train()
    optimizer = build_sgd(cfg, model)
    if cfg.SOLVER.AMP.ENABLED:
        trainer = AMPTrainer(model, Repeated(batch), optimizer, precision=torch.bfloat16)
    else:
        trainer = SimpleTrainer(model, Repeated(batch), optimizer)
    writer = hooks.PeriodicWriter(build_writers(cfg, _NEVER), period=20)
    scheduler = WSLTrainer.build_lr_scheduler(cfg, optimizer)
    trainer.register_hooks([hooks.IterationTimer(), hooks.LRScheduler(optimizer, scheduler), writer])
    return Driven(trainer)


def bare(cfg, batch: dict):
    model = WSLTrainer.build_model(cfg).train()
    optimizer = build_sgd(cfg, model)
    device, enabled = cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=enabled):
                loss = sum(model(batch).values())
            loss.backward()
            optimizer.step()

    return run


def torchvisions(cfg, batch: dict):
    """After ``train_one_epoch`` of torchvision's references/classification: float images, one label, meters."""
    model = WSLTrainer.build_model(cfg).train()
    network = nn.Sequential(_Res5(model.backbone), nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head)
    optimizer = build_sgd(cfg, model)
    device, enabled = cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    images = (batch["image"] - mean) / std
    targets = batch["labels"][: len(images)]
    meters: dict[str, list[float]] = {"loss": [], "acc1": [], "acc5": []}

    def run(steps: int) -> None:
        for _ in range(steps):
            image, target = images.to(device), targets.to(device)
            with torch.autocast(device, torch.bfloat16, enabled=enabled):
                output = network(image)
                loss = F.cross_entropy(output, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            top = output.topk(5, dim=1).indices == target[:, None]
            meters["loss"].append(loss.item())
            meters["acc1"].append(top[:, :1].float().sum().item())
            meters["acc5"].append(top.float().sum().item())

    return run


class _Res5(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images)["res5"]


def seconds_of(run, steps: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(steps)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def main(arguments: list[str] | None = None) -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="benchmark.py trainer", description=__doc__)
    parser.add_argument("--architecture", default="resnext50_32x4d" if gpu else "resnext26_8x4d")
    parser.add_argument("--batch-size", type=int, default=128 if gpu else 32)
    parser.add_argument("--size", type=int, default=224 if gpu else 112, help="pixels")
    parser.add_argument("--steps", type=int, default=40 if gpu else 20, help="in a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="torch.compile for the trainer (not for its peers)")
    parser.add_argument("--alone", action="store_true", help="only the trainer: images/s, MFU and memory")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "images", 2, max(64, args.batch_size))
        register_hashtag_dataset("benchmark", folder / "images")
        plan = open_plan(make_config(args, folder))
        cfg, dataset = plan.cfg, plan.dataset
        batch = collate([dataset[number] for number in range(args.batch_size)])
        if gpu:
            batch["image"] = batch["image"].pin_memory()
        runs = {"wsl_d2": ours(plan, batch)}
        if not args.alone:
            runs |= {"bare loop": bare(cfg, batch), "torchvision's reference loop": torchvisions(cfg, batch)}
            runs["detectron2's AMPTrainer" if gpu else "detectron2's SimpleTrainer"] = detectron2s(cfg, batch)
        for run in runs.values():
            run(5)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(args.turns):
            for name in sorted(runs, key=lambda name: hash((turn, name))):  # in another order in each turn
                seconds[name].append(seconds_of(runs[name], args.steps))
        where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
        print(
            f"{args.architecture}, {plan.dataset.num_labels:,} labels, {args.batch_size} images of {args.size} pixels, "
            f"{'bfloat16' if gpu else 'float32'}, {where}; medians of {args.turns} turns of {args.steps} steps"
        )
        for name, values in seconds.items():
            speed = args.batch_size / statistics.median(values)
            line = f"{name:30} {1e3 * statistics.median(values):9.2f} ms a step {speed:9.1f} images/s"
            if not args.alone:
                ratios = [value / base for value, base in zip(values, seconds["bare loop"], strict=True)]
                line += f"   {statistics.median(ratios):.3f} times the bare loop's"
            print(line)
        if gpu:
            model = runs["wsl_d2"].trainer._trainer.model
            peak = peak_flops(0, True)
            operations = 6 * (multiply_adds_per_image(model.backbone, args.size) + model.head.weight.numel())
            speed = args.batch_size / statistics.median(seconds["wsl_d2"])
            utilization = f"{100 * speed * operations / peak:.1f}%" if peak else "unknown"
            print(f"MFU {utilization}, memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most")


if __name__ == "__main__":
    main()
