import pytest
from command_line import ROOT, wsl_d2
from toy_data import write_hashtag_folder

CONFIG = ROOT / "configs/Base-Miniworld-Pretraining.yaml"


@pytest.mark.parametrize(("mode", "draws"), [("natural", 48), ("sqrt", 64)])
def test_the_epoch_is_told_before_training(tmp_path, toy_vocabulary, mode, draws):
    write_hashtag_folder(tmp_path / "toy", toy_vocabulary)
    options = ["--output", tmp_path / "p.svg", "--config-file", CONFIG]
    options += ["DATASETS.HASHTAG_FOLDERS", "[['inspected', 'toy']]", "DATASETS.TRAIN", "('inspected',)"]
    options += ["DATALOADER.RESAMPLING.MODE", mode, "DATALOADER.RESAMPLING.THRESHOLD", "0.6"]
    places = {"DETECTRON2_DATASETS": tmp_path, "WSL_D2_CACHE": tmp_path / "cache"}
    printed = [wsl_d2("data", "sampling", *options, **places) for _ in range(2)]
    assert "48 labeled images, 4 of 4 hashtags on an image" in printed[0]
    assert f"one epoch: {draws} draws" in printed[0]
    assert printed[0] == printed[1]  # the second reads what the first kept
    assert len(list((tmp_path / "cache" / "resampling").rglob("*.npz"))) == 1
    assert (tmp_path / "p.svg").read_text().count("<path") > 10


def test_a_dataset_that_is_not_there_is_one_clear_error():
    options = ["--config-file", CONFIG, "DATASETS.HASHTAG_FOLDERS", "[['lost', '/nowhere']]"]
    printed = wsl_d2("data", "sampling", *options, "DATASETS.TRAIN", "('lost',)", code=2)
    assert printed.startswith("wsl-d2 data sampling: /nowhere/manifest.json does not exist")
