"""Downloads of weight files: from pinned servers, resumed where they stopped, and only under their final name once
their SHA-256 is right."""

import hashlib
import http.client
import itertools
import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterable, Iterator
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urljoin, urlsplit

from tqdm import tqdm

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_MAX_REDIRECTS = 5
_DEFAULT_PORTS = {"http": 80, "https": 443}


class DownloadError(OSError):
    """A file could not be had, or is not the one that was asked for; nothing lies under its final name."""


class _Interrupted(Exception):
    """The connection failed, broke or stalled: a later try may go on from there."""


class _Refused(DownloadError):
    """The server says that there is no such file, or that it is not for us."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves redirects to :func:`_open`, which checks where they lead."""

    def http_error_302(self, *args: Any) -> None:  # type: ignore[override]
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302  # type: ignore[assignment]


def download(
    url: str,
    destination: str | os.PathLike[str],
    *,
    sha256: str,
    max_bytes: int,
    origins: Collection[str],
    timeout: float = 30.0,
    min_rate: float = 1024.0,
    retries: int = 3,
    backoff: float = 1.0,
) -> str:
    """Downloads a file and checks it. It appears under its name verified, or not at all.

    What arrives is kept in ``<destination>.part``; after an interruption the next call asks the server for the rest.
    Processes that may download to the same destination have to hold a lock.

    Args:
        url: http or https.
        destination: an existing file is replaced; the folder must exist.
        sha256: the digest as 64 hex digits, or its first ones, at least 8.
        max_bytes: a longer answer is refused.
        origins: the "scheme://host" or "scheme://host:port" that may be asked. Redirects are held to them, too.
        timeout: seconds to wait for a connection, and then for any byte.
        min_rate: bytes per second below which the transfer counts as stalled, over periods of ``timeout`` seconds.
        retries: how often to try again after a failed connection.
        backoff: seconds before the first of these tries; doubled from one to the next.

    Returns:
        The file's SHA-256.

    Raises:
        DownloadError: for a server that is not in ``origins``, any failure of the network (what arrived stays for the
            next call), an answer that is too long or has another digest (which is removed), or a disk that cannot be
            written to.
        ValueError: if ``sha256`` is no digest.
    """
    expected = sha256.lower()
    if not re.fullmatch(r"[0-9a-f]{8,64}", expected):
        raise ValueError(f"sha256 must be 8 to 64 hex digits, got {sha256!r}")
    destination = os.fspath(destination)
    part = f"{destination}.part"
    for attempt in range(retries + 1):
        try:
            _transfer(url, part, max_bytes, origins, timeout, min_rate)
            break
        except _Interrupted as e:
            if attempt == retries:
                kept = f"the {_size(part)} bytes that arrived stay in {part} and the next try goes on from there"
                raise DownloadError(
                    f"{url} could not be downloaded: {e}. Check the network and try again"
                    + (f"; {kept}" if _size(part) else "")
                ) from e
            delay = backoff * 2**attempt
            logger.warning(f"{url}: {e}; trying again in {delay:g} s")
            time.sleep(delay)

    digest = file_sha256(part)
    if not digest.startswith(expected):
        problem = describe_mismatch(url, part, expected, digest)
        os.remove(part)
        raise DownloadError(f"{problem}. The download was removed; try again, or ask who runs the server")
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, destination)
    return digest


def fetch_text(url: str, *, origins: Collection[str], max_bytes: int = 1 << 20, timeout: float = 30.0) -> str | None:
    """A small text file of a server; None if the server has none.

    Raises:
        DownloadError: as :func:`download`.
    """
    content = b""
    try:
        with _open(url, 0, origins, timeout) as response:
            total = response.length or 0
            for chunk in _body(response, timeout, min_rate=1024.0):
                content += chunk
                if len(content) > max_bytes:
                    raise DownloadError(f"{url} is longer than {max_bytes} bytes: refused")
            if len(content) < total:
                raise _Interrupted(f"the connection ended after {len(content)} of {total} bytes")
    except _Refused:  # many servers answer 403 for what they do not have
        return None
    except _Interrupted as e:
        raise DownloadError(f"{url} could not be downloaded: {e}. Check the network and try again") from e
    return content.decode(errors="replace")


def origin_of(url: str) -> str:
    """The "scheme://host[:port]" of a URL, without the port where it is the scheme's own.

    Raises:
        ValueError: if the URL is none of http or https, or has a user name in it.
    """
    parts = urlsplit(url)
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError(f"no http or https URL: {url}")
    if parts.username is not None or parts.password is not None:
        raise ValueError("user names and passwords in URLs are not supported")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    port = "" if parts.port in (None, _DEFAULT_PORTS[parts.scheme]) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}"


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def describe_mismatch(source: str, path: str, expected: str, digest: str) -> str:
    """Says how a file differs from the one that was expected, for messages."""
    with open(path, "rb") as file:
        page = _is_web_page(file.read(512))
    is_page = "; it is a web page (HTML), such as an error or login page" if page else ""
    return (
        f"{source} is not the expected file: its SHA-256 should {'be' if len(expected) == 64 else 'start with'} "
        f"{expected} and is {digest} ({_size(path)} bytes){is_page}"
    )


def _transfer(url: str, part: str, max_bytes: int, origins: Collection[str], timeout: float, min_rate: float) -> None:
    """Brings the partial file to its full length."""
    with _open(url, _size(part), origins, timeout) as response:
        if response.status == 416:  # there is no rest: all of it arrived before, which the digest shows
            return
        offset = 0
        if response.status == 206:
            offset = _size(part)
            content_range = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if content_range is None or int(content_range[1]) != offset:
                os.remove(part)
                raise _Interrupted("the server sent another part of the file than it was asked for")
        total = None if response.length is None else offset + response.length
        if total is not None and total > max_bytes:
            _remove(part)
            raise DownloadError(f"{url} has {total} bytes, and no more than {max_bytes} are expected: refused")
        chunks = _body(response, timeout, min_rate)
        if offset == 0:
            # Before the file is opened: a web page must not cost what arrived of the file earlier.
            first = next(chunks, b"")
            if _is_web_page(first):
                raise DownloadError(
                    f"the server sent a web page (HTML) instead of {url}, such as an error or login page. "
                    "Open the address in a browser to see what it says"
                )
            chunks = itertools.chain([first], chunks)
        try:
            size = _write(chunks, part, offset, total, max_bytes)
        except DownloadError:
            raise
        except OSError as e:  # of the disk: _body has another error for those of the network
            raise DownloadError(
                f"cannot write {part}: {e.strerror}. Free some space, or set FVCORE_CACHE to another folder"
            ) from e
        if size > max_bytes:
            os.remove(part)
            raise DownloadError(
                f"{url} does not end after the {max_bytes} bytes that are expected at most: "
                "stopped, and what arrived was removed"
            )
        if total is not None and size < total:
            raise _Interrupted(f"the connection ended after {size} of {total} bytes")


def _write(chunks: Iterable[bytes], part: str, offset: int, total: int | None, max_bytes: int) -> int:
    """Writes until the chunks end or are too many; returns the size that the file has then, or would have."""
    size = offset
    name = os.path.basename(part.removesuffix(".part"))
    bar = tqdm(total=total, initial=offset, unit="B", unit_scale=True, desc=name, disable=None)  # None: on a terminal
    with open(part, "ab" if offset else "wb") as file, bar:
        for chunk in chunks:
            size += len(chunk)
            if size > max_bytes:
                break
            file.write(chunk)
            bar.update(len(chunk))
    return size


def _open(url: str, offset: int, origins: Collection[str], timeout: float) -> HTTPResponse:
    """Asks for a file from an offset on. Returns answers of status 200, 206 and, to an offset, 416."""
    # No handlers but these: urllib's default opener knows file: and ftp:, too.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _NoRedirect(),
    ):
        opener.add_handler(handler)
    headers = {"User-Agent": "wsl_d2", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    asked = url
    for _ in range(_MAX_REDIRECTS + 1):
        _check_origin(url, asked, origins)
        try:
            return opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
        except urllib.error.HTTPError as e:
            if e.code == 416 and offset:
                return e  # type: ignore[return-value]
            with e:
                location = e.headers.get("Location")
                if e.code in (301, 302, 303, 307, 308) and location:
                    try:
                        url = urljoin(url, location)
                    except ValueError as invalid:
                        raise DownloadError(f"{asked} redirects to an invalid address ({invalid})") from invalid
                    continue
                if e.code == 429 or e.code >= 500:
                    raise _Interrupted(f"the server answered HTTP {e.code} {e.reason}") from e
                raise _Refused(
                    f"the server does not give out {asked}: HTTP {e.code} {e.reason}. Check the address"
                ) from e
        except (OSError, http.client.HTTPException) as e:
            reason = getattr(e, "reason", e)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise DownloadError(f"the certificate of {origin_of(url)} is not valid: {reason}. Refused") from e
            raise _Interrupted(str(reason) or type(e).__name__) from e
        except ValueError as e:  # characters that no address may have
            raise DownloadError(f"{asked} leads to an invalid address ({e})") from e
    raise DownloadError(f"{asked} is redirected more than {_MAX_REDIRECTS} times: refused")


def _check_origin(url: str, asked: str, origins: Collection[str]) -> None:
    redirected = "" if url == asked else f"{asked} redirects to "
    try:
        origin = origin_of(url)
    except ValueError as e:
        raise DownloadError(f"{redirected}{url}: refused, {e}") from e
    if origin not in {origin_of(allowed) for allowed in origins}:
        raise DownloadError(f"{redirected}{url}: refused, only {', '.join(sorted(origins))} may be asked")


def _body(response: HTTPResponse, timeout: float, min_rate: float) -> Iterator[bytes]:
    """The chunks of an answer as they arrive, as long as they do."""
    start, received = time.monotonic(), 0
    while True:
        try:
            chunk = response.read1(_CHUNK)  # read() would wait for a whole chunk, however slowly it comes
        except (OSError, http.client.HTTPException) as e:
            raise _Interrupted(str(e) or type(e).__name__) from e
        if not chunk:
            return
        yield chunk
        received += len(chunk)
        elapsed = time.monotonic() - start
        if elapsed >= timeout:
            if received < min_rate * elapsed:
                raise _Interrupted(f"the transfer stalled, with {received} bytes in {elapsed:.0f} s")
            start, received = time.monotonic(), 0


def _is_web_page(content: bytes) -> bool:
    return content.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower().startswith((b"<!doctype html", b"<html", b"<head"))


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.remove(path)
