"""Data commands in processes of this machine and in jobs of SLURM: seconds, CPU, memory, the same bytes, and a kill."""

import argparse
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from benchmarks.hashtags import ROOT, make_corpus
from PIL import Image

_TICKS = os.sysconf("SC_CLK_TCK")
_WORKERS = (b"spawn_main", b"submitit.core._submit")  # in the command lines of processes and of jobs
_MARK = "WSL_D2_BENCHMARK"
HASHTAGS = ["#dog", "#cats", "#sea", "#pizza", "#brownbear", "#love", "#instagood"]


class Measured(NamedTuple):
    """What a command took: seconds, CPU seconds and peak memory (MB) of all its processes; and what it said."""

    seconds: float
    cpu: float
    memory: float
    said: str


def run_measured(command: list[str], kill: float | None = None) -> Measured:
    """Runs `wsl-d2`; its processes are known by a variable of their environment, also those of jobs.

    Args:
        command: behind `wsl-d2`.
        kill: a process that has worked for so many CPU seconds, its imports included, once; None for no process.
    """
    mark = f"{_MARK}={uuid.uuid4().hex}"
    mine: dict[int, float] = {}  # process -> CPU seconds
    begin, peak = time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as log:
        environment = os.environ | dict([mark.split("=")])
        main = subprocess.Popen(
            [sys.executable, "-m", "wsl_d2", *command], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        while main.poll() is None:
            memory = 0.0
            for process in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()):
                folder = Path("/proc") / str(process)
                try:
                    if mark.encode() not in (folder / "environ").read_bytes():
                        continue
                    fields = (folder / "stat").read_text().rpartition(")")[2].split()
                    mine[process] = (int(fields[11]) + int(fields[12])) / _TICKS
                    is_worker = any(worker in (folder / "cmdline").read_bytes() for worker in _WORKERS)
                    if kill is not None and is_worker and mine[process] > kill:
                        os.kill(process, signal.SIGKILL)
                        kill = None
                    lines = (folder / "smaps_rollup").read_text().splitlines()
                    memory += sum(int(line.split()[1]) / 1e3 for line in lines if line.startswith("Pss:"))
                except OSError:  # ended meanwhile
                    continue
            peak = max(peak, memory)
            time.sleep(0.25)
        log.seek(0)
        lines = log.read().splitlines()
    seconds = time.perf_counter() - begin
    if main.returncode:
        raise SystemExit(f"{' '.join(command)}: status {main.returncode}: {lines[-3:]}")
    said = "; ".join(line for line in lines if " was killed " in line)
    return Measured(seconds, sum(mine.values()), peak, said or ("" if kill is None else "nothing was killed"))


def digest(place: Path) -> str:
    """SHA-256 of a folder's files, or of a verification's reports in any order; without times of files."""
    found = hashlib.sha256()
    if place.is_file():
        rows = (json.loads(line) for line in place.read_text().splitlines())
        lines = (json.dumps({k: v for k, v in row.items() if k != "stamp"}, sort_keys=True) for row in rows)
        found.update("\n".join(sorted(lines)).encode())
    else:
        for path in sorted(path for path in place.rglob("*") if path.is_file() and path.name != ".stamps.jsonl"):
            with open(path, "rb") as file:
                found.update(f"{path.relative_to(place)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()[:16]


def make_jpeg(rng: np.random.Generator) -> bytes:
    """A picture of 96 x 72 pixels like no other one."""
    buffer = io.BytesIO()
    image = Image.fromarray(rng.integers(256, size=(6, 8, 3), dtype=np.uint8))
    image.resize((96, 72), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_posts(folder: Path, num_shards: int, size: int) -> None:
    """Writes Parquet files of posts with images in them, a vocabulary, and the first image of each shard.

    Args:
        folder: to write to; what is there is kept.
        num_shards: in all.
        size: images of a shard.
    """
    if (folder / "vocabulary.json").is_file():
        return
    (folder / "posts").mkdir(parents=True, exist_ok=True)
    (folder / "evaluation").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for first in range(0, num_shards, 10):
        keys = [f"{number:08d}" for number in range(first * size, min(first + 10, num_shards) * size)]
        images = [make_jpeg(rng) for _ in keys]
        tags = [[HASHTAGS[tag] for tag in row] for row in rng.integers(len(HASHTAGS), size=(len(keys), 3)).tolist()]
        table = pa.table({"key": keys, "image": images, "hashtags": tags})
        pq.write_table(table, folder / "posts" / f"posts-{first:04d}.parquet", row_group_size=size)
        for number in range(0, len(keys), size):
            (folder / "evaluation" / f"{keys[number]}.jpg").write_bytes(images[number])
    command = ["hashtags", "vocabulary", "--vocabulary", "1.5k", "--output", str(folder / "vocabulary.json")]
    subprocess.run([sys.executable, "-m", "wsl_d2", *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def commands(folder: Path, posts: Path, size: int, output: Path) -> dict[str, tuple[list[str], Path]]:
    """The commands in order, each with what it writes: `data index` gets the tars of `data make` alone."""
    made, tars, vocabulary = output / "made", output / "tars", str(folder / "vocabulary.json")
    make = [
        "data",
        "make",
        *map(str, sorted((folder / "posts").iterdir())),
        "--images",
        "column:image",
        "--vocabulary",
        vocabulary,
    ]
    pair = ["--pretraining", str(made), "--evaluation", str(folder / "evaluation")]
    return {
        "hashtags count": (["hashtags", "count", str(posts), "--output", str(output / "counts")], output / "counts"),
        "data make": ([*make, "--images-per-shard", str(size), "--output", str(made)], made),
        "data index": (["data", "index", str(tars), "--vocabulary", vocabulary], tars),
        "data verify": (
            ["data", "verify", str(made), "--report", str(output / "verify.jsonl")],
            output / "verify.jsonl",
        ),
        "duplicates": (["duplicates", *pair, "--output", str(output / "duplicates")], output / "duplicates"),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmark.py runner", description=__doc__)
    parser.add_argument("--posts", type=int, default=4_000_000, help="of `hashtags count`")
    parser.add_argument("--tail", type=int, default=3_000_000, help="distinct made-up hashtags of these")
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--size", type=int, default=500, help="images of a shard")
    parser.add_argument("--runner", nargs="+", choices=("local", "slurm"), default=["local"])
    parser.add_argument("--runner-parameter", nargs="+", default=[], help="of SLURM's jobs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--kill",
        type=float,
        metavar="SECONDS",
        help="run everything once more, and kill a process after so much CPU time",
    )
    parser.add_argument("--only", nargs="+", help="commands, such as `data make`; what they need must be there")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "wsl_d2_benchmark_runner")
    args = parser.parse_args(arguments)
    folder, corpus = args.folder.absolute(), args.folder.absolute() / f"posts_{args.posts}_{args.tail}"
    make_corpus(corpus, args.posts, None, args.tail)
    make_posts(folder, args.shards, args.size)
    for runner in args.runner:
        for kill in (None, args.kill)[: 1 if args.kill is None else 2]:
            killed = "" if kill is None else ", a process killed"
            output = folder / f"{runner}{'_kill' if killed else ''}"
            options = ["--runner", runner, "--workers", str(args.workers)]
            options += [f"--runner-parameter={parameter}" for parameter in args.runner_parameter if runner == "slurm"]
            for name, (command, written) in commands(folder, corpus, args.size, output).items():
                if args.only and name not in args.only:
                    continue
                shutil.rmtree(written) if written.is_dir() else written.unlink(missing_ok=True)
                written.parent.mkdir(parents=True, exist_ok=True)
                if name == "data index":
                    shutil.copytree(output / "made", written, copy_function=os.link, ignore=_all_but_tars)
                found = run_measured([*command, *options], kill)
                print(
                    f"| {name} | {runner}{killed} | {found.seconds:.0f} s | "
                    f"{found.cpu:.0f} s of CPU | {found.memory:,.0f} MB | {digest(written)} | {found.said} |",
                    flush=True,
                )
    print(f"cores of this machine: {os.cpu_count()}, load {os.getloadavg()[0]:.1f}")


def _all_but_tars(_: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(".tar")]


if __name__ == "__main__":
    main()
