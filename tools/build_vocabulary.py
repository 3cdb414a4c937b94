#!/usr/bin/env python3
"""Builds a vocabulary, the classes of hashtag pretraining, from WordNet 3.0 (and hashtag counts).

tools/build_vocabulary.py --vocabulary 1.5k --output vocabulary.json
tools/build_vocabulary.py --vocabulary 8.5k --counts hashtag_counts.json --output vocabulary.json
tools/build_vocabulary.py --vocabulary birds --synsets birds.txt --output vocabulary.json
"""

import argparse
import sys
from pathlib import Path

from wsl_d2.hashtags import Vocabulary, load_wordnet, read_hashtag_counts


def main(arguments: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--vocabulary", required=True, help="1.5k, 8.5k, 17k, or any name with --synsets")
    parser.add_argument(
        "--counts",
        type=Path,
        help="hashtag -> number of images: a JSON object, or lines of `hashtag<TAB>number`; 8.5k needs it",
    )
    parser.add_argument("--synsets", type=Path, help="file of WordNet ids such as n02084071")
    parser.add_argument("--wordnet", type=Path, help="folder of WordNet 3.0 (default: found by itself)")
    parser.add_argument("--output", type=Path, required=True, help="file to write: vocabulary.json")
    args = parser.parse_args(arguments)
    try:
        vocabulary = Vocabulary.build(
            args.vocabulary,
            load_wordnet(args.wordnet),
            counts=read_hashtag_counts(args.counts) if args.counts else None,
            synsets=args.synsets.read_text(encoding="utf-8").split() if args.synsets else None,
        )
        vocabulary.save(args.output)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    num_hashtags = sum(map(len, vocabulary.hashtags))
    print(
        f"{args.output}: vocabulary {vocabulary.name}, {len(vocabulary)} labels, {num_hashtags} hashtags, "
        f"checksum {vocabulary.checksum}"
    )
    dropped = vocabulary.built_with.get("dropped_synsets")
    if dropped:
        print(f"dropped, as more frequent senses took all their hashtags: {', '.join(dropped)}")


if __name__ == "__main__":
    main()
