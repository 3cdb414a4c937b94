import os
import signal

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from toy_data import open_train_loader

from wsl_d2 import add_wsl_config
from wsl_d2.data import HashtagDataset, register_hashtag_dataset
from wsl_d2.data.read.loaders import WorkerError, build_hashtag_test_loader, collate
from wsl_d2.data.read.mapper import HashtagMapper


@pytest.fixture()
def cfg(hashtag_folder):
    name = "build_test_hashtags"
    register_hashtag_dataset(name, hashtag_folder)
    cfg = get_cfg()
    add_wsl_config(cfg)
    cfg.DATASETS.TRAIN = (name,)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.RANDOM_RESIZED_CROP.SIZE = 16
    cfg.INPUT.TEST_RESIZE_SHORT_SIDE = 18
    cfg.SOLVER.IMS_PER_BATCH = 6
    cfg.TEST.IMS_PER_BATCH = 5
    cfg.SEED = 3
    yield cfg
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def batches(cfg, num_workers: int, start: int, count: int) -> list[dict]:
    cfg.DATALOADER.NUM_WORKERS = num_workers
    iterator = iter(open_train_loader(cfg, start))
    return [next(iterator) for _ in range(count)]


def same(a: dict, b: dict) -> bool:
    tensors = all(torch.equal(a[key], b[key]) for key in ("image", "labels", "image_index"))
    return tensors and a["keys"] == b["keys"] and a["skipped"] == b["skipped"]


def test_batches_do_not_depend_on_workers_and_resume_exactly(cfg):
    whole = batches(cfg, 0, 0, 5)
    assert all(same(a, b) for a, b in zip(whole, batches(cfg, 2, 0, 5), strict=True))
    assert all(same(a, b) for a, b in zip(whole[2:], batches(cfg, 1, 2, 3), strict=True))
    assert not same(whole[0], whole[1])


def test_a_batch_is_one_contiguous_array_of_bytes(cfg):
    image = batches(cfg, 1, 0, 1)[0]["image"]
    assert image.shape == (6, 3, 16, 16) and image.dtype == torch.uint8 and image.is_contiguous()
    assert image.is_shared()


def test_collate_keeps_every_image_and_its_labels():
    samples = [
        {
            "image": np.full((3, 2, 2), i, np.uint8),
            "labels": np.arange(i),
            "key": str(i),
            "skipped": [("x", "y")] * (i % 2),
        }
        for i in (1, 3, 2)
    ]
    batch = collate(samples)
    assert batch["image"][:, 0, 0, 0].tolist() == [1, 3, 2]
    assert batch["labels"].tolist() == [0, 0, 1, 2, 0, 1] and batch["image_index"].tolist() == [0, 1, 1, 1, 2, 2]
    assert batch["keys"] == ["1", "3", "2"] and batch["skipped"] == [("x", "y")] * 2


def test_testing_reads_every_image_once_with_and_without_workers(cfg, hashtag_folder):
    dataset = HashtagDataset(hashtag_folder, HashtagMapper.from_config(cfg, is_train=False))
    for num_workers in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = num_workers
        keys = [key for batch in build_hashtag_test_loader(cfg, dataset) for key in batch["keys"]]
        assert keys == [f"{i:06d}" for i in range(48)]


def test_a_killed_worker_is_one_kind_of_error(cfg):
    cfg.DATALOADER.NUM_WORKERS = 1
    loader = open_train_loader(cfg)
    iterator = iter(loader)
    next(iterator)
    os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="worker process died"):
        for _ in range(10):
            next(iterator)


def test_a_worker_killed_as_it_holds_a_lock_does_not_hang_the_training(cfg):
    def hangs(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    cfg.DATALOADER.NUM_WORKERS = 2
    loader = open_train_loader(cfg)
    iterator = iter(loader)
    next(iterator)
    loader._iterator._workers_done_event._cond.acquire()  # as a worker does between two batches
    os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
    signal.alarm(60)
    try:
        with pytest.raises(WorkerError, match="worker process died"):
            for _ in range(10):
                next(iterator)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), EOFError()])
def test_a_worker_that_dies_while_handing_over_is_the_same_error(cfg, error, monkeypatch):
    def broken(self):
        raise error
        yield

    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", broken)
    with pytest.raises(WorkerError, match="worker process died"):
        next(iter(open_train_loader(cfg)))


def test_a_datasets_own_error_keeps_its_type(cfg, monkeypatch):
    def broken(self):
        raise ConnectionError("Caught ConnectionError in DataLoader worker process 0.")
        yield

    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", broken)
    with pytest.raises(ConnectionError, match="Caught"):
        next(iter(open_train_loader(cfg)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_workers_leave_signals_to_the_main_process(cfg, number):
    cfg.DATALOADER.NUM_WORKERS = 1
    loader = open_train_loader(cfg)
    iterator = iter(loader)
    next(iterator)
    os.kill(loader._iterator._workers[0].pid, number)
    for _ in range(6):
        next(iterator)
    assert loader._iterator._workers[0].is_alive()


def test_prefetching_comes_from_the_config(cfg):
    cfg.DATALOADER.NUM_WORKERS = 2
    cfg.DATALOADER.PREFETCH_BATCHES = 3
    loader = open_train_loader(cfg)
    assert loader.prefetch_factor == 3 and loader.persistent_workers
