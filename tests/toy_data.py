"""Writers of small datasets for the tests."""

import io

import numpy as np
from PIL import Image

TOY_SYNSETS = ["n02084071", "n02121620", "n01503061", "n02958343"]  # dog, cat, bird, car
TOY_HASHTAGS = ["#Dog", "#cat", "#bird", "#car"]


def jpeg(seed: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """A random smooth JPEG of (width, height) pixels."""
    grid = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grid).resize(size, Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_hashtag_folder(folder, vocabulary, num_images=48, images_per_shard=16, damaged=(), second_label_every=3):
    """A finished folder of shards: image i carries hashtag i % 4, every third one (0: none) a second hashtag."""
    from wsl_d2.data import finish_dataset, index_shard, write_shard

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary.save(folder / "vocabulary.json")
    for shard, start in enumerate(range(0, num_images, images_per_shard)):
        samples = []
        for i in range(start, min(start + images_per_shard, num_images)):
            hashtags = [TOY_HASHTAGS[i % 4]] + (
                [TOY_HASHTAGS[(i + 1) % 4]] if second_label_every and i % second_label_every == 0 else []
            )
            data = jpeg(i)
            samples.append((f"{i:06d}", data[:-20] if i in damaged else data, {"hashtags": hashtags}))
        path = folder / f"shard-{shard:06d}.tar"
        write_shard(path, samples)
        index_shard(path, vocabulary)
    finish_dataset(folder, vocabulary)
    return folder


def random_index(num_images=200, num_labels=12, seed=0):
    """Labels of images with one to three of Zipf-distributed hashtags."""
    from wsl_d2.data import HashtagIndex

    rng = np.random.default_rng(seed)
    rows = [np.unique(rng.zipf(1.6, size=rng.integers(1, 4)) % num_labels) for _ in range(num_images)]
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return HashtagIndex(indptr, np.concatenate(rows).astype(np.int32), num_labels)


def split_index(index, sizes):
    """The same labels in shards of the given numbers of images, for the order."""
    from wsl_d2.data import ShardedIndex
    from wsl_d2.data.format.labels import ShardLabels

    ends = np.cumsum(sizes)

    def read(shard):
        first, last = int(ends[shard] - sizes[shard]), int(ends[shard])
        indptr = index.indptr[first : last + 1]
        labels = index.labels[indptr[0] : indptr[-1]]
        return ShardLabels(np.arange(last - first), indptr - indptr[0], labels, 0, "", "hashtags", "")

    return ShardedIndex(read, np.array(sizes), index.hashtag_counts())


def open_train_loader(cfg, start_iteration=0):
    """The training loader of a config, as a run's plan has it."""
    from wsl_d2.data.read.loaders import build_hashtag_train_loader, build_sampler, training_dataset

    dataset = training_dataset(cfg)
    sampler = build_sampler(cfg, dataset)
    sampler.start_iteration = start_iteration
    return build_hashtag_train_loader(cfg, dataset, sampler)
