"""Hashtags of a corpus: mapping them, seen and new ones, and counting them; against nltk with a memo, and polars."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wsl_d2.data.format.index import RawHashtags, ShardIndex
from wsl_d2.data.format.labels import label_index
from wsl_d2.hashtags import HashtagMapping, Vocabulary, load_wordnet, read_hashtag_counts
from wsl_d2.hashtags.lemma_table import load_lemma_table
from wsl_d2.hashtags.splitter import known_words

ROOT = Path(__file__).resolve().parents[2]
_FILES = 20


def make_tail(number: int, rng: np.random.Generator) -> pa.Array:
    """Distinct hashtags as they are on one or few images: words run together, some with a number or a misspelling."""
    words = np.array(sorted(known_words()))
    first, second = (words[rng.integers(len(words), size=number)] for _ in range(2))
    signs = rng.integers(10, size=number)
    tags = [
        f"{a}{b}" if sign < 5 else f"{a}{i}" if sign < 7 else f"{a[1:]}{b[:-1]}" if sign < 9 else f"{a}_{b}{i % 100}"
        for i, (a, b, sign) in enumerate(zip(first.tolist(), second.tolist(), signs.tolist(), strict=True))
    ]
    return pa.array(dict.fromkeys(tags), pa.large_string())


def make_corpus(folder: Path, num_posts: int, real: Path | None, num_tail: int) -> None:
    """Writes a seeded corpus of Parquet files: 3 to 10 hashtags a post, drawn by Zipf's law.

    Args:
        folder: to write to; what is there is kept.
        num_posts: in all.
        real: counts of real hashtags, which are the most frequent ones; nouns of WordNet if it is not given.
        num_tail: distinct hashtags behind them.
    """
    paths = [folder / f"posts-{number:03d}.parquet" for number in range(_FILES)]
    if paths[-1].is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    head = list(read_hashtag_counts(real)) if real else rng.permutation(list(load_lemma_table().words)).tolist()
    tags = pa.concat_arrays([pa.array(head, pa.large_string()), make_tail(num_tail, rng)])
    cumulative = np.cumsum(np.arange(1, len(tags) + 1) ** -1.0)
    cumulative /= cumulative[-1]
    for number, path in enumerate(paths):
        size = num_posts // _FILES
        lengths = rng.integers(3, 11, size)
        codes = np.searchsorted(cumulative, rng.random(lengths.sum()))
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
        lists = pa.LargeListArray.from_arrays(offsets, tags.take(pa.array(codes)))
        keys = pa.array([f"{number:03d}{i:08d}" for i in range(size)])
        pq.write_table(pa.table({"key": keys, "hashtags": lists}), path, row_group_size=100_000)


def memory_of(process: int) -> float:
    """MB of a process and those below it, memory shared by n processes counting 1/n."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1e3 for line in lines if line.startswith("Pss:")) + sum(
        memory_of(int(child)) for child in children
    )


def run_measured(command: list[str]) -> tuple[float, float, float]:
    """Runs a command; returns its seconds, its processes' CPU seconds, and the peak of their memory in all, MB."""
    begin, before, peak = time.perf_counter(), os.times(), 0.0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(process.returncode)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - begin, cpu, peak


def cpu_seconds(work: Callable[[], object]) -> float:
    """The CPU seconds of the fastest of three calls."""
    times = []
    for _ in range(3):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def label_lists(lists: pa.LargeListArray, vocabulary: Vocabulary) -> int:
    """From a column of hashtags to labels as `data make` does it; returns the number of labeled posts."""
    encoded = lists.flatten().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    column = RawHashtags(lists.offsets.to_numpy(), codes, encoded.dictionary.to_pylist())
    nothing = np.zeros(len(lists), np.int64)
    index = ShardIndex(nothing.astype("S"), nothing, nothing, nothing.astype(np.uint32), {"hashtags": column})
    return len(label_index(index, vocabulary).rows)


class NltkLoop:
    """What a script would do: every tag's lemma by nltk, with a memo, and its first synset in the vocabulary."""

    def __init__(self, vocabulary: Vocabulary):
        self._wordnet = load_wordnet()
        self._wanted = {synset: label for label, synset in enumerate(vocabulary.synsets)}
        self._memo: dict[str, int | None] = {}

    def label(self, tag: str) -> int | None:
        """The label of a hashtag, None if it has none."""
        if tag not in self._memo:
            word = tag.lstrip("#").lower()
            senses = self._wordnet.synsets(self._wordnet.morphy(word, "n") or word, "n")[:1]
            self._memo[tag] = self._wanted.get(f"n{senses[0].offset():08d}") if senses else None
        return self._memo[tag]

    def label_lists(self, lists: pa.LargeListArray) -> int:
        """The number of labeled posts."""
        return sum(bool({self.label(tag) for tag in tags} - {None}) for tags in lists.to_pylist())


def polars_job(vocabulary: Vocabulary) -> Callable[[pa.LargeListArray], int] | None:
    """The same in polars: nouns and plurals in "s", joined to the exploded hashtags; None if it is not installed."""
    try:
        import polars as pl
    except ImportError:
        return None
    wanted = {synset: label for label, synset in enumerate(vocabulary.synsets)}
    table = load_lemma_table()
    label_of = {key: wanted.get(table.senses(key)[0]) for key, row in table.words.items() if row >= 0}
    label_of |= {f"{key}s": label for key, label in label_of.items() if f"{key}s" not in label_of}
    nouns = pl.DataFrame({"tag": list(label_of), "label": list(label_of.values())}).drop_nulls()

    def job(lists: pa.LargeListArray) -> int:
        posts = pl.DataFrame({"tag": pl.from_arrow(lists)}).with_row_index("post").explode("tag")
        posts = posts.with_columns(pl.col("tag").str.strip_chars_start("#").str.to_lowercase())
        return posts.join(nouns, on="tag").select("post", "label").unique()["post"].n_unique()

    return job


def polars_counts(paths: list[Path]) -> int:
    """Counts of the hashtags in polars, streaming; the number of different ones."""
    import polars as pl

    posts = pl.scan_parquet(paths).select("key", pl.col("hashtags")).explode("hashtags").unique()
    return len(posts.group_by("hashtags").len().sort("len", descending=True).collect(engine="streaming"))


def compare_mapping(paths: list[Path], vocabulary: Vocabulary, num_posts: int) -> None:
    """Prints posts per CPU second of hashtags seen before, and microseconds of new ones."""
    lists = pq.read_table(paths[0], columns=["hashtags"]).column("hashtags").combine_chunks().slice(0, num_posts)
    tags = pc.unique(lists.flatten()).to_pylist()
    HashtagMapping(vocabulary).map("homemadepizza")  # opens the word list
    begin = time.process_time()
    mapping = vocabulary.mapping
    for tag in tags:
        mapping.map(tag)
    new = (time.process_time() - begin) / len(tags)
    print(f"{len(lists):,} posts, {len(lists.flatten()):,} hashtags, {len(tags):,} different ones; one process")
    loop = NltkLoop(vocabulary)
    begin = time.process_time()
    for tag in tags:
        loop.label(tag)
    new_nltk = (time.process_time() - begin) / len(tags)
    print(f"a new hashtag: {1e6 * new:.1f} us; nltk {1e6 * new_nltk:.1f} us; ratio {new_nltk / new:.2f}")
    jobs: dict[str, Callable[[pa.LargeListArray], int] | None] = {
        "wsl_d2": lambda lists: label_lists(lists, vocabulary),
        "nltk with a memo": loop.label_lists,
        "polars, nouns and plurals": polars_job(vocabulary),
    }
    rates = {}
    for name, job in jobs.items():
        if job is None:
            print(f"{name}: not installed")
            continue
        rates[name] = len(lists) / cpu_seconds(lambda job=job: job(lists))
        ratio = f"; wsl_d2 is {rates['wsl_d2'] / rates[name]:.2f} times as fast" if name != "wsl_d2" else ""
        print(f"seen hashtags, {name}: {rates[name]:,.0f} posts per CPU second, {job(lists):,} labeled{ratio}")


def compare_counting(corpus: Path, output: Path, num_posts: int, workers: int) -> None:
    """Prints seconds and memory of `wsl-d2 hashtags count` and of polars."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "wsl_d2", "hashtags", "count", str(corpus), "--workers", str(workers)]
    seconds, cpu, memory = run_measured([*command, "--output", str(output)])
    distinct = sum(1 for _ in open(output / "hashtag_counts.tsv", encoding="utf-8"))
    print(
        f"hashtags count, {workers} processes: {num_posts:,} posts, {distinct:,} different hashtags in {seconds:.0f} s "
        f"({cpu:.0f} s of CPU, {num_posts / cpu:,.0f} posts per CPU second), peak memory in all {memory:,.0f} MB"
    )
    code = (
        "import sys; sys.path.insert(0, 'tools'); from benchmarks.hashtags import *; "
        f"print(polars_counts(sorted(Path({str(corpus)!r}).glob('*.parquet'))))"
    )
    try:
        import polars  # noqa: F401
    except ImportError:
        print("polars: not installed")
        return
    peer_seconds, peer_cpu, peer_memory = run_measured([sys.executable, "-c", code])
    print(
        f"polars, streaming: {peer_seconds:.0f} s ({peer_cpu:.0f} s of CPU), peak memory {peer_memory:,.0f} MB; ratio "
        f"of CPU {peer_cpu / cpu:.2f}, of memory {peer_memory / memory:.2f}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmark.py hashtags", description=__doc__)
    parser.add_argument("--posts", type=int, default=10_000_000)
    parser.add_argument(
        "--tail", type=int, default=8_000_000, help="distinct made-up hashtags behind the frequent ones"
    )
    parser.add_argument("--real", type=Path, help="hashtag_counts.tsv of real hashtags, to be the frequent ones")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--mapped", type=int, default=200_000, help="posts to map")
    parser.add_argument("--only", choices=("mapping", "counting"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "wsl_d2_benchmark_hashtags")
    args = parser.parse_args(arguments)
    corpus = args.folder / f"posts_{args.posts}_{args.tail}"
    make_corpus(corpus, args.posts, args.real, args.tail)
    paths = sorted(corpus.glob("*.parquet"))
    if args.only != "counting":
        compare_mapping(paths, Vocabulary.build("17k", load_wordnet()), args.mapped)
    if args.only != "mapping":
        compare_counting(corpus, args.folder / "counts", args.posts, args.workers)
    print(f"cores of this machine: {os.cpu_count()}, load {os.getloadavg()[0]:.1f}")
