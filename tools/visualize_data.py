#!/usr/bin/env python3
"""Shows the training data of a config on one HTML page: a batch as the model sees it, labels, sizes, failures.

tools/visualize_data.py --config-file configs/Hashtag-Pretraining/... --output data.html [KEY VALUE ...]

The page holds everything it shows. "After resampling" is the expectation of one epoch under DATALOADER.RESAMPLING.
"""

import argparse
import base64
import html
import io
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from wsl_d2.data import ShardError, build_hashtag_train_loader, image_repeat_factors, register_datasets
from wsl_d2.data.read.decode import DamagedImageError, decode, open_image
from wsl_d2.data.read.device_decode import decode_batch
from wsl_d2.data.read.loaders import get_hashtag_dataset, training_dataset
from wsl_d2.files import write_atomically
from wsl_d2.engine.main import ConfigError, load_config
from wsl_d2.hashtags import Vocabulary, VocabularyError

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:1180px;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem;border-bottom:1px solid #ccc}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.8rem}
.sheet figure{margin:0;min-width:0}.sheet img{width:100%;display:block}
figcaption{font-size:.85rem;overflow-wrap:anywhere}.key{color:#666}
.scroll{overflow-x:auto;margin:.8rem 0}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}
svg{width:100%;max-width:760px;height:auto}td,p{overflow-wrap:anywhere}
"""
BEFORE, AFTER = "#444", "#0b62a8"
SMALL = 'font-size="13" fill="#444"'


def text(value: object) -> str:
    """Escapes: hashtags and keys are written by strangers."""
    return html.escape(str(value), quote=True)


def data_url(pixels: np.ndarray) -> str:
    """Returns (3, H, W) uint8 RGB as an image that the page holds itself."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


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
        figures.append(
            f'<figure><img alt="{text(tags)}" src="{data_url(pixels)}"><figcaption>{text(tags)}<br>'
            f'<span class="key">{text(batch["keys"][number])}</span></figcaption></figure>'
        )
    return f'<div class="sheet">{"".join(figures)}</div>'


def label_distribution(index, threshold: float, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns, both (C,), how many images of an epoch carry each label without and, expected, with resampling."""
    factors = image_repeat_factors(index, threshold, mode)
    weights = np.repeat(factors, np.diff(index.indptr))
    after = np.bincount(index.labels, weights=weights, minlength=index.num_labels)
    return index.hashtag_counts().astype(float), after


def rank_plot(before: np.ndarray, after: np.ndarray) -> str:
    """An SVG of the labels' counts, in the order of the counts before; both axes are logarithmic."""
    order = np.argsort(-before, kind="stable")
    order = order[before[order] > 0]
    top = math.ceil(math.log10(max(2.0, before.max(), after.max())))
    right = max(1, math.ceil(math.log10(max(2, len(order)))))
    ranks = np.unique(np.geomspace(1, len(order), 400).astype(int))
    parts = ['<svg viewBox="0 0 760 330" role="img" aria-label="images per label by rank">']
    for power in range(top + 1):
        y = 280 - 260 * power / top
        parts.append(f'<path d="M60 {y}H740" stroke="#ddd"/><text x="52" y="{y + 4}" {SMALL} text-anchor="end">')
        parts.append(f"{10**power:,}</text>")
    for power in range(right + 1):
        x = 60 + 680 * power / right
        parts.append(f'<text x="{x}" y="298" {SMALL} text-anchor="middle">{10**power:,}</text>')
    for counts, color, dash in ((before, BEFORE, ""), (after, AFTER, "6 3")):
        heights = np.log10(np.maximum(1, counts[order[ranks - 1]])) / top
        xs, ys = 60 + 680 * np.log10(ranks) / right, 280 - 260 * heights
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
    parts.append(
        f'<text x="400" y="320" {SMALL} text-anchor="middle">rank of the label; vertical: images an epoch</text>'
    )
    return "".join(parts) + "</svg>"


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


def table(header: list[str], rows: list[list[object]]) -> str:
    """An HTML table; every cell is escaped."""
    lines = ["".join(f"<th>{text(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{text(cell)}</td>" for cell in row) for row in rows]
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def read_statistics(dataset, count: int) -> tuple[list[tuple[int, int, int]], Counter, list[tuple[str, str]]]:
    """Decodes ``count`` images spread evenly over the dataset.

    Returns:
        ((width, height, bytes) of each good image, how many have each format or kind of damage, (key, error) of bad).
    """
    good, kinds, bad = [], Counter(), []
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
    parts.append(f"<p>{len(bad)} of {total} images cannot be used.</p>")
    if bad:
        parts.append(table(["key", "reason"], [list(entry) for entry in bad[:limit]]))
    return "".join(parts)


def make_page(cfg, num_images: int, num_statistics: int) -> str:
    """Builds the page of a config's training data."""
    name = cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else ""
    dataset, raw = training_dataset(cfg), get_hashtag_dataset(name)
    vocabulary = Vocabulary.load(dataset.folder / "vocabulary.json")
    batch = decode_batch(next(iter(build_hashtag_train_loader(cfg))), "cpu")
    resampling = cfg.DATALOADER.RESAMPLING
    before, after = label_distribution(dataset.index, resampling.THRESHOLD, resampling.MODE)
    good, kinds, bad = read_statistics(raw, num_statistics)
    per_image = before.sum() / len(dataset)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{text(name)}</h1>"
        f"<p>{len(dataset):,} labelled images, {dataset.num_labels:,} labels of vocabulary {text(vocabulary.name)}, "
        f"{per_image:.2f} labels an image, {(before == 0).sum():,} labels without an image.</p>"
        f"<h2>A batch as the model sees it</h2><p>Crops of {cfg.INPUT.RANDOM_RESIZED_CROP.SIZE} pixels, "
        f"decoding {text(cfg.INPUT.DECODING)}.</p>"
        f"{contact_sheet(batch, vocabulary, cfg.INPUT.FORMAT, num_images)}"
        f"<h2>Labels before and after resampling</h2><p>Mode {text(resampling.MODE)}, "
        f"threshold {resampling.THRESHOLD:g}. "
        f'<span style="color:{BEFORE}">Solid: as stored.</span> '
        f'<span style="color:{AFTER}">Dashed: expected in one epoch after resampling.</span></p>'
        f"{rank_plot(before, after)}{label_table(before, after, label_names(vocabulary))}"
        f"<h2>Image sizes and failures</h2><p>Of {sum(kinds.values()):,} images spread evenly over the dataset.</p>"
        f"{size_tables(good, kinds, bad)}</body></html>\n"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--output", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--images", type=int, default=48, help="images of the contact sheet, at most a batch")
    parser.add_argument("--statistics", type=int, default=1000, help="images decoded for sizes and failures")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys to override: KEY VALUE ...")
    options = parser.parse_args(arguments)
    if options.images < 1 or options.statistics < 1:
        parser.error("--images and --statistics must be at least 1")
    try:
        cfg = load_config(options.config_file, options.opts)
        cfg.DATALOADER.NUM_WORKERS = 0
        register_datasets(cfg)
        page = make_page(cfg, options.images, options.statistics)
    except (ConfigError, ShardError, VocabularyError, ValueError, KeyError) as error:
        sys.exit(f"error: {error}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, page.encode())
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
