#!/usr/bin/env python3
"""Compares the AP of detectors that differ in their initialisation; writes a page and a JSON, prints the table.

    tools/compare_ap.py --baseline imagenet --run imagenet=output/a --run wsl=output/b \
        --ground-truth instances_val.json --images val/ --output output/report

Repeat --run with the same name for further training seeds.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from tabulate import tabulate

from wsl_d2.analysis import RunError, compare_runs
from wsl_d2.analysis.records import without_nan
from wsl_d2.report.comparison import describe_gain, format_cell, write_report


def named(text: str) -> tuple[str, Path]:
    """Parses NAME=FOLDER."""
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=named, action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument(
        "--baseline", action="append", required=True, help="a NAME that gains of the others are counted from"
    )
    parser.add_argument("--ground-truth", type=Path, required=True, help="COCO annotations of the evaluated images")
    parser.add_argument("--images", type=Path, help="folder of the evaluated images, for the pictures")
    parser.add_argument("--curve", type=named, action="append", default=[], help="NAME=FOLDER of a pretraining run")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--title", default="AP gain of pretraining")
    parser.add_argument("--num-resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--force", action="store_true", help="compare runs of different schedules or data, too")
    args = parser.parse_args()

    folders: dict[str, list[Path]] = {}
    for name, folder in args.run:
        folders.setdefault(name, []).append(folder)
    try:
        comparison = compare_runs(
            folders, args.ground_truth, args.baseline, args.num_resamples, args.seed, force=args.force
        )
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "ap_gain.json").write_text(json.dumps(without_nan(comparison), indent=1, allow_nan=False))
        write_report(
            comparison,
            args.output / "report.html",
            title=args.title,
            image_folder=args.images,
            curves=dict(args.curve),
            command=shlex.join(["tools/compare_ap.py", *sys.argv[1:]]),
        )
    except RunError as error:
        sys.exit(f"error: {error}")

    columns = [(t, m) for t in ("bbox", "segm") for m in ("AP", "AP50", "AP75")]
    rows = [[name, *(format_cell(run[t][m]) for t, m in columns)] for name, run in comparison["runs"].items()]
    names = {"bbox": "box", "segm": "mask"}
    print(tabulate(rows, ["initialisation", *(f"{names[t]} {m}" for t, m in columns)], disable_numparse=True))
    print()
    for row in comparison["gains"]:
        for iou_type in names:
            print(describe_gain(row, iou_type))
    print(f"\n{args.output / 'report.html'}")


if __name__ == "__main__":
    main()
