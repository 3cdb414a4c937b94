"""The probe from a weight file and two folders of shards to its results."""

import csv
import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from toy_data import TOY_HASHTAGS

from wsl_d2 import add_wsl_config
from wsl_d2.checkpoint import IncompleteLoadError, export_backbone
from wsl_d2.data import finish_dataset, index_shard, write_shard
from wsl_d2.transfer import ProbeError, probe_backbone
from wsl_d2.transfer import features as features_module


def write_classes(folder, vocabulary, num_images, first=0, damaged=(), two_labels=()):
    """Images of one plain color per class, with some noise."""
    import io

    from PIL import Image

    folder.mkdir(parents=True)
    vocabulary.save(folder / "vocabulary.json")
    samples = []
    for i in range(first, first + num_images):
        rng = np.random.default_rng(i)
        pixels = np.full((32, 32, 3), 60) + np.array([[0, 0, 0], [120, 0, 0], [0, 120, 0], [0, 0, 120]])[i % 4]
        buffer = io.BytesIO()
        Image.fromarray((pixels + rng.integers(0, 60, pixels.shape)).astype(np.uint8)).save(buffer, "JPEG")
        data = buffer.getvalue()
        tags = [TOY_HASHTAGS[i % 4], *([TOY_HASHTAGS[(i + 1) % 4]] if i in two_labels else [])]
        samples.append((f"{i:06d}", data[:200] if i in damaged else data, {"hashtags": tags}))
    write_shard(folder / "shard-000000.tar", samples)
    index_shard(folder / "shard-000000.tar", vocabulary)
    finish_dataset(folder, vocabulary)


def config(folder):
    cfg = get_cfg()
    add_wsl_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "HashtagClassifier"
    cfg.MODEL.BACKBONE.NAME = "build_resnext26_8x4d_backbone"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.280, 103.530], [58.395, 57.120, 57.375]
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.RESNETS.OUT_FEATURES = "BN", ["res5"]
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.RANDOM_RESIZED_CROP.SIZE = cfg.INPUT.TEST_RESIZE_SHORT_SIDE = 32
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATASETS.HASHTAG_FOLDERS = [[f"probe_{part}", str(folder / part)] for part in ("train", "test")]
    cfg.TEST.IMS_PER_BATCH = 8
    return cfg


@pytest.fixture()
def world(tmp_path, toy_vocabulary):
    write_classes(tmp_path / "train", toy_vocabulary, 48)
    write_classes(tmp_path / "test", toy_vocabulary, 24, first=1000)
    cfg = config(tmp_path)
    cfg.MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES = 4
    torch.manual_seed(0)
    export_backbone(build_model(cfg), tmp_path / "backbone.pth")
    yield tmp_path
    for name in ("probe_train", "probe_test"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def probe(world, output="out", **options):
    weights = str(world / "backbone.pth")
    return probe_backbone(config(world), weights, "probe_train", "probe_test", world / output, **options)


def test_colors_are_told_apart_and_everything_is_written(world):
    record, classes = probe(world, shots=[2], num_seeds=3)
    assert record["top1"] > 90 and record["top5"] == 100
    assert (record["num_train"], record["num_test"]) == (48, 24)
    assert record["few_shot"][0]["shots"] == 2 and len(record["few_shot"][0]["top1"]) == 3
    assert json.loads((world / "out" / "probe.json").read_text()) == record
    rows = list(csv.DictReader(open(world / "out" / "classes.csv")))
    assert [row["synset"] for row in rows] == [c["synset"] for c in classes]
    assert sum(int(row["num_test"]) * float(row["top1"]) for row in rows) / 24 == pytest.approx(record["top1"])


def test_features_are_extracted_once_and_go_on_after_an_interruption(world, monkeypatch):
    forward = features_module.HashtagClassifier.features
    calls = []

    def counted(self, batch):
        calls.append(len(batch["keys"]))
        if len(calls) == interrupt_at:
            raise KeyboardInterrupt
        return forward(self, batch)

    monkeypatch.setattr(features_module.HashtagClassifier, "features", counted)
    monkeypatch.setattr(features_module, "_BATCHES_BETWEEN_FLUSHES", 1)
    interrupt_at = 4
    with pytest.raises(KeyboardInterrupt):
        probe(world)
    calls.clear()
    interrupt_at = None
    resumed = probe(world)[0]
    assert sum(calls) == 48 - 24 + 24  # three batches of 8 were kept; the test set is new
    calls.clear()
    assert probe(world)[0] == resumed and not calls
    assert probe(world, output="fresh")[0] == resumed and sum(calls) == 72


def test_other_weights_are_other_features(world):
    probe(world)
    cfg = config(world)
    cfg.MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES = 4
    torch.manual_seed(1)
    export_backbone(build_model(cfg), world / "backbone.pth")
    probe(world)
    assert len(list((world / "out" / "features").glob("*.json"))) == 4


def test_damaged_images_are_left_out_and_counted(tmp_path, world, toy_vocabulary):
    write_classes(tmp_path / "other" / "train", toy_vocabulary, 48, damaged=(5, 30))
    write_classes(tmp_path / "other" / "test", toy_vocabulary, 24, first=1000)
    cfg = config(tmp_path / "other")
    with pytest.raises(ProbeError, match="2 of 48 images cannot be decoded"):
        probe_backbone(cfg.clone(), str(world / "backbone.pth"), "probe_train", "probe_test", tmp_path / "a")
    cfg.DATALOADER.MAX_DAMAGED_FRACTION = 0.1
    record, _ = probe_backbone(cfg, str(world / "backbone.pth"), "probe_train", "probe_test", tmp_path / "a")
    assert (record["num_train"], record["num_damaged"]) == (46, 2)


def test_an_image_with_two_labels_is_refused(tmp_path, world, toy_vocabulary):
    write_classes(tmp_path / "other" / "train", toy_vocabulary, 48, two_labels=(9,))
    write_classes(tmp_path / "other" / "test", toy_vocabulary, 24)
    with pytest.raises(ProbeError, match="'000009' has 2 labels"):
        weights = str(world / "backbone.pth")
        probe_backbone(config(tmp_path / "other"), weights, "probe_train", "probe_test", tmp_path / "a")


def test_wrong_weights_and_configs_are_refused(world):
    cfg = config(world)
    cfg.MODEL.BACKBONE.NAME = "build_resnext50_32x4d_backbone"
    with pytest.raises(IncompleteLoadError):
        probe_backbone(cfg, str(world / "backbone.pth"), "probe_train", "probe_test", world / "a")
    cfg = config(world)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    with pytest.raises(ProbeError, match="trains a GeneralizedRCNN"):
        probe_backbone(cfg, str(world / "backbone.pth"), "probe_train", "probe_test", world / "a")
