"""A step of pretraining: gradient accumulation, autocast, loss scaling, the check for finite numbers, metrics."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from wsl_d2.data.read.device_decode import decode_batch
from wsl_d2.engine.agreement import Agreement, Heartbeat
from wsl_d2.engine.batch_norm import GhostBatchStatistics
from wsl_d2.errors import UserError

_MIN_ALLOWED_DAMAGED_IMAGES = 8
_MAX_OVERFLOWS = 20  # of float16 gradients in consecutive steps; GradScaler needs a few to find its scale


class TooManyDamagedImagesError(UserError, RuntimeError):
    """More images could not be decoded than ``DATALOADER.MAX_DAMAGED_FRACTION`` allows."""


class PretrainLoop(SimpleTrainer):
    """Trains on micro-batches, of which the loader delivers ``num_micro_batches`` for each step of this process.

    Metrics stay on the device and reach the host every ``log_period`` iterations; the recorded loss is the mean of
    those iterations over all processes, without smoothing, so that a resumed run records the same numbers. (Their sum
    is exact in float64, so that its order does not matter.)

    Args:
        model: returns {"loss_hashtag": loss}.
        num_micro_batches: forward passes of this process in each step, whose gradients are accumulated.
        amp_dtype: None, "bfloat16" or "float16".
        log_period: iterations.
        max_iter: length of the run, iterations; the last one is always recorded.
        batch_size: images per iteration over all processes.
        max_damaged_fraction: see ``DATALOADER.MAX_DAMAGED_FRACTION``.
        max_skipped_steps: see ``SOLVER.MAX_SKIPPED_STEPS``.
        output_dir: where the keys of batches with non-finite numbers are written.
        flops_per_image: of a training step, to record the model FLOPs utilization.
        peak_flops: of this process's device, per second; None if unknown.
        agreement: exchanged once in each step.
        heartbeat: told what this process does.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        num_micro_batches: int = 1,
        amp_dtype: str | None = None,
        log_period: int = 20,
        max_iter: int,
        batch_size: int,
        max_damaged_fraction: float = 1e-3,
        max_skipped_steps: int = 0,
        output_dir: str = ".",
        flops_per_image: float = 0.0,
        peak_flops: float | None = None,
        agreement: Agreement | None = None,
        heartbeat: Heartbeat | None = None,
    ):
        super().__init__(model, None, optimizer)
        self.num_micro_batches = num_micro_batches
        self.device = next(model.parameters()).device
        self.amp_dtype = getattr(torch, amp_dtype) if amp_dtype else None
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype == "float16")
        self.log_period = log_period
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.max_damaged_fraction = max_damaged_fraction
        self.max_skipped_steps = max_skipped_steps
        self.output_dir = output_dir
        self.flops_per_image = flops_per_image
        self.peak_flops = peak_flops
        self.agreement = agreement or Agreement(self.device)
        self.heartbeat = heartbeat or Heartbeat()
        self._ghost_batches = GhostBatchStatistics(model, num_micro_batches)
        # [sum of losses, steps that count, images skipped] of this process since the last record
        self._window = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._saved_window = [0.0, 0.0, 0.0]  # of all processes, when last prepared for saving
        self._num_skipped = 0  # of all processes up to the last record
        self._num_skipped_steps = 0
        self._overflows = 0  # in a row
        self._num_overflows = 0  # in all, where gradients are scaled
        self._window_start: float | None = None
        self._window_steps = 0
        self._data_seconds = 0.0

    def run_step(self) -> None:
        if self._window_start is None:
            self._window_start = time.perf_counter()
        self._window_steps += 1
        loss, keys = self._forward_backward()
        self.after_backward()
        is_finite = self._is_finite(loss, keys)
        if is_finite:
            self._window[0] += loss
            self._window[1] += 1
        if (self.iter + 1) % self.log_period == 0 or self.iter + 1 >= self.max_iter:
            self._record()
        if is_finite or self.grad_scaler.is_enabled():  # the scaler skips the step itself, and lowers its scale
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        self.heartbeat.pause()

    def _forward_backward(self) -> tuple[torch.Tensor, list[str]]:
        """Returns the mean loss of this process's images, and their keys; fills the parameters' gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self._ghost_batches.before_step()
        total = torch.zeros((), device=self.device)
        keys: list[str] = []
        for number in range(self.num_micro_batches):
            batch = self._next_batch()
            keys += batch["keys"]
            wait = isinstance(self.model, DistributedDataParallel) and number < self.num_micro_batches - 1
            with self.model.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                    loss = sum(self.model(batch).values())
                loss = loss / self.num_micro_batches
                self.grad_scaler.scale(loss).backward()
            self._ghost_batches.after_batch(number)
            total += loss.detach()
        return total, keys

    def _next_batch(self) -> dict:
        self.heartbeat.note(self.iter, "waiting for data")
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        batch = decode_batch(batch, self.device)
        self._data_seconds += time.perf_counter() - start
        self.heartbeat.note(self.iter, "computing")
        for key, reason in batch["skipped"]:
            self._window[2] += 1
            logging.getLogger(__name__).warning(f"skipped image {key!r} ({reason}) at iteration {self.iter}")
        return batch

    def _is_finite(self, loss: torch.Tensor, keys: list[str]) -> bool:
        """Whether loss and gradients are finite in all processes, which agree on it before the weights are updated.

        Raises:
            FloatingPointError: in all processes, when more steps are skipped than allowed.
        """
        self.grad_scaler.unscale_(self.optimizer)
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)) if gradients else loss.new_zeros(1)
        mine = [~torch.isfinite(loss), ~torch.isfinite(norms).all()]
        bad_loss, bad_gradient = self.agreement.exchange(mine)
        if not bad_loss and not bad_gradient:
            self._overflows = 0
            return True
        if self.grad_scaler.is_enabled() and not bad_loss:
            self._overflows += 1
            self._num_overflows += 1
            if self._overflows <= _MAX_OVERFLOWS:
                return False
            raise FloatingPointError(
                f"the float16 gradients overflowed in {self._overflows} steps in a row, up to iteration {self.iter}; "
                "use SOLVER.AMP.DTYPE bfloat16, or lower SOLVER.LR_PER_256_IMAGES."
            )
        self._num_skipped_steps += 1
        name = f"not_finite_{self.iter:07d}_rank{comm.get_rank()}.json"
        here = any(bool(flag) for flag in mine)
        content = {"iteration": self.iter, "here": here, "loss": str(loss.item()), "keys": keys}
        with open(os.path.join(self.output_dir, name), "w") as file:
            json.dump(content, file)
        what = "loss" if bad_loss else "gradient"
        message = (
            f"the {what} of iteration {self.iter} is not finite; the keys of its images are in "
            f"{os.path.join(self.output_dir, name)} and in those of the other ranks"
        )
        if self._num_skipped_steps <= self.max_skipped_steps:
            logging.getLogger(__name__).warning(f"{message}; step skipped")
            return False
        comm.synchronize()  # a launcher may kill the others once the first has ended
        raise FloatingPointError(
            f"{message}. {self._num_skipped_steps - 1} steps were skipped before, SOLVER.MAX_SKIPPED_STEPS allows "
            f"{self.max_skipped_steps}. Lower SOLVER.LR_PER_256_IMAGES or lengthen SOLVER.WARMUP_IMAGES, and resume "
            "from the last checkpoint."
        )

    def _totals(self) -> list[float]:
        """The window's sums over all processes."""
        totals = self._window.clone()
        if comm.get_world_size() > 1:
            dist.all_reduce(totals)
        return totals.tolist()

    def _record(self) -> None:
        """Averages the window over processes, stops at too many damaged images, and writes to the storage."""
        loss_sum, num_losses, skipped = self._totals()
        loss = loss_sum / num_losses if num_losses else math.nan  # all of its steps were skipped
        self._num_skipped += int(skipped)
        images_seen = (self.iter + 1) * self.batch_size
        allowed = max(_MIN_ALLOWED_DAMAGED_IMAGES, self.max_damaged_fraction * images_seen)
        if self._num_skipped > allowed:
            raise TooManyDamagedImagesError(
                f"{self._num_skipped} of {images_seen} images could not be decoded, more than "
                f"DATALOADER.MAX_DAMAGED_FRACTION = {self.max_damaged_fraction} allows; the log lists their keys. "
                "Verify the shards, or raise the limit."
            )
        storage = get_event_storage()
        storage.put_scalars(
            smoothing_hint=False,
            total_loss=loss,
            loss_hashtag=loss,
            images_seen=images_seen,
            skipped_images=self._num_skipped,
            skipped_steps=self._num_skipped_steps,
            **self._speed(),
        )
        if self.grad_scaler.is_enabled():
            storage.put_scalar("overflow_steps", self._num_overflows, smoothing_hint=False)
        storage.put_scalar("data_time", self._data_seconds / self._window_steps)
        self._window.zero_()
        self._window_start = None
        self._window_steps = 0
        self._data_seconds = 0.0

    def _speed(self) -> dict[str, float]:
        """Speed and memory of this process since the last record."""
        seconds = max(time.perf_counter() - (self._window_start or 0.0), 1e-9)
        images_per_second = self._window_steps * self.batch_size / seconds
        found = {"images_per_second": images_per_second, "data_wait_percent": 100 * self._data_seconds / seconds}
        if self.device.type == "cuda":
            found["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if self.peak_flops:
            speed = images_per_second / comm.get_world_size() * self.flops_per_image
            found["mfu_percent"] = 100 * speed / self.peak_flops
        return found

    def prepare_saving(self) -> None:
        """Gathers from all processes what a checkpoint holds; called by all of them before one of them saves."""
        if isinstance(self.optimizer, ZeroRedundancyOptimizer):
            self.optimizer.consolidate_state_dict(to=0)
        self._saved_window = self._totals()

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "grad_scaler": self.grad_scaler.state_dict(),
            "num_skipped": self._num_skipped,
            "num_skipped_steps": self._num_skipped_steps,
            "overflows": [self._overflows, self._num_overflows],
            "window": self._saved_window,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        flags = [{name: group.get(name) for name in ("foreach", "fused")} for group in self.optimizer.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.optimizer.param_groups, flags, strict=True):
            group.update(own)  # not those of the device that the state was saved on
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self._num_skipped = state_dict["num_skipped"]
        self._num_skipped_steps = state_dict["num_skipped_steps"]
        self._overflows, self._num_overflows = state_dict["overflows"]
        if comm.is_main_process():
            self._window.copy_(torch.tensor(state_dict["window"], dtype=torch.float64))
