"""Faults injected for real into runs of tools/train_net.py: bad numbers on one process, a full disk, a second run."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from training_runs import ROOT, command, environment, losses, merged_records, train, weights

NAN_ON_ONE_RANK = """
import sys
import torch
from detectron2.utils import comm
from wsl_d2.engine.main import run_command_line
from wsl_d2.engine import trainer

original = trainer.PretrainLoop._numbers_are_good
backward = torch.Tensor.backward

def run_step(self, step=trainer.PretrainLoop.run_step):
    bad = self.iter in {iterations} and comm.get_rank() == comm.get_world_size() - 1
    torch.Tensor.backward = (lambda loss, *a, **k: backward(loss * float("nan"), *a, **k)) if bad else backward
    step(self)

trainer.PretrainLoop.run_step = run_step
run_command_line()
"""


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run_with(script, datasets, tmp_path, launcher=(), **opts):
    path = tmp_path / "faulty_train_net.py"
    path.write_text(script)
    arguments = command(tmp_path / "out", launcher=[sys.executable, *launcher], **opts)
    arguments[arguments.index(str(ROOT / "tools" / "train_net.py"))] = str(path)
    return subprocess.run(arguments, env=environment(datasets), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("launcher", [(), TORCHRUN])
def test_a_bad_number_on_one_process_stops_all_before_the_weights_change(datasets, tmp_path, launcher):
    done = run_with(NAN_ON_ONE_RANK.replace("{iterations}", "{9}"), datasets, tmp_path, launcher)
    assert done.returncode == 1
    assert "error: the gradient of iteration 9 is not finite" in done.stderr
    out = tmp_path / "out"
    files = sorted(out.glob("bad_numbers_*.json"))
    saved = [json.loads(file.read_text()) for file in files]
    processes = 2 if launcher else 1
    assert [file.name for file in files] == [f"bad_numbers_0000009_rank{rank}.json" for rank in range(processes)]
    assert all(len(entry["keys"]) == 8 // processes and entry["iteration"] == 9 for entry in saved)
    assert sorted(losses(out)) == list(range(9))
    assert (out / "last_checkpoint").read_text() == "model_0000006.pth"
    state = torch.load(out / "model_0000006.pth", weights_only=True)["model"]
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_a_few_bad_steps_are_skipped_and_counted_if_allowed(datasets, tmp_path):
    script = NAN_ON_ONE_RANK.replace("{iterations}", "{3, 8}")
    done = run_with(script, datasets, tmp_path, SOLVER__MAX_SKIPPED_STEPS=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert merged_records(tmp_path / "out")["skipped_steps"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "out").values())
    assert len(list((tmp_path / "out").glob("bad_numbers_*.json"))) == 2


FULL_DISK = """
import resource
from wsl_d2.engine.main import run_command_line
from wsl_d2.engine.checkpointer import AtomicCheckpointer
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def save(self, name, save=AtomicCheckpointer.save, **kwargs):
    full = name in {names}
    limit = 100_000 if full else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save(self, name, **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

AtomicCheckpointer.save = save
run_command_line()
"""


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(datasets, tmp_path):
    script = FULL_DISK.replace("{names}", "('model_0000013', 'model_0000020')")
    done = run_with(script, datasets, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    out = tmp_path / "out"
    assert (done.stdout + done.stderr).count("could not be saved") >= 2
    assert sorted(path.name for path in out.glob("model_*")) == [
        "model_0000006.pth",
        "model_0000027.pth",
        "model_final.pth",
    ]


def test_a_disk_that_stays_full_ends_the_run_and_keeps_the_last_good_checkpoint(datasets, tmp_path):
    script = FULL_DISK.replace("{names}", "('model_0000013', 'model_0000020', 'model_0000027')")
    done = run_with(script, datasets, tmp_path, SOLVER__CHECKPOINTS_TO_KEEP=1)
    assert done.returncode == 1 and "model_0000027.pth: " in done.stderr
    out = tmp_path / "out"
    assert [path.name for path in out.glob("model_*")] == ["model_0000006.pth"]
    assert (out / "last_checkpoint").read_text() == "model_0000006.pth"
    resumed = train(datasets, out, flags=["--resume"])
    assert "Starting training from iteration 7" in resumed.stdout + resumed.stderr
    assert sorted(losses(out)) == list(range(30))


def test_milestones_are_kept_and_old_checkpoints_removed(datasets, tmp_path):
    train(datasets, tmp_path, SOLVER__CHECKPOINTS_TO_KEEP=1, SOLVER__CHECKPOINT_MILESTONES="(7, 10)")
    names = sorted(path.name for path in tmp_path.glob("model_*"))
    assert names == ["model_0000006.pth", "model_0000009.pth", "model_0000027.pth", "model_final.pth"]


def test_a_second_run_in_the_same_folder_is_refused(datasets, tmp_path):
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen(
            command(tmp_path, SOLVER__TOTAL_IMAGES=80000), env=environment(datasets), stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "metrics.json").exists() or not losses(tmp_path):
                assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.1)
            second = train(datasets, tmp_path, check=False, flags=["--resume"], SOLVER__TOTAL_IMAGES=80000)
        finally:
            first.send_signal(signal.SIGKILL)
            first.wait()
    assert second.returncode == 1
    assert f"is in use by process {first.pid} on " in second.stderr
