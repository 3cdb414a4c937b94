"""Verbs about hashtags: explain, count, vocabulary."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from wsl_d2.cli.verb import Verb, add_runner, local_path, place, positive, read_user_text, runner_of, share

FORMATS = ("auto", "yfcc100m", "parquet", "jsonl", "json", "csv", "sqlite", "webdataset")
AMBIGUOUS_POLICIES = ("most_frequent", "drop", "all")
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029]")  # characters that a terminal obeys


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where the hashtags of posts are."""
    parser.add_argument("--format", choices=FORMATS, default="auto", help="of the posts; auto: by each file's name")
    parser.add_argument("--key-column", default="key", help="column of the images' keys; a dot leads into nested ones")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--hashtags-column", default="hashtags", help="column of hashtags: lists, or texts with commas between them"
    )
    which.add_argument("--caption-column", help="column of texts whose #words are the hashtags, instead")


def show_posts(paths: list[str], args: argparse.Namespace) -> None:
    """Prints the first posts as they are read.

    Args:
        paths: files, folders, glob patterns or URLs.
        args: of :func:`add_columns`.

    Raises:
        PostsError: they cannot be read, or hold no hashtag.
    """
    from wsl_d2.data.posts.files import find_files
    from wsl_d2.data.posts.readers import detect_post_format, first_rows

    found_files = find_files(paths)
    files = ((path, detect_post_format(path) if args.format == "auto" else args.format) for path in found_files)
    found = first_rows(files, args.key_column, args.hashtags_column, args.caption_column)
    print("the first posts as read, key: hashtags", flush=True)
    for key, hashtags in found:
        line = f"  {key}: {', '.join(hashtags)}"
        line = _CONTROL.sub(lambda found: repr(found[0])[1:-1], line)
        print(line if len(line) <= 120 else f"{line[:117]}...", flush=True)


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hashtags", nargs="+", help="with or without '#'; mind the shell's quotes")
    parser.add_argument("--vocabulary", default="17k", help="1.5k, 17k, coco, or a vocabulary.json")


def explain(args: argparse.Namespace) -> None:
    """Shows what becomes of hashtags: each step from the spelling to the label, or the reason for dropping it.

    wsl-d2 hashtags explain "#brownbear" "#doooogs" --vocabulary 1.5k
    """
    from wsl_d2.hashtags import Vocabulary, load_wordnet, wnid_to_synset

    wordnet = load_wordnet()
    is_file = Path(args.vocabulary).suffix == ".json"
    vocabulary = Vocabulary.load(args.vocabulary) if is_file else Vocabulary.build(args.vocabulary, wordnet)
    for hashtag in args.hashtags:
        for step, text in vocabulary.mapping.explain(hashtag):
            if step.startswith("sense"):
                synset = wnid_to_synset(wordnet, text.split()[0])
                text = f"{text}: {synset.name()}, {synset.definition()}"
            print(f"{step:10}{text}")
        print()


def _count_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("posts", type=place, nargs="+", help="files, folders, glob patterns or URLs of posts")
    parser.add_argument("--output", type=local_path, required=True, help="folder of results")
    add_columns(parser)
    add_runner(parser)


def count(args: argparse.Namespace) -> None:
    """Counts how many images carry each hashtag, for any number of posts; can be repeated after an interruption.

    wsl-d2 hashtags count posts/*.parquet --output counts/

    Reads YFCC100M's metadata, Parquet, JSON lines and lists, CSV, SQLite and WebDataset tars, local or by URL. Every
    row is accounted for: a post, no image, or in rejected/ with the reason.
    """
    from wsl_d2.data.posts.count import CountOptions, count_hashtags

    show_posts(args.posts, args)
    options = CountOptions(args.format, args.key_column, args.hashtags_column, args.caption_column)
    manifest = count_hashtags(args.posts, args.output, options, workers=runner_of(args, args.output))
    rows = manifest["rows"]
    print(f"rows: {rows:,}, posts {share(manifest['posts'], rows)}")
    for name in ("skipped", "rejected"):
        for reason, number in manifest[name].items():
            print(f"  {name}, {reason}: {share(number, rows)}")
    print(f"hashtags: {manifest['hashtags']:,}, {manifest['distinct']:,} different ones")
    print(f"written: {args.output / 'hashtag_counts.tsv'}, {args.output / 'manifest.json'}")


def _vocabulary_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocabulary", required=True, help="1.5k, 8.5k, 17k, coco, or any name with --synsets")
    parser.add_argument(
        "--counts",
        type=local_path,
        help="hashtag -> number of images: a JSON object, or lines of `hashtag<TAB>number`; 8.5k needs it",
    )
    parser.add_argument(
        "--synsets",
        type=local_path,
        help="file of WordNet ids such as n02084071, one a line; words after it are ignored",
    )
    parser.add_argument("--min-images", type=positive, default=1, help="leave out labels on fewer counted images")
    parser.add_argument("--max-labels", type=positive, help="keep the most frequent labels only")
    parser.add_argument("--wordnet", type=local_path, help="folder of WordNet 3.0; found by itself if not given")
    parser.add_argument("--output", type=local_path, required=True, help="file to write: vocabulary.json")
    parser.add_argument(
        "--report", type=local_path, help="folder for a report: page, text and JSON; --counts add what it covers"
    )
    parser.add_argument(
        "--max-distance",
        type=int,
        help="hypernym steps allowed from a hashtag's own synset up to a label; by default what was measured to be "
        "right for the vocabulary",
    )
    parser.add_argument(
        "--ambiguous",
        choices=AMBIGUOUS_POLICIES,
        default="most_frequent",
        help="which labels a hashtag gets that has several senses among them",
    )


def vocabulary(args: argparse.Namespace) -> None:
    """Builds a vocabulary, the classes of hashtag pretraining and the rules by which hashtags find them.

    wsl-d2 hashtags vocabulary --vocabulary 1.5k --output vocabulary.json
    wsl-d2 hashtags vocabulary --vocabulary 8.5k --counts counts/hashtag_counts.tsv --output vocabulary.json
    wsl-d2 hashtags vocabulary --vocabulary birds --synsets birds.txt --output vocabulary.json --report report/
    """
    from wsl_d2.errors import VocabularyError
    from wsl_d2.hashtags import HashtagCounts, Vocabulary, load_wordnet
    from wsl_d2.hashtags.report import describe_vocabulary, format_description

    counts = HashtagCounts(args.counts) if args.counts else None
    try:
        built = Vocabulary.build(
            args.vocabulary,
            load_wordnet(args.wordnet),
            counts=counts,
            synsets=_read_synsets(args.synsets) if args.synsets else None,
            max_distance=args.max_distance,
            ambiguous=args.ambiguous,
            min_images=args.min_images,
            max_labels=args.max_labels,
        )
    except ValueError as error:
        raise VocabularyError(str(error)) from error
    built.save(args.output)
    policy = built.policy
    print(
        f"{args.output}: vocabulary {built.name}, {len(built)} labels, {sum(map(len, built.hashtags))} hashtags, "
        f"max_distance {policy.max_distance}, ambiguous {policy.ambiguous}, checksum {built.checksum}"
    )
    if args.vocabulary == "17k" and counts is None:
        print(
            f"17k without --counts has {len(built):,} labels, every noun of WordNet; give them to keep what people use"
        )
    for wnid, hashtag in built.built_with.get("disambiguated", {}).items():
        print(f"{wnid} has no hashtag of its own, as more frequent senses have them; it gets #{hashtag}")
    for wnid in built.built_with.get("unreachable", []):
        print(f"warning: no spelling leads to {wnid}: all of them are dropped or belong to other labels")
    if args.report:
        from wsl_d2.report.vocabulary import write_description  # needs matplotlib

        facts = describe_vocabulary(built, counts)
        write_description(facts, args.report)
        print(format_description(facts))


def _read_synsets(path: Path) -> list[str]:
    """The first word of every line that is not empty and no comment."""
    lines = read_user_text(path).splitlines()
    return [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]


VERBS = {
    "explain": Verb(explain, _explain_arguments),
    "count": Verb(count, _count_arguments, "finished parts are kept, and the same command goes on"),
    "vocabulary": Verb(vocabulary, _vocabulary_arguments),
}
