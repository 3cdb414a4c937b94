"""Verification of a dataset of shards: every byte against the manifest, every image decoded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from wsl_d2.data.format.index import ShardIndex, index_path, read_index
from wsl_d2.data.format.labels import ShardLabels, labels_path, read_labels
from wsl_d2.data.format.manifest import MANIFEST, VOCABULARY, ShardTable, read_manifest
from wsl_d2.data.read.decode import DamagedImageError, decode, open_image
from wsl_d2.data.read.store import ShardStore
from wsl_d2.data.runner import Workers, run_parts
from wsl_d2.errors import ShardError
from wsl_d2.files import sha256_of

NOT_LISTED = "not in the manifest"


@dataclass
class ShardReport:
    """What was found in one shard.

    Attributes:
        name: of the tar.
        problem: "missing", "empty", "truncated", "too long", "altered", "no index", "damaged index", "index of other
            images", "no labels", "damaged labels", "labels of another vocabulary", "other labels", "not in the
            manifest", "unreadable", or "".
        detail: more of it.
        num_images: labeled images looked at.
        damaged: (key, reason) of those that cannot be decoded, and of those that are not what was indexed.
        stamp: sizes and times of the files, by which an unchanged shard is recognized.
    """

    name: str
    problem: str = ""
    detail: str = ""
    num_images: int = 0
    damaged: list[tuple[str, str]] = field(default_factory=list)
    stamp: list = field(default_factory=list)


@dataclass(frozen=True)
class _Shard:
    """A row of the manifest, and the stamp of its files."""

    name: str
    num_images: int
    num_bytes: int
    sha256: str
    labels_sha256: str
    vocabulary_checksum: str
    stamp: list

    def __str__(self) -> str:
        return self.name


def verify_shard(place: tuple[ShardStore, bool], shard: _Shard) -> ShardReport:
    """Checks one shard; nothing of it is an exception. ``place``: its store, and whether images are decoded."""
    store, decode_images = place
    path = store.folder / shard.name
    report = ShardReport(shard.name, stamp=shard.stamp)
    try:
        if store.is_remote:
            for file, size in zip(_files_of(shard.name), shard.stamp[::2], strict=True):
                (store.folder / file).unlink(missing_ok=True)
                if size >= 0:
                    store.path(file)
        found = _check_files(shard, path, report)
    except (OSError, ShardError) as error:
        report.problem, report.detail = "unreadable", str(error)
        return report
    if found is not None and decode_images:
        _check_images(path, *found, report)
    if store.is_remote and report.problem:
        path.unlink(missing_ok=True)  # nobody is to read this copy
    return report


def _files_of(tar: str) -> list[str]:
    return [tar, index_path(tar).name, labels_path(tar).name]


def _check_files(shard: _Shard, path: Path, report: ShardReport) -> tuple[ShardIndex, ShardLabels] | None:
    """Fills in the first problem; returns index and labels if they belong to the shard."""
    if not path.is_file():
        report.problem = "missing"
        return None
    size = path.stat().st_size
    if size != shard.num_bytes:
        report.problem = "empty" if size == 0 else "truncated" if size < shard.num_bytes else "too long"
        report.detail = f"{size} bytes, the manifest says {shard.num_bytes}"
    elif (found := sha256_of(path)) != shard.sha256:
        report.problem, report.detail = "altered", f"SHA-256 {found}, the manifest says {shard.sha256}"
    for name, of in (("index", index_path), ("labels", labels_path)):
        if not of(path).is_file():
            report.problem = report.problem or f"no {name}"
            return None
    try:
        index = read_index(path)
    except ShardError as error:
        report.problem, report.detail = report.problem or "damaged index", report.detail or str(error)
        return None
    try:
        labels = read_labels(path)
    except ShardError as error:
        report.problem, report.detail = report.problem or "damaged labels", report.detail or str(error)
        return None
    if index.tar_sha256 != shard.sha256:
        report.problem = report.problem or "index of other images"
    elif labels.vocabulary_checksum != shard.vocabulary_checksum:
        report.problem = report.problem or "labels of another vocabulary"
    elif labels.sha256 != shard.labels_sha256:
        report.problem = report.problem or "other labels"
    else:
        return index, labels
    return None


def _check_images(path: Path, index: ShardIndex, labels: ShardLabels, report: ShardReport) -> None:
    with open(path, "rb") as file:
        for row in labels.rows.tolist():
            data = index.read_image(file.fileno(), row)
            report.num_images += 1
            if data is None:
                report.damaged.append((index.key(row), "altered"))
                continue
            try:
                decode(open_image(data))
            except DamagedImageError as error:
                report.damaged.append((index.key(row), error.reason))


def verify_dataset(
    folder: str | Path, report_path: str | Path, *, workers: Workers = 1, decode_images: bool = True
) -> Iterator[ShardReport]:
    """Checks every shard of a dataset and yields a report of each in the order of completion, first those of tars that
    the manifest lacks.

    Reports are appended to ``report_path`` (JSON lines) as they come; shards that are in it and have not changed since
    are not read again, so that an interrupted call can be repeated. Shows progress.

    Raises:
        ShardError: the manifest is missing or damaged.
    """
    store, report_path = ShardStore(folder), Path(report_path)
    for name in (MANIFEST, VOCABULARY) if store.is_remote else ():
        store.path(name, fresh=True)
    manifest = read_manifest(store.folder)
    found = store.list_files()
    table = ShardTable.from_manifest(manifest)
    shards = [
        _Shard(
            table.name(i),
            int(images),
            int(size),
            table.hex_digest(i),
            table.labels_hex_digest(i),
            manifest["vocabulary_checksum"],
            [fact for file in _files_of(table.name(i)) for fact in found.get(file, [-1, -1])],
        )
        for i, (images, size) in enumerate(zip(table.num_images, table.num_bytes, strict=True))
    ]
    facts = [manifest["vocabulary_checksum"], decode_images]
    known = _known_reports(report_path, facts)
    for stray in sorted(set(store.tars()) - {shard.name for shard in shards}):
        yield ShardReport(stray, NOT_LISTED)
    left = []
    for shard in shards:
        report = known.get((shard.name, shard.sha256 + shard.labels_sha256))
        if report and report.stamp == shard.stamp and "" not in shard.stamp:
            yield report
        else:
            left.append(shard)
    digests = {shard.name: shard.sha256 + shard.labels_sha256 for shard in left}
    with open(report_path, "a", encoding="utf-8") as log:
        for report in run_parts(
            verify_shard, left, (store, decode_images), workers=workers, unit="shard", total=len(left)
        ):
            log.write(json.dumps({"facts": facts, "sha256": digests[report.name], **asdict(report)}) + "\n")
            log.flush()
            yield report


def _known_reports(path: Path, facts: list) -> dict[tuple[str, str], ShardReport]:
    known = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a call that was killed
                continue
            if row.pop("facts") == facts:
                sha256 = row.pop("sha256")
                known[row["name"], sha256] = ShardReport(**row | {"damaged": [tuple(e) for e in row["damaged"]]})
    return known


def summarize(reports: list[ShardReport]) -> dict:
    """Returns counts: of shards by problem, and of images by damage."""
    return {
        "shards": len(reports),
        "images": sum(report.num_images for report in reports),
        "problems": dict(sorted(Counter(report.problem for report in reports if report.problem).items())),
        "damaged_images": dict(sorted(Counter(reason for report in reports for _, reason in report.damaged).items())),
    }
