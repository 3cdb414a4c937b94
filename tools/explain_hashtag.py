#!/usr/bin/env python3
"""Shows what becomes of hashtags: each step from the spelling to the label, or the reason for dropping it.

tools/explain_hashtag.py "#brownbear" "#doooogs" --vocabulary 17k
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("WSL_D2_REGISTER", "0")  # no torch here

from wsl_d2.hashtags import (
    AMBIGUOUS_POLICIES,
    HashtagMapping,
    Vocabulary,
    load_wordnet,
    wnid_to_synset,
)


def main(arguments: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("hashtags", nargs="+", help="with or without '#'; mind the shell's quotes")
    parser.add_argument("--vocabulary", default="17k", help="1.5k, 17k, coco, or a vocabulary.json")
    parser.add_argument("--max-distance", type=int, default=0, help="hypernym steps allowed up to a label")
    parser.add_argument("--ambiguous", choices=AMBIGUOUS_POLICIES, default="most_frequent")
    args = parser.parse_args(arguments)
    try:
        wordnet = load_wordnet()
        is_file = Path(args.vocabulary).suffix == ".json"
        vocabulary = Vocabulary.load(args.vocabulary) if is_file else Vocabulary.build(args.vocabulary, wordnet)
        mapping = HashtagMapping(vocabulary, args.max_distance, args.ambiguous)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for hashtag in args.hashtags:
        for step, text in mapping.explain(hashtag):
            if step.startswith("sense"):
                synset = wnid_to_synset(wordnet, text.split()[0])
                text = f"{text}: {synset.name()}, {synset.definition()}"
            print(f"{step:10}{text}")
        print()


if __name__ == "__main__":
    main()
