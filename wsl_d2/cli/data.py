"""Verbs about datasets: of shards make, index, from-folders, verify, view, report, sampling; of detection check;
show."""

from __future__ import annotations

import argparse
from pathlib import Path

from wsl_d2.cli.hashtags import add_columns, show_posts
from wsl_d2.cli.verb import Verb, add_runner, local_path, place, positive, read_user_text, runner_of

_SHOWN = 20


def _print_dataset(folder: str | Path, manifest: dict) -> None:
    from wsl_d2.data.format.manifest import describe_images

    print(f"{folder}: {describe_images(manifest).replace('; ', chr(10) + '  ')}")
    for reason, count in manifest.get("account", {}).items():
        print(f"  {reason}: {count:,}")
    for kind, count in manifest.get("skipped", {}).items():
        print(f"  skipped, {kind}: {count:,}")


def _add_shrinking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--short-side", type=positive, help="store larger images with a short side of so many pixels")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs that --short-side makes, 1 to 100")


def _shrinking_of(args: argparse.Namespace):
    from wsl_d2.data.read.shrink import Shrinking

    return Shrinking(args.short_side, args.quality)


def _make_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("posts", type=place, nargs="+", help="files, folders, glob patterns or URLs of posts")
    parser.add_argument(
        "--images",
        type=place,
        required=True,
        help="path or URL of a key's image, with {key} in it; a folder; or column:NAME of Parquet files",
    )
    parser.add_argument(
        "--vocabulary", type=place, required=True, help="vocabulary.json, of `wsl-d2 hashtags vocabulary`"
    )
    parser.add_argument(
        "--output", type=place, required=True, help="folder to write, or its URL such as s3://bucket/train"
    )
    parser.add_argument("--images-per-shard", type=positive, default=10_000, help="posts in a shard")
    add_columns(parser)
    parser.add_argument("--user-column", default="", help="column that says who posted an image; YFCC100M's is known")
    parser.add_argument("--time-column", default="", help="column of a date, a year, or seconds since 1970")
    parser.add_argument("--place-column", default="", help="column of a country, or two: longitude,latitude")
    parser.add_argument("--max-images-per-user", type=positive, help="posts of one user to take, the first ones")
    parser.add_argument(
        "--check",
        choices=("none", "header", "full"),
        default="header",
        help="what of each image is looked at: nothing, format and size, or every pixel",
    )
    parser.add_argument("--only-labeled", action="store_true", help="leave out posts without a label")
    _add_shrinking(parser)
    add_runner(parser)


def make(args: argparse.Namespace) -> None:
    """Writes posts and their images as a dataset of shards; the same command goes on after an interruption.

    wsl-d2 data make posts/*.parquet --images 'photos/{key}.jpg' --vocabulary vocabulary.json \\
        --output datasets/mine/train
    """
    from wsl_d2.data import make_shards
    from wsl_d2.hashtags import Vocabulary

    show_posts(args.posts, args)
    manifest = make_shards(
        args.posts,
        args.images,
        Vocabulary.load(args.vocabulary),
        args.output,
        images_per_shard=args.images_per_shard,
        workers=runner_of(args, args.output),
        kind=None if args.format == "auto" else args.format,
        check=args.check,
        only_labeled=args.only_labeled,
        key_column=args.key_column,
        hashtags_column=args.hashtags_column,
        caption_column=args.caption_column,
        user_column=args.user_column,
        time_column=args.time_column,
        place_column=args.place_column,
        max_images_per_user=args.max_images_per_user,
        shrinking=_shrinking_of(args),
    )
    _print_dataset(args.output, manifest)
    if any(reason.startswith(("store busy", "access denied")) for reason in manifest["account"]):
        print("  some images may be had later: the same command tries them again")


def _index_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=place, help="or its URL, with *.tar of images and .json of the same keys")
    parser.add_argument(
        "--vocabulary", type=place, required=True, help="vocabulary.json, of `wsl-d2 hashtags vocabulary`"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--hashtags-column", default="hashtags", help="name of the hashtags in the .json")
    which.add_argument("--caption-column", help="name of a text in it whose #words are the hashtags, instead")
    add_runner(parser)


def index(args: argparse.Namespace) -> None:
    """Makes a folder of existing WebDataset tars, such as img2dataset's, a dataset; the tars are not touched.

    wsl-d2 data index datasets/mine/train --vocabulary vocabulary.json
    """
    from wsl_d2.data import index_shards
    from wsl_d2.hashtags import Vocabulary

    vocabulary = Vocabulary.load(args.vocabulary)
    manifest = index_shards(
        args.folder,
        vocabulary,
        workers=runner_of(args, args.folder),
        hashtags_column=args.hashtags_column,
        caption_column=args.caption_column,
    )
    _print_dataset(args.folder, manifest)


def _from_folders_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=local_path, help="folder of class folders, or a tar")
    parser.add_argument(
        "--output", type=place, required=True, help="folder to write, or its URL such as s3://bucket/train"
    )
    parser.add_argument(
        "--classes-of", type=local_path, help="folder of shards with the classes to use, for validation"
    )
    parser.add_argument(
        "--files", type=local_path, help="text file, one name below the source a line; only these are taken"
    )
    parser.add_argument("--images-per-shard", type=positive, default=5_000, help="images in a shard")
    _add_shrinking(parser)
    add_runner(parser)


def from_folders(args: argparse.Namespace) -> None:
    """Writes a dataset of class folders, such as ImageNet, as shards to fine-tune on or to probe; can be repeated.

    wsl-d2 data from-folders imagenet/train --output datasets/imagenet/train
    wsl-d2 data from-folders imagenet/val --output datasets/imagenet/val --classes-of datasets/imagenet/train

    The source may also be a tar of class folders, or of one tar for each class, as ILSVRC2012_img_train.tar.
    """
    from wsl_d2.data import make_class_shards
    from wsl_d2.hashtags import Vocabulary

    manifest = make_class_shards(
        args.source,
        args.output,
        vocabulary=Vocabulary.load(args.classes_of / "vocabulary.json") if args.classes_of else None,
        files=list(filter(None, read_user_text(args.files).split("\n"))) if args.files else None,
        images_per_shard=args.images_per_shard,
        workers=runner_of(args, args.output),
        shrinking=_shrinking_of(args),
    )
    _print_dataset(args.output, manifest)
    print(f"  classes: {manifest['num_labels']:,}")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=place, help="of a finished dataset, or its URL")
    parser.add_argument(
        "--report", type=local_path, required=True, help="JSON lines, one a shard; a repeated call goes on from it"
    )
    parser.add_argument("--no-decode", action="store_true", help="compare checksums alone")
    add_runner(parser)


def verify(args: argparse.Namespace) -> int:
    """Reads every byte of a dataset, compares it with the manifest and decodes every image; exits with 2 on damage.

    wsl-d2 data verify datasets/mine/train --report verification.jsonl
    """
    from wsl_d2.data.write.verify import summarize, verify_dataset

    reports = list(
        verify_dataset(args.folder, args.report, workers=runner_of(args, args.report), decode_images=not args.no_decode)
    )
    summary = summarize(reports)
    print(f"{summary['shards']:,} shards, {summary['images']:,} images looked at")
    for title, counts in (("shards", summary["problems"]), ("images", summary["damaged_images"])):
        for kind, count in counts.items():
            print(f"  {title}, {kind}: {count:,}")
    for report in [report for report in reports if report.problem][:_SHOWN]:
        print(f"{report.name}: {report.problem}{', ' + report.detail if report.detail else ''}")
    if not summary["problems"] and not summary["damaged_images"]:
        print("no damage")
        return 0
    print(f"{args.report} lists all of them")
    return 2


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("annotations", type=local_path, help="JSON in COCO's format")
    parser.add_argument("images", type=local_path, help="folder that file_name in it is relative to")
    parser.add_argument("--config-file", default="", metavar="FILE", help="of the detector that is to be trained on it")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="a config key to override"
    )
    parser.add_argument("--train", type=local_path, help="annotations of the training set, whose images must be others")
    parser.add_argument("--train-images", type=local_path, help="its folder; the same folder if left out")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop reading image files after so long")


def check(args: argparse.Namespace) -> int:
    """Checks a detection dataset in COCO's format: files, sizes, boxes, masks, classes, ids; exits with 2 on errors.

    wsl-d2 data check instances_train.json train/ --config-file COCO-InstanceSegmentation/...
    wsl-d2 data check instances_val.json val/ --train instances_train.json --train-images train/

    Every training of a detector does the same at its start, with 10 seconds for the image files.
    """
    import sys

    from wsl_d2.config import load_config
    from wsl_d2.data.read.detection_check import check_detection, compare_datasets

    keys = [text for pair in args.set for text in pair]
    cfg = load_config(args.config_file, keys) if args.config_file or keys else None
    checked = check_detection(args.annotations, args.images, cfg, seconds=args.seconds)
    if args.train:
        of_train = check_detection(args.train, args.train_images or args.images, seconds=args.seconds)
        compare_datasets(of_train, checked)
    print(f"{args.annotations}, {args.images}")
    for what, count in checked.facts:
        print(f"{count:9,}  {what}")
    for finding in checked.findings:
        print(f"{'error' if finding.is_error else 'warning':>9}  {finding}")
    for line in checked.errors:
        print(f"{args.prog}: {line}", file=sys.stderr)
    if checked.errors:
        return 2
    number = len(checked.warnings)
    print(f"no errors, {number or 'no'} warning{'' if number == 1 else 's'}")
    return 0


def _view_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=local_path, help="folder of a finished dataset")
    parser.add_argument("target", type=local_path, help="folder to make")
    parser.add_argument("--num-images", type=positive, help="labeled images to keep; all if left out")
    parser.add_argument("--max-images-per-user", type=positive, help="labeled images of a user to keep")
    parser.add_argument("--seed", type=int, default=0, help="of the subset; smaller subsets lie within larger ones")
    parser.add_argument("--vocabulary", type=local_path, help="vocabulary.json that labels the images anew")
    parser.add_argument("--hashtags-column", help="column to label them by; the dataset's own if left out")
    parser.add_argument("--held-out", type=float, default=0.0, help="fraction of the images that a split holds out")
    parser.add_argument("--part", choices=("train", "val"), default="train", help="which part of the split is kept")
    parser.add_argument("--label-noise", type=float, default=0.0, help="fraction of the labels to replace by draws")
    parser.add_argument("--noise-seed", type=int, default=0, help="of the noise")
    add_runner(parser)


def view(args: argparse.Namespace) -> None:
    """Makes a view of a dataset: a nested subset, other labels, or label noise. Copies no image and reads no tar.

    wsl-d2 data view datasets/yfcc/17k datasets/yfcc/17k_10M --num-images 10000000
    wsl-d2 data view datasets/yfcc/17k datasets/yfcc/1.5k --vocabulary vocabulary_1.5k.json
    wsl-d2 data view datasets/yfcc/17k datasets/yfcc/val --held-out 0.02 --part val
    """
    from wsl_d2.data import make_view
    from wsl_d2.hashtags import Vocabulary

    manifest = make_view(
        args.source,
        args.target,
        num_images=args.num_images,
        max_images_per_user=args.max_images_per_user,
        seed=args.seed,
        vocabulary=Vocabulary.load(args.vocabulary) if args.vocabulary else None,
        hashtags_column=args.hashtags_column,
        held_out=args.held_out,
        part=args.part,
        label_noise=args.label_noise,
        noise_seed=args.noise_seed,
        workers=runner_of(args, args.target),
    )
    print(
        f"{args.target}: {manifest['num_images']:,} images, {manifest['num_labels']:,} labels "
        f"({sum(count > 0 for count in manifest['hashtag_counts']):,} of them on an image)"
    )


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, help="YAML of a pretraining")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys to override: KEY VALUE ...")


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=local_path, required=True, help="HTML file to write")
    parser.add_argument("--images", type=positive, default=48, help="images of the contact sheet, at most a batch")
    parser.add_argument(
        "--statistics", type=positive, default=1000, help="images decoded for sizes and failures; not of detection"
    )
    _config_arguments(parser)


def show(args: argparse.Namespace) -> None:
    """Shows the training data of a config on one HTML page: images, their labels or objects, sizes, failures.

    wsl-d2 data show --config-file configs/Hashtag-Pretraining/... --output data.html [KEY VALUE ...]

    Of a pretraining it shows a batch as the model sees it, of a detector the annotations as they are stored.
    """
    from detectron2.data import MetadataCatalog

    from wsl_d2.config import load_config
    from wsl_d2.data import register_datasets
    from wsl_d2.files import write_atomically
    from wsl_d2.report.detection_data import detection_data_page
    from wsl_d2.report.training_data import training_data_page

    cfg = load_config(args.config_file, args.opts)
    cfg.DATALOADER.NUM_WORKERS = 0
    register_datasets(cfg)
    if any(MetadataCatalog.get(name).get("evaluator_type") == "hashtag" for name in cfg.DATASETS.TRAIN):
        found = training_data_page(cfg, args.images, args.statistics)
    else:
        found = detection_data_page(cfg, args.images)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, found)
    print(f"wrote {args.output}")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=local_path, help="of a finished dataset that knows who posted its images")
    parser.add_argument("--output", type=local_path, required=True, help="HTML file to write")
    parser.add_argument(
        "--max-images-per-user", type=positive, default=100, help="a limit, to show what it would change"
    )
    parser.add_argument("--mode", choices=("sqrt", "uniform"), default="sqrt", help="of resampling, to show the same")
    parser.add_argument("--threshold", type=float, default=1e-3, help="of resampling, a share of the images")
    parser.add_argument("--pictures", type=int, default=6, help="of each of the most frequent labels; 0 for none")


def report(args: argparse.Namespace) -> None:
    """Shows who made the labels of a dataset: people, years, places, words, and labels that one person makes.

    wsl-d2 data report datasets/yfcc/17k --output report.html

    The page names nothing that fewer than five people stand behind. It takes what `data make` kept of the posts: of
    YFCC100M all, of other tables what --user-column, --time-column and --place-column name.
    """
    from wsl_d2.files import write_atomically
    from wsl_d2.report.origins import origins_page

    found = origins_page(
        args.folder,
        limit=args.max_images_per_user,
        mode=args.mode,
        threshold=args.threshold,
        num_pictures=args.pictures,
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, found)
    print(f"wrote {args.output}")


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=local_path, help="picture to write, .svg, .png or .pdf")
    parser.add_argument("--top", type=positive, default=10, help="labels listed at both ends")
    _config_arguments(parser)


def sampling(args: argparse.Namespace) -> None:
    """Tells what an epoch of a config's training set holds after resampling: its length, and how often a label comes.

    wsl-d2 data sampling --config-file CONFIG [--output sampling.svg] [KEY VALUE ...]
    """
    import numpy as np

    from wsl_d2.config import load_config
    from wsl_d2.data import register_datasets
    from wsl_d2.data.read.loaders import training_dataset
    from wsl_d2.hashtags import Vocabulary
    from wsl_d2.report.sampling import describe_epoch, plot_epoch

    cfg = load_config(args.config_file, args.opts)
    register_datasets(cfg)
    dataset, resampling = training_dataset(cfg), cfg.DATALOADER.RESAMPLING
    epoch = dataset.epoch_distribution(resampling.MODE, resampling.THRESHOLD)
    counts = dataset.sharded_index.hashtag_counts()
    vocabulary = Vocabulary.load(dataset.folder / "vocabulary.json")
    print(f"{cfg.DATASETS.TRAIN[0]}: {resampling.MODE} resampling, threshold {resampling.THRESHOLD:g}")
    print("\n".join(describe_epoch(counts, len(dataset), epoch)))
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    print("synset       images    of images   of draws  hashtag")
    for number, label in enumerate(order.tolist()):
        if number < args.top or number >= len(order) - args.top:
            shares = f"{counts[label] / len(dataset):10.4%} {epoch.draws[label] / epoch.length:10.4%}"
            name = vocabulary.hashtags[label][0]
            print(f"{vocabulary.synsets[label]:10} {counts[label]:8,} {shares}  #{name}")
        elif number == args.top:
            print("...")
    if args.output:
        plot_epoch(counts, epoch, len(dataset)).savefig(args.output)
        print(f"wrote {args.output}")


_RESUMES = "what is finished is kept, and the same command goes on"
VERBS = {
    "make": Verb(make, _make_arguments, _RESUMES),
    "index": Verb(index, _index_arguments, _RESUMES),
    "from-folders": Verb(from_folders, _from_folders_arguments, _RESUMES),
    "verify": Verb(verify, _verify_arguments, _RESUMES),
    "check": Verb(check, _check_arguments),
    "view": Verb(view, _view_arguments, _RESUMES),
    "show": Verb(show, _show_arguments),
    "report": Verb(report, _report_arguments),
    "sampling": Verb(sampling, _sampling_arguments),
}
