"""Faults injected for real into runs of tools/train_net.py: bad numbers on one process, a full disk, a second run."""

import json
import signal

import pytest
import torch
from training_runs import Run, losses, merged_records, start_processes, train, wait_for_records, weights

NAN_ON_ONE_RANK = """
import sys
import torch
from detectron2.utils import comm
from wsl_d2.engine.main import run_command_line
from wsl_d2.engine import pretrain_loop as trainer

backward = torch.Tensor.backward

def run_step(self, step=trainer.PretrainLoop.run_step):
    bad = self.iter in {iterations} and comm.get_rank() == comm.get_world_size() - 1
    torch.Tensor.backward = (lambda loss, *a, **k: backward(loss * float("nan"), *a, **k)) if bad else backward
    step(self)

trainer.PretrainLoop.run_step = run_step
run_command_line()
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_number_on_one_process_stops_all_before_the_weights_change(datasets, tmp_path, processes):
    out = tmp_path / "out"
    script = NAN_ON_ONE_RANK.replace("{iterations}", "{9}")
    for run in start_processes(datasets, out, processes, script=script):
        assert run.wait() == 1
        assert "error: the gradient of iteration 9 is not finite" in run.stderr
    files = sorted(out.glob("bad_numbers_*.json"))
    saved = [json.loads(file.read_text()) for file in files]
    assert [file.name for file in files] == [f"bad_numbers_0000009_rank{rank}.json" for rank in range(processes)]
    assert all(len(entry["keys"]) == 8 // processes and entry["iteration"] == 9 for entry in saved)
    assert sorted(losses(out)) == list(range(9))
    assert (out / "last_checkpoint").read_text() == "model_0000006.pth"
    state = torch.load(out / "model_0000006.pth", weights_only=True)["model"]
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_a_few_bad_steps_are_skipped_and_counted_if_allowed(datasets, tmp_path):
    script = NAN_ON_ONE_RANK.replace("{iterations}", "{3, 8}")
    train(datasets, tmp_path / "out", script=script, SOLVER__MAX_SKIPPED_STEPS=2)
    assert merged_records(tmp_path / "out")["skipped_steps"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "out").values())
    assert len(list((tmp_path / "out").glob("bad_numbers_*.json"))) == 2


FULL_DISK = """
import resource
from wsl_d2.engine.main import run_command_line
from wsl_d2.engine.checkpointer import AtomicCheckpointer
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def write(self, path, data, write=AtomicCheckpointer._write):
    full = any(path.endswith(f"{name}.pth") for name in {names})
    limit = 100_000 if full else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write(self, path, data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

AtomicCheckpointer._write = write
run_command_line()
"""


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(datasets, tmp_path):
    script = FULL_DISK.replace("{names}", "('model_0000013', 'model_0000020')")
    out = tmp_path / "out"
    done = train(datasets, out, script=script)
    assert done.output.count("could not be saved") >= 2
    assert sorted(path.name for path in out.glob("model_*.pth")) == [
        "model_0000006.pth",
        "model_0000027.pth",
        "model_final.pth",
    ]


def test_a_disk_that_stays_full_ends_the_run_and_keeps_the_last_good_checkpoint(datasets, tmp_path):
    script = FULL_DISK.replace("{names}", "('model_0000013', 'model_0000020', 'model_0000027')")
    out = tmp_path / "out"
    done = train(datasets, out, check=False, script=script, SOLVER__CHECKPOINTS_TO_KEEP=1)
    assert done.returncode == 1 and f"error: 3 checkpoints in a row could not be saved in {out}" in done.stderr
    assert "model_0000027.pth: " in done.output and "File too large" in done.output
    assert [path.name for path in out.glob("model_*.pth")] == ["model_0000006.pth"]
    assert (out / "last_checkpoint").read_text() == "model_0000006.pth"
    resumed = train(datasets, out, flags=["--resume"])
    assert "Starting training from iteration 7" in resumed.output
    assert sorted(losses(out)) == list(range(30))


def test_milestones_are_kept_and_old_checkpoints_removed(datasets, tmp_path):
    train(datasets, tmp_path, SOLVER__CHECKPOINTS_TO_KEEP=1, SOLVER__CHECKPOINT_MILESTONES="(7, 10)")
    names = sorted(path.name for path in tmp_path.glob("model_*.pth"))
    assert names == ["model_0000006.pth", "model_0000009.pth", "model_0000027.pth", "model_final.pth"]


def test_a_second_run_in_the_same_folder_is_refused(datasets, tmp_path):
    first = Run(datasets, tmp_path, SOLVER__TOTAL_IMAGES=80000)
    try:
        wait_for_records(first, tmp_path, 1)
        second = train(datasets, tmp_path, check=False, flags=["--resume"], SOLVER__TOTAL_IMAGES=80000)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert second.returncode == 1
    assert f"is in use by process {first.pid} on " in second.stderr
