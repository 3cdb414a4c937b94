"""Registration of datasets in Detectron2's catalogs, called from ``setup(args)`` and never on import."""

from __future__ import annotations

import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from wsl_d2.coco import CocoError
from wsl_d2.data.read.dataset import HashtagDataset
from wsl_d2.data.read.detection import load_coco_dataset
from wsl_d2.data.remote import is_url


def datasets_root() -> Path:
    """Returns ``$DETECTRON2_DATASETS``, Detectron2's folder of datasets, "datasets" by default."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def register_hashtag_dataset(name: str, folder: str | Path) -> None:
    """Registers a folder of shards under ``name``; opening it later gives a :class:`HashtagDataset`.

    Registering the same folder again does nothing.

    Raises:
        ValueError: the name is taken by another dataset.
    """
    folder = str(folder)
    if name in DatasetCatalog.list():
        if MetadataCatalog.get(name).get("folder", None) == folder:
            return
        raise ValueError(f"dataset name {name!r} is already registered for something else; choose another name.")
    DatasetCatalog.register(name, lambda: HashtagDataset(folder, fresh=comm.get_local_rank() == 0))
    MetadataCatalog.get(name).set(folder=folder, evaluator_type="hashtag")


def register_coco_dataset(name: str, json_file: str | Path, image_root: str | Path) -> None:
    """Registers a dataset in COCO's format under ``name``, as :func:`load_coco_dataset` reads it; registering the
    same one again does nothing.

    Raises:
        CocoError: the name is taken by another dataset.
    """
    json_file, image_root = str(json_file), str(image_root)
    if name in DatasetCatalog.list():
        metadata = MetadataCatalog.get(name)
        if (metadata.get("json_file", None), metadata.get("image_root", None)) == (json_file, image_root):
            return
        raise CocoError(f"dataset name {name!r} is already registered for something else; choose another name.")
    DatasetCatalog.register(name, lambda: load_coco_dataset(json_file, image_root, name))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco")


def register_datasets(cfg) -> None:
    """Registers the rows of DATASETS.HASHTAG_FOLDERS and DATASETS.COCO_FOLDERS, relative to :func:`datasets_root`; a
    hashtag folder may be a URL.

    Raises:
        ValueError: a row has the wrong length.
    """
    root = datasets_root()
    for row in cfg.DATASETS.HASHTAG_FOLDERS:
        if len(row) != 2:
            raise ValueError(f"a row of DATASETS.HASHTAG_FOLDERS is [name, folder], got {row}.")
        register_hashtag_dataset(row[0], row[1] if is_url(row[1]) else root / row[1])
    for row in cfg.DATASETS.COCO_FOLDERS:
        if len(row) != 3:
            raise CocoError(f"a row of DATASETS.COCO_FOLDERS is [name, annotation json, image folder], got {row}.")
        register_coco_dataset(row[0], root / row[1], root / row[2])
