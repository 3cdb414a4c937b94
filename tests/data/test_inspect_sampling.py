import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_data import write_hashtag_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("mode", "draws"), [("natural", 48), ("sqrt", 64)])
def test_the_epoch_is_told_before_training(tmp_path, toy_vocabulary, mode, draws):
    write_hashtag_folder(tmp_path / "toy", toy_vocabulary)
    command = [sys.executable, str(ROOT / "tools/inspect_sampling.py"), "--output", str(tmp_path / "p.svg")]
    command += ["--config-file", str(ROOT / "configs/Base-Miniworld-Pretraining.yaml")]
    command += ["DATASETS.HASHTAG_FOLDERS", "[['inspected', 'toy']]", "DATASETS.TRAIN", "('inspected',)"]
    command += ["DATALOADER.RESAMPLING.MODE", mode, "DATALOADER.RESAMPLING.THRESHOLD", "0.6"]
    environment = os.environ | {"DETECTRON2_DATASETS": str(tmp_path), "FVCORE_CACHE": str(tmp_path / "cache")}
    printed = [subprocess.run(command, capture_output=True, text=True, env=environment) for _ in range(2)]
    assert printed[0].returncode == 0, printed[0].stderr
    assert "48 labelled images, 4 of 4 hashtags on an image" in printed[0].stdout
    assert f"one epoch: {draws} draws" in printed[0].stdout
    assert printed[0].stdout == printed[1].stdout  # the second reads what the first kept
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1
    assert (tmp_path / "p.svg").read_text().count("<path") > 10


def test_a_dataset_that_is_not_there_is_one_clear_error():
    command = [sys.executable, str(ROOT / "tools/inspect_sampling.py")]
    command += ["--config-file", str(ROOT / "configs/Base-Miniworld-Pretraining.yaml")]
    command += ["DATASETS.HASHTAG_FOLDERS", "[['lost', '/nowhere']]", "DATASETS.TRAIN", "('lost',)"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: /nowhere/manifest.json")
