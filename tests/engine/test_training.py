"""Runs of tools/train_net.py on a toy dataset, each in its own process."""

import json
import re
import sys

import pytest
import torch
from toy_data import write_hashtag_folder
from training_runs import (
    TORCHRUN,
    losses,
    merged_records,
    train,
    weights,
)


def test_a_run_records_every_iteration_and_exports_its_backbone(whole_run):
    assert sorted(losses(whole_run)) == list(range(30))
    last = merged_records(whole_run)
    assert last["hashtag/num_images"] == 20 and last["images_seen"] == 240
    exported = torch.load(whole_run / "backbone.pth", weights_only=True)
    assert exported["matching_heuristics"] is True
    assert exported["wsl_d2"]["images_seen"] == 240 and exported["wsl_d2"]["input_format"] == "RGB"
    final = weights(whole_run)
    for name, tensor in exported["model"].items():
        assert torch.equal(tensor, final[f"backbone.{name}"]), name


@pytest.mark.parametrize("launcher", ["launch", pytest.param("torchrun", marks=pytest.mark.long)])
def test_two_processes_give_the_loss_curve_of_one(datasets, tmp_path, launcher):
    """The one process forms batch-norm groups of the same 4 images by micro-batches."""
    train(datasets, tmp_path / "one", SOLVER__IMS_PER_MICRO_BATCH=4)
    if launcher == "torchrun":
        kwargs = {"launcher": TORCHRUN}
    else:
        kwargs = {"launcher": (sys.executable,), "flags": ["--num-gpus", "2", "--dist-url", "auto"]}
    train(datasets, tmp_path / "two", **kwargs)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    for iteration in one:
        assert two[iteration] == pytest.approx(one[iteration], rel=2e-4), iteration
    assert merged_records(tmp_path / "two")["hashtag/num_images"] == 20
    for name, tensor in weights(tmp_path / "one").items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=1e-4)


def test_an_evaluation_set_of_another_vocabulary_is_refused(datasets, tmp_path):
    from wsl_d2.hashtags import Vocabulary, load_wordnet

    other = Vocabulary.build("other", load_wordnet(), synsets=["n02084071", "n02121620", "n01503061", "n04468005"])
    write_hashtag_folder(datasets / "other", other)
    folders = "[['toy_train', 'toy/train'], ['other', 'other']]"
    result = train(datasets, tmp_path, check=False, DATASETS__HASHTAG_FOLDERS=folders, DATASETS__TEST="('other',)")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(r"DATASETS.TEST other .* has vocabulary 'other' \w{12}, but .* has 'toy'", result.stderr)


def test_a_missing_shard_stops_before_the_first_iteration(datasets, toy_vocabulary, tmp_path):
    folder = write_hashtag_folder(datasets / "gap", toy_vocabulary)
    (folder / "shard-000001.tar").unlink()
    folders = "[['toy_train', 'gap'], ['toy_val', 'toy/val']]"
    result = train(datasets, tmp_path, check=False, DATASETS__HASHTAG_FOLDERS=folders)
    assert result.returncode == 2
    assert "1 of 3 shards cannot be used" in result.stderr and "shard-000001.tar is missing" in result.stderr
    assert not (tmp_path / "metrics.json").exists() or not (tmp_path / "metrics.json").read_text()


def test_damaged_images_are_counted_and_too_many_stop_the_run(datasets, toy_vocabulary, tmp_path):
    write_hashtag_folder(datasets / "one_bad", toy_vocabulary, damaged={3})
    folders = "[['toy_train', 'one_bad'], ['toy_val', 'toy/val']]"
    train(datasets, tmp_path / "a", DATASETS__HASHTAG_FOLDERS=folders, SOLVER__TOTAL_IMAGES=96)
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.json").read_text().splitlines()]
    assert max(record.get("skipped_images", 0) for record in records) >= 2  # once in each of the two epochs
    assert "skipped image '000003' (truncated" in (tmp_path / "a" / "log.txt").read_text()

    write_hashtag_folder(datasets / "many_bad", toy_vocabulary, damaged=set(range(0, 48, 2)))
    folders = "[['toy_train', 'many_bad'], ['toy_val', 'toy/val']]"
    result = train(datasets, tmp_path / "b", check=False, DATASETS__HASHTAG_FOLDERS=folders)
    assert result.returncode == 2
    assert re.search(r"\d+ of \d+ images could not be decoded, more than DATALOADER.MAX_DAMAGED", result.stderr)


def test_an_unknown_key_on_the_command_line_is_one_clear_error(datasets, tmp_path):
    result = train(datasets, tmp_path, check=False, SOLVER__LR_PER_256=1)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "command line: unknown config key SOLVER.LR_PER_256. Did you mean" in result.stderr


def test_mixed_precision_and_micro_batches_train_on_the_cpu(datasets, tmp_path):
    train(datasets, tmp_path, SOLVER__AMP__ENABLED=True, SOLVER__IMS_PER_MICRO_BATCH=2, SOLVER__TOTAL_IMAGES=80)
    assert len(losses(tmp_path)) == 10 and all(0 < loss < 10 for loss in losses(tmp_path).values())


def test_eval_only_gives_the_results_of_the_run(whole_run, datasets, tmp_path):
    expected = merged_records(whole_run)
    weights_of_run = str(whole_run / "model_final.pth")
    result = train(datasets, tmp_path, flags=["--eval-only"], MODEL__WEIGHTS=weights_of_run)
    found = re.search(r"copypaste: ([\d.]+),([\d.]+),20", result.output)
    assert [float(value) for value in found.groups()] == pytest.approx(
        [expected["hashtag/top1"], expected["hashtag/top5"]], abs=1e-3
    )
    backbone = str(whole_run / "backbone.pth")
    result = train(datasets, tmp_path, check=False, flags=["--eval-only"], MODEL__WEIGHTS=backbone)
    assert result.returncode == 2 and "the classifier's head does not fit" in result.stderr
    assert "head.weight" in result.stderr


def test_a_dry_run_tells_the_facts_and_writes_nothing(datasets, tmp_path):
    result = train(
        datasets, tmp_path / "out", flags=["--dry-run", "--images-per-second", "100"], SOLVER__TOTAL_IMAGES=360000
    )
    assert "length: 45,000 iterations of 8 images on 1 processes, 360,000 images" in result.stdout
    assert "time at 100.0 images/s: 1.0 hours" in result.stdout
    assert "epochs of" in result.stdout
    rates = dict(re.findall(r"learning rate at iteration ([\d,]+): ([\d.e-]+)", result.stdout))
    assert float(rates["5"]) == pytest.approx(0.0125, rel=1e-3)
    assert not (tmp_path / "out").exists()
