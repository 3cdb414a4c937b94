#!/usr/bin/env python3
"""Reads every byte of a dataset, compares it with the manifest and decodes every image.

The exit code is 2 if anything is wrong.

tools/verify_shards.py datasets/mine/train --report verification.jsonl
"""

import argparse
import os
import sys

os.environ.setdefault("WSL_D2_REGISTER", "0")

from wsl_d2.data.shards import ShardError
from wsl_d2.data.write.verify import summarise, verify_dataset
from wsl_d2.hashtags import VocabularyError

_SHOWN = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--report", required=True, help="JSON lines, one a shard; a repeated call goes on from it")
    parser.add_argument("--no-decode", action="store_true", help="compare checksums alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    try:
        reports = list(verify_dataset(args.folder, args.report, workers=args.workers, decode_images=not args.no_decode))
    except (ShardError, VocabularyError) as error:
        sys.exit(f"error: {error}")
    summary = summarise(reports)
    print(f"{summary['shards']:,} shards, {summary['images']:,} images looked at")
    for title, counts in (("shards", summary["problems"]), ("images", summary["damaged_images"])):
        for kind, count in counts.items():
            print(f"  {title}, {kind}: {count:,}")
    for report in [report for report in reports if report.problem][:_SHOWN]:
        print(f"{report.name}: {report.problem}{', ' + report.detail if report.detail else ''}")
    if summary["problems"] or summary["damaged_images"]:
        print(f"{args.report} lists all of them")
        sys.exit(2)


if __name__ == "__main__":
    main()
