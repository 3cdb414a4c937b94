#!/usr/bin/env python
"""Converts backbone weights between Detectron2, torchvision and timm; reads Caffe2's (Detectron2's model zoo), too.

    tools/convert_weights.py wsl://resnext101_32x8d resnext101_32x8d.safetensors --to d2 --verify
    tools/convert_weights.py output/X_101_32x8d_17k/backbone.pth mine --to timm --verify   # a folder for timm
    tools/convert_weights.py detector/model_final.pth mine.pth --prefix modelTeacher       # the backbone inside

--verify builds both networks, each by its scheme's own library, runs them on the same random images and prints the
largest difference per stage; above --tolerance nothing is written. Exit status: 0, or 2 with one line that says why.
"""

import argparse
import json
import sys

from wsl_d2.checkpoint import TARGET_FORMATS, convert_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a weight file, or a wsl://, torchvision://, timm:// or detectron2:// path")
    parser.add_argument("target", help="a file that ends in .pth, .pkl or .safetensors; for timm also a folder")
    parser.add_argument("--to", choices=TARGET_FORMATS, default="d2", help="naming scheme to write (d2)")
    parser.add_argument("--prefix", help="of the names of the backbone to take, where the source has several")
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
    if args.image_size < 32:
        parser.error(f"--image-size must be at least 32, got {args.image_size}")
    statistics = dict(zip(("input_format", "pixel_mean", "pixel_std"), given, strict=True)) if all(given) else None
    try:
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
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.target}: {json.dumps(record, indent=1)}")
    if comparison is not None:
        first, second = comparison.libraries
        print(f"{first}'s network and {second}'s, largest difference relative to the largest feature of the stage:")
        for stage, difference in comparison.differences.items():
            print(f"  {stage:8} {difference:.1e}")


if __name__ == "__main__":
    main()
