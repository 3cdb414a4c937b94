"""Mapping the hashtags of a corpus: posts/s and memory, against a loop over nltk and the same job in pandas."""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wsl_d2.hashtags import HashtagMapping, Vocabulary, load_wordnet, normalize_hashtag

ROOT = Path(__file__).resolve().parents[2]
_FILES = 20


def make_tags(num_tags: int, rng: np.random.Generator) -> list[str]:
    """Hashtags as people write them: half nouns of WordNet in several spellings, half of them nothing of the kind."""
    lemmas = sorted(load_wordnet().all_lemma_names("n"))
    junk = "instagood picoftheday love4life tbt ootd follow4follow собака 東京 fotografía amor vsco f4f".split()
    tags = []
    for number in range(num_tags):
        lemma = lemmas[rng.integers(len(lemmas))]
        style = rng.integers(10)
        if style < 3:
            tags.append("#" + normalize_hashtag(lemma))
        elif style == 3:
            tags.append("#" + "".join(word.capitalize() for word in lemma.split("_")))
        elif style == 4:
            tags.append(normalize_hashtag(lemma) + "s")
        elif style < 7:
            tags.append(junk[rng.integers(len(junk))] + str(number))
        else:
            tags.append("#" + "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(4, 12))))
    return tags


def make_corpus(folder: Path, num_posts: int) -> None:
    """Writes a seeded corpus of Parquet files: 3 to 10 hashtags a post, by Zipf's law."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    tags = pa.array(make_tags(300_000, rng), pa.large_string())
    probabilities = np.arange(1, len(tags) + 1) ** -1.0
    cumulative = np.cumsum(probabilities / probabilities.sum())
    for number in range(_FILES):
        path = folder / f"posts-{number:03d}.parquet"
        size = num_posts // _FILES
        lengths = rng.integers(3, 11, size)
        codes = np.searchsorted(cumulative, rng.random(lengths.sum()))
        if path.is_file() and pq.ParquetFile(path).metadata.num_rows == size:
            continue
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
        lists = pa.LargeListArray.from_arrays(offsets, tags.take(pa.array(codes)))
        keys = pa.array([f"{number:03d}{i:08d}" for i in range(size)])
        pq.write_table(pa.table({"key": keys, "hashtags": lists}), path, row_group_size=100_000)


def peak_of_children() -> float:
    """Peak resident memory of the largest finished child process, MB."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def run_measured(command: list[str]) -> tuple[float, float]:
    """Runs a command; returns its seconds and the peak of the summed resident memory of its processes, MB."""
    import psutil

    begin, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    root = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        for one in [root, *root.children(recursive=True)]:
            try:
                total += one.memory_full_info().pss
            except psutil.Error:
                continue
        peak = max(peak, total / 2**20)
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(process.communicate()[0])
    return time.perf_counter() - begin, peak


def nltk_loop(posts: pa.Table, vocabulary: Vocabulary) -> int:
    """What a script would do: look every tag of every post up with nltk, and its synsets in the vocabulary."""
    wordnet = load_wordnet()
    wanted = {synset: label for label, synset in enumerate(vocabulary.synsets)}
    labelled = 0
    for tags in posts.column("hashtags").to_pylist():
        labels = set()
        for tag in tags:
            word = tag.lstrip("#").lower()
            for synset in wordnet.synsets(wordnet.morphy(word, "n") or word, "n")[:1]:
                label = wanted.get(f"n{synset.offset():08d}")
                if label is not None:
                    labels.add(label)
        labelled += bool(labels)
    return labelled


def pandas_job(paths: list[Path], vocabulary: Vocabulary) -> int:
    """The same job in pandas with this project's mapping: explode, map the distinct hashtags, group again."""
    import pandas as pd

    mapping = HashtagMapping(vocabulary)
    labelled = 0
    for path in paths:
        frame = pd.read_parquet(path).explode("hashtags")
        table = {tag: mapping.map(tag).labels for tag in frame["hashtags"].unique()}
        frame["label"] = frame["hashtags"].map({tag: labels[0] for tag, labels in table.items() if labels})
        labels = frame.dropna(subset="label").groupby("key")["label"].unique()
        labelled += len(labels)
        counts = frame.drop_duplicates(["key", "hashtags"])["hashtags"].value_counts()
        assert len(counts) and len(labels)
    return labelled


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--posts", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sample", type=int, default=10_000, help="posts of the nltk loop, which is extrapolated")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "wsl_d2_benchmark_hashtags")
    args = parser.parse_args(arguments)
    corpus = args.folder / f"posts_{args.posts}"
    make_corpus(corpus, args.posts)
    vocabulary = Vocabulary.build("17k", load_wordnet())
    vocabulary.save(args.folder / "vocabulary.json")
    paths = sorted(corpus.glob("*.parquet"))

    output = args.folder / "labels"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "tools/prepare_hashtags.py", str(corpus), "--vocabulary"]
    command += [str(args.folder / "vocabulary.json"), "--output", str(output), "--workers", str(args.workers)]
    seconds, memory = run_measured(command)
    rate = args.posts / seconds
    manifest = json.loads((output / "manifest.json").read_text())
    print(
        f"wsl_d2, {args.workers} processes: {args.posts:,} posts, {manifest['pairs_in']:,} hashtags in {seconds:.0f} s"
    )
    print(f"  {rate:,.0f} posts/s, starting included; peak memory of all its processes {memory:,.0f} MB")

    sample = pq.read_table(paths[0]).slice(0, args.sample)
    nltk_loop(sample.slice(0, 200), vocabulary)
    times = []
    for part in range(5):
        rows = sample.slice(part * args.sample // 5, args.sample // 5)
        begin = time.perf_counter()
        nltk_loop(rows, vocabulary)
        times.append((time.perf_counter() - begin) / len(rows))
    nltk_rate = 1 / statistics.median(times)
    print(f"loop over nltk, one process: {nltk_rate:,.0f} posts/s (median of 5 times {args.sample // 5:,} posts)")
    begin = time.perf_counter()
    pandas_job(paths[:2], vocabulary)
    pandas_seconds = time.perf_counter() - begin
    pandas_rate = 2 * args.posts // _FILES / pandas_seconds
    print(f"pandas, one process: {pandas_rate:,.0f} posts/s ({2 * args.posts // _FILES:,} posts)")
    print(f"ratios: {rate / nltk_rate:.0f} times the nltk loop, {rate / pandas_rate:.1f} times pandas")
    print(f"cores of this machine: {os.cpu_count()}")
