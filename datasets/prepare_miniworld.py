#!/usr/bin/env python3
"""Prepares the mini-world, a small world for the whole pipeline (see datasets/README.md).

python datasets/prepare_miniworld.py   # into $DETECTRON2_DATASETS/miniworld, by default datasets/miniworld
python datasets/prepare_miniworld.py --tiny --output /tmp/world
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from miniworld_renderer.prepare import TINY, LabelError, OptionsError, WorldOptions, prepare_miniworld, world_summary
from miniworld_renderer.sprites import ART_STYLES, SpriteError


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; number options not given are None."""
    default = WorldOptions()
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    parser = argparse.ArgumentParser(
        description="Prepares the mini-world, or what is missing of it.\n\n"
        "    datasets/prepare_miniworld.py --tiny --output datasets/miniworld_tiny",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=root / "miniworld", help="folder to fill [%(default)s]")
    parser.add_argument("--tiny", action="store_true", help="a few dozen images, for tests; other options still hold")
    parser.add_argument("--num-workers", type=int, default=_num_cores(), help="rendering processes [%(default)s]")
    parser.add_argument(
        "--held-out-styles",
        default="",
        metavar="STYLE,...",
        help="art styles that only the detection set shows, and the only ones it shows [none]; of "
        + ", ".join(ART_STYLES),
    )
    parser.add_argument(
        "--dominance",
        type=float,
        metavar="SHARE",
        help="share of the hashtag photos for training that 1%% of 1,000 posters post, each showing two concepts alone "
        "[photos have no poster]",
    )
    parser.add_argument(
        "--frequency-exponent",
        type=float,
        metavar="A",
        help="a concept's share of the objects in hashtag photos is proportional to 1 / (rank + 10)^A; 4 makes the "
        f"first 1,000 times as frequent as the last [{default.frequency_exponent}]",
    )
    for name, text in (
        ("seed", "seed of everything random"),
        ("num-hashtag-images", "hashtag photos for training"),
        ("num-hashtag-val-images", "hashtag photos for validation"),
        ("num-clean-images", "clean images for training, the 24 classes in turn"),
        ("num-clean-val-images", "clean images for validation"),
        ("num-train", "detection images for training"),
        ("num-val", "detection images for validation"),
        ("image-size", "side of hashtag and clean images in pixels"),
        ("detection-size", "side of detection images in pixels"),
        ("shard-size", "images per shard"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"{text} [{getattr(default, name.replace('-', '_'))}]")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    # Imported here because rendering processes import this file and need none of wsl_d2.
    from wsl_d2.hashtags import WordNetError

    args = parse_arguments(arguments)
    given = {
        name: value
        for name, value in vars(args).items()
        if name in WorldOptions.__dataclass_fields__ and name != "held_out_styles" and value is not None
    }
    styles = tuple(style.strip() for style in args.held_out_styles.split(",") if style.strip())
    started = time.monotonic()
    try:
        options = WorldOptions(**{**(TINY if args.tiny else {}), **given}, held_out_styles=styles)
        prepare_miniworld(args.output, options, args.num_workers)
    except (OptionsError, SpriteError, LabelError, WordNetError) as error:
        print(f"prepare_miniworld: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nprepare_miniworld: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    print(world_summary(args.output))
    seconds = time.monotonic() - started
    print(f"mini-world ready in {args.output} after {seconds:.0f} s; look at its contact_sheet.png")
    root, read = args.output.resolve().parent, Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    if args.output.name == "miniworld" and read.expanduser().resolve() != root:
        print(f"for training, first: export DETECTRON2_DATASETS={root}")
    return 0


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
