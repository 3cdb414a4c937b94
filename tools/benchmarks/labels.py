"""Are the labels in the shards right? Precision and recall against hashtags labeled by hand, with 95% intervals."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from wsl_d2.data import finish_dataset, index_shard, write_shard
from wsl_d2.data.format.index import read_index
from wsl_d2.hashtags import Vocabulary, load_wordnet, read_hashtag_counts
from wsl_d2.hashtags.lemma_table import load_lemma_table

TESTS = Path(__file__).resolve().parents[2] / "tests" / "hashtags"
_JPEG = b"\xff\xd8\xff\xd9"  # nothing looks at the images


class Expected:
    """What is right for a hashtag, and whether it should get a label.

    Args:
        hashtag: as written.
        right: synset ids; for a vocabulary of few labels all that lie above the meaning are right.
        wanted: whether there is a label that it should get.
    """

    def __init__(self, hashtag: str, right: set[str], wanted: bool):
        self.hashtag, self.right, self.wanted = hashtag, right, wanted


def _above(synset: str) -> set[str]:
    table = load_lemma_table()
    seen, level = {synset}, [synset]
    while level:
        level = [parent for one in level for parent in table.parents(one) if parent not in seen]
        seen.update(level)
    return seen


def read_golden(vocabulary: Vocabulary, part: str) -> list[Expected]:
    """Rows of golden.tsv of one part; right is the synset, or for other vocabularies than 17k any label above it."""
    lines = (TESTS / "golden.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("# ")]
    found = []
    for hashtag, synset, name, row_part, _ in rows:
        if row_part == part:
            right = ({synset} if vocabulary.name == "17k" else _above(synset)) if name else set()
            found.append(Expected(hashtag, right, bool(right & set(vocabulary.synsets))))
    return found


def read_real(vocabulary: Vocabulary, part: str) -> list[Expected]:
    """Rows of real_hashtags_<part>.tsv; right is a meaning chosen by hand, and where the vocabulary gives labels above
    a hashtag's own, one above it; for 1.5k and coco the label was chosen by hand, too."""
    lines = (TESTS / f"real_hashtags_{part}.tsv").read_text(encoding="utf-8").splitlines()
    column = {"1.5k": 4, "coco": 5}.get(vocabulary.name)
    found = []
    for line in lines:
        if line.startswith("# "):
            continue
        row = line.split("\t")
        meant = {one for one in (row[3], *row[6].split(",")) if one not in ("", "-")}
        if vocabulary.policy.max_distance:
            meant = {above for one in meant for above in _above(one)}
        if column is None:
            found.append(Expected(row[0], meant, row[3] in vocabulary.synsets))
        else:
            found.append(Expected(row[0], {row[column]} - {"-"} | meant, row[column] != "-"))
    return found


def labels_in_shards(vocabulary: Vocabulary, hashtags: list[str], folder: Path) -> list[str | None]:
    """Writes a shard with an image for each hashtag, indexes it, and reads the labels' synsets back."""
    folder.mkdir()
    write_shard(folder / "0.tar", [(f"k{i}", _JPEG, {"hashtags": [tag]}) for i, tag in enumerate(hashtags)])
    labels = index_shard(folder / "0.tar", vocabulary)
    finish_dataset(folder, vocabulary)
    found: list[str | None] = [None] * len(hashtags)
    index = read_index(folder / "0.tar")
    for place, row in enumerate(labels.rows.tolist()):
        found[int(index.key(row)[1:])] = vocabulary.synsets[labels.labels[labels.indptr[place]]]
    return found


def measure(vocabulary: Vocabulary, expected: list[Expected], folder: Path) -> dict[str, tuple[int, int]]:
    """Returns "precision" and "recall" as (right, of)."""
    found = labels_in_shards(vocabulary, [one.hashtag for one in expected], folder)
    right = np.array([label in one.right for label, one in zip(found, expected, strict=True)])
    given = np.array([label is not None for label in found])
    wanted = np.array([one.wanted for one in expected])
    return {
        "precision": (int(right.sum()), int(given.sum())),
        "recall": (int((right & wanted).sum()), int(wanted.sum())),
    }


def _shown(right: int, number: int) -> str:
    if not number:
        return "none"
    low, high = binomtest(right, number).proportion_ci(method="wilson")
    return f"{right:4d} of {number:4d}  {right / number:.2f} [{low:.2f}, {high:.2f}]"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmark.py labels", description=__doc__)
    parser.add_argument("--counts", type=Path, help="hashtag_counts.tsv, to measure 8.5k, too")
    parser.add_argument("--mistakes", action="store_true", help="also list the hashtags that got a wrong label")
    args = parser.parse_args(arguments)
    wordnet = load_wordnet()
    vocabularies = {name: Vocabulary.build(name, wordnet) for name in ("17k", "1.5k", "coco")}
    if args.counts:
        vocabularies["8.5k"] = Vocabulary.build("8.5k", wordnet, counts=read_hashtag_counts(args.counts))
    sets = {
        "golden, tuned": lambda v: read_golden(v, "tuned"),
        "golden, held out": lambda v: read_golden(v, "held out"),
        "real, tuning": lambda v: read_real(v, "tuning"),
        "real, held out": lambda v: read_real(v, "held_out"),
        "real, held out 2": lambda v: read_real(v, "second_held_out"),
    }
    print(f"{'vocabulary':11} {'hashtags':17} {'precision':34} recall")
    with tempfile.TemporaryDirectory() as folder:
        for name, vocabulary in vocabularies.items():
            for title, read in sets.items():
                expected = read(vocabulary)
                measured = measure(vocabulary, expected, Path(folder) / f"{name} {title}")
                print(f"{name:11} {title:17} {_shown(*measured['precision'])}  {_shown(*measured['recall'])}")
                if args.mistakes:
                    for one in expected:
                        match = vocabulary.match(one.hashtag)
                        if match and match.synset not in one.right:
                            print(
                                f"    {one.hashtag}: {wordnet.synset_from_pos_and_offset('n', int(match.synset[1:]))}"
                            )


if __name__ == "__main__":
    main()
