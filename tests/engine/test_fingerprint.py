"""The resume fingerprint: every key of the config is in it, or is one that may change."""

import json
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from wsl_d2 import add_wsl_config
from wsl_d2.engine.fingerprint import (
    _KEYS_THAT_CHANGE_WHAT_IS_SAVED,
    check_fingerprint,
    compare_fingerprints,
    resume_fingerprint,
)
from wsl_d2.errors import ConfigError
from wsl_d2.run_keys import (
    KEYS_OF_EVALUATION,
    KEYS_OF_PLACE_AND_SPEED,
    KEYS_OF_TOLERANCE,
    VALUES_WHERE_UNKNOWN,
    flatten,
    is_among,
)

FINGERPRINTS = Path(__file__).parent / "fingerprints"
MAY_CHANGE = KEYS_OF_PLACE_AND_SPEED + KEYS_OF_EVALUATION + KEYS_OF_TOLERANCE
# Our keys that change a run's numbers. A new key of ours belongs here, or in one of the lists of run_keys.py.
OURS_THAT_COUNT = {
    "DATALOADER.READ_STREAMS",
    "DATALOADER.RESAMPLING.MODE",
    "DATALOADER.RESAMPLING.THRESHOLD",
    "DATALOADER.SHUFFLE_WINDOW_SHARDS",
    "INPUT.DECODING",
    "INPUT.RANDOM_RESIZED_CROP.RATIO",
    "INPUT.RANDOM_RESIZED_CROP.SCALE",
    "INPUT.RANDOM_RESIZED_CROP.SIZE",
    "INPUT.TEST_RESIZE_SHORT_SIDE",
    "MODEL.HASHTAG_CLASSIFIER.HEAD_INIT_STD",
    "MODEL.HASHTAG_CLASSIFIER.LOSS",
    "MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES",
    "MODEL.RESNEXT.STAGE_BLOCKS",
    "MODEL.RESNEXT.ZERO_INIT_RESIDUAL",
    "SOLVER.AMP.DTYPE",
    "SOLVER.EMA_DECAY",
    "SOLVER.GRADIENT_COMPRESSION",
    "SOLVER.LR_PER_256_IMAGES",
    "SOLVER.NUM_LR_HALVINGS",
    "SOLVER.TOTAL_EPOCHS",
    "SOLVER.TOTAL_IMAGES",
    "SOLVER.WARMUP_IMAGES",
}


def full_config():
    cfg = get_cfg()
    add_wsl_config(cfg)
    return cfg


def test_every_name_of_the_lists_is_a_key_or_group_of_the_config():
    keys = flatten(full_config())
    for name in MAY_CHANGE + _KEYS_THAT_CHANGE_WHAT_IS_SAVED:
        assert any(is_among(key, (name,)) for key in keys), name


def test_every_key_of_the_config_counts_or_may_change():
    cfg = full_config()
    counted = resume_fingerprint(cfg).keys()
    for key in flatten(cfg):
        must_count = not is_among(key, MAY_CHANGE) or is_among(key, _KEYS_THAT_CHANGE_WHAT_IS_SAVED)
        assert (key in counted) == must_count, key


def test_it_was_decided_of_each_key_of_ours_whether_it_counts():
    cfg = full_config()
    ours = flatten(cfg).keys() - flatten(get_cfg()).keys()
    assert ours & resume_fingerprint(cfg).keys() == OURS_THAT_COUNT


@pytest.mark.parametrize("key", ["SEED", "MODEL.WEIGHTS", "SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER", "DATASETS.TRAIN"])
def test_what_decides_the_numbers_of_any_run_counts(key):
    assert key in resume_fingerprint(full_config())


def test_facts_of_the_data_are_part_of_it():
    cfg = full_config()
    found = resume_fingerprint(cfg, {"number of images": 48, "ghost batch size": 8})
    assert found == resume_fingerprint(cfg) | {"number of images": "48", "ghost batch size": "8"}


def test_differences_are_named():
    assert compare_fingerprints({"A": "1", "B": "2", "C": "3"}, {"A": "1", "B": "4", "C": "3"}) == ["B was 2, is now 4"]


def test_a_key_that_one_side_does_not_know_counts_as_its_default():
    now = resume_fingerprint(full_config())
    old = {name: value for name, value in now.items() if name != "SOLVER.EMA_DECAY"}
    assert compare_fingerprints(old, now) == compare_fingerprints(now, old) == []
    now["SOLVER.EMA_DECAY"] = "0.5"
    assert compare_fingerprints(old, now) == ["SOLVER.EMA_DECAY was 0, is now 0.5"]
    assert compare_fingerprints(now, old) == ["SOLVER.EMA_DECAY was 0.5, is now 0"]
    assert compare_fingerprints(old | {"SOLVER.OF_OLD": "1"}, old) == ["SOLVER.OF_OLD was 1, is now not there"]


def test_a_key_whose_default_changed_the_numbers_has_the_value_of_before(monkeypatch):
    monkeypatch.setitem(VALUES_WHERE_UNKNOWN, "SOLVER.EMA_DECAY", "0.9")
    assert compare_fingerprints({}, {"SOLVER.EMA_DECAY": "0.0"}) == ["SOLVER.EMA_DECAY was 0.9, is now 0.0"]
    assert compare_fingerprints({}, {"SOLVER.EMA_DECAY": "0.9"}) == []


def test_facts_that_one_side_does_not_know_are_not_compared():
    assert compare_fingerprints({"number of images": "48"}, {"SHA-256 of the labels": "ab"}) == []


@pytest.mark.parametrize("path", sorted(FINGERPRINTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_runs_of_earlier_versions_resume(path):
    """A file of this folder is what a checkpoint of that version holds. If this fails, resuming such a run is refused:
    give the new key the default that computes as before, or an entry in VALUES_WHERE_UNKNOWN."""
    saved = json.loads(path.read_text())
    now = {name: saved.get(name, value) for name, value in resume_fingerprint(full_config()).items()}
    assert compare_fingerprints(saved, now) == []


def test_what_cannot_be_overridden_is_said(tmp_path):
    saved, now = {"A": "1"}, {"A": "2"}
    with pytest.raises(ConfigError, match="belongs to another run: A was 1"):
        check_fingerprint(saved, now, str(tmp_path), override=False, iteration=6, misfit="its tensor x is [1]")
    with pytest.raises(
        ConfigError, match=r"also not with --override-resume: its tensor x is \[1\] \(A was 1, is now 2"
    ):
        check_fingerprint(saved, now, str(tmp_path), override=True, iteration=6, misfit="its tensor x is [1]")
    assert not list(tmp_path.iterdir())


def test_another_run_is_refused_or_the_override_recorded(tmp_path):
    saved, now = {"SEED": "0", "A": "1"}, {"SEED": "5", "A": "1"}
    check_fingerprint(saved, dict(saved), str(tmp_path), override=False, iteration=6)
    with pytest.raises(ConfigError, match="belongs to another run: SEED was 0, is now 5. Restore the old values"):
        check_fingerprint(saved, now, str(tmp_path), override=False, iteration=6)
    assert not list(tmp_path.iterdir())
    check_fingerprint(saved, now, "", override=True, iteration=6)  # as in processes other than the first
    for iteration in (6, 13):
        check_fingerprint(saved, now, str(tmp_path), override=True, iteration=iteration)
    rows = [json.loads(line) for line in (tmp_path / "resume_overrides.json").read_text().splitlines()]
    assert [(row["iteration"], row["differences"]) for row in rows] == [
        (6, ["SEED was 0, is now 5"]),
        (13, ["SEED was 0, is now 5"]),
    ]
