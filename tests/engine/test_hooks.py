"""Saving, stopping and exporting, without a training."""

import os
import signal

import pytest
import torch
from torch import nn

from wsl_d2.checkpoint import WeightFile, convert_file
from wsl_d2.engine.agreement import Agreement
from wsl_d2.engine.checkpointer import AtomicCheckpointer
from wsl_d2.engine.hooks import MAX_FAILED_SAVES, EarlyEstimate, SaveCheckpoints, StopOnSignal, UnsavedError
from wsl_d2.engine.plan import open_plan
from wsl_d2.engine.signals import REQUEUE_SIGNALS, STOP_SIGNALS, Stopped
from wsl_d2.engine.trainer import WSLTrainer


class FakeTrainer:
    """What the hooks know of a trainer."""

    def __init__(self, folder, max_iter):
        self.cfg = type("Config", (), {"OUTPUT_DIR": str(folder)})
        self.model = nn.Linear(1, 1)
        self.checkpointer = AtomicCheckpointer(self.model, str(folder))
        self.agreement = Agreement("cpu")
        self.max_iter = max_iter
        self.iter = self.start_iter = 0

    def prepare_saving(self):
        pass

    def origin_of_weights(self):
        return {}

    def run(self, *hooks):
        for hook in hooks:
            hook.trainer = self
            hook.before_train()
        while self.iter < self.max_iter:
            self.agreement.exchange()
            for hook in hooks:
                hook.after_step()
            self.iter += 1
        for hook in hooks:
            hook.after_train()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth"))


@pytest.mark.parametrize("in_background", [True, False])
def test_the_newest_checkpoints_and_the_milestones_are_kept(tmp_path, in_background):
    FakeTrainer(tmp_path, 11).run(SaveCheckpoints(2, keep=2, milestones=(3, 4), in_background=in_background))
    # after 3 and 4 iterations as milestones, after 8 and 10 as the newest
    kept = ["model_0000002.pth", "model_0000003.pth", "model_0000007.pth", "model_0000009.pth", "model_final.pth"]
    assert names(tmp_path) == kept
    assert sorted(path.name for path in tmp_path.glob("*.sha256")) == [f"{name}.sha256" for name in kept]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_leftovers_of_a_killed_save_are_removed_at_the_start(tmp_path):
    for name in ("model_0000001.pth.partial-17", "last_checkpoint.partial-17", "model_0000003.pth.sha256"):
        (tmp_path / name).write_text("")
    FakeTrainer(tmp_path, 1).run(SaveCheckpoints(5, keep=1))
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_final.pth", "model_final.pth.sha256"]


def failing(trainer, is_failing):
    """Lets the saves fail whose names ``is_failing`` says so of."""
    save = trainer.checkpointer.save

    def save_or_fail(name, **kwargs):
        if is_failing(name):
            raise OSError(28, "No space left on device")
        save(name, **kwargs)

    trainer.checkpointer.save = save_or_fail
    return trainer


def test_failed_saves_in_a_row_end_the_run_and_a_good_one_forgives_them(tmp_path, caplog):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    trainer = failing(FakeTrainer(tmp_path / "a", 12), lambda name: name in ("model_0000001", "model_0000005"))
    trainer.run(SaveCheckpoints(2, keep=9, in_background=False))
    assert len(names(tmp_path / "a")) == 6 - 2
    assert caplog.text.count("a checkpoint could not be saved ([Errno 28] No space left on device)") == 2
    trainer = failing(FakeTrainer(tmp_path / "b", 12), lambda name: name != "model_0000001")
    with pytest.raises(UnsavedError, match=f"{MAX_FAILED_SAVES} checkpoints in a row could not be saved"):
        trainer.run(SaveCheckpoints(2, keep=9))
    assert names(tmp_path / "b") == ["model_0000001.pth"] and trainer.iter == 8  # the step after the third failure


def test_what_is_kept_after_a_failed_save_is_what_is_there(tmp_path, caplog):
    trainer = failing(FakeTrainer(tmp_path, 12), lambda name: name != "model_0000003")
    with pytest.raises(UnsavedError, match=r"the older ones are kept, the newest is model_0000003\.pth"):
        trainer.run(SaveCheckpoints(2, keep=9, in_background=False))
    (tmp_path / "model_0000003.pth").unlink()
    caplog.clear()
    with pytest.raises(UnsavedError, match=f"{tmp_path} holds no checkpoint to resume from"):
        failing(FakeTrainer(tmp_path, 12), lambda name: True).run(SaveCheckpoints(2, keep=9, in_background=False))
    assert "are kept" not in caplog.text


def test_a_last_save_that_fails_is_an_error(tmp_path):
    trainer = failing(FakeTrainer(tmp_path, 3), lambda name: name == "model_final")
    with pytest.raises(UnsavedError, match="the last checkpoint could not be saved: .*No space left"):
        trainer.run(SaveCheckpoints(2, keep=1))


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_saves_at_the_end_of_the_step_and_ends_the_run(tmp_path, number):
    class Signalled(SaveCheckpoints):
        def after_step(self):
            super().after_step()
            if self.trainer.iter == 3:
                signal.raise_signal(number)
                signal.raise_signal(number)  # the second one changes nothing

    before = signal.signal(number, signal.SIG_DFL)  # Ctrl-C is ignored where the tests run in the background
    trainer = FakeTrainer(tmp_path, 10)
    saving = Signalled(100, keep=1)
    stopping = StopOnSignal(saving, exchange=True)
    with pytest.raises(Stopped) as stop:
        trainer.run(saving, stopping)
    stopping.after_train()  # as Detectron2's training loop does in any case
    assert stop.value.code == (130 if number == signal.SIGINT else 75)
    assert stop.value.asks_for_requeue == (number in REQUEUE_SIGNALS)
    assert names(tmp_path) == ["model_0000003.pth"]
    assert signal.getsignal(number) is not signal.SIG_DFL  # the process ends, and no other signal may disturb that
    signal.signal(number, before)


def test_a_signal_in_the_last_step_lets_the_run_end(tmp_path):
    trainer = FakeTrainer(tmp_path, 1)
    trainer.agreement.signal = signal.SIGTERM
    saving = SaveCheckpoints(100, keep=1)
    trainer.run(saving, StopOnSignal(saving, exchange=False))
    assert names(tmp_path) == ["model_final.pth"]


def test_a_checkpoint_of_a_run_is_a_weight_file(cfg, tmp_path):
    """One saved on the way holds what an export holds: it converts, with its pixel statistics and its provenance."""
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.EMA_DECAY = 0.5  # the file holds a second set of weights, which is not to be taken for the backbone
    plan = open_plan(cfg)
    WSLTrainer(plan).train()
    path = tmp_path / "out" / "model_0000003.pth"
    file = WeightFile.read(path)
    assert file.provenance["images_seen"] == 4 * 8
    assert file.provenance["vocabulary_checksum"] == plan.dataset.vocabulary_checksum
    assert file.statistics() == {
        "input_format": "RGB",
        "pixel_mean": plan.cfg.MODEL.PIXEL_MEAN,
        "pixel_std": plan.cfg.MODEL.PIXEL_STD,
    }
    record, _ = convert_file(path, tmp_path / "converted.pth", "torchvision")
    assert record["images_seen"] == 4 * 8 and record["pixel_mean"] == plan.cfg.MODEL.PIXEL_MEAN
    saved = torch.load(path, weights_only=True)["model"]
    converted = torch.load(tmp_path / "converted.pth", weights_only=True)["state_dict"]
    assert torch.equal(converted["layer4.1.bn3.running_var"], saved["backbone.res5.1.conv3.norm.running_var"])
    assert torch.equal(converted["conv1.weight"], saved["backbone.stem.conv1.weight"])
    exported = WeightFile.read(tmp_path / "out" / "backbone.pth")
    assert exported.provenance["images_seen"] == 80
    assert {**exported.provenance, "images_seen": 32} == file.provenance | {
        name: value for name, value in exported.provenance.items() if name not in file.provenance
    }


def test_a_slow_run_says_early_how_long_it_takes(tmp_path, caplog, monkeypatch):
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr("wsl_d2.engine.hooks.time.monotonic", lambda: next(clock))
    caplog.set_level("INFO")
    FakeTrainer(tmp_path, 1000).run(EarlyEstimate(log_period=20))
    assert [record.message for record in caplog.records] == ["about 1:06:24 left: 996 iterations at 4.0 s"]
    caplog.clear()
    FakeTrainer(tmp_path, 1000).run(EarlyEstimate(log_period=2))  # the first line of numbers tells it
    assert not caplog.records
