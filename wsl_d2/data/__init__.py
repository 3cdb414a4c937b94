"""Labels and images -> batches: shards, resampling, order, loading, registration.

Names are imported when they are first asked for, so that tools that only write or verify shards start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsl_d2.data.build import build_hashtag_test_loader, build_hashtag_train_loader
    from wsl_d2.data.catalog import register_coco_dataset, register_datasets, register_hashtag_dataset
    from wsl_d2.data.dataset import HashtagDataset
    from wsl_d2.data.detection import build_resumable_detection_train_loader
    from wsl_d2.data.make import index_shards, make_shards
    from wsl_d2.data.resampling import image_repeat_factors, repeat_factors
    from wsl_d2.data.sampler import HashtagSampler
    from wsl_d2.data.shards import HashtagIndex, ShardedIndex, ShardError, finish_dataset, index_shard, write_shard
    from wsl_d2.data.verify import verify_dataset
    from wsl_d2.data.views import make_view

_MODULE_OF = {
    "HashtagDataset": "dataset",
    "HashtagIndex": "shards",
    "HashtagSampler": "sampler",
    "ShardError": "shards",
    "ShardedIndex": "shards",
    "build_hashtag_test_loader": "build",
    "build_hashtag_train_loader": "build",
    "build_resumable_detection_train_loader": "detection",
    "finish_dataset": "shards",
    "image_repeat_factors": "resampling",
    "index_shard": "shards",
    "index_shards": "make",
    "make_shards": "make",
    "make_view": "views",
    "register_coco_dataset": "catalog",
    "register_datasets": "catalog",
    "register_hashtag_dataset": "catalog",
    "repeat_factors": "resampling",
    "verify_dataset": "verify",
    "write_shard": "shards",
}

__all__ = [
    "HashtagDataset",
    "HashtagIndex",
    "HashtagSampler",
    "ShardError",
    "ShardedIndex",
    "build_hashtag_test_loader",
    "build_hashtag_train_loader",
    "build_resumable_detection_train_loader",
    "finish_dataset",
    "image_repeat_factors",
    "index_shard",
    "index_shards",
    "make_shards",
    "make_view",
    "register_coco_dataset",
    "register_datasets",
    "register_hashtag_dataset",
    "repeat_factors",
    "verify_dataset",
    "write_shard",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
