import re

import pytest

from wsl_d2.hashtags import WordNetError, load_wordnet, synset_to_wnid, wnid_to_synset
from wsl_d2.hashtags.wordnet import REQUIRED_FILES, find_wordnet

_LICENCE_LINE = "  21 WordNet {} Copyright 2006 by Princeton University.  All rights reserved.  \n"


@pytest.fixture
def fake_wordnet(tmp_path):
    """A folder that has the files of a WordNet, of any version, but hardly a content."""

    def make(version):
        for name in REQUIRED_FILES:
            (tmp_path / name).write_text(_LICENCE_LINE.format(version))
        return tmp_path

    return make


def test_imagenet_ids_are_offsets_into_the_wordnet_that_is_opened():
    wordnet = load_wordnet()
    assert wordnet.get_version() == "3.0"
    ids = {"dog.n.01": "n02084071", "tench.n.01": "n01440764", "toilet_tissue.n.01": "n15075141"}
    for name, wnid in ids.items():
        assert synset_to_wnid(wordnet.synset(name)) == wnid
        assert wnid_to_synset(wordnet, wnid).name() == name


def test_opening_twice_gives_the_same_reader():
    assert load_wordnet() is load_wordnet()


def test_lexnames_are_known_whether_or_not_the_file_is_there():
    wordnet = load_wordnet()
    assert wordnet.synset("dog.n.01").lexname() == "noun.animal"
    assert wordnet.synset("entity.n.01").lexname() == "noun.Tops"
    assert wordnet.synset("run.v.01").lexname() == "verb.motion"


def test_senses_come_in_order_of_frequency():
    assert load_wordnet().synsets("dog", "n")[0].name() == "dog.n.01"
    assert {s.name() for s in load_wordnet().synset("dog.n.01").hypernyms()} == {
        "canine.n.02",
        "domestic_animal.n.01",
    }


def test_wordnet_3_1_is_refused_with_the_ways_to_get_3_0(fake_wordnet):
    folder = fake_wordnet("3.1")
    with pytest.raises(WordNetError) as caught:
        load_wordnet(folder)
    message = str(caught.value)
    assert f"{folder / 'data.noun'} is WordNet 3.1, but WordNet 3.0 is needed" in message
    for way in ("make setup", "wordnet-base", "WORDNET_HOME"):
        assert way in message


def test_missing_files_are_named(fake_wordnet):
    folder = fake_wordnet("3.0")
    (folder / "index.noun").unlink()
    (folder / "adv.exc").unlink()
    message = f"{folder} does not hold WordNet 3.0: index.noun, adv.exc missing"
    with pytest.raises(WordNetError, match=re.escape(message)):
        load_wordnet(folder)


def test_wordnet_home_goes_before_everything_but_the_argument(fake_wordnet, monkeypatch, tmp_path_factory):
    real = find_wordnet()
    monkeypatch.setenv("WORDNET_HOME", str(fake_wordnet("3.1")))
    with pytest.raises(WordNetError, match=r"WordNet 3\.1"):
        load_wordnet()
    assert find_wordnet(real) == real
    parent = tmp_path_factory.mktemp("princeton")
    (parent / "dict").symlink_to(real)
    monkeypatch.setenv("WORDNET_HOME", str(parent))
    assert find_wordnet() == real


def test_the_cache_is_searched_first(monkeypatch, tmp_path):
    real = find_wordnet()
    monkeypatch.delenv("WORDNET_HOME", raising=False)
    monkeypatch.setenv("WSL_D2_CACHE", str(tmp_path))
    (tmp_path / "wordnet-3.0").symlink_to(real)
    assert find_wordnet() == real


def test_when_nothing_is_found_the_message_lists_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.delenv("WORDNET_HOME", raising=False)
    monkeypatch.setattr("wsl_d2.hashtags.wordnet._search_folders", lambda: [tmp_path / "nowhere"])
    message = f"was not found; looked in {tmp_path / 'nowhere'}. Three ways"
    with pytest.raises(WordNetError, match=re.escape(message)):
        load_wordnet()


@pytest.mark.parametrize("wnid", ["02084071", "n2084071", "v02084071", "n02084071 ", "dog.n.01", 2084071])
def test_malformed_ids_are_refused(wnid):
    with pytest.raises(ValueError, match=re.escape(repr(wnid)) + ".*like 'n02084071'"):
        wnid_to_synset(load_wordnet(), wnid)


def test_an_id_without_synset_is_refused():
    with pytest.raises(ValueError, match="no noun synset n02084072"):
        wnid_to_synset(load_wordnet(), "n02084072")


def test_only_nouns_have_ids():
    with pytest.raises(ValueError, match=r"run\.v\.01 is not a noun"):
        synset_to_wnid(load_wordnet().synset("run.v.01"))
