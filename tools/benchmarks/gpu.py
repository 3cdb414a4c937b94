"""The first half hour on a GPU: training steps beside timm's and torchvision's, one option at a time, data, detection.

Each measurement is a process of its own, so that what runs out of memory costs one row; the most telling come first,
and what the minutes do not allow is named. `--small` runs all of it in small on any device, to see that it works.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
_MARK = "RESULT "
_BATCHES = {"resnext50_32x4d": 256, "resnext101_32x8d": 128, "resnext101_32x16d": 64, "resnext101_32x48d": 8}
_OPTIONS = {  # one at a time, of ours on 101_32x8d
    "float32 instead of bfloat16": {"amp": False},
    "contiguous instead of channels_last": {"channels_last": False},
    "SGD that is not fused": {"fused": False},
    "torch.compile": {"compile": True},
    "activation checkpointing of res2 to res4": {"checkpointed": True},
}


def plan_of(small: bool) -> list[dict]:
    """The measurements, in order; each has a name, a kind and what it needs."""
    base = {"size": 32, "batch_size": 2, "steps": 1, "turns": 1} if small else {"size": 224, "steps": 15, "turns": 5}
    steps: list[dict] = [{"name": "tests marked gpu", "kind": "tests"}]
    for architecture in ("resnext101_32x8d", "resnext50_32x4d", "resnext101_32x16d")[: 1 if small else 3]:
        chosen = "resnext50_32x4d" if small else architecture
        peers = {"kind": "step", "architecture": chosen, "peers": True}
        steps.append({"name": f"training step, {chosen}", "batch_size": _BATCHES[architecture], **peers, **base})
    architecture = "resnext26_8x4d" if small else "resnext101_32x8d"
    for name, option in _OPTIONS.items():
        row = {"name": name, "kind": "step", "architecture": architecture, "batch_size": _BATCHES["resnext101_32x8d"]}
        steps.append({**row, **base, "option": option})
    for decoding in ("fast", "device"):
        steps.append({"name": f"with data, decoding {decoding}", "kind": "data", "decoding": decoding, **base})
        steps[-1] |= {"architecture": architecture, "batch_size": base.get("batch_size", _BATCHES["resnext101_32x8d"])}
    for trainer in ("ours", "Detectron2's"):
        steps.append(
            {"name": f"Mask R-CNN, trainer {trainer}", "kind": "detection", "trainer": trainer, "small": small}
        )
    large = "resnext26_8x4d" if small else "resnext101_32x48d"
    row = {"name": f"fits: {large}", "kind": "step", "architecture": large, "batch_size": _BATCHES["resnext101_32x48d"]}
    steps.append({**row, **base, "steps": 1, "turns": 1, "option": {"checkpointed": True}})
    return steps


# ----- measurements, each in a process of its own


def measure_tests(step: dict) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "0", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.strip().splitlines()
    return {"summary": lines[-1] if lines else done.stderr[-200:], "status": done.returncode}


def measure_step(step: dict) -> dict:
    from benchmarks import trainer as t
    from benchmarks.start import write_dataset

    from wsl_d2.data import register_hashtag_dataset
    from wsl_d2.data.read.loaders import collate
    from wsl_d2.engine.efficiency import peak_flops
    from wsl_d2.engine.plan import open_plan
    from wsl_d2.modeling.complexity import multiply_adds_per_image

    option, batch_size, size = step.get("option", {}), step["batch_size"], step["size"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "images", 2, max(64, batch_size))
        register_hashtag_dataset("benchmark", folder / "images")
        wanted = {"architecture": step["architecture"], "compile": option.get("compile", False)}
        cfg = t.make_config(argparse.Namespace(**wanted, size=size, batch_size=batch_size), folder)
        cfg.SOLVER.AMP.ENABLED &= option.get("amp", True)
        if option.get("checkpointed"):
            cfg.MODEL.RESNEXT.CHECKPOINT_STAGES = ["res2", "res3", "res4"]
        plan = open_plan(cfg)
        batch = collate([plan.dataset[number] for number in range(batch_size)])
        if torch.cuda.is_available():
            batch["image"] = batch["image"].pin_memory()
        runs = {"ours": t.ours(plan, batch)}
        loop = runs["ours"].trainer._trainer
        if not option.get("channels_last", True):
            loop.model.to(memory_format=torch.contiguous_format)
        if not option.get("fused", True):
            for group in [loop.optimizer.defaults, *loop.optimizer.param_groups]:
                group["fused"] = False
        if step.get("peers"):
            runs["timm"] = _timms(step["architecture"], plan.cfg, batch)
            runs["torchvision"] = t.torchvisions(plan.cfg, batch)
        for run in runs.values():
            run(1 if step["steps"] == 1 else 5)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(step["turns"]):
            for name in list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]:
                seconds[name].append(t.seconds_of(runs[name], step["steps"]))
        speed = {name: batch_size / statistics.median(values) for name, values in seconds.items()}
        network = loop.model
        operations = 6 * (multiply_adds_per_image(network.backbone, size) + network.head.weight.numel())
        peak = peak_flops(0, cfg.SOLVER.AMP.ENABLED)
    return {
        "images_per_second": speed,
        "ratio_to": {name: speed["ours"] / speed[name] for name in speed if name != "ours"},
        "mfu_percent": 100 * speed["ours"] * operations / peak if peak else None,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
    }


def _timms(architecture: str, cfg, batch: dict):
    """A step as timm's train.py does it: uint8 normalized on the device as its loader does, channels_last, autocast."""
    import timm
    from timm.optim import create_optimizer_v2

    device, enabled = cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED
    classes = cfg.MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES or 1000
    model = timm.create_model(architecture, num_classes=classes).to(device, memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=1e-3, momentum=0.9, weight_decay=1e-4)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    targets = batch["labels"][: len(batch["image"])]

    def run(steps: int) -> None:
        for _ in range(steps):
            images = batch["image"].to(device, non_blocking=True).float().sub_(mean).div_(std)
            images, target = images.contiguous(memory_format=torch.channels_last), targets.to(device, non_blocking=True)
            with torch.autocast(device, torch.bfloat16, enabled=enabled):
                loss = F.cross_entropy(model(images), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def measure_data(step: dict) -> dict:
    """A run of `wsl-d2 train` over JPEGs of 500 x 375 pixels: how much of its time it waits for them."""
    import io

    import numpy as np
    from PIL import Image

    from wsl_d2.data import finish_dataset, index_shard, write_shard
    from wsl_d2.hashtags import Vocabulary, load_wordnet

    gpu, batch_size = torch.cuda.is_available(), step["batch_size"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        folder.mkdir()
        vocabulary, random = Vocabulary.build("1.5k", load_wordnet()), np.random.default_rng(0)
        samples = []
        for i in range(8 if step["steps"] == 1 else 512):
            buffer = io.BytesIO()
            coarse = Image.fromarray(random.integers(0, 255, (47, 63, 3), np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            samples.append((f"image{i}", buffer.getvalue(), {"hashtags": [vocabulary.hashtags[37 * i % 1000][0]]}))
        write_shard(folder / "shard-000000.tar", samples)
        index_shard(folder / "shard-000000.tar", vocabulary)
        finish_dataset(folder, vocabulary)
        keys = {
            "MODEL.DEVICE": "cuda" if gpu else "cpu",
            "MODEL.BACKBONE.NAME": f"build_{step['architecture']}_backbone",
            "INPUT.RANDOM_RESIZED_CROP.SIZE": step["size"],
            "INPUT.DECODING": step["decoding"],
            "DATASETS.HASHTAG_FOLDERS": [["benchmark", str(folder)]],
            "DATASETS.TRAIN": ("benchmark",),
            "DATASETS.TEST": (),
            "SOLVER.IMS_PER_BATCH": batch_size,
            "SOLVER.IMS_PER_MICRO_BATCH": batch_size,
            "SOLVER.TOTAL_IMAGES": batch_size * (4 if step["steps"] == 1 else 60),
            "SOLVER.WARMUP_IMAGES": batch_size,
            "SOLVER.LOG_PERIOD": 1 if step["steps"] == 1 else 20,
            "SOLVER.AMP.ENABLED": gpu,
            "OUTPUT_DIR": str(Path(name) / "out"),
        }
        command = [sys.executable, "-m", "wsl_d2", "train", "--config-file", "Base-Hashtag-Pretraining.yaml"]
        command += [str(word) for pair in keys.items() for word in pair]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-500:])
        records = [json.loads(line) for line in (Path(name) / "out" / "metrics.json").read_text().splitlines()]
    last = [record for record in records if "images_per_second" in record][-1]
    speed = {"ours": last["images_per_second"]}
    return {"images_per_second": speed, "data_wait_percent": last["data_wait_percent"]}


def measure_detection(step: dict) -> dict:
    """Mask R-CNN steps on one batch that stays in memory, by our trainer or Detectron2's, with the same network."""
    from detectron2.engine import AMPTrainer, SimpleTrainer
    from detectron2.modeling import build_model
    from detectron2.solver import build_optimizer
    from detectron2.structures import BitMasks, Boxes, Instances
    from detectron2.utils.events import EventStorage

    from wsl_d2.config import load_config
    from wsl_d2.engine.trainer import DetectionTrainer

    small, gpu = step["small"], torch.cuda.is_available()
    cfg = load_config("Base-RCNN-FPN.yaml", [])
    architecture = "resnext26_8x4d" if small else "resnext101_32x8d"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.MASK_ON = f"build_{architecture}_fpn_backbone", True
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.INPUT.MASK_FORMAT = "", "cuda" if gpu else "cpu", "bitmask"
    height, width, count = (64, 96, 1) if small else (800, 1216, 2)
    batch = []
    for _ in range(count):
        target = Instances((height, width))
        corners = torch.rand(8, 2) * torch.tensor([width / 2, height / 2])
        target.gt_boxes = Boxes(torch.cat([corners, corners + torch.tensor([width / 3, height / 3])], 1))
        target.gt_classes = torch.randint(0, cfg.MODEL.ROI_HEADS.NUM_CLASSES, (8,))
        target.gt_masks = BitMasks(torch.rand(8, height, width) > 0.5)
        image = (255 * torch.rand(3, height, width)).byte()
        batch.append({"image": image, "height": height, "width": width, "instances": target})
    if step["trainer"] == "ours":
        model = DetectionTrainer.build_model(cfg)
        optimizer = DetectionTrainer.build_optimizer(cfg, model)
    else:
        model = build_model(cfg)
        optimizer = build_optimizer(cfg, model)
    model.train()
    kind = AMPTrainer if gpu else SimpleTrainer
    trainer = kind(model, [batch] * 1000, optimizer)
    times = []
    with EventStorage(0) as trainer.storage:
        trainer.iter = 0
        for _ in range(2 if small else 40):
            start = time.perf_counter()
            trainer.run_step()
            if gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    speed = 1 / statistics.median(times[len(times) // 2 :])
    return {"iterations_per_second": speed, "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else None}


_KINDS = {"tests": measure_tests, "step": measure_step, "data": measure_data, "detection": measure_detection}


# ----- the whole


def _run(step: dict, seconds: float) -> dict:
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "gpu", "--measure", json.dumps(step)]
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished within {seconds:.0f} s", "seconds": seconds}
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    found = json.loads(lines[-1].removeprefix(_MARK)) if lines else {}
    if not lines:
        words = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        found = {"error": "out of memory" if "OutOfMemoryError" in done.stderr else words[0][:200]}
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def table(results: list[dict]) -> str:
    """Returns the measurements as a table in Markdown."""
    from wsl_d2.report.records import markdown

    rows = []
    for result in results:
        speeds = result.get("images_per_second", {})
        each = [f"{name} {value:,.1f}" for name, value in speeds.items()]
        each += [f"{result['iterations_per_second']:.2f} iterations/s"] if "iterations_per_second" in result else []
        ratios = [f"{value:.2f} times {name}'s" for name, value in result.get("ratio_to", {}).items()]
        other = [f"{result[key]:.1f}" if result.get(key) is not None else "-" for key in _NUMBERS]
        what = ", ".join(each) or result.get("summary") or result.get("error", "left out: no time")
        rows.append([result["name"], what, ", ".join(ratios) or "-", *other, f"{result.get('seconds', 0):.0f}"])
    return markdown(["measurement", "images/s", "ours is", "MFU, %", "memory, GB", "waiting for data, %", "s"], rows)


_NUMBERS = ("mfu_percent", "memory_gb", "data_wait_percent")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmark.py gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=25, help="after which nothing more is started")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="all that was measured")
    parser.add_argument("--small", action="store_true", help="tiny networks and images, on any device")
    parser.add_argument("--only", help="measurements whose name holds this text")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure:
        step = json.loads(args.measure)
        print(_MARK + json.dumps(_KINDS[step["kind"]](step)))
        return
    if not (args.small or torch.cuda.is_available()):
        sys.exit("benchmark.py gpu: no GPU can be used; --small runs all of it in small on the CPU")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "timm")}
    end = time.monotonic() + 60 * args.minutes
    results: list[dict] = []
    for step in plan_of(args.small):
        left = end - time.monotonic()
        if args.only and args.only not in step["name"]:
            continue
        results.append({"name": step["name"], **(_run(step, left) if left > 0 else {})})
        print(json.dumps(results[-1]), flush=True)
        args.output.write_text(json.dumps({"device": device, "versions": versions, "results": results}, indent=1))
    print(f"\n{device}; {', '.join(f'{name} {version}' for name, version in versions.items())}\n\n{table(results)}")


if __name__ == "__main__":
    main()
