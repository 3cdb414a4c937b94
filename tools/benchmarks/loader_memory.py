"""Memory of the training loader and its workers on an index of many images, over time.

The dataset is real to the loader: a manifest, and an index for every shard; all are links to one. Memory is the
proportional set size (PSS) of the process and its workers in all, less that of the process before the loader was built.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from benchmarks.start import write_dataset
from detectron2.config import get_cfg

from wsl_d2.config import add_wsl_config
from wsl_d2.data import register_hashtag_dataset
from wsl_d2.data.read.loaders import build_hashtag_train_loader
from wsl_d2.engine.plan import open_plan


def pss(process: int) -> float:
    """MB of memory of a process, memory shared by n processes counting 1/n."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1e3
    return 0.0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmark.py loader_memory", description=__doc__)
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--images-per-shard", type=int, default=1_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--window-shards", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "many"
        write_dataset(folder, args.images // args.images_per_shard, args.images_per_shard)
        register_hashtag_dataset("many", folder)
        cfg = get_cfg()
        add_wsl_config(cfg)
        cfg.DATASETS.TRAIN = ("many",)
        cfg.INPUT.RANDOM_RESIZED_CROP.SIZE = 32
        cfg.SOLVER.IMS_PER_BATCH = 256
        cfg.DATALOADER.NUM_WORKERS = args.workers
        cfg.DATALOADER.SHUFFLE_WINDOW_SHARDS = args.window_shards
        cfg.DATALOADER.RESAMPLING.THRESHOLD = 0.5
        before = pss(os.getpid())
        begun = time.perf_counter()
        plan = open_plan(cfg)
        stream = build_hashtag_train_loader(plan.cfg, plan.dataset, plan.sampler)._get_iterator()
        next(stream)
        print(f"first batch after {time.perf_counter() - begun:.1f} s, the repeat factors of all shards read first")
        processes = [os.getpid(), *(worker.pid for worker in stream._workers)]
        records, drawn, start = [], 256, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < args.seconds:
            next(stream)
            drawn += 256
            if elapsed >= len(records) * args.seconds / 12:
                records.append({"draws": drawn, "MB": round(sum(map(pss, processes)) - before)})
                print(json.dumps(records[-1]), flush=True)
        half, peak = records[len(records) // 2 :], max(record["MB"] for record in records)
        slope = np.polyfit([r["draws"] / 1e6 for r in half], [r["MB"] for r in half], 1)[0]
        print(
            f"{args.images:,} images, {args.workers} workers: {peak:,} MB at most beyond the "
            f"{before:,.0f} MB of the interpreter and its libraries; in the second half {slope:+.1f} MB per million "
            "draws"
        )


if __name__ == "__main__":
    main()
