"""Downloads a weight file: what arrived stays for the next try, and it gets its name only once its SHA-256 is right.

torch.hub.download_url_to_file checks digests, too, but starts again after each interruption, has no time-out, and
leaves its errors to the caller; the largest public file has 3.3 GB.
"""

import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from ..errors import UserError
from ..files import sha256_of, sync_folder

logger = logging.getLogger(__name__)


class DownloadError(UserError, OSError):
    """A file could not be had, or is not the one that was asked for; nothing lies under its final name."""


def describe_failure(url: str, problem: object, destination: Path | None = None) -> str:
    """Says for messages why a download failed, and how to go on with and without a network.

    Args:
        destination: where a file of another machine would be found in its place.
    """
    place = f", or put the file at {destination}" if destination else ""
    return (
        f"{url} could not be downloaded: {problem}. Check the network and try again; without one fetch that address "
        f"elsewhere, and give the file's path as MODEL.WEIGHTS (or --candidate, --baseline){place}"
    )


def download(
    url: str, destination: str | os.PathLike[str], sha256: str, *, timeout: float = 30.0, retries: int = 3
) -> str:
    """Downloads a file and checks it. Processes that may download to the same destination have to hold a lock.

    Args:
        url: http or https.
        destination: an existing file is replaced; the folder must exist. What arrives is kept in ``<name>.part``.
        sha256: the digest in hex digits, or its first ones.
        timeout: seconds to wait for a connection, and then for any byte.
        retries: how often to try again after a failed connection, with a pause that doubles from 1 s.

    Returns:
        The file's SHA-256.

    Raises:
        DownloadError: for any failure of the network (what arrived stays for the next call), another digest (what
            arrived is removed), or a disk that cannot be written to.
    """
    destination = Path(destination)
    part = destination.with_name(f"{destination.name}.part")
    for attempt in range(retries + 1):
        try:
            _transfer(url, part, timeout)
            break
        except urllib.error.HTTPError as e:
            problem = f"the server answered HTTP {e.code} {e.reason}"
            if e.code < 500 and e.code != 429:
                raise DownloadError(f"{url}: {problem}. Check the address") from e
        except (urllib.error.URLError, TimeoutError, ConnectionError, ssl.SSLError, HTTPException) as e:
            problem = str(getattr(e, "reason", e)) or type(e).__name__
        except OSError as e:
            raise DownloadError(f"cannot write {part}: {e.strerror}. Free some space, or set WSL_D2_CACHE") from e
        if attempt == retries:
            kept = f" ({part.stat().st_size} bytes stay in {part} for the next try)" if part.exists() else ""
            raise DownloadError(describe_failure(url, f"{problem}{kept}", destination))
        logger.warning(f"{url}: {problem}; trying again in {2**attempt} s")
        time.sleep(2**attempt)
    digest = sha256_of(part)
    if not digest.startswith(sha256.lower()):
        message = describe_mismatch(url, part, sha256, digest)
        part.unlink()
        raise DownloadError(f"{message}. It was removed; try again, or ask who runs the server")
    os.replace(part, destination)
    sync_folder(destination.parent)
    return digest


def fetch_text(url: str, timeout: float = 30.0) -> str | None:
    """A small text file of a server; None if it has none.

    Raises:
        DownloadError: the server cannot be reached.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            return response.read(1 << 20).decode(errors="replace")
    except urllib.error.HTTPError:
        return None
    except (OSError, HTTPException) as e:
        raise DownloadError(describe_failure(url, getattr(e, "reason", e))) from e


def describe_mismatch(source: str, path: str | os.PathLike[str], expected: str, digest: str) -> str:
    """Says how a file differs from the one that was expected, for messages."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    is_page = start.startswith((b"<!doctype html", b"<html", b"<head"))
    return (
        f"{source} is not the expected file: its SHA-256 should {'be' if len(expected) == 64 else 'start with'} "
        f"{expected} and is {digest} ({os.path.getsize(path)} bytes)"
        + ("; it is a web page (HTML), such as an error or login page" if is_page else "")
    )


def _transfer(url: str, part: Path, timeout: float) -> None:
    """Brings the partial file to its full length."""
    offset = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "wsl_d2", "Accept-Encoding": "identity"})
    if offset:
        request.add_header("Range", f"bytes={offset}-")
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as e:
        if e.code == 416 and offset:  # there is no rest: all of it arrived before, which the digest shows
            return
        raise
    with response:
        sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if response.status != 206 or sent is None or int(sent[1]) != offset:
            offset = 0  # a server that starts again, or has no ranges
            if response.status == 206:
                part.unlink(missing_ok=True)
                raise ConnectionError("the server sent another part of the file than it was asked for")
        total = None if response.length is None else offset + response.length
        bar = tqdm(total=total, initial=offset, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with open(part, "ab" if offset else "wb") as file, bar:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    if total is not None and size < total:
        raise ConnectionError(f"the connection ended after {size} of {total} bytes")
