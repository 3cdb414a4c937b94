"""Finds and opens WordNet 3.0 through nltk: the thesaurus that hashtags are merged with.

ImageNet's synset ids (wnids) such as "n02084071" are byte offsets into WordNet 3.0's data.noun. The files of
WordNet 3.1 have other offsets and would silently map ids to wrong concepts, so they are refused.
"""

from __future__ import annotations

import functools
import io
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsl_d2.errors import UserError
from wsl_d2.files import cache_folder

if TYPE_CHECKING:  # importing nltk takes as long as importing torch, and few processes read WordNet itself
    from nltk.corpus.reader.wordnet import Synset, WordNetCorpusReader

WORDNET_VERSION = "3.0"

REQUIRED_FILES = (
    *(f"{kind}.{pos}" for kind in ("data", "index") for pos in ("noun", "verb", "adj", "adv")),
    *(f"{pos}.exc" for pos in ("noun", "verb", "adj", "adv")),
)

# The 45 lexicographer files of lexnames(5WN), in order. Some distributions leave this file out.
_LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body "
    "noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location "
    "noun.motive noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process "
    "noun.quantity noun.relation noun.shape noun.state noun.substance noun.time verb.body verb.change "
    "verb.cognition verb.communication verb.competition verb.consumption verb.contact verb.creation "
    "verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
).split()
_LEXNAME_POS_NUMBER = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}

_PREFERRED_SENSES_FILES = [Path(__file__).with_name(f"{name}_senses.tsv") for name in ("lvis", "preferred")]

_WNID = re.compile(r"n\d{8}")

_HOW_TO_GET = (
    "Three ways to get WordNet 3.0: run `make setup`, which fetches it into the cache; install Debian's or "
    "Ubuntu's package wordnet-base (/usr/share/wordnet); or set WORDNET_HOME to a folder that holds the "
    "files of Princeton's WNdb-3.0.tar.gz or of nltk's unzipped corpus 'wordnet'."
)


class WordNetError(UserError, ValueError):
    """WordNet 3.0 was not found, is incomplete, or another version was found in its place."""


def _search_folders() -> Iterator[Path]:
    yield cache_folder("wordnet-3.0")
    import nltk.data

    yield from (Path(str(root)) / "corpora" / "wordnet" for root in nltk.data.path)
    yield Path("/usr/share/wordnet")


def _read_version(data_noun: Path) -> str | None:
    """The version that the license text at the head of data.noun names, such as "3.0"."""
    with data_noun.open(encoding="latin-1") as file:
        for _, line in zip(range(29), file, strict=False):  # the license takes 29 lines
            match = re.search(r"Word[nN]et (\d+(?:\.\d+)*)\+? Copyright", line)
            if match:
                return match.group(1)
    return None


def _check_folder(folder: Path) -> None:
    """Raises WordNetError unless the folder holds the files of WordNet 3.0."""
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        raise WordNetError(
            f"{folder} does not hold WordNet {WORDNET_VERSION}: {', '.join(missing)} missing. {_HOW_TO_GET}"
        )
    data_noun = folder / "data.noun"
    version = _read_version(data_noun)
    if version != WORDNET_VERSION:
        found = f"WordNet {version}" if version else "a file that names no WordNet version"
        raise WordNetError(
            f"{data_noun} is {found}, but WordNet {WORDNET_VERSION} is needed: synset ids are byte offsets "
            f"into that version's data.noun, and another version would map them to wrong concepts. "
            f"{_HOW_TO_GET}"
        )


def find_wordnet(path: str | Path | None = None) -> Path:
    """Finds the folder of WordNet 3.0.

    Looks in `path` alone if it is given; else in $WORDNET_HOME alone if that is set; else, in this order, in
    the cache ($WSL_D2_CACHE or ~/.cache/wsl_d2, wordnet-3.0), nltk's data folders (corpora/wordnet) and
    /usr/share/wordnet. In each, the files may lie in a subfolder `dict`.

    Raises:
        WordNetError: no folder with the files was found, or what was found is incomplete or of another
            version.
    """
    named = path if path is not None else os.environ.get("WORDNET_HOME")
    looked = []
    problem = None
    for folder in [Path(named).expanduser()] if named else _search_folders():
        looked.append(str(folder))
        if not (folder / "data.noun").is_file() and (folder / "dict" / "data.noun").is_file():
            folder = folder / "dict"
        try:
            if named or folder.is_dir():
                _check_folder(folder)
                return folder.resolve()
        except WordNetError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    raise WordNetError(f"WordNet {WORDNET_VERSION} was not found; looked in {', '.join(looked)}. {_HOW_TO_GET}")


@functools.lru_cache(maxsize=4)
def _open(folder: Path) -> WordNetCorpusReader:
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class WordNet30Reader(WordNetCorpusReader):
        """nltk's reader without its dependence on nltk's downloaded corpora."""

        def map_wn(self, version: str = "wordnet") -> None:
            """nltk maps offsets of other versions through corpora/wordnet here; 3.0 is what it would map from."""

        def open(self, file: str) -> Any:
            if file == "lexnames" and not (Path(str(self.root)) / file).exists():
                lines = (
                    f"{number:02d}\t{name}\t{_LEXNAME_POS_NUMBER[name.split('.')[0]]}\n"
                    for number, name in enumerate(_LEXNAMES)
                )
                return io.StringIO("".join(lines))
            return super().open(file)

    allowed = [Path(str(root)).expanduser().resolve() for root in nltk.data.path if str(root)]
    if not any(folder.is_relative_to(root) for root in allowed):
        nltk.data.path.append(str(folder))  # nltk opens no file outside of the folders in this list
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions are not available")
        try:
            return WordNet30Reader(str(folder), omw_reader=None)
        except PermissionError as error:
            raise WordNetError(f"{folder} cannot be read: {error}") from error


def load_wordnet(path: str | Path | None = None) -> WordNetCorpusReader:
    """Opens WordNet 3.0; the same folder is opened once per process.

    Args:
        path: the folder with data.noun and its companions; see `find_wordnet` for where it looks otherwise.

    Returns:
        nltk's reader. `reader.synsets(lemma, "n")` lists the noun senses of a lemma, the most frequent first.

    Raises:
        WordNetError: WordNet 3.0 was not found, is incomplete, or is another version; the message names the
            file and the ways to get it.
    """
    return _open(find_wordnet(path))


@functools.cache
def preferred_senses() -> dict[str, str]:
    """Returns normalized spelling -> id of the sense to put first, from lvis_senses.tsv and preferred_senses.tsv.

    WordNet orders senses by how often they occur in its tagged texts, where a "table" is one of numbers; where they
    never do, the order is arbitrary, and "tiger" is first a fierce person, "otter" first a fur.
    """
    lines = [line for file in _PREFERRED_SENSES_FILES for line in file.read_text(encoding="utf-8").splitlines()]
    rows = (line.split("\t") for line in lines if line and not line.startswith("#"))
    return {spelling: wnid for spelling, wnid, _ in rows}


def synset_to_wnid(synset: Synset) -> str:
    """The id of a noun synset: 'n' and its offset in 8 digits, "n02084071" for dog.n.01.

    Raises:
        ValueError: the synset is not a noun; ids as ImageNet writes them exist for nouns only.
    """
    if synset.pos() != "n":
        raise ValueError(f"synset {synset.name()} is not a noun (part of speech {synset.pos()!r}) and has no id")
    return f"n{synset.offset():08d}"


def wnid_to_synset(wordnet: WordNetCorpusReader, wnid: str) -> Synset:
    """The noun synset of an id such as "n02084071".

    Raises:
        ValueError: the id is malformed, or WordNet 3.0 has no noun at that offset.
    """
    if not isinstance(wnid, str) or not _WNID.fullmatch(wnid):
        raise ValueError(f"synset id {wnid!r} is malformed; it must be 'n' and 8 digits, like 'n02084071'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns where we raise
        synset = wordnet.synset_from_pos_and_offset("n", int(wnid[1:]))
    if synset is None:
        raise ValueError(
            f"WordNet {WORDNET_VERSION} has no noun synset {wnid}; ids of other versions (3.1, 2.1) differ"
        )
    return synset
