"""Makes the modules of datasets/, which are scripts and no part of the package, importable."""

import sys
from pathlib import Path

import pytest

DATASETS = Path(__file__).resolve().parents[2] / "datasets"
sys.path.insert(0, str(DATASETS))


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """A tiny world of seed 5, made in one process; tests must not change it."""
    from miniworld_renderer.prepare import TINY, WorldOptions, prepare_miniworld

    folder = tmp_path_factory.mktemp("world")
    prepare_miniworld(folder, WorldOptions(seed=5, **TINY), num_workers=1, progress=False)
    return folder
