"""The verbs of weights."""

from __future__ import annotations

import argparse
import json
import os

from wsl_d2.cli.verb import Verb, positive
from wsl_d2.errors import UserError

FORMATS = ("d2", "torchvision", "timm")


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def list_weights(args: argparse.Namespace) -> None:
    """Public weights by the names that MODEL.WEIGHTS takes, and the backbones that they fill.

    wsl-d2 weights list

    A file is downloaded, checked and kept in $WSL_D2_CACHE/weights (~/.cache/wsl_d2/weights) at its first use.
    """
    from tabulate import tabulate

    from wsl_d2.checkpoint.catalog import public_weights

    rows = public_weights()
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    table = [
        [
            row["name"],
            row["backbone"] or "MODEL.RESNETS",
            row["license"] or "see its page",
            "yes" if row["is_cached"] else "",
        ]
        for row in rows
    ]
    print(tabulate(table, ["MODEL.WEIGHTS", "backbone", "license", "on this machine"]))


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a weight file, or a wsl://, torchvision://, timm:// or detectron2:// path")
    parser.add_argument("target", help="a file that ends in .pth, .pkl or .safetensors; for timm also a folder")
    parser.add_argument("--to", choices=FORMATS, default="d2", help="naming scheme to write")
    parser.add_argument("--prefix", help="of the names of the backbone to take, where the source has several")
    parser.add_argument("--keep-head", action="store_true", help="also write the classification head")
    parser.add_argument("--input-format", choices=("RGB", "BGR"), help="channel order the written weights shall take")
    parser.add_argument("--source-input-format", choices=("RGB", "BGR"), help="of a source that does not say it")
    parser.add_argument("--source-pixel-mean", type=float, nargs=3, help="likewise, in that order, 0 to 255")
    parser.add_argument("--source-pixel-std", type=float, nargs=3, help="likewise")
    parser.add_argument("--verify", action="store_true", help="compare both networks on random images")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference allowed")
    parser.add_argument("--image-size", type=positive, default=224, help="of --verify's images, pixels")


def convert(args: argparse.Namespace) -> None:
    """Converts backbone weights between Detectron2, torchvision and timm; reads Caffe2's, too.

    wsl-d2 weights convert wsl://resnext101_32x8d resnext101_32x8d.safetensors --verify
    wsl-d2 weights convert output/X_101_32x8d_17k/backbone.pth mine --to timm --verify   # a folder for timm
    wsl-d2 weights convert detector/model_final.pth mine.pth --prefix modelTeacher       # the backbone inside

    --verify builds both networks, each by its scheme's own library, runs them on the same random images and prints the
    largest difference per stage; above --tolerance, or if they give the same for all images, as weights of zeros do,
    nothing is written.
    """
    from wsl_d2.checkpoint import convert_file

    given = (args.source_input_format, args.source_pixel_mean, args.source_pixel_std)
    if any(given) and not all(given):
        raise UserError("--source-input-format, --source-pixel-mean and --source-pixel-std go together.")
    if args.image_size < 32:
        raise UserError(f"--image-size must be at least 32, got {args.image_size}.")
    statistics = dict(zip(("input_format", "pixel_mean", "pixel_std"), given, strict=True)) if all(given) else None
    record, comparison = convert_file(
        args.source,
        args.target,
        args.to,
        prefix=args.prefix,
        keep_head=args.keep_head,
        input_format=args.input_format,
        statistics=statistics,
        tolerance=args.tolerance if args.verify else None,
        image_size=args.image_size,
    )
    print(f"{os.fspath(args.target)}: {json.dumps(record, indent=1)}")
    if comparison is not None:
        first, second = comparison.libraries
        print(f"{first}'s network and {second}'s, largest difference relative to the largest feature of the stage:")
        for stage, difference in comparison.differences.items():
            print(f"  {stage:8} {difference:.1e}")


VERBS = {
    "list": Verb(list_weights, _list_arguments, extra="weights"),
    "convert": Verb(convert, _convert_arguments, extra="weights"),
}
