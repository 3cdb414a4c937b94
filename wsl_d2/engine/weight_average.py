"""An exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from detectron2.engine import HookBase
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class AverageWeights(HookBase):
    """Updates ``average <- decay * average + (1 - decay) * weights`` after every step, in all processes.

    Buffers, such as running statistics, are copied from the model.

    Args:
        model: of the trainer.
        decay: in (0, 1).
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        plain = model.module if isinstance(model, DistributedDataParallel) else model
        self._source = plain
        self._average = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @property
    def model(self) -> torch.nn.Module:
        """The averaged model, for evaluation and export."""
        return self._average.module

    def after_step(self) -> None:
        self._average.update_parameters(self._source)

    def copy_buffers(self) -> None:
        """Copies the model's running statistics."""
        for own, source in zip(self.model.buffers(), self._source.buffers(), strict=True):
            own.copy_(source)

    def state_dict(self) -> dict:
        return self._average.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self._average.load_state_dict(state_dict)
