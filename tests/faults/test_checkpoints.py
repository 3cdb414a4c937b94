"""Rows 3, 8, 10 and 11 of the fault matrix: lost power, full disks, altered files, weights that change while saved."""

import os
import shutil
import signal
import subprocess
import threading

import numpy as np
import pytest
import torch
from training_runs import INJECT, assert_same_state, losses, train

from wsl_d2 import files
from wsl_d2.engine import checkpointer
from wsl_d2.engine.checkpointer import AtomicCheckpointer, checksum_path, find_damage, write_checkpoint

pytestmark = pytest.mark.fault


class Stopped(BaseException):
    """The machine has lost its power: nothing more happens."""


class FailingDisk:
    """Stands in for ``os`` and ``open`` where checkpoints are written: stops, or fails, at the k-th call.

    Args:
        stop_at: number of the call.
        error: raised once there; None for a loss of power, after which no call does anything, and files that were not
            flushed are empty.
    """

    def __init__(self, stop_at: int, error: OSError | None = None):
        self.calls = 0
        self.stop_at = stop_at
        self.error = error
        self.unflushed: set[str] = set()
        self._names: dict[int, str] = {}

    def _call(self) -> None:
        self.calls += 1
        if self.calls == self.stop_at and self.error:
            raise self.error
        if self.calls >= self.stop_at and not self.error:
            raise Stopped

    def lose_power(self) -> None:
        for name in self.unflushed:
            if os.path.exists(name):
                open(name, "w").close()

    def __getattr__(self, name):
        return getattr(os, name)

    def open_file(self, path, mode="r"):
        if "w" not in mode:
            return open(path, mode)
        self._call()
        file = open(path, mode)
        self.unflushed.add(str(path))
        self._names[file.fileno()] = str(path)
        write = file.write

        class Counted:
            def __getattr__(_, name):
                return getattr(file, name)

            def __enter__(_):
                return _

            def __exit__(_, *exception):
                file.close()

            def write(_, data):
                self._call()
                return write(data)

        return Counted()

    def fsync(self, descriptor):
        self._call()
        os.fsync(descriptor)
        self.unflushed.discard(self._names.get(descriptor, ""))

    def replace(self, source, target):
        self._call()
        os.replace(source, target)
        if str(source) in self.unflushed:
            self.unflushed.add(str(target))

    def remove(self, path):
        self._call()
        os.remove(path)


def state(value: float) -> dict:
    return {"model": {"weight": torch.full((64, 64), value)}, "iteration": int(value)}


@pytest.mark.parametrize("error", [None, OSError(5, "Input/output error")], ids=["power", "error"])
@pytest.mark.parametrize("name", ["model_0000002", "model_final"])
def test_at_every_call_of_a_save_the_old_or_the_new_checkpoint_loads(tmp_path, monkeypatch, error, name, survived):
    """Of another name, as in training, and of the same one, as when a finished run is resumed."""
    number = 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        first = "model_final" if name == "model_final" else "model_0000001"
        model = torch.nn.Linear(1, 1)
        AtomicCheckpointer(model, str(folder))._write(str(folder / f"{first}.pth"), state(1))
        disk = FailingDisk(number, error)
        with monkeypatch.context() as patch:
            patch.setattr(checkpointer, "os", disk)
            patch.setattr(files, "os", disk)
            patch.setattr(files, "open", disk.open_file, raising=False)
            stopped = True
            try:
                AtomicCheckpointer(model, str(folder))._write(str(folder / f"{name}.pth"), state(2))
                stopped = False
            except (Stopped, OSError):
                pass
        if error is None:
            disk.lose_power()
        again = AtomicCheckpointer(model, str(folder))
        again.remove_leftovers()
        loaded = {}
        again.load = lambda path: loaded.update(torch.load(path, weights_only=True))  # noqa: B023
        again.resume_or_load("", resume=True)
        assert loaded["iteration"] in ((1, 2) if stopped else (2,)), number
        assert float(loaded["model"]["weight"][0, 0]) == loaded["iteration"]
        if not stopped:
            break
    assert number > 8
    kind = "power lost, or an error, at every call of a save that touches the disk"
    survived(3, kind, number - 1, "the old or the new checkpoint always loads")


def test_altered_and_cut_checkpoints_are_refused(tmp_path, survived):
    path = tmp_path / "model_0000006.pth"
    write_checkpoint(str(path), state(6))
    assert find_damage(str(path)) is None
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for offset, bit in zip(rng.integers(0, len(whole), 200), rng.integers(0, 8, 200), strict=True):
        altered = bytearray(whole)
        altered[offset] ^= 1 << bit
        path.write_bytes(altered)
        damage = find_damage(str(path))
        refused += "SHA-256" in damage and checksum_path(str(path)) in damage
    for length in rng.integers(0, len(whole), 50):
        path.write_bytes(whole[:length])
        refused += find_damage(str(path)) is not None
    assert refused == 250
    survived(11, "one bit of a checkpoint flipped (200), or its end cut off (50)", 250, "250 refused by SHA-256")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "missing"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_previous_one(whole_run, datasets, tmp_path, damage, survived):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    newest, before = tmp_path / "model_0000027.pth", tmp_path / "model_0000020.pth"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"flipped": bytes(content), "truncated": bytes(content[:-1000]), "empty": b"", "missing": None}[damage]
    newest.unlink() if damaged is None else newest.write_bytes(damaged)
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text(newest.name)
    if damage == "truncated":  # as of a run before there were checksums: the CRC-32 inside the file tells
        os.remove(checksum_path(str(newest)))
    resumed = train(datasets, tmp_path, flags=["--resume"])
    if damage != "missing":
        assert f"Checkpoint {newest}: " in resumed.output
    assert "Starting training from iteration 21" in resumed.output
    assert losses(tmp_path) == losses(whole_run)
    assert_same_state(tmp_path, whole_run)
    if damage == "flipped":
        for path in (newest, before, tmp_path / "model_0000013.pth"):
            path.write_bytes(b"nothing")
        (tmp_path / "last_checkpoint").write_text(newest.name)
        result = train(datasets, tmp_path, check=False, flags=["--resume"])
        assert result.returncode == 2 and f"no checkpoint in {tmp_path} can be resumed from" in result.stderr
    survived(11, "", 1, "resumed from the one before")


def test_an_empty_or_lost_pointer_is_no_loss(whole_run, datasets, tmp_path):
    for content in ("", None):
        out = tmp_path / f"pointer {content!r}"
        shutil.copytree(whole_run, out)
        (out / "model_final.pth").unlink()
        (out / "last_checkpoint").unlink() if content is None else (out / "last_checkpoint").write_text(content)
        resumed = train(datasets, out, flags=["--resume"])
        assert "Starting training from iteration 28" in resumed.output
        assert_same_state(out, whole_run)


def test_what_is_saved_is_the_moment_of_saving(tmp_path, monkeypatch, survived):
    model = torch.nn.Linear(4, 4)
    saver = AtomicCheckpointer(model, str(tmp_path))
    go_on = threading.Event()
    write = checkpointer.write_checkpoint

    def slow(path, data):
        go_on.wait()
        write(path, data)

    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saver.save("model_0000001")
    monkeypatch.setattr(checkpointer, "write_checkpoint", slow)
    saver.save("model_0000002", in_background=True)
    with torch.no_grad():
        model.weight.add_(1)
    assert saver.is_writing() and not (tmp_path / "model_0000002.pth").exists()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    go_on.set()
    assert saver.wait()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    saved = torch.load(tmp_path / "model_0000002.pth", weights_only=True)["model"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    survived(
        10, "weights change while they are saved in the background", 1, "the saved ones are of the moment asked for"
    )


FULL_DISK = (
    INJECT
    + """
import resource
from wsl_d2.engine.checkpointer import AtomicCheckpointer
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
)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("model_*.pth"))


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(datasets, whole_run, tmp_path, survived):
    script = FULL_DISK.replace("{names}", "('model_0000013', 'model_0000020')")
    done = train(datasets, tmp_path, script=script)
    assert done.stdout.count("could not be saved") == 2
    assert names(tmp_path) == ["model_0000006.pth", "model_0000027.pth", "model_final.pth"]
    assert not list(tmp_path.glob("*.partial*"))
    assert_same_state(tmp_path, whole_run)
    survived(8, "disk full while saving", 2, "training goes on, the older checkpoints stay")


def test_a_disk_that_stays_full_ends_the_run_and_keeps_the_last_good_checkpoint(
    datasets, whole_run, tmp_path, survived
):
    script = FULL_DISK.replace("{names}", "('model_0000013', 'model_0000020', 'model_0000027')")
    done = train(datasets, tmp_path, check=False, script=script, SOLVER__CHECKPOINTS_TO_KEEP=1)
    assert done.returncode == 2
    assert f"3 checkpoints in a row could not be saved in {tmp_path}" in done.stderr
    assert "model_0000027.pth: " in done.output and "File too large" in done.output
    assert names(tmp_path) == ["model_0000006.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000006.pth"
    resumed = train(datasets, tmp_path, flags=["--resume"])
    assert "Starting training from iteration 7" in resumed.output
    assert losses(tmp_path) == losses(whole_run)
    survived(8, "", 3, "the third failure in a row ends the run; it resumes from the last good one")


NO_ROOM = (
    INJECT
    + """
import shutil
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=1_000_000)
run_command_line()
"""
)


def test_a_run_does_not_start_without_room_for_its_checkpoints(datasets, tmp_path, survived):
    done = train(datasets, tmp_path, check=False, script=NO_ROOM)
    assert done.returncode == 2
    assert f"OUTPUT_DIR {tmp_path} has 0.00 GB of free disk; a checkpoint takes about 0.01 GB" in done.stderr
    survived(8, "", 1, "a run does not start without room for two checkpoints")


def test_milestones_are_kept_and_old_checkpoints_removed(datasets, tmp_path):
    train(datasets, tmp_path, SOLVER__CHECKPOINTS_TO_KEEP=1, SOLVER__CHECKPOINT_MILESTONES="(7, 10)")
    assert names(tmp_path) == ["model_0000006.pth", "model_0000009.pth", "model_0000027.pth", "model_final.pth"]
    assert len(list(tmp_path.glob("model_*.sha256"))) == 4


@pytest.fixture()
def small_disk(tmp_path):
    """A file system of 60 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs a file system of its own: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


FILLS = (
    INJECT
    + """
def fill(loop, path=sys.argv[-1] + "/filler"):
    if loop.iter == 10:
        with open(path, "wb", buffering=0) as file:
            try:
                while file.write(bytes(100)):
                    pass
            except OSError:
                pass
    elif loop.iter == 22:
        os.remove(path)
    elif loop.iter == {dies}:
        os.kill(os.getpid(), signal.SIGKILL)

before_step(fill)
run_command_line()
"""
)


def test_a_disk_full_for_a_while_costs_two_checkpoints_and_one_line_of_each_writer(
    datasets, whole_run, small_disk, survived
):
    run = train(datasets, small_disk, script=FILLS.replace("{dies}", "None"))
    assert run.stdout.count("could not be saved") == 2
    assert run.stdout.count("MetricsWriter failed (OSError: [Errno 28] No space left on device)") == 1
    assert run.stderr.count(f"{small_disk}/log.txt: No space left on device") == 1
    assert "Traceback" not in run.output
    assert losses(small_disk) == losses(whole_run)
    assert_same_state(small_disk, whole_run)
    survived(8, "", 1, "the log and the metrics are one warning each, and no record of metrics.json is lost")


def test_a_run_killed_on_a_full_disk_leaves_whole_records(datasets, whole_run, small_disk, survived):
    run = train(datasets, small_disk, check=False, script=FILLS.replace("{dies}", "15"))
    assert run.returncode == -signal.SIGKILL and sorted(losses(small_disk))[-1] < 15
    (small_disk / "filler").unlink()
    train(datasets, small_disk, flags=["--resume"])
    assert losses(small_disk) == losses(whole_run)
    survived(8, "", 1, "the log and the metrics are one warning each, and no record of metrics.json is lost")
