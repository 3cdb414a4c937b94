"""The verb duplicates."""

from __future__ import annotations

import argparse
from pathlib import Path

from wsl_d2.cli.verb import Verb, add_runner, local_path, place, runner_of


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pretraining", type=place, help="folder of shards or its URL, or folder of image files")
    parser.add_argument("--evaluation", type=place, help="folder of shards or its URL, or folder of image files")
    parser.add_argument("--coco", type=local_path, help="annotation file that lists the evaluation images")
    parser.add_argument("--output", type=local_path, help="folder of results")
    parser.add_argument("--config-file", help="of a HashtagClassifier, for deep features")
    parser.add_argument("--weights", help="of its backbone; with a GPU --runner local is one process")
    parser.add_argument("--min-score", type=_score, default=0.85, help="correlation from which a pair is a duplicate")
    parser.add_argument("--judged", type=local_path, help="pairs.csv with judgements")
    parser.add_argument("--correct", type=local_path, help="JSON object of evaluation key -> true or false")
    add_runner(parser)


def _score(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 2.0
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from -1 to 1")
    return value


def duplicates(args: argparse.Namespace) -> None:
    """Finds near-duplicates of evaluation images among pretraining images, also rescaled, cropped, mirrored, recolored.

    wsl-d2 duplicates --pretraining datasets/yfcc/train --evaluation datasets/imagenet/val --output duplicates/
    wsl-d2 duplicates --pretraining datasets/yfcc/train --coco annotations/instances_val2017.json \\
        --evaluation datasets/coco/val2017 --output duplicates/
    wsl-d2 duplicates --judged duplicates/pairs.csv --correct correct.json

    Look at pairs.html and write "no" into the last column of pairs.csv for pairs that are none; the same
    command keeps what you wrote. With --judged and --correct it prints the accuracy that counts every duplicated image
    as wrong, a lower bound. --config-file and --weights add the nearest neighbors of a backbone's features.
    """
    from wsl_d2.errors import UserError

    inputs = (args.pretraining, args.evaluation, args.output)
    if args.judged or args.correct:
        if any((*inputs, args.coco, args.config_file, args.weights)):
            raise UserError("give either --judged and --correct alone, or --pretraining, --evaluation and --output.")
        if not (args.judged and args.correct):
            raise UserError("--judged and --correct belong together.")
        return _lower_bound(args.judged, args.correct)
    if not all(inputs):
        raise UserError("give --pretraining, --evaluation and --output, or --judged and --correct.")
    if bool(args.config_file) != bool(args.weights):
        raise UserError("--config-file and --weights belong together.")
    return _search(args)


def _search(args: argparse.Namespace) -> None:
    from wsl_d2.duplicates.features import backbone_features
    from wsl_d2.duplicates.images import open_images
    from wsl_d2.duplicates.search import JUDGEMENTS, PAIRS, find_duplicates
    from wsl_d2.files import write_atomically
    from wsl_d2.report.duplicates import SHEET, SHOWN, duplicates_page

    sets = {"evaluation": open_images(args.evaluation, args.coco), "pretraining": open_images(args.pretraining)}
    features = backbone_features(args.config_file, args.weights) if args.weights else None
    workers = runner_of(args, args.output)
    if features and isinstance(workers, int):
        import torch

        workers = 1 if torch.cuda.is_available() else workers  # the model is on the GPU once
    found = find_duplicates(
        **sets,
        output=args.output,
        min_score=args.min_score,
        features=features,
        workers=workers,
    )
    rejected = found.judged.count("no")
    judged = f", {rejected:,} judged no" if rejected else ""
    share = f"{found.duplicated:,} of {len(found.progress.keys):,}"
    print(f"{len(found.pairs):,} pairs{judged}; {share} evaluation images have a duplicate")
    if found.kept_aside:
        print(
            f"  judgements of pairs that are not among them, kept in {args.output / JUDGEMENTS}: {found.kept_aside:,}"
        )
    for name, images in sets.items():
        for kind, number in images.skipped.items():
            print(f"  {images.place}: skipped, {kind}: {number:,}")
        if damaged := found.progress.damaged[name]:
            key, reason = next(iter(damaged.items()))
            print(f"  {images.place}: cannot be decoded: {len(damaged):,}, the first {key!r} ({reason})")
    write_atomically(args.output / SHEET, duplicates_page(found, **sets))
    print(f"written: {args.output / PAIRS}, {args.output / SHEET}")
    if len(found.pairs) > SHOWN:
        print(f"  {SHEET} shows the first {SHOWN} of {len(found.pairs):,} pairs")


def _lower_bound(judged: Path, correct: Path) -> None:
    from wsl_d2.duplicates.judgements import duplicated_images, lower_bound_accuracy, read_correct
    from wsl_d2.duplicates.search import evaluation_keys

    results = read_correct(correct, evaluation_keys(judged.parent))
    plain, bound, number = lower_bound_accuracy(results, duplicated_images(judged))
    print(
        f"accuracy {plain:.2f} of {len(results):,} images; at least {bound:.2f} with the {number:,} duplicated images "
        "counted as wrong"
    )


DUPLICATES = Verb(
    duplicates,
    _arguments,
    "judgements and what was compared are kept in --output, and the same command goes on",
    extra="pretrain,analysis",
)
