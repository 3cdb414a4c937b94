import hashlib
import json
import os
import pickle
import re

import numpy as np
import pytest
from command_line import wsl_d2

from wsl_d2.hashtags import (
    HashtagCounts,
    MappingPolicy,
    Match,
    Vocabulary,
    VocabularyError,
    load_wordnet,
    normalize_hashtag,
    read_hashtag_counts,
)
from wsl_d2.hashtags.vocabulary import imagenet_1k_synsets

BROWN_BEAR, DOG, CANINE, CARNIVORE = "n02132136", "n02084071", "n02083346", "n02075296"
CRANE_BIRD, CRANE_MACHINE = "n02012849", "n03126707"


@pytest.fixture(scope="module")
def wordnet():
    return load_wordnet()


@pytest.fixture(scope="module")
def imagenet(wordnet):
    return Vocabulary.build("1.5k", wordnet)


@pytest.fixture(scope="module")
def all_nouns(wordnet):
    return Vocabulary.build("17k", wordnet)


@pytest.fixture
def animals(wordnet):
    return Vocabulary.build("animals", wordnet, synsets=[DOG, CARNIVORE, BROWN_BEAR])


def test_synonyms_are_one_label(imagenet):
    # brown bear, bruin, Ursus arctos: FACTS' own example of a canonical hashtag
    label = imagenet.synsets.index(BROWN_BEAR)
    assert imagenet.hashtags[label] == ("brownbear", "bruin", "ursusarctos")
    for hashtag in ("#brownbear", "#ursusarctos", "#UrsusArctos", "#brown_bear", "bruin"):
        assert imagenet.match(hashtag) == Match(label, BROWN_BEAR, 0)
    assert imagenet.labels(["#brownbear", "#ursusarctos"]).tolist() == [label]


def test_labels_are_sorted_unique_int64(imagenet):
    labels = imagenet.labels(["#toiletpaper", "#tench", "#nosuchhashtag", "#TENCH", "#brownbear"])
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, imagenet.synsets.index(BROWN_BEAR), len(imagenet) - 1]
    assert imagenet.labels([]).shape == (0,) and imagenet.labels([]).dtype == np.int64
    assert imagenet.labels(["#❤️", "#nosuchhashtag"]).shape == (0,)


def test_unknown_hashtags_match_nothing(imagenet):
    for hashtag in ("#nosuchhashtag", "#", "", "#love"):
        assert imagenet.match(hashtag) is None


def test_a_hashtag_of_several_synsets_goes_to_its_most_frequent_sense(imagenet, all_nouns, wordnet):
    machine, bird = wordnet.synsets("crane", "n")[3:5]
    assert [machine.offset(), bird.offset()] == [int(CRANE_MACHINE[1:]), int(CRANE_BIRD[1:])]
    assert imagenet.match("#crane").synset == CRANE_MACHINE
    assert all_nouns.match("#dog").synset == DOG
    assert all_nouns.match("#bank").synset == "n09213565"  # of a river: WordNet's first sense


def test_every_synset_of_imagenet_is_reached(imagenet):
    # "crane" is the machine, "maillot" the swimsuit: the bird and the tights get a compound.
    assert imagenet.built_with["disambiguated"] == {CRANE_BIRD: "cranebird", "n03710637": "maillottights"}
    assert imagenet.match("#CraneBird").synset == CRANE_BIRD
    assert len(imagenet) == 1000 and sorted(imagenet.synsets) == imagenet_1k_synsets()
    assert sum(map(len, imagenet.hashtags)) == 1806
    assert all(imagenet.match(group[0]).label == label for label, group in enumerate(imagenet.hashtags))


def test_coco(wordnet):
    coco = Vocabulary.build("coco", wordnet)
    assert len(coco) == 80
    assert coco.match("#hotdog").synset == "n07697537" and coco.match("#frisbee") is not None
    with pytest.raises(ValueError, match="chooses its own synsets"):
        Vocabulary.build("coco", wordnet, synsets=["n02084071"])


def test_senses_that_photos_mean_come_first(all_nouns):
    assert all_nouns.match("#tiger").synset == "n02129604"  # the feline; WordNet first lists a fierce person
    assert all_nouns.match("#otter").synset == "n02444819"  # the animal, not its fur


def test_all_nouns(all_nouns, wordnet):
    every = {normalize_hashtag(lemma) for lemma in wordnet.all_lemma_names("n")} - {""}
    assert {hashtag for group in all_nouns.hashtags for hashtag in group} == every
    assert list(all_nouns.synsets) == sorted(set(all_nouns.synsets))


def animals_within(wordnet, distance):
    return Vocabulary.build("animals", wordnet, synsets=[DOG, CARNIVORE, BROWN_BEAR], max_distance=distance)


def test_nearest_hypernym_and_its_distance(animals, wordnet):
    # poodle -> dog; wolf -> canine -> carnivore; puppy -> dog
    assert animals.match("#poodle") is None
    one, two = animals_within(wordnet, 1), animals_within(wordnet, 2)
    assert one.match("#poodle") == Match(one.synsets.index(DOG), DOG, 1)
    assert one.match("#wolf") is None
    assert two.match("#wolf") == Match(two.synsets.index(CARNIVORE), CARNIVORE, 2)
    assert animals_within(wordnet, 9).match("#dog").distance == 0
    assert one.labels(["#poodle", "#dog"]).tolist() == [one.synsets.index(DOG)]


def test_instances_count_as_one_step(wordnet):
    vocabulary = Vocabulary.build("rivers", wordnet, synsets=["n09411430"], max_distance=1)  # river.n.01
    assert vocabulary.match("#Danube") == Match(0, "n09411430", 1)


def test_the_policy_is_part_of_the_vocabulary(wordnet, animals, tmp_path):
    near = animals_within(wordnet, 3)
    assert near.checksum != animals.checksum and near.policy == MappingPolicy(max_distance=3)
    near.save(tmp_path / "v.json")
    assert Vocabulary.load(tmp_path / "v.json").match("#poodle").synset == DOG
    for wrong in ({"max_distance": -1}, {"ambiguous": "first"}):
        with pytest.raises(ValueError, match="0 or more; got -1|most_frequent, drop, all; got 'first'"):
            Vocabulary.build("animals", wordnet, synsets=[DOG], **wrong)


def test_a_vocabulary_of_other_rules_maps_nothing(animals, tmp_path, monkeypatch):
    animals.save(tmp_path / "v.json")
    monkeypatch.setattr("wsl_d2.hashtags.mapping._RULES", -1)
    from wsl_d2.hashtags.mapping import rules_checksum

    rules_checksum.cache_clear()
    try:
        with pytest.raises(VocabularyError, match="was built for the mapping rules .* build the vocabulary again"):
            Vocabulary.load(tmp_path / "v.json").match("#dog")
    finally:
        monkeypatch.undo()
        rules_checksum.cache_clear()


def test_exact_matching_knows_spellings_alone():
    exact = Vocabulary("classes", ["are", "canon"], [["are"], ["canon"]], policy=MappingPolicy(matching="exact"))
    assert exact.labels(["#are", "canon", "canons"]).tolist() == [0, 1] and exact.match("canons") is None


def test_counts_choose_the_most_frequent(wordnet, monkeypatch):
    counts = {
        "#dog": 50,
        "#Dog": 7,
        "#brownbear": 30,
        "#ursusarctos": 28,
        "#tench": 3,
        "#crane": 0,
        "#qqq": 9,
    }
    seen = Vocabulary.build("17k", wordnet, counts=counts)
    assert seen.synsets == ("n01440764", DOG, BROWN_BEAR)
    # All synonyms come along, seen or not; "bruin" first of all names another noun.
    assert seen.hashtags[2] == ("brownbear", "ursusarctos")
    assert seen.match("#Tinca_tinca").synset == "n01440764"
    monkeypatch.setattr("wsl_d2.hashtags.vocabulary.NUM_MOST_FREQUENT", 1)
    assert Vocabulary.build("8.5k", wordnet, counts=counts).synsets == (BROWN_BEAR,)  # 30 + 28 > 50 + 7


def test_counts_keep_what_the_mapping_reaches_and_nothing_else(wordnet):
    counts = {"#dogs": 4, "#goldenretrieverpuppy": 3, "🐱": 2, "#canon": 99, "#homemadepizza": 1, "#doooog": 1}
    seen = Vocabulary.build("17k", wordnet, counts=counts)
    assert {seen.match(hashtag).synset for hashtag in counts if hashtag != "#canon"} == set(seen.synsets)
    assert seen.match("#canon") is None and len(seen) == 4


def test_build_refuses_what_it_cannot_build(wordnet):
    with pytest.raises(ValueError, match="'8.5k'.*needs counts"):
        Vocabulary.build("8.5k", wordnet)
    with pytest.raises(ValueError, match=r"unknown vocabulary '2k'; choose one of 1\.5k, 8\.5k, 17k, coco, or"):
        Vocabulary.build("2k", wordnet)
    with pytest.raises(ValueError, match="'1.5k' is built in"):
        Vocabulary.build("1.5k", wordnet, synsets=[DOG])
    with pytest.raises(ValueError, match="no noun synset n00000001"):
        Vocabulary.build("mine", wordnet, synsets=["n00000001"])
    with pytest.raises(ValueError, match="has no labels"):
        Vocabulary.build("mine", wordnet, synsets=[])
    with pytest.raises(ValueError, match="none of the 1 counted hashtags is a noun"):
        Vocabulary.build("17k", wordnet, counts={"#qqqq": 5})


def test_the_order_of_the_input_does_not_matter(wordnet, animals):
    again = Vocabulary.build("other name", wordnet, synsets=iter([BROWN_BEAR, DOG, CARNIVORE, DOG]))
    assert again == animals and again.checksum == animals.checksum
    assert Vocabulary.build("animals", wordnet, synsets=[BROWN_BEAR, DOG]) != animals


def test_saved_and_loaded_it_is_the_same(imagenet, tmp_path):
    path = tmp_path / "new folder" / "vocabulary.json"
    imagenet.save(path)
    loaded = Vocabulary.load(path)
    assert loaded == imagenet
    for name in ("name", "synsets", "hashtags", "checksum", "built_with"):
        assert getattr(loaded, name) == getattr(imagenet, name)
    assert os.listdir(path.parent) == ["vocabulary.json"]


def test_the_file_is_the_documented_one(animals, tmp_path):
    path = tmp_path / "vocabulary.json"
    animals.save(path)
    content = json.loads(path.read_text())
    assert content["format"] == "wsl_d2 vocabulary" and content["format_version"] == 2
    assert content["wordnet_version"] == "3.0" and content["name"] == "animals"
    # Checksum recomputed by hand: canonical JSON of all that decides a label.
    canonical = json.dumps(
        {key: content[key] for key in ("hashtags", "synsets", "wordnet_version", "policy", "rules")},
        sort_keys=True,
        separators=(",", ":"),
    )
    assert content["checksum"] == hashlib.sha256(canonical.encode()).hexdigest() == animals.checksum


def test_loading_needs_no_wordnet(animals, tmp_path, monkeypatch):
    animals.save(tmp_path / "vocabulary.json")
    monkeypatch.setenv("WORDNET_HOME", str(tmp_path))
    assert Vocabulary.load(tmp_path / "vocabulary.json") == animals


def test_it_travels_to_worker_processes(animals):
    assert pickle.loads(pickle.dumps(animals)) == animals


def _tampered(vocabulary, path, **changes):
    vocabulary.save(path)
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))
    return path


def test_an_edited_file_is_refused_with_both_checksums(animals, tmp_path):
    edited = [[*animals.hashtags[0], "sneaked"], *animals.hashtags[1:]]
    path = _tampered(animals, tmp_path / "vocabulary.json", hashtags=edited)
    with pytest.raises(VocabularyError) as caught:
        Vocabulary.load(path)
    assert str(path) in str(caught.value) and animals.checksum in str(caught.value)
    assert len(set(re.findall(r"[0-9a-f]{64}", str(caught.value)))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wordnet_version": "3.1"}, r"has wordnet_version '3\.1', but this version of wsl_d2 reads '3\.0'"),
        ({"format_version": 1}, "has format_version 1, but this version of wsl_d2 reads 2"),
        ({"format": "something else"}, "its format is 'something else', expected 'wsl_d2 vocabulary'"),
        ({"policy": {"max_distance": -3}}, "'policy' cannot be read .*0 or more; got -3"),
        ({"policy": {"depth": 3}}, "'policy' cannot be read"),
        ({"synsets": "n02084071"}, "'synsets' must be a list of strings"),
        ({"hashtags": [["dog"], [1]]}, "'hashtags' must be a list of lists of strings"),
    ],
)
def test_files_of_another_kind_are_refused(animals, tmp_path, changes, message):
    path = _tampered(animals, tmp_path / "vocabulary.json", **changes)
    with pytest.raises(VocabularyError, match=re.escape(str(path)) + ".*" + message):
        Vocabulary.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_what_is_no_vocabulary_is_refused(tmp_path, text):
    path = tmp_path / "vocabulary.json"
    path.write_text(text)
    with pytest.raises(VocabularyError, match=re.escape(f"{path} is not a vocabulary file")):
        Vocabulary.load(path)


@pytest.mark.parametrize(
    ("synsets", "hashtags", "message"),
    [
        (["n1", "n2"], [["a"]], "2 synsets but 1 groups"),
        (["n1", "n2"], [["a"], []], r"label 1 \(n2\) has no hashtag"),
        (["n1", "n2"], [["a"], ["b", "a"]], "'a' has labels 0 and 1"),
        (["n1", "n1"], [["a"], ["b"]], "synsets occur twice: n1"),
        (["n1"], [["Brown Bear"]], r"'Brown Bear' of label 0 is not in normalized form \('brownbear'\)"),
    ],
)
def test_contradictions_are_refused(synsets, hashtags, message):
    with pytest.raises(VocabularyError, match=message):
        Vocabulary("mine", synsets, hashtags)


def test_a_failed_save_leaves_the_old_file(animals, tmp_path, monkeypatch):
    path = tmp_path / "vocabulary.json"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        animals.save(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["vocabulary.json"]


def test_counts_are_read_from_json_and_text(tmp_path):
    (tmp_path / "counts.json").write_text('{"#dog": 3, "bruin": 0}')
    (tmp_path / "counts.tsv").write_text("#dog\t3\n\nbruin\t0\n#dog\t2\n")
    assert read_hashtag_counts(tmp_path / "counts.json") == {"#dog": 3, "bruin": 0}
    assert read_hashtag_counts(tmp_path / "counts.tsv") == {"#dog": 5, "bruin": 0}
    (tmp_path / "bad.tsv").write_text("#dog\t3\n#cat\tmany\n")
    with pytest.raises(ValueError, match=r"bad\.tsv, line 2: expected a hashtag, a tab and its number"):
        read_hashtag_counts(tmp_path / "bad.tsv")
    (tmp_path / "bad.json").write_text('{"#dog": -1}')
    with pytest.raises(ValueError, match=r"bad\.json, entry '#dog'"):
        read_hashtag_counts(tmp_path / "bad.json")
    (tmp_path / "empty.tsv").write_text("\n")
    with pytest.raises(ValueError, match="there is no hashtag in it"):
        read_hashtag_counts(tmp_path / "empty.tsv")


def test_a_file_of_counts_is_never_in_memory_as_a_whole(tmp_path, wordnet):
    import tracemalloc

    nouns = [("dog", 9), ("cats", 7), ("brownbear", 1)]
    lines = [f"{name}\t{count}\n" for name, count in nouns] + [f"{i:040d}\t1\n" for i in range(20_000)]
    (tmp_path / "counts.tsv").write_text("".join(lines))
    counts = HashtagCounts(tmp_path / "counts.tsv")
    tracemalloc.start()
    try:
        assert sum(1 for _ in counts.items()) == 20_003
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (tmp_path / "counts.tsv").stat().st_size / 4
    built = Vocabulary.build("17k", wordnet, counts=counts, min_images=5)
    assert built == Vocabulary.build("17k", wordnet, counts=dict(nouns), min_images=5) and len(built) == 2
    assert built.built_with["num_hashtags_counted"] == 20_003


def test_the_command_writes_a_vocabulary_and_says_its_size(tmp_path, imagenet):
    output = tmp_path / "vocabulary.json"
    printed = wsl_d2("hashtags", "vocabulary", "--vocabulary", "1.5k", "--output", output)
    assert f"1000 labels, 1806 hashtags, max_distance {imagenet.policy.max_distance}, " in printed
    assert f"checksum {imagenet.checksum}" in printed and CRANE_BIRD in printed
    assert Vocabulary.load(output) == imagenet
    refused = wsl_d2("hashtags", "vocabulary", "--vocabulary", "8.5k", "--output", tmp_path / "no.json", code=2)
    assert "--counts FILE" in refused and not (tmp_path / "no.json").exists()


def test_the_command_says_how_large_17k_is_without_counts_and_chooses_labels_by_them(tmp_path, all_nouns):
    output = tmp_path / "vocabulary.json"
    printed = wsl_d2("hashtags", "vocabulary", "--vocabulary", "17k", "--output", output)
    assert f"17k without --counts has {len(all_nouns):,} labels" in printed and len(all_nouns) > 60_000
    counts = tmp_path / "counts.tsv"
    counts.write_text("dog\t50\ndogs\t20\npizza\t30\nbrownbear\t5\nqxqxqx\t90\n")
    arguments = ["--vocabulary", "17k", "--counts", counts, "--output", output]
    printed = wsl_d2("hashtags", "vocabulary", *arguments)
    assert "3 labels" in printed and "without --counts" not in printed
    assert "2 labels" in wsl_d2("hashtags", "vocabulary", *arguments, "--min-images", 30)
    assert "1 labels" in wsl_d2("hashtags", "vocabulary", *arguments, "--max-labels", 1)
    assert Vocabulary.load(output).synsets == ("n02084071",)
