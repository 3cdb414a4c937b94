#!/usr/bin/env python
"""Converts backbone weights between Detectron2, torchvision, timm and Caffe2 (Detectron2's model zoo).

    tools/convert_weights.py wsl://resnext101_32x8d resnext101_32x8d.safetensors --to d2 --verify
    tools/convert_weights.py output/X_101_32x8d_17k/backbone.pth mine.pth --to timm --verify

--verify then builds both networks, each by its scheme's own library, runs them on the same random images and prints the
largest difference per stage; it fails above --tolerance.
"""

import argparse
import json
import sys

from wsl_d2.checkpoint import FORMATS, IncompleteLoadError, compare_files, convert_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a weight file, or a wsl://, torchvision://, timm:// or detectron2:// path")
    parser.add_argument("target", help="a file that ends in .pth, .pkl or .safetensors")
    parser.add_argument("--to", choices=FORMATS, default="d2", help="naming scheme to write (d2)")
    parser.add_argument("--keep-head", action="store_true", help="also write the classification head")
    parser.add_argument("--input-format", choices=("RGB", "BGR"), help="channel order the written weights shall take")
    parser.add_argument("--source-input-format", choices=("RGB", "BGR"), help="of a source that does not say it")
    parser.add_argument("--source-pixel-mean", type=float, nargs=3, help="likewise, in that order, 0 to 255")
    parser.add_argument("--source-pixel-std", type=float, nargs=3, help="likewise")
    parser.add_argument("--verify", action="store_true", help="compare both networks on random images")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference allowed (1e-5)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of --verify's images (224)")
    args = parser.parse_args()
    given = (args.source_input_format, args.source_pixel_mean, args.source_pixel_std)
    if any(given) and not all(given):
        parser.error("--source-input-format, --source-pixel-mean and --source-pixel-std go together")
    statistics = dict(zip(("input_format", "pixel_mean", "pixel_std"), given, strict=True)) if all(given) else None
    try:
        record = convert_file(
            args.source,
            args.target,
            args.to,
            keep_head=args.keep_head,
            input_format=args.input_format,
            statistics=statistics,
        )
        print(f"{args.target}: {json.dumps(record, indent=1)}")
        if not args.verify:
            return
        formats = (None, "timm" if args.to == "timm" else None)
        differences = compare_files(args.source, args.target, formats=formats, size=args.image_size)
    except (IncompleteLoadError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("largest difference, relative to the largest feature of the stage:")
    for stage, difference in differences.items():
        print(f"  {stage:8} {difference:.1e}")
    if not max(differences.values()) <= args.tolerance:
        sys.exit(f"error: more than --tolerance {args.tolerance:g}; the two networks are not the same")


if __name__ == "__main__":
    main()
