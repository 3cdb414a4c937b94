"""Rows 1, 2, 7 and 13 of the fault matrix: kill -9 at any moment, and what --resume makes of it."""

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from training_runs import (
    TORCHRUN,
    WAITS_FOR_SIGNAL,
    Run,
    assert_same_state,
    descendants,
    dies_at,
    losses,
    train,
    wait_for_records,
)

from wsl_d2.engine.checkpointer import AtomicCheckpointer, find_damage

pytestmark = pytest.mark.fault

SAVES_OFTEN = {"SOLVER__CHECKPOINT_PERIOD": 1, "SOLVER__CHECKPOINTS_TO_KEEP": 2}


def newest_whole_checkpoint(output) -> int:
    """Iteration of the newest checkpoint that is whole, -1 if there is none."""
    numbered = AtomicCheckpointer(None, str(output)).numbered_checkpoints() if output.exists() else {}
    return max((number for number, path in numbered.items() if find_damage(path) is None), default=-1)


def kill_until_finished(datasets, output, seed: int, launcher=None, longest=1.6, **options) -> list[int]:
    """Resumes and kills a run at random moments until it gets through.

    Returns:
        For each kill, how many recorded iterations the newest checkpoint is behind.
    """
    rng, behind = random.Random(seed), []
    while True:
        run = Run(datasets, output, flags=["--resume"], launcher=launcher, **SAVES_OFTEN, **options)
        deadline = time.monotonic() + rng.uniform(longest / 5, longest)
        while run.returncode is None and time.monotonic() < deadline:
            time.sleep(0.002)
        if run.returncode is not None:
            assert run.wait() == 0, run.output[-3000:]
            return behind
        processes = descendants(run.pid) if launcher else []
        for pid in [run.pid, *processes]:
            os.kill(pid, signal.SIGKILL)
        run.wait()
        recorded = max(losses(output), default=-1) if (output / "metrics.json").exists() else -1
        behind.append(recorded - newest_whole_checkpoint(output))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [4, pytest.param(180, marks=pytest.mark.long)])
def test_no_kill_loses_a_checkpoint_or_changes_a_number(datasets, whole_run, tmp_path, kills, survived):
    behind: list[int] = []

    def chain(number: int) -> None:
        while len(behind) < kills:
            output = tmp_path / f"{number}-{len(behind)}"
            behind.extend(kill_until_finished(datasets, output, seed=1000 * number + len(behind)))
            assert losses(output) == losses(whole_run)
            assert_same_state(output, whole_run)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(chain, range(min(2, kills // 4))))
    assert max(behind) <= 2  # the one being written, and the one before it
    survived(
        1,
        "kill -9 at random moments, a checkpoint after every step",
        len(behind),
        f"0 lost; at most {max(behind)} steps done again; every curve and state bit-identical",
    )


@pytest.mark.timeout(1200)
@pytest.mark.long
def test_no_kill_of_torchrun_loses_a_checkpoint(datasets, tmp_path, survived):
    undisturbed = tmp_path / "undisturbed"
    train(datasets, undisturbed, launcher=TORCHRUN)
    behind: list[int] = []
    while len(behind) < 20:
        output = tmp_path / str(len(behind))
        behind += kill_until_finished(datasets, output, seed=len(behind), launcher=TORCHRUN, longest=9)
        assert losses(output) == losses(undisturbed)
        assert_same_state(output, undisturbed)
    assert max(behind) <= 2
    survived(1, "", len(behind), f"{len(behind)} of them of two processes under torchrun")


@pytest.mark.parametrize(
    "dtype, workers",
    [
        ("float32", 0),
        ("bfloat16", 2),
        *(pytest.param(*pair, marks=pytest.mark.long) for pair in (("bfloat16", 0), ("float32", 2))),
    ],
)
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(datasets, tmp_path, dtype, workers, survived):
    options = {
        "SOLVER__TOTAL_IMAGES": 320,
        "SOLVER__LOG_PERIOD": 4,  # so that checkpoints fall inside a record
        "SOLVER__EMA_DECAY": 0.9,
        "SOLVER__IMS_PER_MICRO_BATCH": 4,
        "SOLVER__AMP__ENABLED": dtype != "float32",
        "DATALOADER__NUM_WORKERS": workers,
    }
    train(datasets, tmp_path / "whole", **options)
    for iteration in (13, 22, 31):
        killed = train(datasets, tmp_path / "a", check=False, flags=["--resume"], script=dies_at(iteration), **options)
        assert killed.returncode == -signal.SIGKILL
    resumed = train(datasets, tmp_path / "a", flags=["--resume"], **options)
    assert "Starting training from iteration 28" in resumed.output
    assert losses(tmp_path / "a") == losses(tmp_path / "whole")
    assert_same_state(tmp_path / "a", tmp_path / "whole")
    survived(2, "kill -9 at iterations 13, 22 and 31 of 40, in float32 and bfloat16", 3, "bit-identical")


def test_another_number_of_workers_changes_nothing(datasets, whole_run, tmp_path, survived):
    train(datasets, tmp_path, check=False, script=dies_at(10))
    train(datasets, tmp_path, flags=["--resume"], DATALOADER__NUM_WORKERS=3)
    assert losses(tmp_path) == losses(whole_run)
    assert_same_state(tmp_path, whole_run)
    survived(13, "resumed with 3 data workers in place of 0", 1, "bit-identical")


SLOW_DISK = (
    WAITS_FOR_SIGNAL
    + """
from wsl_d2.files import HashingWriter
write = HashingWriter.write

def slow_write(self, data):
    if os.path.exists(os.path.join({output!r}, "slow")):
        time.sleep(0.2)
    return write(self, data)

HashingWriter.write = slow_write
run_command_line()
"""
)


def test_a_save_that_is_slower_than_the_grace_leaves_the_checkpoint_before(datasets, whole_run, tmp_path, survived):
    run = Run(datasets, tmp_path, script=SLOW_DISK.replace("{output!r}", repr(str(tmp_path))))
    wait_for_records(run, tmp_path, 9)
    while newest_whole_checkpoint(tmp_path) < 6:
        time.sleep(0.01)
    before = newest_whole_checkpoint(tmp_path)
    (tmp_path / "slow").touch()
    run.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert run.returncode is None  # it saves
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert newest_whole_checkpoint(tmp_path) >= before
    resumed = train(datasets, tmp_path, flags=["--resume"])
    assert "Starting training from iteration" in resumed.output and not list(tmp_path.glob("*.partial*"))
    assert_same_state(tmp_path, whole_run)
    survived(7, "a save slower than the scheduler's grace, killed in the middle", 1, "resumed from the one before")
