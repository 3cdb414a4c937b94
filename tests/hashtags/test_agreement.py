"""Whoever is asked, a hashtag has one label: explained, matched, written, indexed, viewed, and trained on.

Every row of the golden file, and random and mutated strings, under each built-in vocabulary and two policies.
"""

import random

import numpy as np
import pytest
from fuzz_mapping import random_string
from toy_data import jpeg, open_train_loader

from wsl_d2.data import HashtagDataset, finish_dataset, index_shard, make_shards, make_view, write_shard
from wsl_d2.data.format.labels import read_labels
from wsl_d2.hashtags import HashtagMapping, Vocabulary, load_wordnet

GOLDEN = [
    line.split("\t")[0]
    for line in (__import__("pathlib").Path(__file__).with_name("golden.tsv")).read_text(encoding="utf-8").splitlines()
    if not line.startswith("# ")
]
POLICIES = {"default": {}, "far": {"max_distance": 4, "ambiguous": "drop"}}


def mutated(rng: random.Random, hashtag: str) -> str:
    """What people do to a hashtag: case, plurals, digits, drawn-out letters, compounds, accents, and worse."""
    kind = rng.randrange(9)
    if kind == 0:
        return hashtag.upper()
    if kind == 1:
        return f"{hashtag}s"
    if kind == 2:
        return f"{hashtag}{rng.randrange(3000)}"
    if kind == 3 and hashtag:
        place = rng.randrange(len(hashtag))
        return hashtag[:place] + hashtag[place : place + 1] * 4 + hashtag[place + 1 :]
    if kind == 4:
        return f"{hashtag}ofinstagram"
    if kind == 5:
        return f"my{hashtag.lstrip('#').title()}"
    if kind == 6:
        return hashtag.replace("e", "é")
    if kind == 7 and hashtag:
        place = rng.randrange(len(hashtag))
        return hashtag[:place] + hashtag[place + 1 :]
    return rng.choice("_-. ").join(hashtag)


def strings(number: int) -> list[str]:
    rng = random.Random(5)
    found = [mutated(rng, rng.choice(GOLDEN)) if rng.random() < 0.7 else random_string(rng) for _ in range(number)]
    return GOLDEN + found


@pytest.fixture(scope="module")
def vocabularies():
    wordnet = load_wordnet()
    counts = {hashtag: number for number, hashtag in enumerate(GOLDEN, start=1)}
    return {
        (name, policy): Vocabulary.build(name, wordnet, counts=counts if name == "8.5k" else None, **options)
        for name in ("1.5k", "8.5k", "17k", "coco")
        for policy, options in POLICIES.items()
    }


@pytest.mark.parametrize("number", [1500, pytest.param(20_000, marks=pytest.mark.long)])
def test_explain_match_labels_and_mapping_agree_on_every_string(vocabularies, number):
    for vocabulary in vocabularies.values():
        fresh = HashtagMapping(vocabulary)
        labeled = 0
        for text in strings(number):
            labels = vocabulary.labels([text]).tolist()
            match = vocabulary.match(text)
            explained = [int(what.partition(":")[0]) for step, what in fresh.explain(text) if step == "label"]
            assert labels == explained == list(fresh.map(text).labels), text
            assert labels == ([] if match is None else [match.label]), text
            if match is not None:
                assert vocabulary.synsets[match.label] == match.synset
                assert 0 <= match.distance <= vocabulary.policy.max_distance
            labeled += bool(labels)
        assert labeled > 40


def labels_by_key(folder) -> dict[str, list[int]]:
    dataset = HashtagDataset(folder)
    return {(sample := dataset[i])["key"]: sample["labels"].tolist() for i in range(len(dataset))}


@pytest.mark.parametrize("name", ["1.5k", "8.5k", "17k", "coco"])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_written_indexed_viewed_and_trained_on_is_what_is_explained(vocabularies, tmp_path, name, policy):
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    vocabulary = vocabularies[name, policy]
    texts = [text for text in strings(300) if text and text.encode("utf-8", "replace").decode() == text]
    expected = {f"k{i}": labels for i, text in enumerate(texts) if (labels := vocabulary.labels([text]).tolist())}
    image = jpeg(0)
    (tmp_path / "a.jpg").write_bytes(image)

    table = pa.table({"key": [f"k{i}" for i in range(len(texts))], "hashtags": [[text] for text in texts]})
    pq.write_table(table, tmp_path / "posts.parquet")
    for i in range(len(texts)):
        (tmp_path / f"k{i}.jpg").symlink_to(tmp_path / "a.jpg")
    make_shards([str(tmp_path / "posts.parquet")], f"{tmp_path}/{{key}}.jpg", vocabulary, tmp_path / "made")
    assert labels_by_key(tmp_path / "made") == expected

    (tmp_path / "indexed").mkdir()
    samples = [(f"k{i}", image, {"hashtags": [text]}) for i, text in enumerate(texts)]
    write_shard(tmp_path / "indexed" / "0.tar", samples)
    index_shard(tmp_path / "indexed" / "0.tar", vocabulary)
    finish_dataset(tmp_path / "indexed", vocabulary)
    assert labels_by_key(tmp_path / "indexed") == expected

    other = vocabularies["coco" if name != "coco" else "1.5k", "default"]
    make_view(tmp_path / "made", tmp_path / "there", vocabulary=other)
    make_view(tmp_path / "there", tmp_path / "back", vocabulary=vocabulary)
    assert labels_by_key(tmp_path / "back") == expected
    there = read_labels(tmp_path / "there" / "shard-000000.tar")
    assert json.loads((tmp_path / "there" / "manifest.json").read_text())["num_images"] == len(there.rows)

    batch = training_batch(tmp_path / "made", f"agreement_{name}_{policy}", len(expected))
    trained = {}
    for place, key in enumerate(batch["keys"]):
        trained[key] = batch["labels"][batch["image_index"] == place].tolist()
    assert trained == expected


def training_batch(folder, name, size):
    from detectron2.config import get_cfg

    from wsl_d2.config import add_wsl_config
    from wsl_d2.data import register_hashtag_dataset

    cfg = get_cfg()
    add_wsl_config(cfg)
    register_hashtag_dataset(name, folder)
    cfg.DATASETS.TRAIN = (name,)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.RANDOM_RESIZED_CROP.SIZE = cfg.INPUT.TEST_RESIZE_SHORT_SIDE = 16
    cfg.DATALOADER.RESAMPLING.MODE = "natural"
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = size
    return next(iter(open_train_loader(cfg)))


def test_counts_give_exactly_the_labels_of_the_mapping():
    wordnet = load_wordnet()
    counts = {text: 1 + len(text) for text in strings(1500) if text}
    for policy in POLICIES.values():
        for name in ("17k", "8.5k"):
            vocabulary = Vocabulary.build(name, wordnet, counts=counts, **policy)
            given = np.unique(vocabulary.labels(counts))
            assert given.tolist() == list(range(len(vocabulary)))
