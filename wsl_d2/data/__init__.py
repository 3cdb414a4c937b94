"""Labels and images -> batches: shards, resampling, order, loading, registration.

Names are imported when they are first asked for, so that tools that only write or verify shards start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsl_d2.data.format.labels import HashtagIndex, ShardedIndex
    from wsl_d2.data.format.manifest import finish_dataset, index_shard, write_shard
    from wsl_d2.data.order.resampling import image_repeat_factors, repeat_factors
    from wsl_d2.data.order.sampler import HashtagSampler
    from wsl_d2.data.read.catalog import register_coco_dataset, register_datasets, register_hashtag_dataset
    from wsl_d2.data.read.dataset import HashtagDataset
    from wsl_d2.data.write.class_folders import make_class_shards
    from wsl_d2.data.write.posts import make_shards
    from wsl_d2.data.write.tars import index_shards
    from wsl_d2.data.write.verify import verify_dataset
    from wsl_d2.data.write.views import make_view
    from wsl_d2.errors import ShardError

_MODULE_OF = {
    "HashtagDataset": "wsl_d2.data.read.dataset",
    "HashtagIndex": "wsl_d2.data.format.labels",
    "HashtagSampler": "wsl_d2.data.order.sampler",
    "ShardError": "wsl_d2.errors",
    "ShardedIndex": "wsl_d2.data.format.labels",
    "finish_dataset": "wsl_d2.data.format.manifest",
    "image_repeat_factors": "wsl_d2.data.order.resampling",
    "index_shard": "wsl_d2.data.format.manifest",
    "index_shards": "wsl_d2.data.write.tars",
    "make_class_shards": "wsl_d2.data.write.class_folders",
    "make_shards": "wsl_d2.data.write.posts",
    "make_view": "wsl_d2.data.write.views",
    "register_coco_dataset": "wsl_d2.data.read.catalog",
    "register_datasets": "wsl_d2.data.read.catalog",
    "register_hashtag_dataset": "wsl_d2.data.read.catalog",
    "repeat_factors": "wsl_d2.data.order.resampling",
    "verify_dataset": "wsl_d2.data.write.verify",
    "write_shard": "wsl_d2.data.format.manifest",
}

__all__ = [
    "HashtagDataset",
    "HashtagIndex",
    "HashtagSampler",
    "ShardError",
    "ShardedIndex",
    "finish_dataset",
    "image_repeat_factors",
    "index_shard",
    "index_shards",
    "make_class_shards",
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
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
