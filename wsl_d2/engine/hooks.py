"""Hooks of the pretraining trainer."""

from __future__ import annotations

import os

import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules

from wsl_d2.checkpoint import export_backbone


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
        if comm.get_world_size() > 1 and (
            done >= self.trainer.max_iter or any(done % period == 0 for period in self.periods)
        ):
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
