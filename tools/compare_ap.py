#!/usr/bin/env python3
"""Compares the AP of detectors that differ in their initialisation; writes a page and a JSON, prints the table.

    tools/compare_ap.py --baseline imagenet --run imagenet=output/a --run wsl=output/b \
        --ground-truth instances_val.json --images val/ --output output/report

Repeat --run with the same name for further training seeds: with at least 2 on each side, the answer is about training
again, and not about these detectors alone. Compared are boxes, masks and keypoints, as all runs and the ground truth
have them.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

os.environ.setdefault("WSL_D2_REGISTER", "0")  # starts without torch

from tabulate import tabulate

from wsl_d2.analysis import compare_runs
from wsl_d2.analysis.records import without_nan
from wsl_d2.errors import UserError
from wsl_d2.report.comparison import describe_gain, describe_settling, format_cell, write_report
from wsl_d2.report.plots import IOU_NAMES


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
    parser.add_argument(
        "--seed-sd",
        type=float,
        help="standard deviation of AP between trainings to assume where a NAME has one run (about 0.3 on COCO)",
    )
    parser.add_argument("--force", action="store_true", help="compare runs of different schedules or data, too")
    args = parser.parse_args()

    folders: dict[str, list[Path]] = {}
    for name, folder in args.run:
        folders.setdefault(name, []).append(folder)
    try:
        comparison = compare_runs(
            folders,
            args.ground_truth,
            args.baseline,
            args.num_resamples,
            args.seed,
            force=args.force,
            seed_sd=args.seed_sd,
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
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

    columns = [(t, m) for t in comparison["iou_types"] for m in ("AP", "AP50", "AP75")]
    rows = [[name, *(format_cell(run[t][m], m) for t, m in columns)] for name, run in comparison["runs"].items()]
    headers = ["initialisation", *(f"{IOU_NAMES[t]} {m}" for t, m in columns)]
    print(tabulate(rows, headers, disable_numparse=True))
    print()
    for iou_type, reason in comparison["left_out"].items():
        print(f"{IOU_NAMES[iou_type]} AP is not compared: {reason}")
    for row in comparison["gains"]:
        for iou_type in comparison["iou_types"]:
            known = row[iou_type]["AP"]["method_interval"]
            print(describe_gain(row, iou_type) + (f": {row[iou_type]['verdict']}" if known else ""))
        main_type = comparison["iou_types"][0]
        print(f"  more certain ({IOU_NAMES[main_type]} AP): {describe_settling(row, main_type)}")
    for key, values in comparison["initialisation"].items():
        print(f"{key} differs: " + "; ".join(f"{n}: {', '.join(map(str, v))}" for n, v in values.items()))
    for line in comparison["differences"]:
        print(f"compared by force, although {line}")
    print(f"\n{args.output / 'report.html'}")


if __name__ == "__main__":
    main()
