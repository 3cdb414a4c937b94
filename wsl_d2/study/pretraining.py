"""From photos and their hashtags to a pretrained backbone in one call; every stage can be interrupted and goes on.

A folder of results::

    arguments.json     of the call that began it
    counts/            how many photos carry each hashtag
    vocabulary.json    the labels
    shards/            photos and hashtags as a dataset (not where tars are given: these are indexed in place)
    train/  val/       its two parts, as views
    pretrain.yaml      the run's config, to keep and to change
    run/               checkpoints, metrics, logs
    backbone.pth       what detectors load
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from wsl_d2.data import index_shards, make_shards, make_view
from wsl_d2.data.format.manifest import MANIFEST, read_manifest
from wsl_d2.data.posts.count import CountOptions, count_hashtags
from wsl_d2.engine.schedule import images_to_process
from wsl_d2.engine.signals import REQUEUE_EXIT_CODE
from wsl_d2.errors import UserError
from wsl_d2.files import write_atomically
from wsl_d2.hashtags import HashtagCounts, Vocabulary, load_wordnet
from wsl_d2.process import start_program, stop_programs
from wsl_d2.study.claim import claim_folder

_SMALL = "resnext26_8x4d"  # for small images; its rate was chosen on the mini-world


def pretrain(
    photos: str | Path,
    posts: Sequence[str] | str | None = None,
    *,
    output: str | Path,
    architecture: str = "resnext50_32x4d",
    vocabulary: str = "17k",
    min_images: int = 2,
    held_out: float = 0.05,
    image_size: int = 224,
    total_images: int | None = None,
    batch_size: int | None = None,
    lr_per_256_images: float | None = None,
    num_gpus: int | None = None,
    seed: int = 0,
    columns: CountOptions | None = None,
    workers: int = 1,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Path:
    """Pretrains a backbone on photos whose only labels are their hashtags.

    Args:
        photos: a folder of images, each named by its post's key; or a folder of WebDataset tars, which are indexed in
            place; or a finished dataset of shards.
        posts: tables of posts with key and hashtags; None with tars and shards.
        output: folder of all results.
        architecture: a key of :data:`wsl_d2.modeling.RESNEXT_ARCHITECTURES`.
        vocabulary: "17k", "8.5k" (both by the counted hashtags), "1.5k", "coco", or a vocabulary.json.
        min_images: of "17k" and "8.5k", a label must be on so many photos.
        held_out: fraction of the photos that the classifier is judged on.
        image_size: pixels of the square crops.
        total_images: images to process, repetitions counted; by the recipe's rule for the number of photos if None.
        batch_size: images per step; chosen for the number of photos and GPUs if None.
        lr_per_256_images: learning rate for 256 images a step; the recipe's if None.
        num_gpus: processes, all GPUs of this machine if None; without a GPU one process on the CPU.
        seed: of split, order and initial weights.
        columns: where key and hashtags are in the posts.
        workers: processes that prepare data.
        overrides: further config keys, KEY VALUE ....
        say: called with what happens.

    Returns:
        The path of ``backbone.pth``.

    Raises:
        UserError: an input that cannot be used; a training that failed, with the place of its log.
    """
    photos, output = Path(photos), Path(output)
    posts = [posts] if isinstance(posts, str) else list(posts or [])
    columns = columns or CountOptions()
    _check_input(photos, posts, architecture)
    claim_folder(
        output,
        {
            "photos": str(photos.resolve()),
            "posts": [str(Path(post).resolve()) for post in posts],
            **{name.replace("_", " "): value for name, value in dataclasses.asdict(columns).items()},
            "vocabulary": vocabulary,
            "min images": min_images,
            "held out": held_out,
            "architecture": architecture,
            "image size": image_size,
            "total images": total_images,
            "batch size": batch_size,
            "learning rate for 256 images": lr_per_256_images,
            "seed": seed,
        },
        "pretraining",
        work=["run"],
        stages=["counts", "vocabulary.json", "shards", "train", "val", "pretrain.yaml"],
    )
    labels = _find_vocabulary(photos, posts, output, vocabulary, min_images, columns, workers, say)
    shards = _make_shards(photos, posts, output, labels, columns, workers, say)
    parts = {}
    for part in ("train", "val"):
        parts[part] = make_view(shards, output / part, held_out=held_out, part=part, seed=seed, workers=workers)
        say(f"{output / part}: {parts[part]['num_images']:,} labeled photos, {parts[part]['num_labels']:,} labels")
    config = output / "pretrain.yaml"
    written = _config(
        output,
        parts["train"]["num_images"],
        architecture,
        image_size=image_size,
        total_images=total_images,
        batch_size=batch_size,
        lr_per_256_images=lr_per_256_images,
        num_gpus=num_gpus,
        seed=seed,
    )
    if not config.is_file():  # one that somebody has changed counts
        write_atomically(config, written)
    say(f"{config}: the config of the run")
    _train(config, output / "run", overrides, say)
    backbone = output / "backbone.pth"
    shutil.copyfile(output / "run" / "backbone.pth", f"{backbone}.partial")
    os.replace(f"{backbone}.partial", backbone)
    results = json.loads((output / "run" / "record.json").read_text())["results"]
    say(
        f"held-out photos: top-1 {results['hashtag/top1']:.1f}%, top-5 {results['hashtag/top5']:.1f}% "
        f"({results['hashtag/num_images']:.0f} photos)"
    )
    return backbone


def _check_input(photos: Path, posts: list[str], architecture: str) -> None:
    if not photos.is_dir():
        raise UserError(f"{photos} is no folder; give the folder of the photos, or of their tars.")
    has_tars = any(photos.glob("*.tar"))
    if posts and has_tars:
        raise UserError(f"{photos} holds tars, which have their hashtags in them; give no posts with them.")
    if not posts and not has_tars:
        raise UserError(f"{photos} holds no tars; give the table of posts with the hashtags of its photos.")
    from wsl_d2.modeling import RESNEXT_ARCHITECTURES

    if architecture not in RESNEXT_ARCHITECTURES:
        raise UserError(f"unknown architecture {architecture!r}; choose one of {', '.join(RESNEXT_ARCHITECTURES)}.")


def _find_vocabulary(
    photos: Path,
    posts: list[str],
    output: Path,
    name: str,
    min_images: int,
    columns: CountOptions,
    workers: int,
    say: Callable[[str], None],
) -> Vocabulary:
    path = output / "vocabulary.json"
    if path.is_file():
        return Vocabulary.load(path)
    if name.endswith(".json"):
        vocabulary = Vocabulary.load(name)
    else:
        counts = None
        if name in ("17k", "8.5k"):
            counted = count_hashtags(posts or [str(photos / "*.tar")], output / "counts", columns, workers=workers)
            counts = HashtagCounts(output / "counts" / "hashtag_counts.tsv")
            say(f"{output / 'counts'}: {counted['distinct']:,} different hashtags")
        chosen = {"min_images": min_images} if counts else {}
        vocabulary = Vocabulary.build(name, load_wordnet(), counts=counts, **chosen)  # type: ignore[arg-type]
    vocabulary.save(path)
    say(f"{path}: {len(vocabulary):,} labels")
    return vocabulary


def _make_shards(
    photos: Path,
    posts: list[str],
    output: Path,
    vocabulary: Vocabulary,
    columns: CountOptions,
    workers: int,
    say: Callable[[str], None],
) -> Path:
    """Returns the folder of a finished dataset of these labels."""
    if not posts:
        if not (photos / MANIFEST).is_file():
            index_shards(
                photos,
                vocabulary,
                workers=workers,
                hashtags_column=columns.hashtags_column,
                caption_column=columns.caption_column,
            )
        elif read_manifest(photos)["vocabulary_checksum"] != vocabulary.checksum:
            make_view(photos, output / "shards", vocabulary=vocabulary, workers=workers)
            return output / "shards"
        return photos
    manifest = make_shards(
        posts,
        str(photos),
        vocabulary,
        output / "shards",
        workers=workers,
        kind=None if columns.format == "auto" else columns.format,
        key_column=columns.key_column,
        hashtags_column=columns.hashtags_column,
        caption_column=columns.caption_column,
    )
    account = ", ".join(f"{reason}: {count:,}" for reason, count in manifest["account"].items())
    say(f"{output / 'shards'}: {manifest['num_images']:,} labeled photos ({account})")
    return output / "shards"


def _config(
    output: Path,
    num_images: int,
    architecture: str,
    *,
    image_size: int,
    total_images: int | None,
    batch_size: int | None,
    lr_per_256_images: float | None,
    num_gpus: int | None,
    seed: int,
) -> str:
    """Returns the YAML of a run, with the reason of each choice."""
    import torch

    from wsl_d2.config import get_config_file

    gpus = torch.cuda.device_count() if num_gpus is None else num_gpus
    processes = max(1, gpus)
    batch = batch_size or min(256 * processes, max(8, num_images // 16 // 8 * 8) * processes)
    total = total_images or images_to_process(num_images)
    rate = lr_per_256_images or (0.8 if architecture == _SMALL else 0.1)
    iterations = max(1, -(-total // batch))
    halvings = min(10, iterations // 20)
    content = {
        "_BASE_": str(Path(get_config_file("Base-Hashtag-Pretraining.yaml")).resolve()),
        "MODEL": {
            "DEVICE": "cuda" if gpus else "cpu",
            "BACKBONE": {"NAME": f"build_{architecture}_backbone"},
        },
        "INPUT": {
            "RANDOM_RESIZED_CROP": {"SIZE": image_size},
            "TEST_RESIZE_SHORT_SIDE": round(image_size * 256 / 224),
        },
        "DATASETS": {
            "HASHTAG_FOLDERS": [[f"pretrain_{part}", str((output / part).resolve())] for part in ("train", "val")],
            "TRAIN": ["pretrain_train"],
            "TEST": ["pretrain_val"],
        },
        "DATALOADER": {"NUM_WORKERS": max(1, (os.cpu_count() or 1) // processes) if gpus else 1},
        "SOLVER": {
            "IMS_PER_BATCH": batch,
            "TOTAL_IMAGES": total,
            "WARMUP_IMAGES": min(6_000_000, total // 20),
            "LR_PER_256_IMAGES": rate,
            "NUM_LR_HALVINGS": halvings,
            "CHECKPOINT_PERIOD": max(20, iterations // 50),
            "LOG_PERIOD": min(20, max(1, iterations // 20)),
            "AMP": {"ENABLED": bool(gpus)},
        },
        "SEED": seed,
        "OUTPUT_DIR": str((output / "run").resolve()),
    }
    lines = [
        f"# Pretraining of {architecture} on {num_images:,} photos: wsl-d2 train --config-file pretrain.yaml --resume",
        f"# {total:,} images in all, {total / num_images:.1f} views of each photo; {iterations:,} steps of {batch}.",
        yaml.safe_dump(content, sort_keys=False),
    ]
    return "\n".join(lines)


def _train(config: Path, run: Path, overrides: Sequence[str], say: Callable[[str], None]) -> None:
    import torch

    if (run / "backbone.pth").is_file() and (run / "record.json").is_file():
        return
    command = [sys.executable, "-m", "wsl_d2", "train", "--config-file", str(config), "--resume"]
    command += ["--num-gpus", str(max(1, torch.cuda.device_count())), *overrides]
    say(f"training: wsl-d2 {' '.join(command[3:])}")
    process = start_program(command)
    try:
        status = process.wait()
    finally:
        stop_programs([process])
    if status == REQUEUE_EXIT_CODE:
        raise SystemExit(REQUEUE_EXIT_CODE)
    if status:
        raise UserError(
            f"the training ended with status {status}; {run / 'log.txt'} tells why. The same command goes on from its "
            "last checkpoint."
        )
