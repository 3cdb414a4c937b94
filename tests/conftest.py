"""Fixtures that tests of several rooms share, and the report of injected faults."""

import json
import os
from pathlib import Path

import pytest
from toy_data import TOY_SYNSETS, write_hashtag_folder

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def toy_vocabulary():
    from wsl_d2.hashtags import Vocabulary, load_wordnet

    return Vocabulary.build("toy", load_wordnet(), synsets=TOY_SYNSETS)


@pytest.fixture()
def hashtag_folder(tmp_path, toy_vocabulary):
    return write_hashtag_folder(tmp_path / "hashtags", toy_vocabulary)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory, toy_vocabulary):
    """A datasets folder for runs of tools/train_net.py; see training_runs.py."""
    root = tmp_path_factory.mktemp("datasets")
    write_hashtag_folder(root / "toy" / "train", toy_vocabulary, num_images=48)
    write_hashtag_folder(root / "toy" / "val", toy_vocabulary, num_images=20)
    return root


@pytest.fixture(scope="module")
def whole_run(datasets, tmp_path_factory):
    """The output of a run that nothing disturbs."""
    from training_runs import train

    output = tmp_path_factory.mktemp("whole")
    train(datasets, output)
    return output


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_addoption(parser):
    parser.addoption("--fault-report", type=Path, help="JSON file for the counts of injected faults")


_faults = {}


@pytest.fixture()
def survived():
    """Called by a test at its end: ``survived(row, fault, number, outcome)`` notes how many injected faults of that
    row of the fault matrix the project came through, and how. A test that fails notes nothing."""

    def note(row: int, fault: str, number: int, outcome: str) -> None:
        entry = _faults.setdefault(row, {"fault": fault, "injected": 0, "outcomes": []})
        entry["injected"] += number
        if outcome not in entry["outcomes"]:
            entry["outcomes"].append(outcome)

    return note


def pytest_sessionfinish(session, exitstatus):
    path = session.config.getoption("--fault-report")
    if path:
        report = {"passed": exitstatus == 0, "rows": {str(row): _faults[row] for row in sorted(_faults)}}
        path.write_text(json.dumps(report, indent=2) + "\n")
