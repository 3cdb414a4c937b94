"""Rows 8, 18 and 30 to 34 of the fault matrix: bad disks, changed settings, failing loggers, odd machines, leaks."""

import json
import os
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from toy_data import TOY_SYNSETS, write_hashtag_folder
from training_runs import INJECT, assert_same_state, dies_at, losses, merged_records, start_processes, train

from wsl_d2.data import make_view
from wsl_d2.hashtags import Vocabulary, load_wordnet

pytestmark = pytest.mark.fault


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"SEED": 5}, "SEED was 0, is now 5"),
        ({"SOLVER__LR_PER_256_IMAGES": 0.2}, "SOLVER.BASE_LR was 0.0125, is now 0.00625; SOLVER.LR_PER_256_IMAGES was"),
        ({"SOLVER__IMS_PER_MICRO_BATCH": 4}, "ghost batch size was 8, is now 4"),
    ],
)
def test_changed_settings_are_refused_on_resume(whole_run, datasets, tmp_path, changed, message, survived):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    result = train(datasets, tmp_path, check=False, flags=["--resume"], **changed)
    assert result.returncode == 2
    assert f"belongs to another run: {message}" in result.stderr and "Restore the old values" in result.stderr
    survived(30, "resumed with another seed, rate, group, data or labels", 1, "refused with the difference")


def test_other_data_is_refused_on_resume(whole_run, datasets, toy_vocabulary, tmp_path, survived):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    write_hashtag_folder(datasets / "toy" / "other", toy_vocabulary, num_images=56)
    folders = "[['toy_train', 'toy/other'], ['toy_val', 'toy/val']]"
    result = train(datasets, tmp_path, check=False, flags=["--resume"], DATASETS__HASHTAG_FOLDERS=folders)
    assert result.returncode == 2 and "number of images was 48, is now 56" in result.stderr
    assert "SHA-256 of the shards was" in result.stderr
    survived(30, "", 1, "refused with the difference")


def test_other_labels_of_the_same_images_are_refused_on_resume(whole_run, datasets, tmp_path, survived):
    make_view(datasets / "toy" / "train", datasets / "toy" / "noisy", label_noise=0.5)
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    folders = "[['toy_train', 'toy/noisy'], ['toy_val', 'toy/val']]"
    result = train(datasets, tmp_path, check=False, flags=["--resume"], DATASETS__HASHTAG_FOLDERS=folders)
    assert result.returncode == 2 and "SHA-256 of the labels was" in result.stderr
    assert "SHA-256 of the shards was" not in result.stderr
    survived(30, "", 1, "refused with the difference")


def test_an_override_continues_with_the_new_settings_and_notes_it(datasets, tmp_path, survived):
    train(datasets, tmp_path, check=False, script=dies_at(10))
    flags = ["--resume", "--override-resume"]
    train(datasets, tmp_path, flags=flags, SOLVER__LR_PER_256_IMAGES=0.04, SOLVER__WEIGHT_DECAY=0.5)
    noted = [json.loads(line) for line in (tmp_path / "resume_overrides.json").read_text().splitlines()]
    assert len(noted) == 1 and noted[0]["iteration"] == 6
    assert "SOLVER.LR_PER_256_IMAGES was 0.4, is now 0.04" in noted[0]["differences"]
    records = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    rates = {record["iteration"]: record["lr"] for record in records if "lr" in record}
    assert rates[20] < 0.1 * 0.0125 < rates[6]
    survived(30, "", 1, "or continued with --override-resume, which is noted")


def test_a_checkpoint_of_older_code_resumes(datasets, whole_run, tmp_path):
    """Its fingerprint does not know the keys that came later."""
    train(datasets, tmp_path, check=False, script=dies_at(10))
    path = tmp_path / (tmp_path / "last_checkpoint").read_text()
    checkpoint = torch.load(path, weights_only=True)
    for key in ("SOLVER.EMA_DECAY", "INPUT.DECODING", "MODEL.HASHTAG_CLASSIFIER.LOSS", "SHA-256 of the labels"):
        del checkpoint["trainer"]["fingerprint"][key]
    torch.save(checkpoint, path)
    path.with_name(f"{path.name}.sha256").unlink()
    train(datasets, tmp_path, flags=["--resume"])
    assert losses(tmp_path) == losses(whole_run)


def test_what_an_override_cannot_change_is_one_line(datasets, whole_run, tmp_path):
    synsets = [*TOY_SYNSETS[:-1]]
    write_hashtag_folder(datasets / "toy" / "fewer", Vocabulary.build("fewer", load_wordnet(), synsets=synsets))
    folders = "[['toy_train', 'toy/fewer'], ['toy_val', 'toy/fewer']]"
    flags = ["--resume", "--override-resume"]
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    result = train(datasets, tmp_path, check=False, flags=flags, DATASETS__HASHTAG_FOLDERS=folders)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.output[-3000:]
    message = r"cannot be continued, also not with --override-resume: its tensor head.bias is \[4\], the model's \[3\]"
    assert re.search(message, result.stderr) and "as MODEL.WEIGHTS" in result.stderr
    assert not (tmp_path / "resume_overrides.json").exists()


def test_a_finished_run_is_extended_with_the_rates_of_the_longer_run(datasets, tmp_path):
    """From its end on it has the rates of a run that was planned so long; nothing else of it changes."""
    train(datasets, tmp_path / "longer", SOLVER__TOTAL_IMAGES=320)
    train(datasets, tmp_path / "extended")
    flags = ["--resume", "--override-resume"]
    run = train(datasets, tmp_path / "extended", flags=flags, SOLVER__TOTAL_IMAGES=320)
    rates = [rates_of(tmp_path / name) for name in ("longer", "extended")]
    assert len(rates[1]) == 40 and [rates[1][i] for i in range(30, 40)] == [rates[0][i] for i in range(30, 40)]
    assert rates[1][29] < rates[0][29]
    assert "the learning rate goes from " in run.output and "from iteration 30 to 39" in run.output


def rates_of(output):
    records = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {record["iteration"]: record["lr"] for record in records if "lr" in record}


FAILING_WRITERS = (
    INJECT
    + """
from detectron2.utils.events import TensorboardXWriter
from wsl_d2.engine.writers import MetricsWriter

def fail(self):
    raise ConnectionError("no answer")

MetricsWriter.write = fail
TensorboardXWriter.write = fail
run_command_line()
"""
)


def test_failing_loggers_do_not_end_a_run(datasets, whole_run, tmp_path, survived):
    run = train(datasets, tmp_path, script=FAILING_WRITERS)
    for name in ("MetricsWriter", "TensorboardXWriter"):
        assert run.stdout.count(f"{name} failed (ConnectionError: no answer)") == 1
    assert_same_state(tmp_path, whole_run)
    survived(31, "writers of metrics fail at every call", 2, "one warning each, training goes on")


CLOCK = (
    INJECT
    + """
clock = time.time
before_step(lambda loop: setattr(time, "time", lambda: clock() - 7200) if loop.iter == 10 else None)
os.close(0)
run_command_line()
"""
)


def test_odd_machines_change_nothing(datasets, whole_run, tmp_path, survived):
    odd = tmp_path / "ein Ordner mit Lücken und ünïcode 图"
    shutil.copytree(datasets, odd / "datasets")
    environ = {"HOME": "/proc/no-home", "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "TERM": "dumb", "TZ": "X+25"}
    train(odd / "datasets", odd / "out", script=CLOCK, environ=environ)
    assert losses(odd / "out") == losses(whole_run)
    survived(32, "clock set back, no home, LANG=C, no terminal, odd letters in paths", 1, "the same numbers")


def test_a_truncated_shard_is_refused_before_anything_is_written(datasets, tmp_path, survived):
    shutil.copytree(datasets / "toy", tmp_path / "toy")
    shard = min((tmp_path / "toy" / "train").glob("*.tar"))
    size = shard.stat().st_size
    os.truncate(shard, size // 2)
    run = train(tmp_path, tmp_path / "out", check=False)
    assert run.returncode == 2 and not (tmp_path / "out").exists()
    assert f"{shard} has {size // 2} bytes, the manifest says {size}" in run.stderr
    survived(18, "a shard cut in half", 1, "refused with its name and size, before anything is written")


def test_a_read_only_disk_is_one_line(datasets, tmp_path, survived):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs a file system of its own: {done.stderr.strip()}")
    try:
        run = train(datasets, disk / "out", check=False)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert run.returncode == 2 and "Traceback" not in run.output
    assert f"OUTPUT_DIR {disk / 'out'}: cannot be written to: Read-only file system" in run.stderr
    survived(8, "", 1, "a read-only one is refused in one line")


MEASURES = (
    INJECT
    + """
import json

def measure(loop):
    if loop.iter % 100 == 99:
        pages = int(open("/proc/self/statm").read().split()[1])
        with open(f"{sys.argv[-1]}/memory.jsonl", "a") as file:
            file.write(json.dumps([loop.iter, pages * 4096 / 1e6, len(os.listdir("/proc/self/fd"))]) + chr(10))

before_step(measure)
run_command_line()
"""
)


def test_memory_and_open_files_stay_flat(datasets, tmp_path, survived):
    train(
        datasets,
        tmp_path,
        script=MEASURES,
        SOLVER__TOTAL_IMAGES=8 * 800,
        SOLVER__CHECKPOINT_PERIOD=40,
        SOLVER__LOG_PERIOD=20,
    )
    rows = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    steps = np.diff([row[1] for row in rows[1:]])  # the first hundred steps warm up
    slope = float(np.median(steps))
    assert slope <= 1.0, rows
    # A checkpoint may be under way at a measurement, with its file open.
    assert max(row[2] for row in rows) - min(row[2] for row in rows) <= 1, rows
    survived(33, "800 steps with 20 checkpoints", 1, f"{slope:+.2f} MB per 100 steps, no file left open")


DIES_IN_EVALUATION = (
    INJECT
    + """
from wsl_d2.evaluation import HashtagEvaluator
HashtagEvaluator.process = lambda self, inputs, outputs: os.kill(os.getpid(), signal.SIGKILL)
run_command_line()
"""
)


def test_an_evaluation_counts_every_image_once_and_is_whole_or_not_there(datasets, toy_vocabulary, tmp_path, survived):
    write_hashtag_folder(datasets / "toy" / "seven", toy_vocabulary, num_images=7, images_per_shard=3)
    options = {"DATASETS__HASHTAG_FOLDERS": "[['toy_train', 'toy/train'], ['toy_val', 'toy/seven']]"}
    options |= {"SOLVER__TOTAL_IMAGES": 80}
    for run in start_processes(datasets, tmp_path, 4, script=DIES_IN_EVALUATION, **options):
        assert run.wait() == -signal.SIGKILL
    assert not any(name.startswith("hashtag/") for name in merged_records(tmp_path))
    runs = start_processes(datasets, tmp_path, 4, flags=["--resume"], **options)
    assert [run.wait() for run in runs] == [0] * 4, runs[0].output[-3000:]
    assert merged_records(tmp_path)["hashtag/num_images"] == 7
    survived(
        34, "7 images on 4 processes, killed while evaluating", 1, "no result; then one that counts each image once"
    )
