"""A pretraining that is small enough to run inside a test."""

from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from wsl_d2.config import load_config
from wsl_d2.data.read.catalog import register_datasets

CONFIG = Path(__file__).parents[2] / "configs" / "Base-Miniworld-Pretraining.yaml"


@pytest.fixture()
def cfg(datasets, tmp_path):
    """Ten iterations of 8 images of 32 pixels, 4 labels; the datasets are registered, nothing else is done."""
    cfg = load_config(str(CONFIG), [])
    cfg.DATASETS.HASHTAG_FOLDERS = [[f"unit_{part}", str(datasets / "toy" / part)] for part in ("train", "val")]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("unit_train",), ("unit_val",)
    cfg.INPUT.RANDOM_RESIZED_CROP.SIZE = 32
    cfg.SOLVER.IMS_PER_BATCH = 8
    cfg.SOLVER.LR_PER_256_IMAGES = 0.4
    cfg.SOLVER.TOTAL_IMAGES = 80
    cfg.SOLVER.CHECKPOINT_PERIOD = 4
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    (tmp_path / "out").mkdir()
    register_datasets(cfg)
    yield cfg
    for name, _ in cfg.DATASETS.HASHTAG_FOLDERS:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
