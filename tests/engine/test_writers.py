"""Writers of metrics: what they write, and that their failures end nothing."""

import json
import sys
import types

import pytest
from detectron2.config import get_cfg
from detectron2.utils.events import EventStorage, TensorboardXWriter

from wsl_d2 import add_wsl_config
from wsl_d2.engine import writers
from wsl_d2.engine.writers import (
    GuardedWriter,
    MetricsWriter,
    PretrainingPrinter,
    build_writers,
    start_wandb,
)
from wsl_d2.errors import ConfigError


class Failing:
    calls = 0

    def write(self):
        self.calls += 1
        raise ConnectionError("no answer")

    close = write


def test_a_failing_writer_is_logged_once_and_tried_again(caplog):
    failing = Failing()
    guarded = GuardedWriter(failing)
    for _ in range(3):
        guarded.write()
    guarded.close()
    assert failing.calls == 4
    assert [record.message for record in caplog.records if record.name == writers.__name__] == [
        "Failing failed (ConnectionError: no answer); training goes on, metrics may be missing there. Further failures "
        "of it are not logged."
    ]


class FullDisk:
    """Stands in for a file: takes some bytes, and then none."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        taken = data[: self.room]
        if not taken:
            raise OSError(28, "No space left on device")
        self.room -= len(taken)
        return self.file.write(taken)


def write_record(writer, iteration: int) -> None:
    with EventStorage(iteration) as storage:
        storage.put_scalar("loss", 0.5)
        writer.write()


def test_metrics_that_a_full_disk_has_no_room_for_are_written_whole_when_it_has(tmp_path):
    path = tmp_path / "metrics.json"
    writer = MetricsWriter(path)
    write_record(writer, 0)
    file = writer._file_handle._file
    writer._file_handle._file = FullDisk(file, room=10)
    for iteration in (1, 2):
        with pytest.raises(OSError, match="No space"):
            write_record(writer, iteration)
        assert path.read_text() == '{"iteration": 0, "loss": 0.5}\n'
    writer._file_handle._file = file
    write_record(writer, 3)
    writer.close()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


@pytest.mark.parametrize("torn", ["", '{"iteration": 1, "lo', '{"iteration": 1'])
def test_a_torn_line_of_a_killed_run_is_removed_before_the_next_record(tmp_path, torn):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 0, "loss": 1.0}\n' + torn)
    writer = MetricsWriter(path)
    write_record(writer, 1)
    writer.close()
    assert path.read_text() == '{"iteration": 0, "loss": 1.0}\n{"iteration": 1, "loss": 0.5}\n'


def test_the_printer_adds_a_line_of_pretrainings_own_metrics(monkeypatch):
    printer = PretrainingPrinter(max_iter=10)
    lines = []
    monkeypatch.setattr(printer, "logger", types.SimpleNamespace(info=lines.append))
    with EventStorage(0) as storage:
        storage.put_scalars(images_seen=12345, images_per_second=1234.56, skipped_images=2, total_loss=1.0)
        printer.write()
        storage.step()
        storage.put_scalar("total_loss", 1.0)
        printer.write()
    assert len(lines) == 3  # of the second iteration, Detectron2's line alone
    assert lines[1] == " 12,345 images seen, 1,234.6 images/s, 2 images skipped"


@pytest.fixture()
def wandb(monkeypatch):
    started = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: started.append(options)))
    return started


def test_wandb_follows_tensorboard_and_a_resumed_run_has_the_same_identity(wandb):
    for folder in ("runs/a b", "runs/a b", "runs/c"):
        start_wandb("mine", folder, {"SEED": 1})
    first, again, other = wandb
    assert first["id"] == again["id"] != other["id"] and set(first["id"]) <= set("abcdefghijklmnopqrstuvwxyz-")
    assert first["sync_tensorboard"] and first["resume"] == "allow"
    assert (first["project"], first["config"], first["dir"]) == ("mine", {"SEED": 1}, "runs/a b")


def test_wandb_that_is_not_installed_or_does_not_start_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="WANDB.PROJECT is 'mine', but wandb is not installed; run `pip install wand"):
        start_wandb("mine", "out", {})

    def refuse(**_):
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with pytest.raises(ConfigError, match=r"W&B did not start \(no API key configured\); run `wandb login`"):
        start_wandb("mine", "out", {})


def test_a_run_has_guarded_writers_and_wandb_if_asked_for(tmp_path, wandb):
    cfg = get_cfg()
    add_wsl_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path)
    found = build_writers(cfg, max_iter=10)
    assert all(isinstance(writer, GuardedWriter) for writer in found)
    assert [type(writer.writer) for writer in found] == [PretrainingPrinter, MetricsWriter, TensorboardXWriter]
    assert not wandb
    cfg.WANDB.PROJECT = "mine"
    build_writers(cfg, 10)
    assert len(wandb) == 1
