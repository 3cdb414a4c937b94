"""Memory of the training loader and its workers on an index of many images, over time.

The dataset is real to the loader: a manifest, and an index for every shard; its tars are links to one small tar whose
images come again and again. Memory is the proportional set size (PSS) of the process and its workers in all, less
that of the process before the loader was built.
"""

import argparse
import io
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from detectron2.config import get_cfg
from PIL import Image
from tqdm import tqdm

from wsl_d2.config import add_wsl_config
from wsl_d2.data import build_hashtag_train_loader, finish_dataset, index_shard, register_hashtag_dataset, write_shard
from wsl_d2.data.shards import ShardIndex, index_path, write_index
from wsl_d2.hashtags import Vocabulary, load_wordnet

_HASHTAGS = {"dog": "n02084071", "cat": "n02121620", "bird": "n01503061", "car": "n02958343"}


def pss(process: int) -> float:
    """MB of memory of a process, memory shared by n processes counting 1/n."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1e3
    return 0.0


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((40, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_dataset(folder: Path, num_images: int, images_per_shard: int) -> None:
    """Links, indexes and a manifest of num_images images."""
    vocabulary = Vocabulary.build("toy", load_wordnet(), synsets=list(_HASHTAGS.values()))
    vocabulary.save(folder / "vocabulary.json")
    names = list(_HASHTAGS)
    samples = [(f"{i:02d}", encoded(i), {"hashtags": [names[int(i**0.5) % 4]]}) for i in range(100)]
    source = folder / "source"
    write_shard(source, samples)
    one = index_shard(source, vocabulary)
    index_path(source).unlink()
    times = images_per_shard // 100
    labels = np.tile(one.labels, times)
    for shard in tqdm(range(num_images // images_per_shard), desc="indexes", disable=None):
        tar = folder / f"shard-{shard:06d}.tar"
        tar.symlink_to("source")
        first = shard * images_per_shard
        keys = np.char.mod("%010d", np.arange(first, first + len(labels))).astype(np.bytes_)
        write_index(
            tar,
            ShardIndex(
                keys=keys,
                offsets=np.tile(one.offsets, times),
                sizes=np.tile(one.sizes, times),
                indptr=np.arange(len(labels) + 1),
                labels=labels,
                num_unlabelled=0,
                vocabulary_checksum=vocabulary.checksum,
                crc32=np.tile(one.crc32, times),
                tar_sha256=one.tar_sha256,
            ),
        )
    finish_dataset(folder, vocabulary)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmark.py loader_memory", description=__doc__)
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--images-per-shard", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--window-shards", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["FVCORE_CACHE"] = str(folder / "cache")
        write_dataset(folder, args.images, args.images_per_shard)
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
        stream = build_hashtag_train_loader(cfg)._get_iterator()
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
