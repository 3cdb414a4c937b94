#!/usr/bin/env python3
"""Writes posts and their images as a dataset of shards; an interrupted call can be repeated.

tools/make_shards.py posts/*.parquet --images 'photos/{key}.jpg' --vocabulary vocabulary.json \\
    --output datasets/mine/train
"""

import argparse
import os
import sys

os.environ.setdefault("WSL_D2_REGISTER", "0")

from wsl_d2.data.posts.readers import FORMATS, CorpusError
from wsl_d2.data.shards import ShardError
from wsl_d2.data.write.posts import IMAGE_CHECKS, make_shards
from wsl_d2.hashtags import Vocabulary, VocabularyError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("posts", nargs="+", help="files or URLs of posts: YFCC100M, JSONL, Parquet or WebDataset")
    parser.add_argument("--images", required=True, help="path or URL of a key's image, with {key} in it")
    parser.add_argument("--vocabulary", required=True, help="vocabulary.json")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--images-per-shard", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--format", choices=FORMATS, help="of the posts; by their names if not given")
    parser.add_argument("--check", choices=IMAGE_CHECKS, default="header", help="what of each image is looked at")
    parser.add_argument("--only-labelled", action="store_true", help="leave out posts without a label")
    parser.add_argument("--key-column", default="key")
    parser.add_argument("--hashtags-column", default="hashtags")
    args = parser.parse_args()
    try:
        manifest = make_shards(
            args.posts,
            args.images,
            Vocabulary.load(args.vocabulary),
            args.output,
            images_per_shard=args.images_per_shard,
            workers=args.workers,
            kind=args.format,
            check=args.check,
            only_labelled=args.only_labelled,
            key_column=args.key_column,
            hashtags_column=args.hashtags_column,
        )
    except (ShardError, VocabularyError, CorpusError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.output}: {manifest['num_images']:,} labelled images in {len(manifest['shards']):,} shards")
    for reason, count in manifest["posts"].items():
        print(f"  {reason}: {count:,}")


if __name__ == "__main__":
    main()
