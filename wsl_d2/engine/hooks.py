"""Hooks of the two trainers."""

from __future__ import annotations

import datetime
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from wsl_d2.checkpoint import PROVENANCE, export_backbone, provenance_of
from wsl_d2.engine.signals import INTERRUPTED_EXIT_CODE, STOP_SIGNALS, Stopped, handle
from wsl_d2.errors import UserError

MAX_FAILED_SAVES = 3  # in a row, before a run ends
_SECONDS_TO_ESTIMATE = 10.0
_ONE_CTRL_C_SECONDS = 1.0  # launchers send on what the terminal has sent to all processes: that is no second Ctrl-C


class UnsavedError(UserError, OSError):
    """A run ends because its checkpoints could not be saved."""


class ExportBackbone(HookBase):
    """Writes ``backbone.pth``, the file detectors load, when the run has reached its last iteration.

    The trainer's ``origin_of_weights()`` travels with the weights; see :func:`wsl_d2.checkpoint.export_backbone`.
    """

    def after_train(self) -> None:
        if comm.is_main_process() and self.trainer.iter >= self.trainer.max_iter:
            folder, origin = self.trainer.cfg.OUTPUT_DIR, self.trainer.origin_of_weights()
            export_backbone(self.trainer.model, os.path.join(folder, "backbone.pth"), **origin)
            if self.trainer.average is not None:
                export_backbone(self.trainer.average.model, os.path.join(folder, "backbone_ema.pth"), **origin)


class PreciseBN(hooks.PreciseBN):
    """Detectron2's hook for TEST.PRECISE_BN, on the same images each time, so that a resumed run computes the same.

    Args:
        loader: builds the loader of these images.
    """

    def __init__(self, period: int, model, loader: Callable, num_iter: int):
        super().__init__(period, model, None, num_iter)
        self._loader = loader

    def update_stats(self) -> None:
        self._data_iter = iter(self._loader())
        super().update_stats()
        self._data_iter = None  # ends its workers


class SaveCheckpoints(HookBase):
    """Saves every ``period`` iterations and at the end, in all processes; keeps the newest ones and the milestones.

    A save that fails, as on a full disk, is logged; training goes on and the older checkpoints stay. The third failure
    in a row, or one of the last save, ends the run in all processes. Older files are removed only after a newer one is
    complete.

    Args:
        period: iterations.
        keep: newest checkpoints kept, besides ``model_final.pth``.
        milestones: iterations after which a checkpoint is also saved, and kept.
        in_background: write while training goes on.
    """

    def __init__(self, period: int, keep: int, milestones: Sequence[int] = (), in_background: bool = True):
        self.period = period
        self.keep = max(1, keep)
        self.milestones = frozenset(milestones)
        self.in_background = in_background

    def before_train(self) -> None:
        if comm.is_main_process():
            self.trainer.checkpointer.remove_leftovers()
            self.trainer.checkpointer.after_saving = self._remove_old

    def after_step(self) -> None:
        agreement = self.trainer.agreement
        if comm.is_main_process() and not self.trainer.checkpointer.is_writing():
            self._note_result()
        if agreement.agreed_failed_saves >= MAX_FAILED_SAVES:
            raise UnsavedError(
                f"{agreement.agreed_failed_saves} checkpoints in a row could not be saved in "
                f"{self.trainer.cfg.OUTPUT_DIR} (see the log); {self._kept()}."
            )
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter:
            self._save_final()
        elif done % self.period == 0 or done in self.milestones:
            self.save(in_background=self.in_background)

    def save(self, in_background: bool) -> None:
        """Saves the state after this iteration, in all processes together; a failure is logged and counted."""
        self.trainer.prepare_saving()
        if not comm.is_main_process():
            return
        self._note_result()  # of the save before
        name = f"model_{self.trainer.iter:07d}"
        try:
            self.trainer.checkpointer.save(name, in_background=in_background, **self._to_store())
        except OSError as error:
            self._note_failure(error)
        else:
            if not in_background:
                self.trainer.agreement.failed_saves = 0

    def _to_store(self) -> dict:
        """What a checkpoint holds beside the states: the iteration, and the provenance of its backbone."""
        origin = self.trainer.origin_of_weights()
        provenance = {PROVENANCE: provenance_of(self.trainer.model) | origin} if origin else {}
        return {"iteration": self.trainer.iter, **provenance}

    def _note_result(self) -> None:
        """Counts whether the last save in the background failed, if there was one."""
        try:
            if self.trainer.checkpointer.wait():
                self.trainer.agreement.failed_saves = 0
        except OSError as error:
            self._note_failure(error)

    def _note_failure(self, error: OSError) -> None:
        agreement = self.trainer.agreement
        agreement.failed_saves += 1
        left = MAX_FAILED_SAVES - agreement.failed_saves
        logging.getLogger(__name__).error(
            f"a checkpoint could not be saved ({error}); {self._kept()}; training goes on. "
            f"{left} more failures in a row end the run"
        )

    def _kept(self) -> str:
        """What there is to resume from."""
        found = self.trainer.checkpointer.numbered_checkpoints()
        if not found:
            return f"{self.trainer.cfg.OUTPUT_DIR} holds no checkpoint to resume from"
        return f"the older ones are kept, the newest is {os.path.basename(found[max(found)])}"

    def _save_final(self) -> None:
        self.trainer.prepare_saving()
        failure = None
        if comm.is_main_process():
            self._note_result()
            try:
                self.trainer.checkpointer.save("model_final", **self._to_store())
            except OSError as error:
                failure = f"the last checkpoint could not be saved: {error}"
        failures = [text for text in comm.all_gather(failure) if text]
        if failures:
            raise UnsavedError(failures[0])

    def after_train(self) -> None:
        if comm.is_main_process():
            self._note_result()

    def _remove_old(self, path: str) -> None:
        checkpointer = self.trainer.checkpointer
        files = checkpointer.numbered_checkpoints()
        removable = [number for number in sorted(files) if number + 1 not in self.milestones]
        for number in removable[: -self.keep]:
            if files[number] != path:
                checkpointer.remove(files[number])


class EarlyEstimate(HookBase):
    """Says once how long the run takes, as soon as two steps tell, where its first line of numbers is far away.

    Args:
        log_period: steps between lines of numbers, which tell it, too.
    """

    def __init__(self, log_period: int):
        self.log_period = log_period
        self._start: float | None = None

    def after_step(self) -> None:
        done = self.trainer.iter + 1 - self.trainer.start_iter
        if done == 1:  # the first step also starts data workers
            self._start = time.monotonic()
        elif self._start is not None and (seconds := time.monotonic() - self._start) >= _SECONDS_TO_ESTIMATE:
            step, left = seconds / (done - 1), self.trainer.max_iter - self.trainer.iter - 1
            self._start = None
            if done < self.log_period and step * left > _SECONDS_TO_ESTIMATE:
                logging.getLogger(__name__).info(
                    f"about {datetime.timedelta(seconds=round(step * left))} left: {left:,} iterations at {step:.1f} s"
                )


class StopOnSignal(HookBase):
    """On one of ``STOP_SIGNALS`` to any process, all save one checkpoint and end with :class:`Stopped`, whose exit
    status is 75, of Ctrl-C 130.

    Schedulers send these before they end or preempt a job; ``--resume`` then continues as if nothing had happened. The
    processes agree at the end of each step. Further signals have no effect, but a second Ctrl-C ends the process at
    once.

    Args:
        saving: the hook that saves.
        exchange: reduce the agreement's flags here, for trainers whose steps do not.
    """

    def __init__(self, saving: SaveCheckpoints, exchange: bool):
        self.saving = saving
        self.exchange = exchange
        self._previous: dict = {}
        self._interrupted: float | None = None

    def before_train(self) -> None:
        self._previous = handle(STOP_SIGNALS, self._note)

    def _note(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            if self._interrupted is not None and time.monotonic() - self._interrupted > _ONE_CTRL_C_SECONDS:
                os._exit(INTERRUPTED_EXIT_CODE)
            self._interrupted = self._interrupted or time.monotonic()
        self.trainer.agreement.signal = self.trainer.agreement.signal or number

    def after_step(self) -> None:
        agreement = self.trainer.agreement
        if self.exchange:
            agreement.exchange()
        done = self.trainer.iter + 1
        if not agreement.agreed_signal or done >= self.trainer.max_iter:
            return
        self.saving.save(in_background=False)
        saved = comm.all_gather(agreement.failed_saves)[0] == 0
        name = signal.Signals(agreement.agreed_signal).name
        logging.getLogger(__name__).warning(
            f"{name}: saved after {done} iterations; --resume continues from there"
            if saved
            else f"{name}: could not save after {done} iterations; --resume continues from the previous checkpoint"
        )
        raise Stopped(agreement.agreed_signal)

    def after_train(self) -> None:
        if not self.trainer.agreement.agreed_signal:  # else the process ends, and nothing may disturb it
            for number, handler in self._previous.items():
                signal.signal(number, handler)
