"""Labels and images -> batches: shards, resampling, order, loading, registration.

Names are imported when they are first asked for, so that tools that only write or verify shards start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsl_d2.data.order.resampling import image_repeat_factors, repeat_factors
    from wsl_d2.data.order.sampler import HashtagSampler
    from wsl_d2.data.read.catalog import register_coco_dataset, register_datasets, register_hashtag_dataset
    from wsl_d2.data.read.dataset import HashtagDataset
    from wsl_d2.data.read.detection import build_resumable_detection_train_loader
    from wsl_d2.data.read.loaders import build_hashtag_test_loader, build_hashtag_train_loader
    from wsl_d2.data.shards import HashtagIndex, ShardedIndex, ShardError, finish_dataset, index_shard, write_shard
    from wsl_d2.data.write.posts import index_shards, make_shards
    from wsl_d2.data.write.verify import verify_dataset
    from wsl_d2.data.write.views import make_view

_MODULE_OF = {
    "HashtagDataset": "read.dataset",
    "HashtagIndex": "shards",
    "HashtagSampler": "order.sampler",
    "ShardError": "shards",
    "ShardedIndex": "shards",
    "build_hashtag_test_loader": "read.loaders",
    "build_hashtag_train_loader": "read.loaders",
    "build_resumable_detection_train_loader": "read.detection",
    "finish_dataset": "shards",
    "image_repeat_factors": "order.resampling",
    "index_shard": "shards",
    "index_shards": "write.posts",
    "make_shards": "write.posts",
    "make_view": "write.views",
    "register_coco_dataset": "read.catalog",
    "register_datasets": "read.catalog",
    "register_hashtag_dataset": "read.catalog",
    "repeat_factors": "order.resampling",
    "verify_dataset": "write.verify",
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
