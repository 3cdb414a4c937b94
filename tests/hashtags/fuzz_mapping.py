"""Maps many random strings and checks that each gets labels or a reason; too slow for every test run.

python tests/hashtags/fuzz_mapping.py --strings 1000000 --seed 0
"""

import argparse
import random
from collections import Counter

from wsl_d2.hashtags import DROP_REASONS, HashtagMapping, Vocabulary, load_wordnet, normalize_hashtag

_RANGES = ((0x20, 0x7F), (0x61, 0x7B), (0xA0, 0x600), (0x2000, 0x3100), (0x1F000, 0x1FB00), (0, 0x110000))


def random_string(rng: random.Random) -> str:
    """Up to 24 characters of one or two blocks: ASCII, letters, scripts, symbols, emoji, any code point at all."""
    blocks = rng.sample(_RANGES, rng.randint(1, 2))
    return "".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(rng.randint(0, 24)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strings", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    rng = random.Random(args.seed)
    mapping = HashtagMapping(Vocabulary.build("17k", load_wordnet()))
    outcomes: Counter[str] = Counter()
    for _ in range(args.strings):
        text = random_string(rng)
        labels, reason, _ = mapping.map(text)
        key = normalize_hashtag(text)
        if bool(labels) == bool(reason) or (reason and reason not in DROP_REASONS) or normalize_hashtag(key) != key:
            raise AssertionError(f"{text!r}: labels {labels}, reason {reason!r}, key {key!r}")
        outcomes[reason or "mapped"] += 1
    print(f"{args.strings:,} strings, {sum(outcomes.values()):,} accounted for:")
    for outcome, count in outcomes.most_common():
        print(f"  {outcome:24}{count:10,}")


if __name__ == "__main__":
    main()
