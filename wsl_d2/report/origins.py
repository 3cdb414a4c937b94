"""Who made the labels: a dataset's posters, years, places and words on one page, and what a limit per poster changes.

Nothing about a single person is shown: what fewer than `FEWEST` people stand behind is neither named nor pictured.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from wsl_d2.data.format.index import read_index
from wsl_d2.data.format.labels import HashtagIndex
from wsl_d2.data.format.manifest import VOCABULARY
from wsl_d2.data.format.origin import limit_users, no_posters
from wsl_d2.data.order.resampling import image_repeat_factors
from wsl_d2.data.read.dataset import HashtagDataset
from wsl_d2.data.read.decode import DamagedImageError, decode, open_image
from wsl_d2.errors import ShardError
from wsl_d2.hashtags import Vocabulary, normalize_hashtag
from wsl_d2.hashtags.lemma_table import load_lemma_table
from wsl_d2.hashtags.splitter import known_words, split_words
from wsl_d2.report.page import page, panels, paragraph, picture, pictures, table
from wsl_d2.report.plots import draw_ranks, log_ticks, panel, style_of

FEWEST = 5  # people behind anything that is named
_SHARES = (0.01, 0.1, 0.5)
_GROUPS = ((1, 1), (2, 4), (5, 9), (10, 99), (100, None))  # numbers of people
_SHOWN = 15


@dataclass
class Corpus:
    """What is known of N labeled images.

    Args:
        users: (N,) int64, numbers of posters from 0 on; -1 if unknown.
        years: (N,) int64; 0 if unknown.
        places: (N,) int64 into ``place_names``; "" is unknown.
        place_names: in any order.
        index: their labels.
        languages: what kind of words the hashtags are -> how often.
    """

    users: np.ndarray
    years: np.ndarray
    places: np.ndarray
    place_names: list[str]
    index: HashtagIndex
    languages: Counter[str]

    @property
    def num_users(self) -> int:
        return int(self.users.max(initial=-1)) + 1


@dataclass
class Concentration:
    """How few people stand behind the images, or behind the draws of an epoch.

    Attributes:
        num_images: images, or draws.
        top: share of :data:`_SHARES` of the posters, the most active ones -> their share of the images.
        num_labels: labels that have an image.
        of_one: labels whose images are all of one poster.
        drawn_of_one: share of all label entries that are of those.
        people: (C,) posters behind each label.
    """

    num_images: float
    top: dict[float, float]
    num_labels: int
    of_one: int
    drawn_of_one: float
    people: np.ndarray


def read_corpus(dataset: HashtagDataset) -> Corpus:
    """Reads what is known of the labeled images from the indexes; takes 8 bytes an image and 12 a label of it.

    Raises:
        ShardError: the indexes say nothing about who posted the images.
    """
    users, years, places, lengths, labels = [], [], [], [], []
    code: dict[str, int] = {"": 0}
    languages: Counter[str] = Counter()
    kinds: dict[str, str] = {}
    for shard in tqdm(range(len(dataset.table)), unit="shard", desc="reading indexes", disable=None):
        own = dataset.read_labels(shard)
        index = read_index(dataset.folder / dataset.table.name(shard))
        rows = own.rows
        lengths.append(np.diff(own.indptr))
        labels.append(own.labels)
        if index.origins:
            users.append(index.origins.users[rows])
            years.append(index.origins.years[rows].astype(np.int64))
            codes = np.array([code.setdefault(name, len(code)) for name in index.origins.place_names], np.int64)
            places.append(codes[index.origins.places[rows]])
        else:
            users.append(np.zeros(len(rows), np.uint64))
            years.append(np.zeros(len(rows), np.int64))
            places.append(np.zeros(len(rows), np.int64))
        column = index.hashtags[own.hashtags_column]
        is_labeled = np.zeros(len(index.keys), bool)
        is_labeled[rows] = True
        entries = column.codes[np.repeat(is_labeled, np.diff(column.indptr))]
        for name, number in zip(column.names, np.bincount(entries, minlength=len(column.names)).tolist(), strict=True):
            if number:
                if len(kinds) > 1_000_000:
                    kinds.clear()
                if name not in kinds:
                    kinds[name] = kind_of_words(name)
                languages[kinds[name]] += number
    names, number_of = np.unique(np.concatenate(users), return_inverse=True)
    if not names.any():
        raise ShardError(no_posters(dataset.folder))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    return Corpus(
        users=number_of.astype(np.int64) - int(names[0] == 0),
        years=np.concatenate(years),
        places=np.concatenate(places),
        place_names=list(code),
        index=HashtagIndex(offsets, np.concatenate(labels), dataset.num_labels),
        languages=languages,
    )


def kind_of_words(hashtag: str) -> str:
    """Returns the script of a hashtag; of Latin letters whether it is English words, by a list of them and WordNet."""
    key = normalize_hashtag(hashtag)
    letters = [character for character in key if character.isalpha()]
    if not letters:
        return "no letters"
    scripts = Counter(unicodedata.name(character, "OTHER").split()[0].split("-")[0] for character in letters)
    script = scripts.most_common(1)[0][0]
    if script != "LATIN":
        return f"{script.title()} script" if script != "CJK" else "Chinese characters"
    word = key.rstrip("0123456789")
    table_of_words = load_lemma_table().words
    if (
        word in table_of_words
        or word in known_words()
        or table_of_words.keys() & set(load_lemma_table().singulars(word))
    ):
        return "English word"
    parts = split_words(word) if word.isascii() and word.isalpha() and len(word) <= 40 else []
    if parts and min(map(len, parts)) > 2:
        return "English words run together"
    return "other Latin letters"


def measure(corpus: Corpus, weights: np.ndarray) -> Concentration:
    """Measures a corpus whose images count by (N,) weights; 0 leaves an image out."""
    known = (corpus.users >= 0) & (weights > 0)
    of_user = np.bincount(corpus.users[known], weights[known], corpus.num_users)
    of_user = np.sort(of_user[of_user > 0])[::-1]
    sums = np.cumsum(of_user)
    top = (
        {share: float(sums[max(1, round(share * len(sums))) - 1] / sums[-1]) for share in _SHARES} if len(sums) else {}
    )
    image = np.repeat(np.arange(corpus.index.num_images), np.diff(corpus.index.indptr))
    label = corpus.index.labels.astype(np.int64)
    counted = weights[image] > 0
    of_label = np.bincount(label[counted], weights[image[counted]], corpus.index.num_labels)
    counted &= corpus.users[image] >= 0
    pairs = np.unique(label[counted] * corpus.num_users + corpus.users[image[counted]])
    people = np.bincount(pairs // max(1, corpus.num_users), minlength=corpus.index.num_labels)
    unknown = np.bincount(label[(weights[image] > 0) & (corpus.users[image] < 0)], minlength=corpus.index.num_labels)
    of_one = (people == 1) & (unknown == 0)
    return Concentration(
        num_images=float(weights.sum()),
        top=top,
        num_labels=int((of_label > 0).sum()),
        of_one=int(of_one.sum()),
        drawn_of_one=float(of_label[of_one].sum() / of_label.sum()) if of_label.sum() else 0.0,
        people=people,
    )


def resample(corpus: Corpus, keep: np.ndarray, mode: str, threshold: float) -> np.ndarray:
    """Returns (N,) expected draws in an epoch of the images that are kept."""
    rows = np.flatnonzero(keep)
    lengths = np.diff(corpus.index.indptr)
    labels = corpus.index.labels[np.repeat(keep, lengths)]
    indptr = np.concatenate([[0], np.cumsum(lengths[rows])]).astype(np.int64)
    factors = np.zeros(len(keep))
    factors[rows] = image_repeat_factors(HashtagIndex(indptr, labels, corpus.index.num_labels), threshold, mode)
    return factors


def group_rows(values: np.ndarray, names: list[str], users: np.ndarray, unknown: str = "unknown") -> list[list]:
    """Counts images and posters of each value, the most images first; values of fewer than `FEWEST` people are one row.

    Args:
        values: (N,) numbers of names.
        names: "" is unknown.
        users: (N,) numbers of posters, -1 if unknown.
        unknown: what it is called.

    Returns:
        Rows of name, images, posters.
    """
    images = np.bincount(values, minlength=len(names))
    pairs = np.unique(np.stack([values, users])[:, users >= 0], axis=1)
    people = np.bincount(pairs[0], minlength=len(names))
    rows, hidden = [], np.zeros(len(names), bool)
    for i in np.argsort(-images, kind="stable").tolist():
        if images[i] and names[i] and people[i] >= FEWEST:
            rows.append([names[i], int(images[i]), int(people[i])])
        elif names[i]:
            hidden[i] = images[i] > 0
    if hidden.any():
        chosen = hidden[values]
        number = len(np.unique(users[chosen & (users >= 0)]))
        rows.append([f"others, of fewer than {FEWEST} people each", int(chosen.sum()), number])
    if "" in names and images[names.index("")]:
        at = names.index("")
        rows.append([unknown, int(images[at]), int(people[at])])
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _bars(rows: list[list], shows: str) -> str:
    plots: list[str] = []
    total = sum(row[1] for row in rows)
    with panel(plots, shows, 0.9 + 0.27 * len(rows), xlabel="% of the labeled images") as axis:
        axis.barh([str(row[0]) for row in rows], [100 * row[1] / total for row in rows], color=style_of(0)[0])
        axis.invert_yaxis()
    return plots[0]


def _table_of_groups(rows: list[list], name: str) -> str:
    total = sum(row[1] for row in rows)
    shown = [[row[0], f"{row[1]:,}", _percent(row[1] / total), f"{row[2]:,}" if row[2] else ""] for row in rows]
    return table([name, "images", "share", "people"], shown)


def _who(corpus: Corpus, stored: Concentration) -> list[str]:
    ordered = np.sort(np.bincount(corpus.users[corpus.users >= 0], minlength=corpus.num_users))[::-1]
    half = int(np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)) + 1
    shown = ordered.astype(float)
    shown[:FEWEST] = shown[:FEWEST].mean()
    plots: list[str] = []
    with panel(plots, "Images of each person, the most active first") as axis:
        draw_ranks(axis, {"images": shown}, f"images; of the first {FEWEST} their mean")
        axis.set_xlabel("person, by number of images")
        axis.get_lines()[0].set_label("_")
    rows = [[f"the most active {share:.0%}", _percent(stored.top[share])] for share in _SHARES]
    few = f"{half:,}" if half >= FEWEST else f"fewer than {FEWEST}"
    rows.append(["the most active who have half of the images", f"{few} people"])
    unknown = int((corpus.users < 0).sum())
    told = f"Of {unknown:,} images the poster is not known; they count nowhere below." if unknown else ""
    return ["<h2>People</h2>", panels(plots), table(["people", "share of the images"], rows), paragraph(told, "quiet")]


def _choices(corpus: Corpus, limit: int, mode: str, threshold: float) -> tuple[list[str], Concentration]:
    everything = np.ones(len(corpus.users), bool)
    limited = limit_users(corpus.users, np.random.default_rng(0).random(len(corpus.users)), limit, unknown=-1)
    resampled = f"resampled ({mode}, {threshold:g})"
    weights = {
        "as stored": everything.astype(float),
        f"at most {limit:,} of a person": limited.astype(float),
        resampled: resample(corpus, everything, mode, threshold),
        f"at most {limit:,}, {resampled}": resample(corpus, limited, mode, threshold),
    }
    found = {name: measure(corpus, values) for name, values in weights.items()}
    rows = [
        [
            name,
            f"{one.num_images:,.0f}",
            _percent(one.top[0.01]) if one.top else "",
            f"{one.num_labels:,}",
            f"{one.of_one:,}",
            _percent(one.drawn_of_one),
        ]
        for name, one in found.items()
    ]
    header = ["", "images or draws", "of the top 1%", "labels", "of one person", "their share of draws"]
    told = (
        "A limit takes away images of the most active; resampling repeats images of rare labels, and a rare label is "
        "often one person's."
    )
    return ["<h2>With a limit, with resampling</h2>", paragraph(told), table(header, rows)], found["as stored"]


def _labels(corpus: Corpus, stored: Concentration, vocabulary: Vocabulary) -> list[str]:
    images = corpus.index.hashtag_counts()
    seen = images > 0
    rows = []
    for low, high in _GROUPS:
        group = seen & (stored.people >= low) & (stored.people <= (high or stored.people.max()))
        name = f"{low} or more" if high is None else f"{low}" if low == high else f"{low} to {high}"
        rows.append([name, f"{group.sum():,}", _percent(group.sum() / seen.sum()), f"{images[group].sum():,}"])
    plots: list[str] = []
    with panel(plots, "People and images of each label") as axis:
        points = seen & (stored.people > 0)
        axis.plot(
            images[points],
            stored.people[points],
            ".",
            color=style_of(0)[0],
            markersize=3 if points.sum() > _SHOWN else 8,
        )
        log_ticks(axis.xaxis)
        log_ticks(axis.yaxis)
        axis.set(xlabel="images of a label", ylabel="people behind it")
    named = np.flatnonzero(seen & (stored.people >= FEWEST))
    most = named[np.argsort(-images[named], kind="stable")][:_SHOWN]
    often = named[images[named] >= max(10, np.median(images[named]))] if len(named) else named
    narrow = often[np.argsort(stored.people[often] / images[often], kind="stable")][:_SHOWN]
    parts = [
        "<h2>People behind each label</h2>",
        panels(plots),
        table(["people", "labels", "share", "images"], rows),
    ]
    for title, chosen in (("Most frequent labels", most), ("Frequent labels of few people", narrow)):
        cells = [
            [
                f"#{vocabulary.hashtags[i][0]} ({vocabulary.synsets[i]})",
                f"{images[i]:,}",
                f"{stored.people[i]:,}",
                f"{images[i] / stored.people[i]:.1f}",
            ]
            for i in chosen.tolist()
        ]
        if cells:
            parts += [f"<h3>{title}</h3>", table(["label", "images", "people", "images a person"], cells)]
    return parts


def _sheets(
    dataset: HashtagDataset, corpus: Corpus, stored: Concentration, vocabulary: Vocabulary, number: int
) -> list[str]:
    """The first images of the most frequent labels, each of another person."""
    if not number:
        return []
    images = np.where(stored.people >= FEWEST, corpus.index.hashtag_counts(), 0)
    image = np.repeat(np.arange(corpus.index.num_images), np.diff(corpus.index.indptr))
    parts = ["<h2>Photos of the most frequent labels</h2>"]
    for label in np.argsort(-images, kind="stable")[:_SHOWN].tolist():
        if not images[label]:
            break
        chosen = image[corpus.index.labels == label]
        chosen = chosen[np.unique(corpus.users[chosen], return_index=True)[1]]
        figures = []
        for row in np.sort(chosen).tolist():
            try:
                pixels = decode(open_image(dataset[row]["image"]))
            except (DamagedImageError, ShardError):
                continue
            figures.append(picture(pixels, f"#{vocabulary.hashtags[label][0]}", side=200, most_bytes=12_000))
            if len(figures) == number:
                break
        if figures:
            parts += [
                paragraph(f"#{vocabulary.hashtags[label][0]}, {images[label]:,} images"),
                pictures(figures, number),
            ]
    return parts


def origins_page(folder: str | Path, *, limit: int, mode: str, threshold: float, num_pictures: int = 0) -> str:
    """Builds the page of a dataset.

    Args:
        folder: a finished dataset whose indexes know the posters.
        limit: images of a person, to show what a limit would change.
        mode, threshold: of the resampling, to show what it changes.
        num_pictures: of each of the most frequent labels.

    Raises:
        ShardError: the dataset is not finished, or does not know who posted its images.
    """
    dataset = HashtagDataset(folder)
    vocabulary = Vocabulary.load(dataset.folder / VOCABULARY)
    corpus = read_corpus(dataset)
    choices, stored = _choices(corpus, limit, mode, threshold)
    headline = (
        f"{len(corpus.users):,} labeled images of {corpus.num_users:,} people; the most active 1% of them posted "
        f"{_percent(stored.top[0.01])}. {stored.of_one:,} of {stored.num_labels:,} labels are one person's."
    )
    years, of_year = np.unique(corpus.years, return_inverse=True)
    rows_of_years = group_rows(of_year, [str(year) if year else "" for year in years.tolist()], corpus.users)
    in_order = sorted(rows_of_years, key=lambda row: (not row[0].isdecimal(), row[0]))
    rows_of_places = group_rows(corpus.places, corpus.place_names, corpus.users)
    tail = [row for row in rows_of_places if row[0] not in corpus.place_names]
    shown = [row for row in rows_of_places if row not in tail]
    if len(shown) > _SHOWN:
        rest = shown[_SHOWN:]
        shown = [*shown[:_SHOWN], [f"{len(rest):,} more", sum(row[1] for row in rest), ""]]
    total = max(1, corpus.languages.total())
    languages = [[name, f"{n:,}", _percent(n / total)] for name, n in corpus.languages.most_common()]
    return page(
        f"Who made the labels of {dataset.folder.name}",
        paragraph(headline, "headline"),
        paragraph(f"Vocabulary {vocabulary.name}. What fewer than {FEWEST} people stand behind is not named.", "quiet"),
        *_who(corpus, stored),
        *choices,
        *_labels(corpus, stored, vocabulary),
        "<h2>Years</h2>",
        panels([_bars(in_order, "Labeled images of each year")]),
        _table_of_groups(in_order, "year"),
        "<h2>Places</h2>",
        panels(
            [_bars([*shown, *tail], "Labeled images of each place")], "Cells of 10 degrees by their south-west corner."
        ),
        _table_of_groups([*shown, *tail], "place"),
        "<h2>Words of the hashtags</h2>",
        paragraph(
            "Of all hashtags of the labeled images, with and without a label. A single hashtag is too short to tell a "
            "language by."
        ),
        table(["kind", "hashtags", "share"], languages),
        *_sheets(dataset, corpus, stored, vocabulary, num_pictures),
    )
