#!/usr/bin/env python3
"""Makes a view of a dataset of shards: a nested subset, or the same images under another vocabulary. Copies no image.

tools/make_view.py datasets/yfcc/17k datasets/yfcc/17k_10M --num-images 10000000
tools/make_view.py datasets/yfcc/17k datasets/yfcc/1.5k --vocabulary vocabulary_1.5k.json
"""

import argparse
import sys
from pathlib import Path

from wsl_d2.data import ShardError, make_view
from wsl_d2.hashtags import Vocabulary, VocabularyError


def main(arguments: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("source", type=Path, help="folder of a finished dataset")
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument("--num-images", type=int, help="labelled images to keep; all if left out")
    parser.add_argument("--seed", type=int, default=0, help="of the subset; smaller subsets lie within larger ones")
    parser.add_argument("--vocabulary", type=Path, help="vocabulary.json that labels the images anew")
    args = parser.parse_args(arguments)
    try:
        vocabulary = Vocabulary.load(args.vocabulary) if args.vocabulary else None
        manifest = make_view(
            args.source, args.target, num_images=args.num_images, seed=args.seed, vocabulary=vocabulary
        )
    except (ShardError, VocabularyError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{args.target}: {manifest['num_images']:,} images, {manifest['num_labels']:,} labels "
        f"({sum(count > 0 for count in manifest['hashtag_counts']):,} of them on an image)"
    )


if __name__ == "__main__":
    main()
