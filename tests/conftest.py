"""Fixtures that tests of several rooms share."""

import os

import pytest
from toy_data import TOY_SYNSETS, write_hashtag_folder

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WSL_D2_REGISTER"] = "1"  # the hashtag tools would switch it off, and tests call them in this process


@pytest.fixture(scope="session")
def toy_vocabulary():
    from wsl_d2.hashtags import Vocabulary, load_wordnet

    return Vocabulary.build("toy", load_wordnet(), synsets=TOY_SYNSETS)


@pytest.fixture()
def hashtag_folder(tmp_path, toy_vocabulary):
    return write_hashtag_folder(tmp_path / "hashtags", toy_vocabulary)
