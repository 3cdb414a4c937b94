"""Writers of metrics: what they write, and that their failures end nothing."""

import sys
import types

import pytest
from detectron2.config import get_cfg
from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter

from wsl_d2 import add_wsl_config
from wsl_d2.engine import writers
from wsl_d2.engine.writers import GuardedWriter, PretrainingPrinter, WandbWriter, build_writers
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


class FakeRun:
    def __init__(self, **options):
        self.options, self.logged, self.is_finished = options, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.is_finished = True


@pytest.fixture()
def wandb(monkeypatch):
    module = types.SimpleNamespace(init=FakeRun)
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_every_scalar_reaches_wandb_once_at_its_iteration(wandb):
    writer = WandbWriter("mine", "runs/of mine", {"SEED": 1})
    with EventStorage(0) as storage:
        for value in (1.0, 2.0):
            storage.put_scalar("loss", value, smoothing_hint=False)
            writer.write()
            writer.write()
            storage.step()
        storage.put_scalar("loss", 3.0, smoothing_hint=False)
        storage.put_scalar("top1", 50.0, smoothing_hint=False)
        writer.write()
    writer.close()
    run = writer._run
    assert run.logged == [(0, {"loss": 1.0}), (1, {"loss": 2.0}), (2, {"loss": 3.0, "top1": 50.0})]
    assert run.is_finished and run.options["project"] == "mine" and run.options["config"] == {"SEED": 1}


def test_a_resumed_run_has_the_same_identity_in_wandb(wandb):
    first, again, other = (
        WandbWriter("mine", folder, {})._run.options for folder in ("runs/a b", "runs/a b", "runs/c")
    )
    assert first["id"] == again["id"] != other["id"] and first["resume"] == "allow"
    assert set(first["id"]) <= set("abcdefghijklmnopqrstuvwxyz-")


def test_wandb_that_is_not_installed_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match="WANDB.PROJECT is 'mine', but wandb is not installed; run `pip install wandb`"
    ):
        WandbWriter("mine", "out", {})


def test_a_run_has_guarded_writers_and_wandbs_if_asked_for(tmp_path, wandb):
    cfg = get_cfg()
    add_wsl_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path)
    found = build_writers(cfg, max_iter=10)
    assert all(isinstance(writer, GuardedWriter) for writer in found)
    kinds = [type(writer.writer) for writer in found]
    assert kinds == [PretrainingPrinter, JSONWriter, TensorboardXWriter]
    cfg.WANDB.PROJECT = "mine"
    assert [type(writer.writer) for writer in build_writers(cfg, 10)] == [*kinds, WandbWriter]
