"""Files of object stores and web servers through fsspec; transient failures are retried, others raised at once."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from wsl_d2.errors import UserError
from wsl_d2.files import open_regular

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between two attempts
_NO_ANSWER = 60.0  # seconds without data after which a connection counts as lost
_GONE, _DENIED = (404, 410), (401, 403)

_T = TypeVar("_T")


class StoreBusyError(UserError, OSError):
    """A store answers, but all attempts to read a file failed; a later one may succeed."""


class StoreUnreachableError(UserError, ConnectionError):
    """A store does not answer at all."""


def is_url(place: str | Path) -> bool:
    """Whether a place is in a store that fsspec knows, such as ``s3://bucket/train``."""
    return "://" in str(place)


def open_file_system(url: str) -> Any:
    """Returns the file system of a URL, with connections of its own."""
    options: dict = {"skip_instance_cache": True, "use_listings_cache": False}
    if url.startswith(("http://", "https://")):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_NO_ANSWER, sock_read=_NO_ANSWER)
        options["client_kwargs"] = {"timeout": timeout}
    try:
        return fsspec.url_to_fs(url, **options)[0]
    except ImportError as error:
        raise UserError(f"{url}: {error}. Install the package that fsspec needs for it.") from error


def retry(action: Callable[[], _T], place: str, attempts: int, done: str = "read") -> _T:
    """Returns what ``action`` returns, after a few attempts with waits in between that double.

    Args:
        action: reads or writes ``place``; may raise whatever the libraries of a store raise.
        place: a path or URL, for messages.
        attempts: in all.
        done: what the action does to it, for messages.

    Raises:
        FileNotFoundError: there is no such file, or it is gone for good.
        PermissionError: access is denied.
        StoreUnreachableError: no connection came about in any attempt.
        StoreBusyError: every attempt failed in another way.
    """
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except FileNotFoundError as error:
            problem = "does not exist" if done == "read" else f"could not be {done}: {error}"
            raise FileNotFoundError(f"{place} {problem}") from None
        except Exception as error:  # stores raise errors of their own libraries
            if isinstance(error, UserError) and not isinstance(error, StoreBusyError):
                raise
            status = getattr(error, "status", None)
            if status in _GONE:
                raise FileNotFoundError(f"{place} does not exist (HTTP {status})") from error
            if isinstance(error, PermissionError) or status in _DENIED:
                raise PermissionError(f"{place}: access denied ({status or error})") from error
            problem = f"HTTP {status}" if status else f"{type(error).__name__}: {error}" if str(error) else repr(error)
            if attempt == attempts:
                kind = StoreUnreachableError if _is_unreachable(error) else StoreBusyError
                raise kind(f"{place} could not be {done} in {attempts} attempts: {problem}") from error
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
            logging.getLogger(__name__).warning(
                f"{place}: {problem}; attempt {attempt + 1} of {attempts} in {wait:.1f} s"
            )
            time.sleep(wait)
    raise AssertionError("attempts is at least 1")


def _is_unreachable(error: Exception) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError | asyncio.TimeoutError) or bool(
        names & {"ClientConnectionError", "EndpointConnectionError", "FSTimeoutError"}
    )


_file_systems: dict[str, Any] = {}


def read_bytes(place: str, attempts: int = 4) -> bytes:
    """Returns the content of a local file or of a URL; for errors see :func:`retry`."""
    if not is_url(place):
        with open_regular(place) as file:
            return file.read()
    kind = place.partition("://")[0]
    if kind not in _file_systems:
        _file_systems[kind] = open_file_system(place)
    return retry(lambda: _file_systems[kind].cat_file(place), place, attempts)
