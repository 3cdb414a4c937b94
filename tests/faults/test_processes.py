"""Rows 4, 5, 6, 9, 12, 14 and 28 of the fault matrix: processes that die, hang, are told to stop, come or go."""

import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import (
    INJECT,
    ROOT,
    TORCHRUN,
    WAITS_FOR_SIGNAL,
    Run,
    assert_same_state,
    command,
    environment,
    losses,
    start_processes,
    survives,
    train,
    train_together,
    wait_for_records,
    weights,
)

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def whole_run_of_two(datasets, tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    train_together(datasets, output, 2)
    return output


def processes_of(output: Path) -> list[str]:
    """Command lines of living processes that work on an output folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().decode().replace("\0", " ")
        except OSError:
            continue
        if f"OUTPUT_DIR {output}" in text:
            found.append(text)
    return found


DIES_ONCE = (
    INJECT
    + """
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
dies = lambda loop: first and loop.iter == 12 and comm.get_rank() == 1
before_step(lambda loop: os.kill(os.getpid(), signal.SIGKILL) if dies(loop) else None)
run_command_line()
"""
)


def test_a_killed_process_is_replaced_by_torchrun_and_the_run_goes_on(datasets, whole_run_of_two, tmp_path, survived):
    started = time.monotonic()
    launcher = [*TORCHRUN, "--max-restarts=1"]
    run = train(datasets, tmp_path, launcher=launcher, flags=["--resume"], script=DIES_ONCE)
    assert "Starting training from iteration 7" in run.output
    assert losses(tmp_path) == losses(whole_run_of_two)
    assert_same_state(tmp_path, whole_run_of_two)
    assert time.monotonic() - started < 120
    survived(4, "one of two processes killed in the middle of a step", 1, "torchrun restarts both, bit-identical")


HANGS = (
    INJECT
    + """
next_batch = PretrainLoop._next_batch

def hang(self):
    batch = next_batch(self)
    if self.iter == 9 and comm.get_rank() == 1:
        self.heartbeat.note(self.iter, "waiting for data")
        time.sleep(600)
    return batch

PretrainLoop._next_batch = hang
run_command_line()
"""
)


def test_a_process_that_hangs_ends_all_and_is_named(datasets, tmp_path, survived):
    run = Run(datasets, tmp_path, launcher=TORCHRUN, script=HANGS, SOLVER__PROCESS_TIMEOUT_SECONDS=8)
    wait_for_records(run, tmp_path, 9)
    hung = time.monotonic()
    assert run.wait(timeout=60) != 0
    seconds = time.monotonic() - hung
    assert "rank 0 lost contact with rank 1 at iteration 9" in run.output
    assert "rank 1: iteration 9, waiting for data" in run.output
    assert seconds < 20 and not processes_of(tmp_path)
    survived(5, "one of two processes hangs, time-out 8 s", 1, f"both ended after {seconds:.0f} s, rank and step named")


def test_a_hanging_process_ends_itself_with_its_stack(datasets, tmp_path, survived):
    script = HANGS.replace("== 1", "== 0")
    run = train(datasets, tmp_path, check=False, script=script, SOLVER__PROCESS_TIMEOUT_SECONDS=2)
    assert run.returncode == 1
    assert "rank 0 hangs: waiting for data at iteration 9" in run.output and "in hang" in run.stderr
    survived(5, "", 1, "a lone one ends itself and shows its stack")


STALLS = (
    INJECT
    + """
from wsl_d2.data.read.dataset import HashtagDataset
item = HashtagDataset.__getitem__
HashtagDataset.__getitem__ = lambda self, place: time.sleep(600) if place[1] >= 72 else item(self, place)
run_command_line()
"""
)


def test_a_stalled_data_worker_ends_the_run(datasets, tmp_path, survived):
    options = {"DATALOADER__NUM_WORKERS": 1, "DATALOADER__TIMEOUT_SECONDS": 3}
    run = train(datasets, tmp_path, check=False, script=STALLS, **options)
    assert run.returncode == 2
    assert "the data workers gave no batch for 3 s, DATALOADER.TIMEOUT_SECONDS" in run.stderr
    assert sorted(losses(tmp_path)) == list(range(9))
    survived(5, "", 1, "a data worker that stalls ends the run with the reason")


STOPPED = f"{WAITS_FOR_SIGNAL}\nrun_command_line()"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_and_exits_for_requeueing(whole_run, datasets, tmp_path, number, survived):
    stopped = Run(datasets, tmp_path, script=STOPPED)
    wait_for_records(stopped, tmp_path, 3)
    stopped.send_signal(number)
    time.sleep(0.02)
    stopped.send_signal(number)  # the second one changes nothing; of Ctrl-C, one that a launcher sends on
    assert stopped.wait() == (130 if number == signal.SIGINT else 75)
    assert "Traceback" not in stopped.output
    assert f"{number.name}: saved after" in stopped.output
    saved = len(losses(tmp_path))
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{saved - 1:07d}.pth"
    resumed = train(datasets, tmp_path, flags=["--resume"])
    assert f"Starting training from iteration {saved}" in resumed.output
    assert losses(tmp_path) == losses(whole_run)
    assert_same_state(tmp_path, whole_run)
    survived(
        6,
        "a signal or Ctrl-C to one process, to all or to torchrun",
        1,
        "all save the same step, exit with 75 (Ctrl-C: 130)",
    )


SAVES_SLOWLY = (
    WAITS_FOR_SIGNAL
    + """
from wsl_d2.engine import checkpointer
checkpointer.write_checkpoint = lambda path, data: time.sleep(600)
run_command_line()
"""
)


def test_a_second_ctrl_c_ends_at_once(datasets, tmp_path, survived):
    run = Run(datasets, tmp_path, script=SAVES_SLOWLY, SOLVER__CHECKPOINT_PERIOD=1000)
    wait_for_records(run, tmp_path, 3)
    run.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert run.returncode is None
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=20) == 130
    assert "Traceback" not in run.output
    survived(6, "", 1, "a second Ctrl-C ends at once")


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGTERM, signal.SIGUSR2))]
)
def test_a_signal_to_a_whole_group_of_processes_saves(datasets, tmp_path, number, survived):
    """As the terminal, scancel and SLURM's time limit send it: the data workers get it, too."""
    launcher = [sys.executable]
    flags = ["--num-gpus", "2", "--dist-url", "auto"]
    opts = {"DATALOADER__NUM_WORKERS": 2, "SOLVER__TOTAL_IMAGES": 80_000}
    run = Run(datasets, tmp_path, launcher=launcher, flags=flags, own_group=True, **opts)
    wait_for_records(run, tmp_path, 3)
    os.killpg(run.pid, number)
    assert run.wait(timeout=60) == (130 if number == signal.SIGINT else 75), run.output[-3000:]
    assert run.output.count(": saved after") == 1 and "Traceback" not in run.output, run.output[-3000:]
    saved = len(losses(tmp_path))
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{saved - 1:07d}.pth"
    assert not processes_of(tmp_path)
    survived(6, "", 1, "all save the same step, exit with 75 (Ctrl-C: 130)")


def test_a_signal_to_one_process_of_two_stops_both_at_one_step(datasets, whole_run_of_two, tmp_path, survived):
    runs = start_processes(datasets, tmp_path, 2, script=STOPPED)
    wait_for_records(runs[0], tmp_path, 3)
    runs[1].send_signal(signal.SIGUSR1)
    assert [run.wait() for run in runs] == [75, 75]
    saved = len(losses(tmp_path))
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{saved - 1:07d}.pth"
    train_together(datasets, tmp_path, 2, flags=["--resume"])
    assert losses(tmp_path) == losses(whole_run_of_two)
    assert_same_state(tmp_path, whole_run_of_two)
    survived(6, "", 1, "and resume bit-identically")


def test_a_signal_to_torchrun_reaches_all(datasets, whole_run_of_two, tmp_path, survived):
    run = Run(datasets, tmp_path, launcher=TORCHRUN, script=STOPPED)
    wait_for_records(run, tmp_path, 3)
    run.send_signal(signal.SIGTERM)
    assert run.wait() != 0
    assert "SIGTERM: saved after" in run.output and not processes_of(tmp_path)
    train_together(datasets, tmp_path, 2, flags=["--resume"])
    assert losses(tmp_path) == losses(whole_run_of_two)
    survived(6, "", 1, "and resume bit-identically")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_that_ends_torchrun_alone_leaves_no_process_behind(datasets, tmp_path, number, survived):
    run = Run(datasets, tmp_path, launcher=TORCHRUN, SOLVER__TOTAL_IMAGES=80_000)
    wait_for_records(run, tmp_path, 3)
    run.send_signal(number)
    assert run.wait() == -number
    deadline = time.monotonic() + 60
    while processes_of(tmp_path):
        assert time.monotonic() < deadline, run.output[-3000:]
        time.sleep(0.1)
    assert "SIGTERM: saved after" in run.output
    survived(6, "", 1, "also when torchrun itself dies of the signal")


@pytest.fixture()
def fake_slurm(tmp_path, monkeypatch):
    """srun that starts its command, and scontrol that notes its arguments; returns the file of these."""
    folder, notes = tmp_path / "bin", tmp_path / "scontrol.txt"
    folder.mkdir()
    scontrol = f'#!/bin/sh\n[ "$1" = show ] && echo localhost || echo "$*" >> {notes}\n'
    for name, content in (("srun", '#!/bin/sh\nexec "$@"\n'), ("scontrol", scontrol)):
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    number = str(random.randrange(100_000))
    for name, value in {"JOB_ID": number, "JOB_NODELIST": "n1", "NNODES": "1", "GPUS_ON_NODE": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return notes


@pytest.mark.long
def test_the_script_for_torchrun_on_slurm_saves_and_requeues(
    datasets, whole_run_of_two, tmp_path, fake_slurm, monkeypatch, survived
):
    """With stand-ins for SLURM's commands; SLURM sends the signal to the script alone."""
    script, out = ["bash", str(ROOT / "tools" / "torchrun.sbatch")], tmp_path / "out"
    arguments = command(out)[1:]
    start = functools.partial(subprocess.Popen, cwd=ROOT, env=environment(datasets))
    with start([*script, *arguments]) as job:
        while not (out / "metrics.json").exists() or len(losses(out)) < 3:
            assert job.poll() is None
            time.sleep(0.01)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(120) == 0
    assert fake_slurm.read_text() == f"requeue {os.environ['SLURM_JOB_ID']}\n" and not processes_of(out)
    assert len(losses(out)) < 30
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # as SLURM sets it, which resumes
    with start([*script, *arguments]) as job:
        assert job.wait(120) == 0
    assert losses(out) == losses(whole_run_of_two)
    with start([*script, *arguments, "NO.KEY", "1"]) as job:
        assert job.wait(120) == 1
    assert len(fake_slurm.read_text().splitlines()) == 1
    survived(6, "", 1, "under tools/torchrun.sbatch the job is requeued")


CANNOT_SAVE = (
    INJECT
    + """
from wsl_d2.engine import checkpointer
write = checkpointer.write_checkpoint

def fail(path, data):
    if "0000006" not in path:
        raise OSError(5, "Input/output error")
    write(path, data)

checkpointer.write_checkpoint = fail
run_command_line()
"""
)


def test_saves_that_fail_on_one_process_end_all_of_them(datasets, tmp_path, survived):
    for run in start_processes(datasets, tmp_path, 2, script=CANNOT_SAVE):
        assert run.wait(timeout=60) == 2
        assert f"3 checkpoints in a row could not be saved in {tmp_path}" in run.stderr
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000006.pth"
    survived(9, "the process that saves cannot", 1, "both end together after the third time")


NOTES_KEYS = (
    INJECT
    + """
import functools
import json
next_batch = PretrainLoop._next_batch

def note(self):
    batch = next_batch(self)
    with open(f"{sys.argv[-1]}/keys_{comm.get_rank()}.jsonl", "a") as file:
        file.write(json.dumps([self.iter, batch["keys"]]) + "\\n")
    return batch

PretrainLoop._next_batch = note
before_step(lambda loop: os.kill(os.getpid(), signal.SIGKILL) if loop.iter == {dies} else None)
run_command_line()
"""
)


def keys_by_iteration(output: Path) -> dict[int, list[str]]:
    """The images of each iteration in the order of the global batch, as last computed; removes the notes."""
    found: dict[int, list[str]] = {}
    for path in sorted(output.glob("keys_*.jsonl")):
        own: dict[int, list[str]] = {}
        for line in path.read_text().splitlines():
            iteration, keys = json.loads(line)
            own.setdefault(iteration, []).extend(keys)
        for iteration, keys in own.items():
            found.setdefault(iteration, []).extend(keys)
        path.unlink()
    return found


@pytest.mark.parametrize("numbers, batch", [((1, 2, 3), 24), pytest.param((2, 1, 4), 16, marks=pytest.mark.long)])
def test_another_number_of_processes_goes_on_with_the_same_images_and_losses(
    datasets, tmp_path, numbers, batch, survived
):
    options = {"SOLVER__IMS_PER_BATCH": batch, "SOLVER__TOTAL_IMAGES": 30 * batch, "SOLVER__CHECKPOINT_PERIOD": 5}
    # Small steps: large ones on so few images amplify rounding errors as much as anything else.
    options |= {"SOLVER__LR_PER_256_IMAGES": 0.004, "INPUT__RANDOM_RESIZED_CROP__SIZE": 64}
    options |= {"INPUT__TEST_RESIZE_SHORT_SIDE": 64}
    whole, out = tmp_path / "whole", tmp_path / "out"
    script = NOTES_KEYS.replace("{dies}", "-1")
    train(datasets, whole, script=script, SOLVER__IMS_PER_MICRO_BATCH=4, **options)
    expected = keys_by_iteration(whole)
    found = {}
    for number, dies in zip(numbers, (10, 20, -1), strict=True):
        # The groups' size is given once; a resumed run keeps it.
        given = {"SOLVER__IMS_PER_MICRO_BATCH": 4} if dies == 10 else {}
        script = NOTES_KEYS.replace("{dies}", str(dies))
        runs = start_processes(datasets, out, number, flags=["--resume"], script=script, **options, **given)
        assert [run.wait() for run in runs] == [0 if dies < 0 else -signal.SIGKILL] * number, runs[0].output[-3000:]
        found |= keys_by_iteration(out)
    assert found == expected and len(expected) == 30
    one, two = losses(whole), losses(out)
    worst = max(abs(two[iteration] / one[iteration] - 1) for iteration in one)
    assert one.keys() == two.keys() and worst <= 1e-5
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(out)[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    survived(
        12,
        "resumed on 1, 2, 3 and on 2, 1, 4 processes, fixed groups of images",
        2,
        f"the same images in the same order; losses equal up to {worst:.0e}",
    )


def test_groups_that_do_not_fit_the_processes_are_refused(datasets, tmp_path):
    train(datasets, tmp_path, SOLVER__TOTAL_IMAGES=48)
    for run in start_processes(datasets, tmp_path, 2, flags=["--resume"]):
        assert run.wait() == 2
        assert "not a multiple of the ghost batch size of this run (8). Use a number of" in run.stderr


WORKER_DIES = (
    INJECT
    + """
import multiprocessing
before_step(lambda loop: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL) if loop.iter == 9 else None)
run_command_line()
"""
)


def test_a_killed_data_worker_is_a_clear_error_and_costs_nothing(datasets, whole_run, tmp_path, survived):
    run = Run(datasets, tmp_path, script=WORKER_DIES, DATALOADER__NUM_WORKERS=2)
    wait_for_records(run, tmp_path, 9)
    started = time.monotonic()
    assert run.wait(timeout=30) == 2
    seconds = time.monotonic() - started
    assert "a DataLoader worker process died, most often because memory ran out" in run.stderr
    assert seconds < 10
    train(datasets, tmp_path, flags=["--resume"], DATALOADER__NUM_WORKERS=2)
    assert losses(tmp_path) == losses(whole_run)
    survived(14, "a data worker killed", 1, f"one clear error after {seconds:.0f} s; resumed bit-identically")


def test_a_folder_with_another_runs_files_is_refused_unless_it_is_said_what_to_do(datasets, whole_run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    train(datasets, tmp_path, SOLVER__TOTAL_IMAGES=80)
    before = losses(tmp_path)
    refused = train(datasets, tmp_path, check=False)
    assert refused.returncode == 2 and losses(tmp_path) == before
    assert "holds the files of a run (last_checkpoint, metrics.json, model_" in refused.stderr
    assert "continue it with --resume, remove it with --overwrite, or choose another OUTPUT_DIR" in refused.stderr
    both = train(datasets, tmp_path, check=False, flags=["--resume", "--overwrite"])
    assert both.returncode == 2 and "give one of them" in both.stderr and losses(tmp_path) == before
    train(datasets, tmp_path, flags=["--overwrite"])
    assert losses(tmp_path) == losses(whole_run)
    assert_same_state(tmp_path, whole_run)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_a_launcher_starts_again_resumes(datasets, whole_run, tmp_path):
    stopped = Run(datasets, tmp_path, script=STOPPED)
    wait_for_records(stopped, tmp_path, 3)
    stopped.send_signal(signal.SIGUSR1)
    assert stopped.wait() == 75
    train(datasets, tmp_path, flags=["--overwrite"], environ={"SLURM_RESTART_COUNT": "1"})
    assert_same_state(tmp_path, whole_run)


def test_a_signal_during_the_imports_ends_with_75(datasets, tmp_path):
    run = Run(datasets, tmp_path, launcher=[sys.executable])
    while not survives(run.pid, signal.SIGUSR2):
        time.sleep(0.01)
    run.send_signal(signal.SIGUSR2)
    assert run.wait() == 75 and run.output == "" and not list(tmp_path.iterdir())


NO_LOCKS = (
    INJECT
    + """
import errno, fcntl

def flock(file, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

fcntl.flock = flock
run_command_line()
"""
)


def test_a_folder_that_cannot_be_used_is_one_line(datasets, tmp_path):
    (tmp_path / "file").write_text("")
    below = train(datasets, tmp_path / "file" / "run", check=False)
    assert below.returncode == 2
    assert f"OUTPUT_DIR {tmp_path}/file/run: cannot be written to: Not a directory; choose another." in below.stderr
    unlocked = train(datasets, tmp_path / "run", check=False, script=NO_LOCKS)
    assert unlocked.returncode == 2
    assert f"OUTPUT_DIR {tmp_path}/run: its file system cannot lock files; choose another." in unlocked.stderr


def test_a_second_run_in_the_same_folder_is_refused(datasets, tmp_path, survived):
    first = Run(datasets, tmp_path, SOLVER__TOTAL_IMAGES=80000)
    try:
        wait_for_records(first, tmp_path, 1)
        second = train(datasets, tmp_path, check=False, flags=["--resume"], SOLVER__TOTAL_IMAGES=80000)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert second.returncode == 2
    assert re.search(rf"is in use by process {first.pid} on ", second.stderr)
    survived(28, "a second run in the same folder", 1, "refused, with host and process of the first")
