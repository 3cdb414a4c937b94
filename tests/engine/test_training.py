"""Runs of tools/train_net.py on a toy dataset, each in its own process."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from toy_data import write_hashtag_folder
from training_runs import (
    TORCHRUN,
    Run,
    assert_same_weights,
    losses,
    merged_records,
    train,
    wait_for_records,
    weights,
)


@pytest.fixture(scope="module")
def whole_run(datasets, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    train(datasets, output)
    return output


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


def test_sigkill_and_resume_give_the_same_losses_and_weights_to_the_bit(whole_run, datasets, tmp_path):
    killed = Run(datasets, tmp_path)
    wait_for_records(killed, tmp_path, 10)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "model_final.pth").exists()
    assert (tmp_path / "last_checkpoint").exists()
    resumed = train(datasets, tmp_path, flags=["--resume"], DATALOADER__NUM_WORKERS=2)
    start = int(re.search(r"Starting training from iteration (\d+)", resumed.output).group(1))
    assert start >= 7
    assert losses(tmp_path) == losses(whole_run)
    assert_same_weights(tmp_path, whole_run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_for_requeueing(whole_run, datasets, tmp_path, number):
    stopped = Run(datasets, tmp_path)
    wait_for_records(stopped, tmp_path, 3)
    stopped.send_signal(number)
    assert stopped.wait() == 75
    assert f"{number.name}: saved after" in stopped.output
    saved = len(losses(tmp_path))
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{saved - 1:07d}.pth"
    resumed = train(datasets, tmp_path, flags=["--resume"])
    assert f"Starting training from iteration {saved}" in resumed.output
    assert losses(tmp_path) == losses(whole_run)
    assert_same_weights(tmp_path, whole_run)


def test_one_process_of_two_is_told_to_stop(datasets, tmp_path):
    """Both save and end at the same iteration; the launcher reports a failure, which is what requeues."""
    run = Run(datasets, tmp_path, launcher=TORCHRUN, SOLVER__TOTAL_IMAGES=24000)
    wait_for_records(run, tmp_path, 3)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    workers = [pid for pid in children if b"train_net.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGTERM)
    assert run.wait() != 0
    assert "exitcode  : 75" in run.output and "SIGTERM: saved after" in run.output
    saved = len(losses(tmp_path))
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{saved - 1:07d}.pth"


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "missing"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(whole_run, datasets, tmp_path, damage):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    newest, before = tmp_path / "model_0000027.pth", tmp_path / "model_0000020.pth"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"flipped": bytes(content), "truncated": bytes(content[:-1000]), "empty": b"", "missing": None}[damage]
    newest.unlink() if damaged is None else newest.write_bytes(damaged)
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text(newest.name)
    resumed = train(datasets, tmp_path, flags=["--resume"])
    output = resumed.output
    assert f"Checkpoint {newest}: " in output and "Starting training from iteration 21" in output
    assert losses(tmp_path) == losses(whole_run)
    if damage == "flipped":
        for path in (newest, before, tmp_path / "model_0000013.pth"):
            path.write_bytes(b"nothing")
        (tmp_path / "last_checkpoint").write_text(newest.name)
        result = train(datasets, tmp_path, check=False, flags=["--resume"])
        assert result.returncode == 1 and f"error: no checkpoint in {tmp_path} can be resumed from" in result.stderr


@pytest.mark.parametrize("launcher", ["torchrun", "launch"])
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


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"SEED": 5}, "SEED was 0, is now 5"),
        (
            {"DATALOADER__LABEL_NOISE__FRACTION": 0.5},
            "DATALOADER.LABEL_NOISE.FRACTION was 0.0, is now 0.5",
        ),
    ],
)
def test_changed_settings_are_refused_on_resume(whole_run, datasets, tmp_path, changed, message):
    (tmp_path / "last_checkpoint").write_text("model_0000006.pth")
    state = torch.load(whole_run / "model_final.pth", weights_only=True)
    torch.save(state, tmp_path / "model_0000006.pth")
    result = train(datasets, tmp_path, check=False, flags=["--resume"], **changed)
    assert result.returncode == 1
    assert f"belongs to another run: {message}. Restore the old values" in result.stderr


def test_label_noise_is_for_training_alone(whole_run, datasets, tmp_path):
    train(datasets, tmp_path, DATALOADER__LABEL_NOISE__FRACTION=1.0, DATASETS__TEST="('toy_train',)")
    assert merged_records(tmp_path)["loss_hashtag"] != merged_records(whole_run)["loss_hashtag"]
    log = (tmp_path / "log.txt").read_text()
    assert "100% of the training labels are replaced (seed 0)" in log
    train(datasets, tmp_path / "clean", DATASETS__TEST="('toy_train',)")
    # On labels that are all replaced, the noisy run would be the better one.
    noisy, clean = (merged_records(folder)["hashtag/top1"] for folder in (tmp_path, tmp_path / "clean"))
    assert noisy < clean


def test_an_evaluation_set_of_another_vocabulary_is_refused(datasets, tmp_path):
    from wsl_d2.hashtags import Vocabulary, load_wordnet

    other = Vocabulary.build("other", load_wordnet(), synsets=["n02084071", "n02121620", "n01503061", "n04468005"])
    write_hashtag_folder(datasets / "other", other)
    folders = "[['toy_train', 'toy/train'], ['other', 'other']]"
    result = train(datasets, tmp_path, check=False, DATASETS__HASHTAG_FOLDERS=folders, DATASETS__TEST="('other',)")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(r"error: DATASETS.TEST other .* has vocabulary 'other' \w{12}, but .* has 'toy'", result.stderr)


def test_a_missing_shard_stops_before_the_first_iteration(datasets, toy_vocabulary, tmp_path):
    folder = write_hashtag_folder(datasets / "gap", toy_vocabulary)
    (folder / "shard-000001.tar").unlink()
    folders = "[['toy_train', 'gap'], ['toy_val', 'toy/val']]"
    result = train(datasets, tmp_path, check=False, DATASETS__HASHTAG_FOLDERS=folders)
    assert result.returncode == 1
    assert "error: 1 of 3 shards cannot be used" in result.stderr and "shard-000001.tar is missing" in result.stderr
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
    assert result.returncode == 1
    assert re.search(r"error: \d+ of \d+ images could not be decoded, more than DATALOADER.MAX_DAMAGED", result.stderr)


def test_an_unknown_key_on_the_command_line_is_one_clear_error(datasets, tmp_path):
    result = train(datasets, tmp_path, check=False, SOLVER__LR_PER_256=1)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: command line: unknown config key SOLVER.LR_PER_256. Did you mean" in result.stderr


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
    assert result.returncode == 1 and "the classifier's head does not fit" in result.stderr
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
