"""Keys that may differ between runs, and flat configs."""

import yaml
from detectron2.config import get_cfg

from wsl_d2 import add_wsl_config
from wsl_d2.run_keys import (
    KEYS_OF_EVALUATION,
    KEYS_OF_INITIALIZATION,
    KEYS_OF_PLACE_AND_SPEED,
    KEYS_OF_RANDOM_WEIGHTS,
    KEYS_OF_TOLERANCE,
    flatten,
    is_among,
    same_spelling,
)


def full_config():
    cfg = get_cfg()
    add_wsl_config(cfg)
    return cfg


def test_every_name_is_a_key_or_a_group_of_the_config():
    keys = flatten(full_config())
    lists = (KEYS_OF_PLACE_AND_SPEED, KEYS_OF_EVALUATION, KEYS_OF_TOLERANCE)
    for name in sum(lists, KEYS_OF_INITIALIZATION + KEYS_OF_RANDOM_WEIGHTS):
        assert any(is_among(key, (name,)) for key in keys), name


def test_the_lists_do_not_overlap_in_a_comparison():
    free = KEYS_OF_PLACE_AND_SPEED + KEYS_OF_INITIALIZATION
    assert not any(is_among(key, KEYS_OF_PLACE_AND_SPEED) for key in KEYS_OF_INITIALIZATION)
    assert not any(is_among(key, free) for key in KEYS_OF_RANDOM_WEIGHTS)


def test_a_config_and_the_yaml_that_detectron2_writes_of_it_are_flat_alike():
    cfg = full_config()
    assert flatten(yaml.safe_load(cfg.dump())) == flatten(cfg)
    assert flatten(cfg)["INPUT.MIN_SIZE_TRAIN"] == "[800]" and flatten(cfg)["MODEL.PIXEL_STD"] == "[1, 1, 1]"


def test_spelling():
    assert flatten({"A": {"B": (1.0, (2, 0.5)), "C": True}, "D": None, "E": "1.0"}) == {
        "A.B": "[1, [2, 0.5]]",
        "A.C": "True",
        "D": "None",
        "E": "'1.0'",
    }
    assert same_spelling({"A": "(1.0, 2)", "B": "nan", "C": "'x'"}) == {"A": "[1, 2]", "B": "nan", "C": "'x'"}


def test_a_name_stands_for_its_group_and_not_for_its_neighbors():
    assert is_among("TEST.AUG.FLIP", ("TEST",)) and is_among("TEST", ("TEST",))
    assert not is_among("TESTS", ("TEST",)) and not is_among("DATASETS.TEST", ("TEST",))
