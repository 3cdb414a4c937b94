"""The verb predict."""

from __future__ import annotations

import argparse

from wsl_d2.cli.verb import Verb, local_path, read_user_text


def fraction(text: str) -> float:
    """Parses a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return value


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=local_path, help="folder of a finished detection run")
    parser.add_argument("images", nargs="+", type=local_path, help="image files, and folders of them")
    parser.add_argument("--output", type=local_path, required=True, help="folder for drawn images and predictions.json")
    parser.add_argument("--threshold", type=fraction, default=0.5, help="lowest score of an object that is shown")
    parser.add_argument(
        "--classes", type=local_path, help="text file with a class name a line; the dataset's if left out"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="that of the run if left out")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="a config key to override"
    )


def predict(args: argparse.Namespace) -> None:
    """Draws what a trained detector finds in images, and writes it as JSON.

    wsl-d2 predict output/my_detector photos/ --output output/found --threshold 0.6
    """
    from wsl_d2.evaluation import predict as room

    paths = room.images_of(args.images)
    predictor = room.open_run(args.run, args.device, [text for pair in args.set for text in pair])
    names = read_user_text(args.classes).split("\n") if args.classes else []
    names = room.class_names(predictor, [name.strip() for name in names if name.strip()])
    found = 0
    for number, (path, objects) in enumerate(room.predict(predictor, paths, names, args.output, args.threshold), 1):
        found += objects
        print(f"[{number}/{len(paths)}] {path}: {objects} objects", flush=True)
    if not found:
        print(f"no object has a score of {args.threshold:g}; a lower --threshold shows those that the detector doubts")
    print(f"{found:,} objects in {len(paths):,} images: {args.output / 'predictions.json'}, and drawn beside it")


PREDICT = Verb(predict, _arguments)
