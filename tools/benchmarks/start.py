"""Start of a pretraining over very many shards: seconds and memory until the first batch, opens of the dataset."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_MAX_LINKS = 60_000  # that file systems allow of a file


def write_dataset(folder: Path, num_shards: int, images: int = 8) -> None:
    """Writes one shard of some images and links it ``num_shards`` times, with a manifest that lists them all."""
    import io

    import numpy as np
    from PIL import Image

    from wsl_d2.data import finish_dataset, index_shard, write_shard
    from wsl_d2.data.format.index import index_path
    from wsl_d2.data.format.labels import labels_path
    from wsl_d2.hashtags import Vocabulary, load_wordnet

    folder.mkdir(parents=True)
    vocabulary = Vocabulary.build("1.5k", load_wordnet())
    first = folder / "shard-000000.tar"
    samples = []
    for i in range(images):
        buffer = io.BytesIO()
        Image.fromarray(np.full((64, 64, 3), i % 256, np.uint8)).save(buffer, "JPEG")
        tags = [vocabulary.hashtags[label][0] for label in (37 * i % 1000, (37 * i + 411) % 1000)]
        samples.append((f"image{i}", buffer.getvalue(), {"hashtags": tags}))
    write_shard(first, samples)
    index_shard(first, vocabulary)
    manifest = finish_dataset(folder, vocabulary)
    row = manifest["shards"][0]
    for number in range(1, num_shards):
        tar = folder / f"shard-{number:06d}.tar"
        for of in (lambda path: path, index_path, labels_path):
            if number % _MAX_LINKS:
                os.link(of(first), of(tar))
            else:
                shutil.copyfile(of(first), of(tar))
        first = first if number % _MAX_LINKS else tar
    manifest["shards"] = [row | {"name": f"shard-{number:06d}.tar"} for number in range(num_shards)]
    for key in ("num_images", "bytes"):
        manifest[key] *= num_shards
    manifest["hashtag_counts"] = [count * num_shards for count in manifest["hashtag_counts"]]
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def memory_mb(line: str) -> float:
    """A line of /proc/self/status in MB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) for text in status if text.startswith(f"{line}:")) / 1000


def first_batch(folder: Path, mode: str) -> None:
    """What a run does before its first step, timed; prints JSON."""
    import wsl_d2.engine.plan  # noqa: F401  (imports are not counted)
    from wsl_d2.config import load_config
    from wsl_d2.data import register_datasets
    from wsl_d2.data.read import dataset as dataset_module
    from wsl_d2.data.read.loaders import build_hashtag_train_loader
    from wsl_d2.engine.plan import open_plan

    opened = []
    read = dataset_module.read_manifest
    dataset_module.read_manifest = lambda path: (opened.append(path), read(path))[1]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory_mb("VmRSS")
    start = time.perf_counter()
    opts = [
        "DATASETS.HASHTAG_FOLDERS",
        f"[['start', '{folder}']]",
        "DATASETS.TRAIN",
        "('start',)",
        "DATASETS.TEST",
        "()",
    ]
    opts += [
        "DATALOADER.SHUFFLE_WINDOW_SHARDS",
        "64",
        "DATALOADER.RESAMPLING.MODE",
        mode,
        "OUTPUT_DIR",
        f"{folder}.out",
    ]
    cfg = load_config(str(ROOT / "configs" / "Base-Miniworld-Pretraining.yaml"), opts)
    register_datasets(cfg)
    plan = open_plan(cfg)
    planned = time.perf_counter()
    next(iter(build_hashtag_train_loader(plan.cfg, plan.dataset, plan.sampler)))
    end = time.perf_counter()
    memory = {"peak": memory_mb("VmHWM") - before, "kept": memory_mb("VmRSS") - before}
    print(json.dumps({"plan": planned - start, "batch": end - planned, "opened": len(opened)} | memory))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmark.py start", description=__doc__)
    parser.add_argument("--shards", type=int, default=350_000)
    parser.add_argument("--folder", type=Path, help="where to keep the simulated dataset; a temporary one if left out")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, in processes of their own")
    parser.add_argument("--one", choices=["natural", "sqrt"], help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        first_batch(args.folder, args.one)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "dataset"
        if not folder.exists():
            write_dataset(folder, args.shards)
        size = (folder / "manifest.json").stat().st_size / 1e6
        print(f"{args.shards:,} shards, manifest of {size:.0f} MB")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "start", "--folder", str(folder), "--one"]
        for mode in ("natural", "sqrt"):
            for number in range(args.rounds):
                done = subprocess.run([*command, mode], capture_output=True, text=True, env=environment, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{mode:8} start {number + 1}: plan {found['plan']:.2f} s, first batch {found['batch']:.2f} s, "
                    f"{found['peak']:.0f} MB more memory at the peak, {found['kept']:.0f} kept, "
                    f"manifest read {found['opened']} time(s)"
                )


if __name__ == "__main__":
    main()
