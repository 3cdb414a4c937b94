"""Hooks of the two trainers."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Sequence

import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules

from wsl_d2.checkpoint import export_backbone

_MAX_FAILED_SAVES = 3
REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL: "try again later"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class AverageBatchNormStatistics(HookBase):
    """Averages batch-norm running statistics over processes before evaluating and saving.

    Each process normalises with its own batch, so that their running statistics drift apart and only the main
    process's would be saved.

    Args:
        periods: iterations; the statistics are averaged at multiples of any of them and at the end.
    """

    def __init__(self, *periods: int):
        self.periods = [period for period in periods if period > 0]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter or any(done % period == 0 for period in self.periods):
            self.average()

    def average(self) -> None:
        """Averages them now; called on all processes."""
        if comm.get_world_size() > 1:
            for module in get_bn_modules(self.trainer.model):
                for statistic in (module.running_mean, module.running_var):
                    dist.all_reduce(statistic)
                    statistic /= comm.get_world_size()


class ExportBackbone(HookBase):
    """Writes ``backbone.pth``, the file detectors load, when the run has reached its last iteration.

    Args:
        provenance: what travels with the weights; see :func:`wsl_d2.checkpoint.export_backbone`.
    """

    def __init__(self, provenance: dict):
        self.provenance = provenance

    def after_train(self) -> None:
        if comm.is_main_process() and self.trainer.iter >= self.trainer.max_iter:
            path = os.path.join(self.trainer.cfg.OUTPUT_DIR, "backbone.pth")
            export_backbone(self.trainer.model, path, **self.provenance)


class SaveCheckpoints(HookBase):
    """Saves every ``period`` iterations and at the end; keeps the newest ones and the milestones.

    A save that fails, as on a full disk, is logged and leaves the run and its older checkpoints alone; the third in a
    row, or the last of the run, ends it. Older files go only once a newer one is there.

    Args:
        period: iterations.
        keep: newest checkpoints kept, besides ``model_final.pth``.
        milestones: iterations after which to save, too; these are kept.
    """

    def __init__(self, period: int, keep: int, milestones: Sequence[int] = ()):
        self.period = period
        self.keep = max(1, keep)
        self.milestones = frozenset(milestones)
        self._failures = 0

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        checkpointer = self.trainer.checkpointer
        if done % self.period == 0 or done in self.milestones:
            try:
                checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
            except OSError as error:
                self._failures += 1
                if self._failures >= _MAX_FAILED_SAVES:
                    raise
                logging.getLogger(__name__).error(
                    f"the checkpoint after {done} iterations could not be saved ({error}); the older ones are kept, "
                    f"and training goes on. {_MAX_FAILED_SAVES - self._failures} more such failures in a row end it"
                )
            else:
                self._failures = 0
                self._remove_old(checkpointer.save_dir)
        if done >= self.trainer.max_iter:
            checkpointer.save("model_final", iteration=self.trainer.iter)

    def _remove_old(self, folder: str) -> None:
        files = {}
        for name in os.listdir(folder):
            if matched := re.fullmatch(r"model_(\d{7,})\.pth", name):
                files[int(matched[1])] = os.path.join(folder, name)
        removable = [number for number in sorted(files) if number + 1 not in self.milestones]
        for number in removable[: -self.keep]:
            os.remove(files[number])


class StopOnSignal(HookBase):
    """On SIGTERM or SIGUSR1 to any process, all of them save one checkpoint and exit with ``REQUEUE_EXIT_CODE``.

    Schedulers send these before they end or preempt a job; `--resume` then goes on as if nothing had happened. The
    processes agree at the next record of metrics, where nothing of an unfinished record is lost.

    Args:
        period: iterations between two records, ``SOLVER.LOG_PERIOD``.
        statistics: hooks whose ``average()`` makes the model ready to be saved.
    """

    def __init__(self, period: int, statistics: Sequence[AverageBatchNormStatistics] = ()):
        self.period = period
        self.statistics = statistics
        self._received: int | None = None
        self._previous: dict = {}

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def _note(self, number: int, frame) -> None:
        self._received = number

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.period or done >= self.trainer.max_iter:
            return
        received = [number for number in comm.all_gather(self._received) if number is not None]
        if not received:
            return
        for hook in self.statistics:
            hook.average()
        self.trainer.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
        comm.synchronize()  # a launcher may kill the others once the first has ended
        logging.getLogger(__name__).warning(
            f"{signal.Signals(received[0]).name}: saved after {done} iterations; --resume goes on from there"
        )
        raise SystemExit(REQUEUE_EXIT_CODE)

    def after_train(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
