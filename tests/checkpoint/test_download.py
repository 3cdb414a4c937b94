import hashlib
import http.server
import os
import re
import threading

import pytest

from wsl_d2.checkpoint import download as module
from wsl_d2.checkpoint.download import DownloadError, download, fetch_text
from wsl_d2.errors import UserError

CONTENT = bytes(range(256)) * 2000
HALF = len(CONTENT) // 2
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PAGE = b"\n<!DOCTYPE html><html><title>Log in to the network</title></html>"


class Server(http.server.ThreadingHTTPServer):
    """Answers each path with a function of its own and remembers what was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = {}  # path -> function(handler), or a list of them, one per request
        self.ranges = []  # the Range header of every request
        self.stop = threading.Event()

    def url(self, answer, path="/weights.pth"):
        self.answers[path] = answer
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
        answer = self.server.answers.get(self.path, not_found)
        (answer.pop(0) if isinstance(answer, list) else answer)(self)

    def log_message(self, *args):
        pass


def reply(handler, status, content, **headers):
    handler.send_response(status)
    headers.setdefault("Content_Length", str(len(content)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def not_found(handler):
    reply(handler, 404, b"no such file")


def whole(content):
    return lambda handler: reply(handler, 200, content)


def ranged(handler):
    """A server that honors ranges."""
    match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    if match is None:
        return reply(handler, 200, CONTENT)
    start = int(match[1])
    if start >= len(CONTENT):
        return reply(handler, 416, b"", Content_Range=f"bytes */{len(CONTENT)}")
    content_range = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
    return reply(handler, 206, CONTENT[start:], Content_Range=content_range)


def cut(handler):
    """Promises everything, sends half and hangs up."""
    reply(handler, 200, CONTENT[: len(CONTENT) // 2], Content_Length=str(len(CONTENT)))


@pytest.fixture()
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture()
def fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)

    def fetch(url, sha256=SHA256, **kwargs):
        return download(url, tmp_path / "weights.pth", sha256, **({"timeout": 10, "retries": 0} | kwargs))

    return fetch


def files(folder):
    return sorted(os.listdir(folder))


def test_a_file_arrives_whole(server, fetch, tmp_path):
    assert fetch(server.url(ranged)) == SHA256
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT
    assert files(tmp_path) == ["weights.pth"]
    assert fetch(server.url(ranged), SHA256[:8].upper()) == SHA256  # over an older file, and by a prefix


def test_wrong_bytes_leave_no_file_and_the_next_try_is_clean(server, fetch, tmp_path):
    url = server.url([whole(CONTENT[:-1] + b"x"), ranged])
    with pytest.raises(DownloadError) as error:
        fetch(url)
    wrong = hashlib.sha256(CONTENT[:-1] + b"x").hexdigest()
    assert all(text in str(error.value) for text in (url, SHA256, wrong, f"{len(CONTENT)} bytes", "try again"))
    assert isinstance(error.value, UserError) and files(tmp_path) == []
    fetch(url)
    assert server.ranges == [None, None]


def test_a_cut_download_goes_on_in_the_next_call(server, fetch, tmp_path):
    url = server.url([cut, ranged])
    with pytest.raises(DownloadError, match=rf"{HALF} of {len(CONTENT)} bytes.*stay in .*weights\.pth\.part"):
        fetch(url)
    assert files(tmp_path) == ["weights.pth.part"]
    assert fetch(url) == SHA256
    assert server.ranges == [None, f"bytes={HALF}-"]
    assert files(tmp_path) == ["weights.pth"]


def test_a_failed_connection_is_tried_again(server, fetch):
    url = server.url([cut, lambda handler: reply(handler, 503, b""), ranged])
    assert fetch(url, retries=2) == SHA256
    assert server.ranges == [None, *[f"bytes={HALF}-"] * 2]


@pytest.mark.parametrize(
    ("part", "answers", "ranges"),
    [
        (b"older", [lambda handler: whole(CONTENT)(handler)], ["bytes=5-"]),  # a server without ranges
        (CONTENT, [lambda handler: ranged(handler)], [f"bytes={len(CONTENT)}-"]),  # whole already
        (CONTENT[:1000], [lambda handler: off(handler), lambda handler: ranged(handler)], ["bytes=1000-", None]),
    ],
    ids=["no ranges", "whole", "another range"],
)
def test_what_arrived_earlier_is_used_only_if_it_fits(server, fetch, tmp_path, part, answers, ranges):
    (tmp_path / "weights.pth.part").write_bytes(part)
    assert fetch(server.url(list(answers)), retries=1) == SHA256
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT and server.ranges == ranges


def off(handler):
    """Another part than it was asked for."""
    reply(handler, 206, CONTENT[500:], Content_Range=f"bytes 500-{len(CONTENT) - 1}/{len(CONTENT)}")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (not_found, "HTTP 404"),
        (lambda handler: reply(handler, 403, b""), "HTTP 403"),
        (whole(PAGE), "it is a web page"),
        (whole(b""), "0 bytes"),
    ],
)
def test_refusals(server, fetch, tmp_path, answer, message):
    with pytest.raises(DownloadError, match=message):
        fetch(server.url(answer), retries=1)
    assert len(server.ranges) == 1 and files(tmp_path) == []


def test_a_silent_server(server, fetch):
    def hang(handler):
        reply(handler, 200, CONTENT[:HALF], Content_Length=str(len(CONTENT)))
        server.stop.wait(10)

    with pytest.raises(DownloadError, match="timed out.*bytes stay in"):
        fetch(server.url(hang), timeout=0.3)


def test_no_server(fetch, tmp_path):
    with pytest.raises(DownloadError, match="could not be downloaded: .*Check the network") as error:
        fetch("http://127.0.0.1:9/weights.pth")
    assert str(error.value).endswith(
        "without one fetch that address elsewhere, and give the file's path as MODEL.WEIGHTS (or --candidate, "
        f"--baseline), or put the file at {tmp_path / 'weights.pth'}"
    )


def test_a_full_disk(server, fetch, monkeypatch):
    monkeypatch.setattr(module.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DownloadError, match="cannot write .*No space left on device. Free some space"):
        fetch(server.url(ranged))


def test_small_texts(server, fetch):
    assert fetch_text(server.url(whole(b"abc"), "/SHA256SUMS")) == "abc"
    assert fetch_text(server.url(not_found, "/none")) is None
    with pytest.raises(DownloadError, match="^SHA256SUMS: .*refused"):
        fetch_text("http://127.0.0.1:9/SHA256SUMS")
