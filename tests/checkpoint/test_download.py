import hashlib
import http.server
import os
import re
import threading
import time

import pytest

from wsl_d2.checkpoint.download import DownloadError, download, fetch_text, origin_of

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PAGE = b"\n<!DOCTYPE html><html><title>Log in to the network</title></html>"


class Server(http.server.ThreadingHTTPServer):
    """Answers each path with a function of its own and remembers what was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self.server_port}"
        self.answers = {}  # path -> function(handler), or a list of them, one per request
        self.ranges = []  # the Range header of every request
        self.stop = threading.Event()

    def url(self, answer, path="/weights.pth"):
        self.answers[path] = answer
        return self.origin + path


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


def redirect(location, status=302):
    return lambda handler: reply(handler, status, b"", Location=location)


def ranged(handler):
    """A server that honours ranges."""
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
def fetch(server, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")

    def fetch(url, **kwargs):
        arguments = {"sha256": SHA256, "max_bytes": 1 << 20, "origins": {server.origin}, "timeout": 10, "retries": 0}
        return download(url, tmp_path / "weights.pth", **(arguments | kwargs))

    return fetch


def files(folder):
    return sorted(os.listdir(folder))


def test_a_file_arrives_whole(server, fetch, tmp_path):
    assert fetch(server.url(ranged)) == SHA256
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT
    assert files(tmp_path) == ["weights.pth"]
    assert fetch(server.url(ranged), sha256=SHA256[:8].upper()) == SHA256  # over an older file, and by a prefix


def test_wrong_bytes_leave_no_file_and_the_next_try_is_clean(server, fetch, tmp_path):
    url = server.url([whole(CONTENT[:-1] + b"x"), ranged])
    with pytest.raises(DownloadError) as error:
        fetch(url)
    wrong = hashlib.sha256(CONTENT[:-1] + b"x").hexdigest()
    assert all(text in str(error.value) for text in (url, SHA256, wrong, f"{len(CONTENT)} bytes", "try again"))
    assert files(tmp_path) == []
    fetch(url)
    assert server.ranges == [None, None]


def test_a_cut_download_is_resumed(server, fetch, tmp_path):
    url = server.url([cut, ranged])
    half = len(CONTENT) // 2
    with pytest.raises(DownloadError, match=rf"{half} of {len(CONTENT)} bytes.*stay in .*weights\.pth\.part"):
        fetch(url)
    assert files(tmp_path) == ["weights.pth.part"]
    assert fetch(url) == SHA256
    assert server.ranges == [None, f"bytes={half}-"]
    assert files(tmp_path) == ["weights.pth"]


def test_a_failed_connection_is_tried_again(server, fetch, tmp_path):
    url = server.url([cut, lambda handler: reply(handler, 503, b""), ranged])
    assert fetch(url, retries=2, backoff=0.01) == SHA256
    assert server.ranges == [None, *[f"bytes={len(CONTENT) // 2}-"] * 2]


def test_a_server_without_ranges_starts_again(server, fetch, tmp_path):
    (tmp_path / "weights.pth.part").write_bytes(b"something older")
    assert fetch(server.url(whole(CONTENT))) == SHA256
    assert (tmp_path / "weights.pth").read_bytes() == CONTENT


def test_another_range_than_asked_for_is_not_appended(server, fetch, tmp_path):
    (tmp_path / "weights.pth.part").write_bytes(CONTENT[:1000])
    off = f"bytes 500-{len(CONTENT) - 1}/{len(CONTENT)}"
    url = server.url([lambda handler: reply(handler, 206, CONTENT[500:], Content_Range=off), ranged])
    assert fetch(url, retries=1, backoff=0) == SHA256
    assert server.ranges == ["bytes=1000-", None]


def test_a_part_that_was_whole_already(server, fetch, tmp_path):
    (tmp_path / "weights.pth.part").write_bytes(CONTENT)
    assert fetch(server.url(ranged)) == SHA256
    assert files(tmp_path) == ["weights.pth"]


def test_a_part_of_another_file_costs_one_try(server, fetch, tmp_path):
    (tmp_path / "weights.pth.part").write_bytes(b"x" * 1000)
    with pytest.raises(DownloadError, match="is not the expected file"):
        fetch(server.url(ranged))
    assert files(tmp_path) == []
    assert fetch(server.url(ranged)) == SHA256


def test_a_missing_file(server, fetch, tmp_path):
    with pytest.raises(DownloadError, match=r"missing\.pth: HTTP 404"):
        fetch(server.origin + "/missing.pth")
    assert files(tmp_path) == []


def test_a_web_page_is_recognised(server, fetch, tmp_path):
    url = server.url([whole(PAGE), whole(PAGE)])
    with pytest.raises(DownloadError, match="web page.*instead of"):
        fetch(url)
    assert files(tmp_path) == []
    (tmp_path / "weights.pth.part").write_bytes(CONTENT[:1000])
    with pytest.raises(DownloadError, match="web page"):
        fetch(url)
    assert (tmp_path / "weights.pth.part").read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_within_the_origin(server, fetch, tmp_path, status):
    server.url(ranged, "/elsewhere.pth")
    assert fetch(server.url(redirect("/elsewhere.pth", status))) == SHA256


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:9/weights.pth",
        "http://localhost/weights.pth",
        "http://169.254.169.254/latest/meta-data",
        "https://download.pytorch.org.example.com/weights.pth",
        "//example.com/weights.pth",
        "file:///etc/passwd",
        "ftp://127.0.0.1/weights.pth",
        "data:,weights",
        "http://[::1/weights.pth",
    ],
)
def test_a_redirect_to_another_origin_is_refused(server, fetch, tmp_path, location):
    url = server.url(redirect(location))
    with pytest.raises(DownloadError, match="redirects to .*(refused|invalid)|redirects to an invalid"):
        fetch(url, retries=3)
    assert len(server.ranges) == 1
    assert files(tmp_path) == []


def test_a_redirect_that_hides_the_host_behind_a_user_name(server, fetch):
    with pytest.raises(DownloadError, match="user names"):
        fetch(server.url(redirect(f"http://127.0.0.1:{server.server_port}@example.com/weights.pth")))


def test_a_circle_of_redirects(server, fetch):
    with pytest.raises(DownloadError, match="more than 5 times"):
        fetch(server.url(redirect("/weights.pth")))


@pytest.mark.parametrize(
    "url",
    ["http://download.pytorch.org/a.pth", "https://example.com/a.pth", "file:///etc/passwd", "ftp://x/a.pth", "a"],
)
def test_other_origins_are_never_asked(fetch, tmp_path, url):
    with pytest.raises(DownloadError, match="refused"):
        fetch(url, origins={"https://download.pytorch.org"})
    assert files(tmp_path) == []


def test_too_many_bytes_by_their_announced_length(server, fetch, tmp_path):
    with pytest.raises(DownloadError, match=f"has {len(CONTENT)} bytes, and no more than 1000"):
        fetch(server.url(ranged), max_bytes=1000)
    assert files(tmp_path) == []


def test_an_endless_answer(server, fetch, tmp_path):
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while not handler.server.stop.is_set():
                handler.wfile.write(b"x" * 65536)
        except OSError:
            pass

    with pytest.raises(DownloadError, match="does not end after the 300000 bytes"):
        fetch(server.url(endless), max_bytes=300_000)
    assert files(tmp_path) == []


def test_a_stalled_answer(server, fetch, tmp_path):
    def stall(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(CONTENT)))
        handler.end_headers()
        handler.wfile.write(CONTENT[:1000])
        handler.server.stop.wait(60)

    with pytest.raises(DownloadError, match="timed out.*1000 bytes that arrived stay"):
        fetch(server.url(stall), timeout=1)
    assert (tmp_path / "weights.pth.part").read_bytes() == CONTENT[:1000]


def test_an_answer_that_only_drips(server, fetch, tmp_path):
    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(CONTENT)))
        handler.end_headers()
        try:
            for byte in CONTENT:
                handler.wfile.write(bytes([byte]))
                time.sleep(0.02)
                if handler.server.stop.is_set():
                    return
        except OSError:
            pass

    with pytest.raises(DownloadError, match="the transfer stalled"):
        fetch(server.url(drip), timeout=1, min_rate=1000)
    assert files(tmp_path) == ["weights.pth.part"]


def test_no_server_at_all(server, fetch, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError, match="could not be downloaded: .*Check the network"):
        fetch(server.origin + "/weights.pth")
    assert files(tmp_path) == []


def test_a_folder_that_is_not_there(server, fetch, tmp_path):
    with pytest.raises(DownloadError, match="cannot write .*No such file or directory"):
        download(
            server.url(ranged),
            tmp_path / "absent" / "weights.pth",
            sha256=SHA256,
            max_bytes=1 << 20,
            origins={server.origin},
        )


@pytest.mark.parametrize("sha256", ["", "abc1234", "not a digest", SHA256 + "0"])
def test_a_digest_that_is_none(fetch, sha256):
    with pytest.raises(ValueError, match="hex digits"):
        fetch("https://example.com", sha256=sha256)


def test_small_text(server, fetch):
    origins = {server.origin}
    assert fetch_text(server.url(whole(b"some text")), origins=origins) == "some text"
    assert fetch_text(server.origin + "/missing", origins=origins) is None
    assert fetch_text(server.url(lambda handler: reply(handler, 403, b"")), origins=origins) is None
    with pytest.raises(DownloadError, match="longer than 100 bytes"):
        fetch_text(server.url(ranged), origins=origins, max_bytes=100)
    with pytest.raises(DownloadError, match="the connection ended"):
        fetch_text(server.url(cut), origins=origins)


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://Download.PyTorch.org/models/", "https://download.pytorch.org"),
        ("https://download.pytorch.org:443/models/", "https://download.pytorch.org"),
        ("http://mirror:8080/a/b?c", "http://mirror:8080"),
        ("http://[::1]:80/", "http://[::1]"),
    ],
)
def test_origins(url, origin):
    assert origin_of(url) == origin
