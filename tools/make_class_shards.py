#!/usr/bin/env python3
"""Writes a dataset of class folders, such as ImageNet, as shards to fine-tune on or to probe; can be repeated.

tools/make_class_shards.py imagenet/train --output datasets/imagenet/train
tools/make_class_shards.py imagenet/val --output datasets/imagenet/val --classes-of datasets/imagenet/train

The source may also be a tar of class folders, or of one tar for each class, as ILSVRC2012_img_train.tar. --files takes
a list of names below the source, for datasets that split one folder, such as CUB-200-2011.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("WSL_D2_REGISTER", "0")

from wsl_d2.data.shards import ShardError
from wsl_d2.data.write.class_folders import make_class_shards
from wsl_d2.hashtags import Vocabulary, VocabularyError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of class folders, or a tar")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--classes-of", type=Path, help="folder of shards with the classes to use, for validation")
    parser.add_argument("--files", type=Path, help="text file, one name below the source a line")
    parser.add_argument("--images-per-shard", type=int, default=5_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    try:
        manifest = make_class_shards(
            args.source,
            args.output,
            vocabulary=Vocabulary.load(args.classes_of / "vocabulary.json") if args.classes_of else None,
            files=args.files.read_text(encoding="utf-8").split("\n")[:-1] if args.files else None,
            images_per_shard=args.images_per_shard,
            workers=args.workers,
        )
    except (ShardError, VocabularyError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{args.output}: {manifest['num_images']:,} images of {manifest['num_labels']:,} classes in "
        f"{len(manifest['shards']):,} shards; {manifest['rejected']:,} rejected"
        + (f", listed in {args.output / 'rejected.jsonl'}" if manifest["rejected"] else "")
    )


if __name__ == "__main__":
    main()
