"""Tagged posts of any number -> label ids of each image, hashtag counts, and an account of everything dropped.

The work is cut into parts: a file, or a range of row groups of a large Parquet file. `process_part` is a pure function
from a part to its files, so results do not depend on who runs it, and a restart does only the parts that are missing.
Daft runs the parts: its native runner on one machine, its Ray runner on a Ray cluster, with the same code. (Polars and
DuckDB were as fast on the join itself, within a factor of two, but neither runs on an existing cluster. The speed is
decided by mapping each distinct hashtag of a chunk once, which is the same under any of them.)

A folder of results::

    labels/part-000000.parquet       key (string), labels (list<int32>, sorted), num_hashtags (int32); labelled images
    counts/part-000000.parquet       hashtag (normalised), images; of all hashtags, mapped or not
    quarantine/part-000000.jsonl     file, row, reason and beginning of rows that could not be used
    parts/part-000000.json           the part's account, and the checksums of its files; written last
    hashtag_counts.tsv               over all parts, for tools/build_vocabulary.py --counts
    label_counts.tsv                 label, synset, images
    manifest.json                    the sum of the accounts; written last of all
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from wsl_d2.data.posts.readers import Chunk, CorpusError, detect_post_format, read_posts
from wsl_d2.hashtags.mapping import DROP_REASONS, HashtagMapping
from wsl_d2.hashtags.normalize import normalize_hashtag
from wsl_d2.hashtags.vocabulary import Vocabulary

FORMAT_VERSION = 1
_PART_ROWS = 1_000_000  # of a Parquet file
_REMEMBERED = 2_000_000  # distinct hashtags that a process keeps the mapping of
_SETTINGS = {"compression": "zstd", "write_statistics": True, "store_schema": False, "version": "2.6"}


@dataclasses.dataclass(frozen=True)
class CorpusOptions:
    """What decides the results, beside the input.

    Attributes:
        vocabulary: path of vocabulary.json; None counts hashtags alone.
        max_distance, ambiguous: see :class:`wsl_d2.hashtags.HashtagMapping`.
        format: one of ``FORMATS`` of posts.py, or "auto": by each file's name.
        key_column, hashtags_column: see :func:`wsl_d2.data.posts.readers.read_posts`.
    """

    vocabulary: str | None
    max_distance: int = 0
    ambiguous: str = "most_frequent"
    format: str = "auto"
    key_column: str = "key"
    hashtags_column: str = "hashtags"


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of the input: a file of ``size`` bytes; of Parquet, the row groups from ``first`` to before ``last``."""

    number: int
    path: str
    size: int
    format: str
    first: int = 0
    last: int = 0

    @property
    def name(self) -> str:
        return f"part-{self.number:06d}"


def plan_parts(inputs: Iterable[str], options: CorpusOptions) -> list[Part]:
    """Cuts the input into parts, in the order of the sorted paths.

    Args:
        inputs: files, folders, glob patterns or URLs.
        options: for the format and what Parquet needs.

    Raises:
        CorpusError: a path matches nothing, or a file's format cannot be told or its Parquet footer not read.
    """
    paths: dict[str, int] = {}
    for pattern in inputs:
        filesystem, root = fsspec.core.url_to_fs(pattern)
        found = filesystem.find(root) if filesystem.isdir(root) else filesystem.glob(root)
        if not found and filesystem.exists(root):
            found = [root]
        if not found:
            raise CorpusError(f"{pattern}: there is no such file.")
        local = "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,))
        for path in found:
            paths[path if local else filesystem.unstrip_protocol(path)] = int(filesystem.size(path))
    parts: list[Part] = []
    for path in sorted(paths):
        kind = detect_post_format(path) if options.format == "auto" else options.format
        for first, last in _row_group_ranges(path) if kind == "parquet" else [(0, 0)]:
            parts.append(Part(len(parts), path, paths[path], kind, first, last))
    return parts


def _row_group_ranges(path: str) -> list[tuple[int, int]]:
    try:
        with fsspec.open(path, "rb") as file:
            footer = pq.ParquetFile(file).metadata
            sizes = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{path}: not readable as parquet to its end ({error}).") from error
    ranges, first, rows = [], 0, 0
    for group, size in enumerate(sizes):
        rows += size
        if rows >= _PART_ROWS or group == len(sizes) - 1:
            ranges.append((first, group + 1))
            first, rows = group + 1, 0
    return ranges or [(0, 0)]


@functools.lru_cache(maxsize=1)
def _open_table(vocabulary: str | None, checksum: str, max_distance: int, ambiguous: str) -> list[_TagTable]:
    """One table in a list, so that a full one can be replaced."""
    mapping = HashtagMapping(Vocabulary.load(vocabulary), max_distance, ambiguous) if vocabulary else None
    return [_TagTable(mapping)]


class _TagTable:
    """What each distinct hashtag becomes, by number, as arrays; kept between the chunks and parts of a process.

    Attributes:
        label_start, label_count: (T,) int64, where the labels of each hashtag lie in ``labels``.
        labels: flat int64.
        reason: (T,) int64 into ``DROP_REASONS``; -1 for a hashtag with labels.
        spelling: (T,) int64 into ``spellings``, the normalised hashtags.
    """

    def __init__(self, mapping: HashtagMapping | None):
        self.mapping = mapping
        self._numbers: dict[str, int] = {}
        self._spelling_numbers: dict[str, int] = {}
        self._rows: list[tuple[int, int, int, int]] = []  # not yet in the arrays
        self._new_labels: list[int] = []
        self._table = np.zeros((4, 0), np.int64)
        self.labels = np.zeros(0, np.int64)

    @property
    def is_full(self) -> bool:
        return len(self._numbers) > _REMEMBERED

    @property
    def spellings(self) -> list[str]:
        return list(self._spelling_numbers)

    @property
    def num_spellings(self) -> int:
        return len(self._spelling_numbers)

    def look_up(self, hashtags: list[str]) -> np.ndarray:
        """Returns the number of each hashtag, mapping those that are new."""
        numbers = [self._numbers.get(hashtag, -1) for hashtag in hashtags]
        for position, number in enumerate(numbers):
            if number < 0:
                numbers[position] = self._add(hashtags[position])
        if self._rows:
            self._table = np.concatenate([self._table, np.array(self._rows, np.int64).T], axis=1)
            self.labels = np.concatenate([self.labels, np.array(self._new_labels, np.int64)])
            self._rows, self._new_labels = [], []
        return np.array(numbers, np.int64)

    def _add(self, hashtag: str) -> int:
        number = self._numbers[hashtag] = len(self._numbers)
        labels, reason = self.mapping.map(hashtag) if self.mapping else ((), "")
        spelling = self._spelling_numbers.setdefault(normalize_hashtag(hashtag), len(self._spelling_numbers))
        start = len(self.labels) + len(self._new_labels)
        self._rows.append((start, len(labels), DROP_REASONS.index(reason) if reason else -1, spelling))
        self._new_labels += labels
        return number

    label_start = property(lambda self: self._table[0])
    label_count = property(lambda self: self._table[1])
    reason = property(lambda self: self._table[2])
    spelling = property(lambda self: self._table[3])


def process_part(part: Part, options: CorpusOptions, checksum: str, output: str | Path) -> dict[str, Any]:
    """Turns one part into its files and returns its account; a finished part is only checked.

    Args:
        part: of :func:`plan_parts`.
        options: as for the plan.
        checksum: of the vocabulary, "" without one.
        output: the folder of results.

    Raises:
        CorpusError: the input cannot be read, or the account does not add up.
    """
    output = Path(output)
    identity = {"part": dataclasses.asdict(part), "options": _identity(options, checksum)}
    account_path = output / "parts" / f"{part.name}.json"
    if account_path.is_file():
        account = json.loads(account_path.read_text())
        if account["identity"] == identity and _files_are_whole(output, account):
            return account
    holder = _open_table(options.vocabulary, checksum, options.max_distance, options.ambiguous)
    aside = output / "partial" / part.name
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    account = _write_part(part, options, holder, aside)
    account = {"identity": identity, **account}
    _check_account(part.path, account)
    account["files"] = {}
    for path in sorted(aside.iterdir()):
        folder = path.name.partition(".")[0]
        target = output / folder / f"{part.name}{path.suffix}"
        target.parent.mkdir(exist_ok=True)
        account["files"][f"{folder}/{target.name}"] = _sha256(path)
        os.replace(path, target)
    aside.rmdir()
    _write_atomically(account_path, json.dumps(account, indent=1) + "\n")
    return account


def _write_part(part: Part, options: CorpusOptions, holder: list[_TagTable], folder: Path) -> dict[str, Any]:
    mapping = holder[0].mapping
    num_labels = len(mapping.vocabulary) if mapping else 0
    rows: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    pairs_in = 0
    dropped = np.zeros(len(DROP_REASONS), np.int64)
    label_counts = np.zeros(num_labels, np.int64)
    counts = np.zeros(0, np.int64)  # images per spelling of the table
    schema = pa.schema([("key", pa.string()), ("labels", pa.list_(pa.int32())), ("num_hashtags", pa.int32())])
    chunks = read_posts(
        part.path,
        part.format,
        options.key_column,
        options.hashtags_column,
        (part.first, part.last) if part.format == "parquet" else None,
    )
    with (
        pq.ParquetWriter(folder / "labels.parquet", schema, **_SETTINGS) as writer,
        pq.ParquetWriter(folder / "counts.parquet", _COUNTS_SCHEMA, **_SETTINGS) as counts_writer,
        open(folder / "quarantine.jsonl", "w", encoding="utf-8") as quarantine,
    ):
        for chunk in chunks:
            if holder[0].is_full:
                counts_writer.write_table(_counts_table(holder[0], counts))
                holder[0], counts = _TagTable(mapping), np.zeros(0, np.int64)
            mapped = _map_chunk(chunk, holder[0])
            rows["in"] += chunk.num_rows
            rows["labelled"] += len(mapped.keys)
            rows["unlabelled"] += len(chunk.keys) - len(mapped.keys)
            skipped.update(chunk.skipped)
            for row, reason, raw in chunk.quarantined:
                reasons[reason if len(reason) < 60 else reason.partition(":")[2].strip()] += 1
                line = {"file": part.path, "row": row, "reason": reason, "beginning": raw}
                quarantine.write(json.dumps(line, ensure_ascii=True) + "\n")
            pairs_in += mapped.num_pairs
            dropped += mapped.dropped
            counts = mapped.counts + np.pad(counts, (0, len(mapped.counts) - len(counts)))
            label_counts += np.bincount(mapped.labels.values.to_numpy(), minlength=num_labels)[:num_labels]
            if len(mapped.keys):
                columns = [mapped.keys.cast(pa.string()), mapped.labels, pa.array(mapped.num_hashtags, pa.int32())]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        counts_writer.write_table(_counts_table(holder[0], counts))
    return {
        "rows_in": rows["in"],
        "labelled": rows["labelled"],
        "unlabelled": rows["unlabelled"],
        "skipped": dict(sorted(skipped.items())),
        "quarantined": dict(sorted(reasons.items())),
        "pairs_in": pairs_in,
        "pairs_mapped": int(pairs_in - dropped.sum()) if mapping else 0,
        "pairs_dropped": {name: int(pairs) for name, pairs in zip(DROP_REASONS, dropped, strict=True) if pairs},
        "label_counts": {str(label): int(label_counts[label]) for label in np.flatnonzero(label_counts)},
    }


_COUNTS_SCHEMA = pa.schema([("hashtag", pa.string()), ("images", pa.int64())])


def _counts_table(table: _TagTable, counts: np.ndarray) -> pa.Table:
    seen = np.flatnonzero(counts)
    names = pa.array(table.spellings, pa.string()).take(pa.array(seen))
    rows = pa.Table.from_arrays([names, pa.array(counts[seen])], schema=_COUNTS_SCHEMA).sort_by("hashtag")
    return rows.filter(pc.not_equal(rows.column("hashtag"), ""))


@dataclasses.dataclass
class _MappedChunk:
    keys: pa.Array  # of labelled images
    labels: pa.ListArray
    num_hashtags: np.ndarray
    num_pairs: int
    dropped: np.ndarray  # pairs by reason
    counts: np.ndarray  # images by spelling


def _map_chunk(chunk: Chunk, table: _TagTable) -> _MappedChunk:
    """Looks each distinct hashtag up once; everything else is done in whole columns."""
    lists = chunk.hashtags
    num_rows = len(lists)
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    row_of_pair = np.repeat(np.arange(num_rows), lengths)
    encoded = lists.flatten().dictionary_encode()
    number_of_code = table.look_up(encoded.dictionary.to_pylist())
    tag = number_of_code[encoded.indices.to_numpy(zero_copy_only=False)]

    reason = table.reason[tag]
    dropped = np.bincount(reason[reason >= 0], minlength=len(DROP_REASONS))

    has_label = table.label_count[tag] > 0
    tag_with_label, repeats = tag[has_label], table.label_count[tag[has_label]]
    row = np.repeat(row_of_pair[has_label], repeats)
    within = np.arange(len(row)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    label = table.labels[np.repeat(table.label_start[tag_with_label], repeats) + within]
    row, label = _distinct_pairs(row, label)
    labels_of_row = np.bincount(row, minlength=num_rows)
    chosen = np.flatnonzero(labels_of_row)
    offsets = np.concatenate([[0], np.cumsum(labels_of_row[chosen])]).astype(np.int32)

    # An image counts once for a hashtag, however often or in however many spellings it carries it.
    _, spelling = _distinct_pairs(row_of_pair, table.spelling[tag])
    return _MappedChunk(
        keys=chunk.keys.take(pa.array(chosen)),
        labels=pa.ListArray.from_arrays(pa.array(offsets), pa.array(label.astype(np.int32))),
        num_hashtags=lengths[chosen],
        num_pairs=len(tag),
        dropped=dropped,
        counts=np.bincount(spelling, minlength=table.num_spellings),
    )


def _distinct_pairs(row: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts (row, value) pairs whose rows are sorted already, and leaves repeated ones out."""
    if not len(row):
        return row, value
    span = int(value.max()) + 1
    pairs = np.sort(row * span + value, kind="stable")
    pairs = pairs[np.concatenate([[True], pairs[1:] != pairs[:-1]])]
    return np.divmod(pairs, span)


def _check_account(path: str, account: dict[str, Any]) -> None:
    rows = account["labelled"] + account["unlabelled"]
    rows += sum(account["skipped"].values()) + sum(account["quarantined"].values())
    pairs = account["pairs_mapped"] + sum(account["pairs_dropped"].values())
    counting_only = account["identity"]["options"]["vocabulary"] == ""
    if rows != account["rows_in"] or (pairs != account["pairs_in"] and not counting_only):
        raise CorpusError(
            f"{path}: the account does not add up: {rows} of {account['rows_in']} rows, {pairs} of "
            f"{account['pairs_in']} hashtags. This is a defect of wsl_d2; please report it."
        )


def _identity(options: CorpusOptions, checksum: str) -> dict[str, Any]:
    return {**dataclasses.asdict(options), "vocabulary": checksum, "format_version": FORMAT_VERSION}


def _files_are_whole(output: Path, account: dict[str, Any]) -> bool:
    return all(
        (output / name).is_file() and _sha256(output / name) == digest for name, digest in account["files"].items()
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def prepare_hashtags(
    inputs: Iterable[str],
    output: str | Path,
    options: CorpusOptions,
    *,
    runner: str = "native",
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Maps or counts the hashtags of a corpus; an interrupted call can be repeated and does what is missing.

    Args:
        inputs: files, folders, glob patterns or URLs of posts.
        output: folder of results; with the Ray runner it must be one that all its machines see.
        options: what decides the results.
        runner: "native" or "ray" (the cluster of RAY_ADDRESS, or a local one).
        workers: processes of the native runner; all cores by default. With Ray its own scheduling decides.
        progress: show a progress bar.

    Returns:
        The manifest.

    Raises:
        CorpusError: input that cannot be read, or an output folder of other input or options.
        VocabularyError: the vocabulary cannot be read.
    """
    output = Path(output).resolve()
    checksum = Vocabulary.load(options.vocabulary).checksum if options.vocabulary else ""
    if options.vocabulary:
        options = dataclasses.replace(options, vocabulary=str(Path(options.vocabulary).resolve()))
    parts = plan_parts(inputs, options)
    plan = {"options": _identity(options, checksum), "parts": [dataclasses.asdict(part) for part in parts]}
    _check_plan(output, plan)
    _write_atomically(output / "plan.json", json.dumps(plan, indent=1) + "\n")
    accounts: list[dict[str, Any] | None] = [None] * len(parts)
    results = _run_parts(parts, options, checksum, output, runner, workers or os.cpu_count() or 1)
    with tqdm(total=len(parts), unit="part", desc="hashtags", disable=not progress) as bar:
        for number, account in results:
            accounts[number] = account
            bar.update()
            bar.set_postfix(posts=f"{sum(a['rows_in'] for a in accounts if a):,}", refresh=False)
    return _finish(output, [account for account in accounts if account], options, checksum)


def _check_plan(output: Path, plan: dict[str, Any]) -> None:
    path = output / "plan.json"
    if not path.is_file():
        return
    before = json.loads(path.read_text())
    differences = [
        f"{name}: {before['options'].get(name)!r} before, {value!r} now"
        for name, value in plan["options"].items()
        if before["options"].get(name) != value
    ]
    if before["parts"] != plan["parts"]:
        differences.append(
            f"input: {len(before['parts'])} parts before, {len(plan['parts'])} now, or files have changed"
        )
    if differences:
        raise CorpusError(
            f"{output} holds the results of something else ({'; '.join(differences)}); choose another --output, or "
            "remove that folder."
        )


def _run_parts(
    parts: list[Part], options: CorpusOptions, checksum: str, output: Path, runner: str, workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (part number, account) as parts finish."""
    if runner == "native" and workers == 1:
        yield from ((part.number, process_part(part, options, checksum, output)) for part in parts)
        return
    import daft

    if runner == "ray":
        daft.set_runner_ray(os.environ.get("RAY_ADDRESS"), noop_if_initialized=True)
    elif runner != "native":
        raise CorpusError(f"unknown runner {runner!r}; choose native or ray.")
    runner_class = daft.cls(_PartRunner, use_process=runner == "native", max_concurrency=workers)
    run = runner_class(dataclasses.asdict(options), checksum, str(output))
    frame = daft.from_pydict({"part": [json.dumps(dataclasses.asdict(part)) for part in parts]})
    frame = frame.into_batches(1).select(run.process(daft.col("part")).alias("account"))
    for row in frame.iter_rows(results_buffer_size=workers):
        account = json.loads(row["account"])
        if "error" in account:
            raise CorpusError(account["error"])
        yield account["identity"]["part"]["number"], account


class _PartRunner:
    """`process_part` as Daft runs it: in its own processes, a part in and an account out as JSON."""

    def __init__(self, options: dict[str, Any], checksum: str, output: str):
        self.options, self.checksum, self.output = CorpusOptions(**options), checksum, output

    def process(self, part: str) -> str:
        try:
            return json.dumps(process_part(Part(**json.loads(part)), self.options, self.checksum, self.output))
        except CorpusError as error:
            return json.dumps({"error": str(error)})


def _finish(output: Path, accounts: list[dict[str, Any]], options: CorpusOptions, checksum: str) -> dict[str, Any]:
    import daft

    def total(name: str) -> dict[str, int]:
        everything: Counter[str] = Counter()
        for account in accounts:
            everything.update(account[name])
        return dict(sorted(everything.items()))

    frame = daft.read_parquet(str(output / "counts" / "*.parquet"))
    frame = frame.groupby("hashtag").agg(daft.col("images").sum()).sort(["images", "hashtag"], desc=[True, False])
    partial = output / ".hashtag_counts.tsv.partial"
    with open(partial, "w", encoding="utf-8") as file:
        for table in frame.to_arrow_iter():
            names, images = table.column("hashtag").to_pylist(), table.column("images").to_pylist()
            file.writelines(f"{name}\t{count}\n" for name, count in zip(names, images, strict=True))
    os.replace(partial, output / "hashtag_counts.tsv")
    label_counts = total("label_counts")
    if options.vocabulary:
        synsets = Vocabulary.load(options.vocabulary).synsets
        lines = [f"{label}\t{synset}\t{label_counts.get(str(label), 0)}\n" for label, synset in enumerate(synsets)]
        _write_atomically(output / "label_counts.tsv", "".join(lines))
    manifest = {
        "format": "wsl_d2 corpus",
        "format_version": FORMAT_VERSION,
        "vocabulary_checksum": checksum,
        "num_parts": len(accounts),
        **{
            name: sum(a[name] for a in accounts)
            for name in ("rows_in", "labelled", "unlabelled", "pairs_in", "pairs_mapped")
        },
        **{name: total(name) for name in ("skipped", "quarantined", "pairs_dropped")},
        "files": {name: digest for account in accounts for name, digest in account["files"].items()},
    }
    shutil.rmtree(output / "partial", ignore_errors=True)
    _write_atomically(output / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return manifest
