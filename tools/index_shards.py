#!/usr/bin/env python3
"""Makes a folder of existing WebDataset tars, such as img2dataset's, a dataset; the tars are not touched.

tools/index_shards.py datasets/mine/train --vocabulary vocabulary.json
"""

import argparse
import os
import sys

os.environ.setdefault("WSL_D2_REGISTER", "0")

from wsl_d2.data.shards import ShardError
from wsl_d2.data.write.posts import index_shards
from wsl_d2.hashtags import Vocabulary, VocabularyError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with *.tar of images and .json of the same keys")
    parser.add_argument("--vocabulary", required=True, help="vocabulary.json")
    parser.add_argument("--hashtags-column", default="hashtags", help="name of the hashtags' list in the .json")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    try:
        manifest = index_shards(
            args.folder,
            Vocabulary.load(args.vocabulary),
            workers=args.workers,
            hashtags_column=args.hashtags_column,
        )
    except (ShardError, VocabularyError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{args.folder}: {manifest['num_images']:,} labelled images in {len(manifest['shards']):,} shards, "
        f"{manifest['num_unlabelled']:,} images without a label"
    )


if __name__ == "__main__":
    main()
