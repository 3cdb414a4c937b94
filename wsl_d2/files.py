"""Files that are whole at every moment, their checksums, and the one cache. Standard library alone."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

CACHE_VARIABLE = "WSL_D2_CACHE"


def cache_folder(*parts: str) -> Path:
    """Returns a folder of the cache, which is $WSL_D2_CACHE, by default ~/.cache/wsl_d2; it may not exist yet."""
    root = os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "wsl_d2"
    return Path(root).expanduser().joinpath(*parts)


def sync_folder(folder: str | Path) -> None:
    """Makes renames in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: str | Path) -> IO[bytes]:
    """Opens a file for reading, and never waits: a pipe, socket or device among images is no file.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


@contextlib.contextmanager
def open_atomically(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a file beside ``path`` for writing; at the end it is flushed to disk and renamed onto ``path``."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno == errno.ENOSPC:  # writing does not say where
            error.filename = error.filename or str(path)
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Writes ``data`` (text as UTF-8) beside ``path``, flushes it to disk, and renames it onto ``path``."""
    with open_atomically(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


class HashingWriter:
    """A file to write to from start to end that takes the SHA-256 of what is written."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def sha256_of(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
