"""Where shards are read from and written to: a local folder, or an object store through fsspec with a bounded cache.

A file of a store is copied whole into the cache, once for all processes of a machine, and its checksum is verified. The
least recently used shards, indexes and labels are evicted. What is written to a store is made in the cache first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from wsl_d2.data.remote import StoreBusyError, StoreUnreachableError, is_url, open_file_system, retry
from wsl_d2.errors import ShardError
from wsl_d2.files import cache_folder, open_atomically, sha256_of

_EVICTED = (".tar", ".npz")  # from the cache


class ShardStore:
    """The files of a folder of shards, as local paths.

    The object pickles without connections, so that every worker process makes its own.

    Args:
        folder: a path, or a URL of fsspec such as ``s3://bucket/train`` or ``https://host/train``.
        cache_bytes: size of the shard cache of this machine, with indexes and labels; at least that of the shards in
            use at a time.
        attempts: to read a file of a store, with waits in between that double.

    Attributes:
        folder: local; of a store, the folder of the cache.
    """

    def __init__(self, folder: str | Path, cache_bytes: float = 100e9, attempts: int = 6):
        self.is_remote = is_url(folder)
        self.location = str(folder).rstrip("/")
        self.cache_bytes = cache_bytes
        self.attempts = attempts
        if self.is_remote:
            self.folder = cache_folder("shards", hashlib.sha256(self.location.encode()).hexdigest()[:16])
            self.folder.mkdir(parents=True, exist_ok=True)
        else:
            self.folder = Path(folder)
        self._connection: tuple[int, Any] | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_connection": None}

    def place(self, name: str) -> str:
        """Returns the path or URL of a file, for messages."""
        return f"{self.location}/{name}"

    def path(self, name: str, sha256: str | None = None, *, fresh: bool = False) -> Path:
        """Returns a local path with the content of a file, copied from the store where it is not there yet.

        Args:
            name: a plain name within the folder.
            sha256: what a copy must have, as hex digits.
            fresh: copy it again even if it is there.

        Raises:
            ShardError: the store does not have it, or all attempts to copy it failed.
        """
        path = self.folder / name
        if not self.is_remote:
            return path
        with FileLock(f"{path}.lock", thread_local=False):
            if fresh or not path.is_file():
                self._copy(name, path, sha256)
        if name.endswith(_EVICTED):
            with contextlib.suppress(FileNotFoundError):  # evicted at this moment
                os.utime(path)  # the time of its last use
        return path

    def list_files(self) -> dict[str, list]:
        """Returns name -> [size, a text or number that changes with the content, "" if unknown] of all files.

        Raises:
            ShardError: the folder cannot be listed.
        """
        if not self.is_remote:
            with os.scandir(self.folder) as entries:
                stamps = {entry.name: entry.stat() for entry in entries if entry.is_file()}
            return {name: [stamp.st_size, stamp.st_mtime_ns] for name, stamp in stamps.items()}

        def ls() -> list[dict]:
            try:
                return self._file_system().ls(self.location, detail=True)
            except FileNotFoundError:  # an object store has no empty folders
                return []

        rows = [row for row in self._retry(ls, self.location) if row["type"] == "file"]
        return {row["name"].rstrip("/").rpartition("/")[2]: [row["size"], _version_of(row)] for row in rows}

    def names(self) -> set[str]:
        """Returns the names of all that is there, links to nothing included; of a local folder without a look at each.

        Raises:
            ShardError: see :meth:`list_files`.
        """
        return set(self.list_files() if self.is_remote else os.listdir(self.folder))

    def tars(self) -> list[str]:
        """Returns the names of the tars, sorted."""
        return sorted(name for name in self.names() if name.endswith(".tar"))

    def sizes(self) -> dict[str, int]:
        """Returns name -> bytes of the files; of a local folder those of the tars, 0 of all others.

        Raises:
            ShardError: see :meth:`list_files`.
        """
        if self.is_remote:
            return {name: stamp[0] for name, stamp in self.list_files().items()}
        with os.scandir(self.folder) as entries:
            return {
                entry.name: entry.stat().st_size if entry.name.endswith(".tar") else 0
                for entry in entries
                if entry.is_file()
            }

    def stamp(self, name: str) -> list:
        """Returns what :meth:`list_files` says of one file of a store; [-1, ""] if it is not there."""

        def info() -> list:
            try:
                row = self._file_system().info(self.place(name))
            except FileNotFoundError:
                return [-1, ""]
            return [row["size"], _version_of(row)]

        return self._retry(info, self.place(name))

    def upload(self, *names: str) -> None:
        """Copies files, in this order, from the cache to a store; of a local folder nothing needs to be done.

        Raises:
            ShardError: the store does not take them.
        """
        for name in names if self.is_remote else ():
            put = partial(self._put, str(self.folder / name), self.place(name))
            self._retry(put, self.place(name), "written")

    def remove(self, *names: str) -> None:
        """Removes files, which may not be there, from the folder, or from a store and its cache."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
            if self.is_remote and self.stamp(name)[0] >= 0:
                self._retry(partial(self._rm, self.place(name)), self.place(name), "removed")

    def _put(self, path: str, place: str) -> None:
        self._file_system().put_file(path, place)

    def _rm(self, place: str) -> None:
        self._file_system().rm_file(place)

    def _retry(self, action: Callable[[], Any], place: str, done: str = "read") -> Any:
        try:
            return retry(action, place, self.attempts, done)
        except (FileNotFoundError, PermissionError, StoreBusyError, StoreUnreachableError) as error:
            raise ShardError(f"{error}.") from error

    def _copy(self, name: str, path: Path, sha256: str | None) -> None:
        with open_atomically(path) as file:

            def copy() -> None:
                self._file_system().get_file(self.place(name), file.name)
                if problem := _problem_of(file.name, name, sha256):
                    raise StoreBusyError(problem)

            self._retry(copy, self.place(name))
            if name.endswith(_EVICTED):
                self._evict(path, os.path.getsize(file.name))

    def _file_system(self) -> Any:
        if self._connection is None or self._connection[0] != os.getpid():
            self._connection = (os.getpid(), open_file_system(self.location))
        return self._connection[1]

    def _evict(self, copied: Path, num_bytes: int) -> None:
        entries = []
        for path in self.folder.iterdir():
            if not path.name.endswith(_EVICTED) or path == copied:
                continue
            try:
                status = path.stat()
            except FileNotFoundError:  # evicted by another process
                continue
            entries.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total + num_bytes <= self.cache_bytes:
                break
            path.unlink(missing_ok=True)  # a process that has it open reads on
            total -= size


def _version_of(row: dict) -> str:
    names = "ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created"  # as stores call it
    return str(next((row[name] for name in names if row.get(name)), ""))


def _problem_of(path: str, name: str, sha256: str | None) -> str:
    """What is wrong with a copy, "" if nothing."""
    if sha256 is not None:
        found = sha256_of(path)
        return "" if found == sha256 else f"the copy's SHA-256 is {found[:12]}, the manifest says {sha256[:12]}"
    if name.endswith(".npz"):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except zipfile.BadZipFile as error:
            return str(error)
        return "" if damaged is None else f"its part {damaged} is damaged"
    return ""
