"""The page of who made the labels: what it counts, and that nothing on it is of a single person."""

import json
import re

import numpy as np
import pytest
from command_line import wsl_d2
from toy_data import TOY_HASHTAGS, jpeg

from wsl_d2.data import HashtagDataset, ShardError, make_shards
from wsl_d2.data.format.origin import limit_users
from wsl_d2.report.origins import FEWEST, group_rows, kind_of_words, measure, origins_page, read_corpus


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, toy_vocabulary):
    """Label 0 by one poster with 30 images, label 1 by 10 posters with 2 each, label 2 by 4 posters, 3 by nobody."""
    folder = tmp_path_factory.mktemp("origins")
    rows = [("much", 0, 2001, "Nowhere")] * 30 + [(f"u{i // 2}", 1, 2010, "Peru") for i in range(20)]
    rows += [(f"v{i}", 2, 2010, "Chile") for i in range(4)] + [(None, 3, None, None)] * 3
    lines = []
    for i, (user, label, year, place) in enumerate(rows):
        (folder / f"p{i:02d}.jpg").write_bytes(jpeg(i))
        tags = [TOY_HASHTAGS[label], "#собака"]
        lines.append(json.dumps({"key": f"p{i:02d}", "hashtags": tags, "who": user, "when": year, "where": place}))
    (folder / "posts.jsonl").write_text("\n".join(lines))
    columns = {"user_column": "who", "time_column": "when", "place_column": "where"}
    images = f"{folder}/{{key}}.jpg"
    make_shards([str(folder / "posts.jsonl")], images, toy_vocabulary, folder / "ds", images_per_shard=20, **columns)
    return folder / "ds"


def test_what_is_counted(dataset, toy_vocabulary):
    corpus = read_corpus(HashtagDataset(dataset))
    assert len(corpus.users) == 57 and corpus.num_users == 15 and (corpus.users < 0).sum() == 3
    assert corpus.languages == {"English word": 57, "Cyrillic script": 57}
    stored = measure(corpus, np.ones(57))
    assert stored.top == {0.01: 30 / 54, 0.1: 32 / 54, 0.5: 44 / 54}
    of = [toy_vocabulary.labels([TOY_HASHTAGS[i]])[0] for i in range(4)]
    assert stored.people[of].tolist() == [1, 10, 4, 0]
    assert (stored.num_labels, stored.of_one, stored.drawn_of_one) == (4, 1, 30 / 57)
    limited = limit_users(corpus.users, np.random.default_rng(0).random(len(corpus.users)), 1, unknown=-1)
    assert np.bincount(corpus.users[limited & (corpus.users >= 0)]).tolist() == [1] * 15
    assert measure(corpus, limited.astype(float)).drawn_of_one == 1 / 18


def test_what_few_people_stand_behind_is_one_row():
    users = np.array([0, 1, 2, 3, 4, 5, 5, 5, -1])
    rows = group_rows(np.array([0, 0, 0, 0, 0, 1, 1, 2, 3]), ["Peru", "home", "work", ""], users)
    assert rows == [["Peru", 5, 5], [f"others, of fewer than {FEWEST} people each", 3, 1], ["unknown", 1, 0]]


def test_the_page_names_nothing_of_one_person(dataset, tmp_path):
    printed = wsl_d2("data", "report", dataset, "--output", tmp_path / "r.html", "--max-images-per-user", 2)
    text = (tmp_path / "r.html").read_text()
    assert f"wrote {tmp_path / 'r.html'}" in printed
    assert "57 labeled images of 15 people; the most active 1% of them posted 55.6%" in text
    cells = set(re.findall(r">\s*([^<>]+?)\s*<", text))
    assert {"Peru", "2010"} < cells and not cells & {"Nowhere", "Chile", "2001"}
    shown = set(re.findall(r"<td>#(\w+)", text))
    assert shown == {TOY_HASHTAGS[1].lstrip("#").lower()}
    assert text.count("<img") == 6  # of the one label that enough people stand behind


def test_a_dataset_without_posters_is_refused(hashtag_folder, tmp_path):
    with pytest.raises(ShardError, match="do not say who posted"):
        origins_page(hashtag_folder, limit=3, mode="sqrt", threshold=1e-3)


@pytest.mark.parametrize(
    ("hashtag", "kind"),
    [
        ("dogs", "English word"),
        ("HomemadePizza", "English words run together"),
        ("кот", "Cyrillic script"),
        ("犬", "Chinese characters"),
        ("2019", "no letters"),
        ("schönwetter", "other Latin letters"),
    ],
)
def test_the_words_of_a_hashtag(hashtag, kind):
    assert kind_of_words(hashtag) == kind
