"""Shards from a slow, failing store on loopback: the same batches as from disk, or an error that names the shard."""

import hashlib
import http.server
import itertools
import random
import threading
import time
from functools import partial

import pytest
import torch
from toy_data import open_train_loader

from wsl_d2.config import add_wsl_config
from wsl_d2.data import HashtagDataset, ShardError, register_datasets
from wsl_d2.data.read.store import ShardStore
from wsl_d2.files import CACHE_VARIABLE


class FailingStore(http.server.SimpleHTTPRequestHandler):
    """Refuses, cuts off, alters and delays a share of its answers."""

    failures = 0.5
    random = random.Random(0)
    requests: list[str] = []
    log_message = lambda *args: None  # noqa: E731

    def do_GET(self):
        self.requests.append(self.path)
        kind = self.random.choice(["refuse", "cut", "alter"]) if self.random.random() < self.failures else ""
        if not self.path.endswith((".tar", ".npz")) and kind == "alter":
            kind = "refuse"  # nothing but their own checksum protects the two small files
        path = self.translate_path(self.path)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:
            return self.send_error(404)
        if kind == "refuse":
            return self.send_error(503)
        if kind == "alter":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for start in range(0, len(data) // 2 if kind == "cut" else len(data), 1 << 14):
            self.wfile.write(data[start : min(start + (1 << 14), len(data) // 2 if kind == "cut" else len(data))])
            time.sleep(0.002)  # 8 MB/s
        self.close_connection = True

    def do_HEAD(self):
        self.send_error(501)


@pytest.fixture
def store(hashtag_folder, tmp_path, monkeypatch):
    """The folder's URL; answers fail half the time."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr("wsl_d2.data.remote.FIRST_WAIT", 0.01)
    monkeypatch.setattr("wsl_d2.data.remote.LONGEST_WAIT", 0.05)
    handler = type("Store", (FailingStore,), {"requests": [], "random": random.Random(0)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(hashtag_folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.handler = handler
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()


def batches(cfg, num_workers, count):
    cfg.DATALOADER.NUM_WORKERS = num_workers
    return list(itertools.islice(iter(open_train_loader(cfg)), count))


def same(a, b):
    return a["keys"] == b["keys"] and all(torch.equal(a[name], b[name]) for name in ("image", "labels", "image_index"))


def config(folder, name):
    from detectron2.config import get_cfg

    cfg = get_cfg()
    add_wsl_config(cfg)
    cfg.DATASETS.TRAIN = (name,)
    cfg.DATASETS.HASHTAG_FOLDERS = [[name, str(folder)]]
    cfg.INPUT.RANDOM_RESIZED_CROP.SIZE = 16
    cfg.SOLVER.IMS_PER_BATCH = 8
    cfg.DATALOADER.SHUFFLE_WINDOW_SHARDS = 2
    cfg.DATALOADER.READ_ATTEMPTS = 30
    cfg.SEED = 1
    register_datasets(cfg)
    return cfg


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_are_those_from_disk(store, hashtag_folder, monkeypatch, workers):
    monkeypatch.setattr(ShardStore.__init__, "__defaults__", (100e9, 30))
    local = batches(config(hashtag_folder, f"store_disk_{workers}"), 0, 14)
    remote = batches(config(store.url, f"store_net_{workers}"), workers, 14)
    assert all(same(a, b) for a, b in zip(local, remote, strict=True))
    assert torch.stack([batch["image"] for batch in remote]).float().std() > 1
    assert len(store.handler.requests) > 8


def test_an_altered_shard_is_named_and_leaves_nothing_behind(store, hashtag_folder, tmp_path):
    store.handler.failures = 0
    path = hashtag_folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    dataset = HashtagDataset(store.url)
    dataset.store.attempts = 2
    assert len(dataset[0]["image"])
    with pytest.raises(ShardError, match=rf"{store.url}/shard-000001.tar could not be read in 2 attempts: .*SHA-256"):
        dataset[20]
    assert not list((tmp_path / "cache").rglob("shard-000001.tar")) and not list(tmp_path.rglob("*.partial-*"))


def test_a_lost_shard_is_named_at_once(store, hashtag_folder):
    store.handler.failures = 0
    (hashtag_folder / "shard-000002.tar").unlink()
    dataset = HashtagDataset(store.url)
    with pytest.raises(ShardError, match=rf"{store.url}/shard-000002.tar does not exist"):
        dataset[40]


def test_the_cache_is_bounded_and_copies_each_shard_once(store, hashtag_folder, tmp_path):
    store.handler.failures = 0
    dataset, other = HashtagDataset(store.url), HashtagDataset(store.url)
    size = (hashtag_folder / "shard-000000.tar").stat().st_size
    for image in range(16):
        assert dataset[image]["key"] == other[image]["key"]
    assert store.handler.requests.count("/shard-000000.tar") == 1
    dataset.store.cache_bytes = 2.5 * size
    assert dataset[20]["key"] == "000020" and dataset[40]["key"] == "000040"
    cached = sorted(path.name for path in (tmp_path / "cache").rglob("*.tar"))
    assert cached == ["shard-000001.tar", "shard-000002.tar"]
    assert dataset[0]["key"] == "000000"  # still open
    assert other.fetch(0).is_file() and hashlib.sha256(
        other.fetch(0).read_bytes()
    ).hexdigest() == other.table.hex_digest(0)


def test_a_store_that_is_not_there_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr("wsl_d2.data.remote.FIRST_WAIT", 0.0)
    with pytest.raises(ShardError, match=r"http://127.0.0.1:9/manifest.json could not be read in 6 attempts"):
        HashtagDataset("http://127.0.0.1:9")
