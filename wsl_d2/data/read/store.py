"""Where shards are read from: a local folder, or an object store through fsspec with a bounded local cache.

A file of a store is copied whole into the cache, once for all processes of a machine; it is kept only if its size and
checksum are right. The shards used longest ago make room for new ones.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
import zipfile
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock
from iopath.common.file_io import get_cache_dir

from wsl_d2.data.shards import ShardError, sha256_of

CACHE_VARIABLE = "WSL_D2_SHARD_CACHE"
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds between two attempts
_NO_ANSWER = 60.0  # seconds after which a connection that gives nothing counts as lost


def is_url(folder: str | Path) -> bool:
    """Whether a folder is in a store that fsspec knows, such as ``s3://bucket/train``."""
    return "://" in str(folder)


class ShardStore:
    """The files of a folder of shards, as local paths.

    The object pickles without connections, so that every worker process makes its own.

    Args:
        folder: a path, or a URL of fsspec such as ``s3://bucket/train`` or ``https://host/train``.
        cache_bytes: of shards from a store kept on this machine; at least as large as those in use at a time.
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
            root = os.environ.get(CACHE_VARIABLE) or Path(get_cache_dir()) / "wsl_d2" / "shards"
            self.folder = Path(root) / hashlib.sha256(self.location.encode()).hexdigest()[:16]
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
            ShardError: the store does not have it, or did not give it whole in any attempt.
        """
        path = self.folder / name
        if not self.is_remote:
            return path
        with FileLock(f"{path}.lock", thread_local=False):
            if fresh or not path.is_file():
                self._copy(name, path, sha256)
        if name.endswith(".tar"):
            os.utime(path)  # the time of its last use
        return path

    def _copy(self, name: str, path: Path, sha256: str | None) -> None:
        partial = path.with_name(f"{name}.partial-{os.getpid()}")
        problem = ""
        for attempt in range(self.attempts):
            if attempt:
                wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
                logging.getLogger(__name__).warning(
                    f"{self.place(name)}: {problem}; attempt {attempt + 1} of {self.attempts} in {wait:.1f} s"
                )
                time.sleep(wait)
            try:
                self._file_system().get_file(self.place(name), str(partial))
                problem = _problem_of(partial, name, sha256)
                if not problem:
                    if name.endswith(".tar"):
                        self._make_room(partial.stat().st_size)
                    os.replace(partial, path)
                    return
            except FileNotFoundError as error:
                raise ShardError(f"{self.place(name)} does not exist.") from error
            except Exception as error:  # stores raise errors of their own libraries
                problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            finally:
                partial.unlink(missing_ok=True)
        raise ShardError(f"{self.place(name)} could not be read in {self.attempts} attempts: {problem}.")

    def _file_system(self) -> Any:
        if self._connection is None or self._connection[0] != os.getpid():
            options: dict = {"skip_instance_cache": True}
            if self.location.startswith(("http://", "https://")):
                import aiohttp

                timeout = aiohttp.ClientTimeout(total=None, sock_connect=_NO_ANSWER, sock_read=_NO_ANSWER)
                options["client_kwargs"] = {"timeout": timeout}
            self._connection = (os.getpid(), fsspec.url_to_fs(self.location, **options)[0])
        return self._connection[1]

    def _make_room(self, num_bytes: int) -> None:
        entries = []
        for path in self.folder.glob("*.tar"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            entries.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total + num_bytes <= self.cache_bytes:
                break
            path.unlink(missing_ok=True)  # a process that has it open reads on
            total -= size


def _problem_of(path: Path, name: str, sha256: str | None) -> str:
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
