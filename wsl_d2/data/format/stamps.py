"""Which tars have changed since they were indexed: by the file system's metadata, then by SHA-256.

``.stamps.jsonl`` beside the shards holds each tar's size, times and inode as they were when its index was written.
While all of them are the same, so is the tar: a program may set a file's modification time back, but not its change
time. A copied dataset has other stamps; its tars are read once, and noted again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from wsl_d2.files import sha256_of

STAMPS = ".stamps.jsonl"


def stamp_of(path: str | Path) -> list[int]:
    """Returns size, modification time, change time and inode of a file; raises OSError if it is not there."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def note_stamp(tar_path: str | Path, sha256: str, stamp: list[int] | None = None) -> None:
    """Notes that a tar with this stamp, by default its present one, has this content."""
    tar_path = Path(tar_path)
    row = {"name": tar_path.name, "sha256": sha256, "stamp": stamp or stamp_of(tar_path)}
    with open(tar_path.parent / STAMPS, "ab") as file:
        file.write(json.dumps(row).encode() + b"\n")  # one write: processes may append at the same time


def read_stamps(folder: str | Path) -> dict[str, tuple[str, list[int]]]:
    """Returns name of the tar -> its SHA-256 and stamp, as last recorded; a truncated line is left out."""
    path = Path(folder) / STAMPS
    found: dict[str, tuple[str, list[int]]] = {}
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
                found[row["name"]] = row["sha256"], row["stamp"]
            except (ValueError, KeyError, TypeError):
                continue
    return found


def has_content(tar_path: str | Path, sha256: str, stamps: dict[str, tuple[str, list[int]]]) -> bool:
    """Whether a tar that is there has the content of this SHA-256; reads it only where the stamps do not tell."""
    name = Path(tar_path).name
    now = stamp_of(tar_path)
    if stamps.get(name) == (sha256, now):
        return True
    if sha256_of(tar_path) != sha256:
        return False
    note_stamp(tar_path, sha256, now)
    return True
