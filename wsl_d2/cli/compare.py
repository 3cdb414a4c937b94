"""The verb compare."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from wsl_d2.cli.verb import Verb, local_path, positive


def named(text: str) -> tuple[str, Path]:
    """Parses NAME=FOLDER."""
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, Path(folder)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", type=named, action="append", required=True, metavar="NAME=FOLDER", help="a finished run; repeat it"
    )
    parser.add_argument(
        "--baseline",
        action="append",
        required=True,
        metavar="NAME",
        help="the gains of the others are counted from it; may be repeated",
    )
    parser.add_argument(
        "--ground-truth", type=local_path, required=True, help="COCO annotations of the evaluated images"
    )
    parser.add_argument("--images", type=local_path, help="folder of the evaluated images, for the pictures")
    parser.add_argument(
        "--curve", type=named, action="append", default=[], metavar="NAME=FOLDER", help="of a pretraining, to draw"
    )
    parser.add_argument("--output", type=local_path, required=True, help="folder for report.html and ap_gain.json")
    parser.add_argument("--title", default="AP gain of pretraining", help="of the page")
    parser.add_argument("--num-resamples", type=positive, default=1000, help="resampled sets of images")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument(
        "--seed-sd",
        type=float,
        help="standard deviation of AP between trainings to assume where a NAME has one run (about 0.3 on COCO)",
    )
    parser.add_argument("--force", action="store_true", help="compare runs of different schedules or data, too")


def compare(args: argparse.Namespace) -> None:
    """Compares the AP of detectors that differ in their initialization; writes a page and a JSON.

    wsl-d2 compare --baseline imagenet --run imagenet=output/a --run wsl=output/b \\
        --ground-truth instances_val.json --images val/ --output output/report

    Repeat --run with the same name for further training seeds: with at least 2 on each side, the answer is about
    training again, and not about these detectors alone. Compared are boxes, masks and keypoints, as all runs and the
    ground truth have them.
    """
    from wsl_d2.report.gains import write_gains

    folders: dict[str, list[Path]] = {}
    for name, folder in args.run:
        folders.setdefault(name, []).append(folder)
    text = write_gains(
        folders,
        args.ground_truth,
        args.baseline,
        args.output,
        title=args.title,
        command=shlex.join(["wsl-d2", *args.command_line]),
        images=args.images,
        curves=dict(args.curve),
        num_resamples=args.num_resamples,
        seed=args.seed,
        seed_sd=args.seed_sd,
        force=args.force,
    )
    print(f"{text}\n\n{args.output / 'report.html'}")


COMPARE = Verb(compare, _arguments, extra="analysis")
