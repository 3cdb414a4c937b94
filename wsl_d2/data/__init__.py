"""Labels and images -> batches: shards, resampling, order, loading, registration."""

from wsl_d2.data.build import build_hashtag_test_loader, build_hashtag_train_loader
from wsl_d2.data.catalog import register_coco_dataset, register_datasets, register_hashtag_dataset
from wsl_d2.data.dataset import HashtagDataset
from wsl_d2.data.detection import build_resumable_detection_train_loader
from wsl_d2.data.resampling import image_repeat_factors, repeat_factors
from wsl_d2.data.sampler import HashtagSampler
from wsl_d2.data.shards import HashtagIndex, ShardedIndex, ShardError, finish_dataset, index_shard, write_shard
from wsl_d2.data.views import make_view

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
    "make_view",
    "register_coco_dataset",
    "register_datasets",
    "register_hashtag_dataset",
    "repeat_factors",
    "write_shard",
]
