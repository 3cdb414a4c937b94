"""How many images carry each hashtag: of any number of posts, with an account of every row.

The work is cut into parts: a file, or a range of row groups of a large Parquet file. `count_part` is a pure function
from a part to its files, so results do not depend on who runs it, and a restart does only the parts that are missing.
The counts of the parts are merged in a tree; no process holds more than a chunk and some ranges of hashtags, however
many different ones there are.

A folder of results::

    counts/part-000000.parquet       hashtag as people wrote it, without '#', sorted; images
    rejected/part-000000.jsonl       file, row, reason and beginning of rows that could not be used
    parts/part-000000.json           the part's account, and the checksums of its files; written last
    hashtag_counts.tsv               over all parts, the most frequent first; for building vocabularies
    manifest.json                    the sum of the accounts; written last of all
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wsl_d2.data.format.labels import sorted_unique
from wsl_d2.data.posts.files import find_files
from wsl_d2.data.posts.merge import COUNTS_SCHEMA, merge_counts, merge_files, read_most_frequent_first, write_counts
from wsl_d2.data.posts.readers import Chunk, PostsError, detect_post_format, no_hashtags, read_posts
from wsl_d2.data.runner import Workers, run_parts
from wsl_d2.files import open_atomically, sha256_of, write_atomically

FORMAT_VERSION = 2
_PART_ROWS = 1_000_000  # of a Parquet file
_ROWS_IN_MEMORY = 2_000_000  # different hashtags of a part; beyond, they go to files
_MERGED_AT_ONCE = 16  # files


@dataclasses.dataclass(frozen=True)
class CountOptions:
    """What decides the results, beside the input; see :func:`wsl_d2.data.posts.readers.read_posts`.

    Attributes:
        format: one of ``FORMATS``, or "auto": by each file's name.
    """

    format: str = "auto"
    key_column: str = "key"
    hashtags_column: str = "hashtags"
    caption_column: str | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of the input: a file of ``size`` bytes; of Parquet, the row groups from ``first`` to before ``last``."""

    number: int
    path: str
    size: int
    format: str
    first: int = 0
    last: int = 0

    def __str__(self) -> str:
        return self.path + (f", row groups {self.first} to {self.last - 1}" if self.last else "")

    @property
    def name(self) -> str:
        return f"part-{self.number:06d}"


def plan_parts(inputs: Iterable[str], options: CountOptions) -> list[Part]:
    """Cuts the input into parts, in the order of the sorted paths.

    Raises:
        PostsError: a path matches nothing, or a file's format cannot be told or its Parquet footer not read.
    """
    parts: list[Part] = []
    for path, size in sorted(find_files(inputs).items()):
        kind = detect_post_format(path) if options.format == "auto" else options.format
        for first, last in _row_group_ranges(path) if kind == "parquet" else [(0, 0)]:
            parts.append(Part(len(parts), path, size, kind, first, last))
    return parts


def _row_group_ranges(path: str) -> list[tuple[int, int]]:
    try:
        with fsspec.open(path, "rb") as file:
            footer = pq.ParquetFile(file).metadata
            sizes = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        raise PostsError(f"{path}: not readable as parquet to its end ({error}).") from error
    ranges, first, rows = [], 0, 0
    for group, size in enumerate(sizes):
        rows += size
        if rows >= _PART_ROWS or group == len(sizes) - 1:
            ranges.append((first, group + 1))
            first, rows = group + 1, 0
    return ranges or [(0, 0)]


@dataclasses.dataclass(frozen=True)
class _Counting:
    options: CountOptions
    output: Path


def count_part(counting: _Counting, part: Part) -> dict[str, Any] | str:
    """Turns one part into its files and returns its account; a finished part is only checked.

    Returns:
        The account, or what is wrong with the input.
    """
    options, output = counting.options, counting.output
    identity = {"part": dataclasses.asdict(part), "options": _identity(options)}
    account_path = output / "parts" / f"{part.name}.json"
    if account_path.is_file():
        account = json.loads(account_path.read_text())
        if account["identity"] == identity and _files_are_whole(output, account):
            return account
    rows: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for folder in ("counts", "rejected", "parts"):
        (output / folder).mkdir(exist_ok=True)
    files = {f"counts/{part.name}.parquet": output / "counts" / f"{part.name}.parquet"}
    rejected = output / "rejected" / f"{part.name}.jsonl"
    chunks = read_posts(
        part.path,
        part.format,
        options.key_column,
        options.hashtags_column,
        options.caption_column,
        (part.first, part.last) if part.format == "parquet" else None,
        with_origins=False,
    )

    def count_chunks(lines: IO[bytes]) -> Iterator[pa.Table]:
        for chunk in chunks:
            rows["rows"] += chunk.num_rows
            rows["posts"] += len(chunk.keys)
            rows["hashtags"] += len(chunk.hashtags.flatten())
            skipped.update(chunk.skipped)
            for row, reason, raw in chunk.rejected:
                reasons[reason] += 1
                line = {"file": part.path, "row": row, "reason": reason, "beginning": raw}
                lines.write(json.dumps(line).encode() + b"\n")
            yield count_chunk(chunk)

    try:
        with open_atomically(rejected) as lines:
            _write_sum(count_chunks(lines), files[f"counts/{part.name}.parquet"])
    except PostsError as error:
        return str(error)
    if reasons:
        files[f"rejected/{part.name}.jsonl"] = rejected
    else:
        rejected.unlink()
    account = {
        "identity": identity,
        **{name: rows[name] for name in ("rows", "posts", "hashtags")},
        "skipped": dict(sorted(skipped.items())),
        "rejected": dict(sorted(reasons.items())),
        "files": {name: sha256_of(path) for name, path in files.items()},
    }
    write_atomically(account_path, json.dumps(account, indent=1) + "\n")
    return account


def count_chunk(chunk: Chunk) -> pa.Table:
    """Returns (hashtag, images) of some rows; an image counts once for a hashtag, however often it carries it."""
    lists = chunk.hashtags
    encoded = lists.flatten().dictionary_encode()
    names = pc.utf8_trim(pc.replace_substring_regex(encoded.dictionary, r"[\t\r\n]+", " "), " ")
    names = pc.utf8_ltrim(names, "#＃").dictionary_encode()
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    code = names.indices.to_numpy(zero_copy_only=False)[encoded.indices.to_numpy(zero_copy_only=False)]
    span = max(1, len(names.dictionary))
    pairs = sorted_unique(np.repeat(np.arange(len(lists)), lengths) * span + code)
    images = np.bincount(pairs % span, minlength=span)[: len(names.dictionary)]
    found = names.dictionary.cast(pa.large_string())
    table = pa.Table.from_arrays([found, pa.array(images, pa.int64())], schema=COUNTS_SCHEMA)
    return table.filter(pc.not_equal(table.column("hashtag"), "")).sort_by("hashtag")


def _write_sum(tables: Iterable[pa.Table], path: Path) -> None:
    """Writes the sums over tables of counts; more different hashtags than fit into memory go through files."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.stem}.partial-") as folder:
        spilled: list[Path] = []
        held: list[pa.Table] = []

        def spill() -> None:
            spilled.append(Path(folder) / f"{len(spilled)}.parquet")
            write_counts([merge_counts(held)], spilled[-1])
            held.clear()

        for table in tables:
            held.append(table)
            if sum(map(len, held)) > _ROWS_IN_MEMORY:
                held[:] = [merge_counts(held)]
                if len(held[0]) > _ROWS_IN_MEMORY // 2:
                    spill()
        if spilled:
            spill()
            merge_files(spilled, path)
        else:
            write_counts([merge_counts(held)], path)


def _identity(options: CountOptions) -> dict[str, Any]:
    return {**dataclasses.asdict(options), "format_version": FORMAT_VERSION}


def _files_are_whole(output: Path, account: dict[str, Any]) -> bool:
    return all(
        (output / name).is_file() and sha256_of(output / name) == digest for name, digest in account["files"].items()
    )


def count_hashtags(
    inputs: Iterable[str], output: str | Path, options: CountOptions | None = None, *, workers: Workers = 1
) -> dict[str, Any]:
    """Counts the hashtags of a corpus; an interrupted call can be repeated and does what is missing.

    Args:
        inputs: files, folders, glob patterns or URLs of posts.
        output: folder of results.
        options: what decides the results.
        workers: processes, or a cluster.

    Returns:
        The manifest.

    Raises:
        PostsError: input that cannot be read, an output folder of other input or options, or no hashtag at all.
    """
    output, options = Path(output), options or CountOptions()
    parts = plan_parts(inputs, options)
    plan = {"options": _identity(options), "parts": [dataclasses.asdict(part) for part in parts]}
    _check_plan(output, plan)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "plan.json", json.dumps(plan, indent=1) + "\n")
    accounts: list[dict[str, Any]] = []
    problems: list[str] = []
    for found in run_parts(
        count_part, parts, _Counting(options, output), workers=workers, unit="part", total=len(parts)
    ):
        if isinstance(found, str):
            problems.append(found)
        else:
            accounts.append(found)
    if problems:
        raise PostsError(
            f"{len(problems)} of {len(parts)} parts could not be read, the others are kept in {output}: "
            + "; ".join(sorted(problems)[:5])
        )
    return _finish(output, accounts, options, workers)


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
        raise PostsError(
            f"{output} holds the results of something else ({'; '.join(differences)}). Nothing was written; choose "
            "another --output, or remove that folder."
        )


def _finish(output: Path, accounts: list[dict[str, Any]], options: CountOptions, workers: Workers) -> dict[str, Any]:
    def total(name: str) -> dict[str, int]:
        everything: Counter[str] = Counter()
        for account in accounts:
            everything.update(account[name])
        return dict(sorted(everything.items()))

    accounts.sort(key=lambda account: account["identity"]["part"]["number"])
    sums = {name: sum(account[name] for account in accounts) for name in ("rows", "posts", "hashtags")}
    manifest = {
        "format": "wsl_d2 hashtag counts",
        "format_version": FORMAT_VERSION,
        "num_parts": len(accounts),
        **sums,
        "skipped": total("skipped"),
        "rejected": total("rejected"),
        "files": {name: digest for account in accounts for name, digest in account["files"].items()},
    }
    if not sums["hashtags"]:
        column = options.caption_column or options.hashtags_column
        paths = list(dict.fromkeys(account["identity"]["part"]["path"] for account in accounts))
        raise PostsError(no_hashtags(paths, sums["rows"], column, manifest["skipped"] | manifest["rejected"]))
    parts = [output / name for account in accounts for name in account["files"] if name.startswith("counts/")]
    merged = _merge_parts(parts, output / "merged", workers)
    distinct = 0
    with open_atomically(output / "hashtag_counts.tsv") as file:
        for table in read_most_frequent_first(merged):
            distinct += len(table)
            rows = zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True)
            file.write("".join(f"{name}\t{count}\n" for name, count in rows).encode())
    manifest["distinct"] = distinct
    write_atomically(output / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(output / "merged", ignore_errors=True)
    for left in list(output.rglob("*.partial-*")):  # by processes that were killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return manifest


def _merge_parts(files: list[Path], folder: Path, workers: Workers) -> Path:
    """Merges files of counts in a tree, in which every node is a file that a restart finds; returns the last one."""
    level = 0
    while len(files) > 1:
        folder.mkdir(exist_ok=True)
        groups = [files[first : first + _MERGED_AT_ONCE] for first in range(0, len(files), _MERGED_AT_ONCE)]
        nodes = [(group, folder / f"level-{level}-{i:06d}.parquet") for i, group in enumerate(groups)]
        several = workers if len(nodes) > 1 else 1
        for _ in run_parts(_merge_node, nodes, None, workers=several, unit="merge", total=len(nodes)):
            pass
        files, level = [path for _, path in nodes], level + 1
    return files[0]


def _merge_node(_: None, node: tuple[list[Path], Path]) -> None:
    files, path = node
    if not path.exists():
        merge_files(files, path)
