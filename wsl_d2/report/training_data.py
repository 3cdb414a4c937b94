"""The training data of a config on one page: a batch as the model sees it, labels, sizes, failures."""

from __future__ import annotations

from collections import Counter

import numpy as np
from tqdm import tqdm

from wsl_d2.data.format.manifest import VOCABULARY
from wsl_d2.data.read.dataset import HashtagDataset
from wsl_d2.data.read.decode import DamagedImageError, decode, open_image
from wsl_d2.data.read.device_decode import decode_batch
from wsl_d2.data.read.loaders import build_hashtag_train_loader, build_sampler, training_dataset
from wsl_d2.hashtags import Vocabulary
from wsl_d2.report.page import page, panels, paragraph, picture, pictures, table
from wsl_d2.report.plots import draw_ranks, panel


def label_names(vocabulary: Vocabulary) -> list[str]:
    """The first hashtag of each label, with its synset."""
    return [f"#{tags[0]} ({synset})" for tags, synset in zip(vocabulary.hashtags, vocabulary.synsets, strict=True)]


def contact_sheet(batch: dict, vocabulary: Vocabulary, image_format: str, limit: int) -> str:
    """The first images of a training batch after decoding, crop and flip, each with its hashtags."""
    images = batch["image"][:limit].numpy()
    figures = []
    for number, pixels in enumerate(images if image_format == "RGB" else images[:, ::-1]):
        labels = batch["labels"][batch["image_index"] == number].tolist()
        tags = " ".join(f"#{vocabulary.hashtags[label][0]}" for label in labels)
        key = batch["keys"][number]
        figures.append(picture(pixels.transpose(1, 2, 0), f"{key}: {tags}", f"{tags}\n{key}", most_bytes=40_000))
    return pictures(figures, 6)


def rank_plot(before: np.ndarray, after: np.ndarray) -> str:
    """An SVG of the labels' counts, in the order of the counts before; both axes are logarithmic."""
    plots: list[str] = []
    with panel(plots, "Images of each label, as stored and in an epoch after resampling") as axis:
        draw_ranks(axis, {"as stored": before, "in an epoch, after resampling": after}, "images")
    return plots[0]


def label_table(before: np.ndarray, after: np.ndarray, names: list[str]) -> str:
    """The most and the least frequent labels, with their shares of all labels before and after."""
    order = np.argsort(-before, kind="stable")
    order = order[before[order] > 0]
    shown = order if len(order) <= 20 else np.concatenate([order[:10], order[-10:]])
    rows = [
        [
            names[i],
            f"{before[i]:,.0f}",
            f"{before[i] / before.sum():.3%}",
            f"{after[i]:,.0f}",
            f"{after[i] / after.sum():.3%}",
        ]
        for i in shown
    ]
    return table(["label", "images", "share", "images, resampled", "share"], rows)


def read_statistics(
    dataset: HashtagDataset, count: int
) -> tuple[list[tuple[int, int, int]], Counter, list[tuple[str, str]]]:
    """Decodes ``count`` images spread evenly over the dataset.

    Returns:
        ((width, height, bytes) of each good image, how many have each format or kind of damage, (key, error) of bad).
    """
    good: list[tuple[int, int, int]] = []
    kinds: Counter[str] = Counter()
    bad: list[tuple[str, str]] = []
    for image in tqdm(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int), desc="decoding"):
        sample = dataset[int(image)]
        try:
            encoded = open_image(sample["image"])
            decode(encoded)
        except DamagedImageError as error:
            kinds[f"refused: {error.reason}"] += 1
            bad.append((sample["key"], str(error)))
        else:
            turned = ", turned by EXIF" if encoded.orientation != 1 else ""
            kinds[f"{encoded.image.format} {encoded.image.mode}{turned}"] += 1
            good.append((*encoded.size, len(sample["image"])))
    return good, kinds, bad


def size_tables(good: list[tuple[int, int, int]], kinds: Counter, bad: list[tuple[str, str]], limit: int = 20) -> str:
    """Percentiles of the sizes, formats and failures."""
    parts = []
    if good:
        width, height, size = np.array(good).T
        columns = {
            "width, pixels": width,
            "height, pixels": height,
            "shorter side, pixels": np.minimum(width, height),
            "width / height": width / height,
            "file, kB": size / 1000,
        }
        shares = (0, 5, 25, 50, 75, 95, 100)
        rows = [
            [name, *(f"{value:.4g}" for value in np.percentile(values, shares))] for name, values in columns.items()
        ]
        parts.append(table(["", "least", "5%", "25%", "median", "75%", "95%", "most"], rows))
    total = sum(kinds.values())
    parts.append(table(["kind", "images", "share"], [[k, n, f"{n / total:.2%}"] for k, n in kinds.most_common()]))
    parts.append(paragraph(f"{len(bad)} of {total} images cannot be used."))
    if bad:
        parts.append(table(["key", "reason"], bad[:limit], {1}))
    return "".join(parts)


def training_data_page(cfg, num_images: int, num_statistics: int) -> str:
    """Builds the page of a config's training data.

    Args:
        cfg: with its datasets registered.
        num_images: shown of the first batch, at most.
        num_statistics: images decoded for sizes and failures.
    """
    name = cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else ""
    dataset = training_dataset(cfg)
    vocabulary = Vocabulary.load(dataset.folder / VOCABULARY)
    batch = decode_batch(next(iter(build_hashtag_train_loader(cfg, dataset, build_sampler(cfg, dataset)))), "cpu")
    resampling = cfg.DATALOADER.RESAMPLING
    before = dataset.sharded_index.hashtag_counts().astype(float)
    after = dataset.epoch_distribution(resampling.MODE, resampling.THRESHOLD).draws
    dataset.mapper = None
    good, kinds, bad = read_statistics(dataset, num_statistics)
    stored = (
        f"{len(dataset):,} labeled images, {dataset.num_labels:,} labels of vocabulary {vocabulary.name}, "
        f"{before.sum() / len(dataset):.2f} labels an image, {(before == 0).sum():,} labels without an image."
    )
    crop = f"Crops of {cfg.INPUT.RANDOM_RESIZED_CROP.SIZE} pixels, decoding {cfg.INPUT.DECODING}; click to enlarge."
    return page(
        name,
        paragraph(stored, "headline"),
        "<h2>A batch as the model sees it</h2>",
        paragraph(crop),
        contact_sheet(batch, vocabulary, cfg.INPUT.FORMAT, num_images),
        "<h2>Labels before and after resampling</h2>",
        panels([rank_plot(before, after)], f"Mode {resampling.MODE}, threshold {resampling.THRESHOLD:g}."),
        label_table(before, after, label_names(vocabulary)),
        "<h2>Image sizes and failures</h2>",
        paragraph(f"Of {sum(kinds.values()):,} images spread evenly over the dataset."),
        size_tables(good, kinds, bad),
    )
