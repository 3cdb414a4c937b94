#!/usr/bin/env python3
"""Builds a vocabulary, the classes of hashtag pretraining, from WordNet 3.0 (and hashtag counts).

tools/build_vocabulary.py --vocabulary 1.5k --output vocabulary.json
tools/build_vocabulary.py --vocabulary 8.5k --counts hashtag_counts.json --output vocabulary.json
tools/build_vocabulary.py --vocabulary birds --synsets birds.txt --output vocabulary.json
tools/build_vocabulary.py --vocabulary 17k --counts counts.tsv --output vocabulary.json --report report/
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("WSL_D2_REGISTER", "0")  # no torch here

from wsl_d2.hashtags import Vocabulary, load_wordnet, read_hashtag_counts
from wsl_d2.hashtags.mapping import AMBIGUOUS_POLICIES, HashtagMapping
from wsl_d2.hashtags.report import describe_vocabulary, format_description, write_description


def read_synsets(path: Path) -> list[str]:
    """The first word of every line that is not empty and no comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]


def main(arguments: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--vocabulary", required=True, help="1.5k, 8.5k, 17k, coco, or any name with --synsets")
    parser.add_argument(
        "--counts",
        type=Path,
        help="hashtag -> number of images: a JSON object, or lines of `hashtag<TAB>number`; 8.5k needs it",
    )
    parser.add_argument(
        "--synsets", type=Path, help="file of WordNet ids such as n02084071, one a line; words after it are ignored"
    )
    parser.add_argument("--wordnet", type=Path, help="folder of WordNet 3.0 (default: found by itself)")
    parser.add_argument("--output", type=Path, required=True, help="file to write: vocabulary.json")
    parser.add_argument("--report", type=Path, help="folder for a report: text, JSON and, with --counts, a picture")
    parser.add_argument("--max-distance", type=int, default=0, help="of the report: hypernym steps up to a label")
    parser.add_argument("--ambiguous", choices=AMBIGUOUS_POLICIES, default="most_frequent", help="of the report")
    args = parser.parse_args(arguments)
    try:
        counts = read_hashtag_counts(args.counts) if args.counts else None
        vocabulary = Vocabulary.build(
            args.vocabulary,
            load_wordnet(args.wordnet),
            counts=counts,
            synsets=read_synsets(args.synsets) if args.synsets else None,
        )
        vocabulary.save(args.output)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    num_hashtags = sum(map(len, vocabulary.hashtags))
    print(
        f"{args.output}: vocabulary {vocabulary.name}, {len(vocabulary)} labels, {num_hashtags} hashtags, "
        f"checksum {vocabulary.checksum}"
    )
    for wnid, hashtag in vocabulary.built_with.get("disambiguated", {}).items():
        print(f"{wnid} has no hashtag of its own, as more frequent senses have them; it gets #{hashtag}")
    if args.report:
        mapping = HashtagMapping(vocabulary, args.max_distance, args.ambiguous)
        facts = describe_vocabulary(vocabulary, counts, mapping)
        write_description(facts, args.report)
        print(format_description(facts))


if __name__ == "__main__":
    main()
