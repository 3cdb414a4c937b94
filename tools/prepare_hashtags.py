#!/usr/bin/env python3
"""Maps the hashtags of posts to labels, or counts them, for any number of posts.

tools/prepare_hashtags.py posts/*.parquet --count-only --output counts/
tools/build_vocabulary.py --vocabulary 8.5k --counts counts/hashtag_counts.tsv --output vocabulary.json
tools/prepare_hashtags.py posts/*.parquet --vocabulary vocabulary.json --output labels/

Reads YFCC100M's metadata, JSONL, Parquet and WebDataset tars, local or by URL (s3://, gs://, https://). Every row of
the input is accounted for: labelled, without a label, no image, or in quarantine/ with the reason. After an
interruption the same command goes on. On a Ray cluster, `--runner ray` runs the same work there (RAY_ADDRESS).
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("WSL_D2_REGISTER", "0")  # no torch here

from wsl_d2.data.posts.count import CorpusOptions, prepare_hashtags
from wsl_d2.data.posts.readers import FORMATS
from wsl_d2.hashtags import AMBIGUOUS_POLICIES


def share(part: int, whole: int) -> str:
    """A number and its percentage."""
    return f"{part:,}" + (f" ({100 * part / whole:.1f}%)" if whole else "")


def main(arguments: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("inputs", nargs="+", help="files, folders, glob patterns or URLs")
    parser.add_argument("--output", type=Path, required=True, help="folder of results")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--vocabulary", help="vocabulary.json to map to")
    what.add_argument("--count-only", action="store_true", help="count hashtags, map nothing")
    parser.add_argument("--format", choices=["auto", *FORMATS], default="auto", help="auto: by each file's name")
    parser.add_argument("--key-column", default="key", help="of JSONL and Parquet")
    parser.add_argument("--hashtags-column", default="hashtags", help="of JSONL, Parquet and tars' JSON members")
    parser.add_argument("--max-distance", type=int, default=0, help="hypernym steps allowed up to a label")
    parser.add_argument("--ambiguous", choices=AMBIGUOUS_POLICIES, default="most_frequent")
    parser.add_argument("--runner", choices=["native", "ray"], default="native", help="Daft's runner")
    parser.add_argument("--workers", type=int, help="processes of the native runner (default: all cores)")
    args = parser.parse_args(arguments)
    options = CorpusOptions(
        args.vocabulary, args.max_distance, args.ambiguous, args.format, args.key_column, args.hashtags_column
    )
    try:
        manifest = prepare_hashtags(args.inputs, args.output, options, runner=args.runner, workers=args.workers)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here.")
    rows = manifest["rows_in"]
    print(f"posts: {rows:,}")
    if args.vocabulary:
        print(f"  labelled {share(manifest['labelled'], rows)}, without a label {share(manifest['unlabelled'], rows)}")
    for name in ("skipped", "quarantined"):
        for reason, count in manifest[name].items():
            print(f"  {name}, {reason}: {share(count, rows)}")
    mapped = f", mapped {share(manifest['pairs_mapped'], manifest['pairs_in'])}" if args.vocabulary else ""
    print(f"hashtags: {manifest['pairs_in']:,}{mapped}")
    for reason, count in sorted(manifest["pairs_dropped"].items(), key=lambda item: -item[1]):
        print(f"  dropped, {reason}: {share(count, manifest['pairs_in'])}")
    print(
        f"written: {args.output}/manifest.json, hashtag_counts.tsv"
        + (", label_counts.tsv, labels/" if args.vocabulary else "")
    )


if __name__ == "__main__":
    main()
