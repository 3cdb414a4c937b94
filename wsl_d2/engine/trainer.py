"""The two trainers, for hashtags and for detection, on Detectron2's DefaultTrainer."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
import weakref

import torch
import torch.distributed as dist
from detectron2.data import MetadataCatalog
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, TrainerBase, hooks
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch.nn.parallel import DistributedDataParallel

from wsl_d2.checkpoint import (
    IncompleteLoadError,
    check_pixel_statistics,
    convert_state_dict,
    holds_detector,
    load_backbone,
    read_checkpoint,
)
from wsl_d2.data import build_hashtag_test_loader, build_hashtag_train_loader, build_resumable_detection_train_loader
from wsl_d2.data.build import build_sampler, split_batch, training_dataset
from wsl_d2.engine.checkpointer import AtomicCheckpointer
from wsl_d2.engine.hooks import AverageBatchNormStatistics, ExportBackbone, SaveCheckpoints, StopOnSignal
from wsl_d2.engine.schedule import ConfigError
from wsl_d2.evaluation import HashtagEvaluator

_ALWAYS_ALLOWED_DAMAGED_IMAGES = 8


_MAX_OVERFLOWS = 20  # of float16 gradients in consecutive steps; GradScaler needs a few to find its scale


class DamagedImagesError(RuntimeError):
    """More images could not be decoded than ``DATALOADER.MAX_DAMAGED_FRACTION`` allows."""


def _data_parallel(model: torch.nn.Module) -> torch.nn.Module:
    """Wraps the model for several processes; unlike Detectron2's ``create_ddp_model`` also on CPU."""
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    return DistributedDataParallel(
        model, device_ids=[torch.cuda.current_device()] if on_gpu else None, broadcast_buffers=False
    )


class ResumableTrainer(DefaultTrainer):
    """DefaultTrainer whose data stream continues on resume and whose checkpoints are written atomically.

    Subclasses give ``build_train_loop``, ``build_train_loader(cfg, start_iteration)`` and ``load_weights``.
    """

    def __init__(self, cfg):
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        model = _data_parallel(model)
        self._trainer = self.build_train_loop(cfg, model, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list:
        """Order matters: statistics are averaged before they are saved, saved before they are evaluated."""
        cfg = self.cfg

        def test():
            self._last_eval_results = self.test(cfg, self.model)
            return self._last_eval_results

        statistics = self.build_statistics_hooks()
        result = [hooks.IterationTimer(), hooks.LRScheduler(), *statistics]
        if comm.is_main_process():
            result.append(
                SaveCheckpoints(
                    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINTS_TO_KEEP, cfg.SOLVER.CHECKPOINT_MILESTONES
                )
            )
        result.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, test))
        if comm.is_main_process():
            result.append(hooks.PeriodicWriter(self.build_writers(), period=cfg.SOLVER.LOG_PERIOD))
        result.append(StopOnSignal(cfg.SOLVER.LOG_PERIOD, statistics))
        return result

    def resume_or_load(self, resume: bool = True) -> None:
        """Resumes the run in OUTPUT_DIR where there is one to resume, else loads MODEL.WEIGHTS.

        Raises:
            IncompleteLoadError: a tensor is missing, left over or of another shape.
            PixelStatisticsError: the weights' pixel statistics contradict INPUT.FORMAT, MODEL.PIXEL_MEAN or PIXEL_STD.
        """
        if resume and self.checkpointer.has_checkpoint():
            super().resume_or_load(resume=True)
        else:
            self.load_weights(self.cfg, self._trainer.model, self.checkpointer)

    def build_statistics_hooks(self) -> list[AverageBatchNormStatistics]:
        """Hooks that change the model's buffers and must run before checkpointing."""
        return []

    def train(self):
        """Trains from ``start_iter``; the loader is built here, when it is known where the data continues."""
        if self.start_iter < self.max_iter:
            self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg, self.start_iter))
        return super().train()


class PretrainLoop(SimpleTrainer):
    """One optimisation step: micro-batches, autocast, gradient scaling, and metrics kept on the device.

    Metrics reach the host every ``log_period`` iterations; the recorded loss is the mean of those iterations over all
    processes, without smoothing, so that a resumed run records the same numbers. Checkpoints fall on records (setup
    checks that), so nothing of an unfinished window needs saving.

    Args:
        model: gives {"loss_hashtag": loss}.
        micro_batch_size: images per forward pass and process; 0 for all at once.
        amp_dtype: None, "bfloat16" or "float16".
        log_period: iterations.
        max_iter: length of the run, iterations; the last one is always recorded.
        batch_size: images per iteration over all processes.
        max_damaged_fraction: see ``DATALOADER.MAX_DAMAGED_FRACTION``.
        max_skipped_steps: see ``SOLVER.MAX_SKIPPED_STEPS``.
        output_dir: where the keys of batches with bad numbers are written.
        identity: what must be equal for a checkpoint to be continued, name -> value.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        micro_batch_size: int = 0,
        amp_dtype: str | None = None,
        log_period: int = 20,
        max_iter: int,
        batch_size: int,
        max_damaged_fraction: float = 1e-3,
        max_skipped_steps: int = 0,
        output_dir: str = ".",
        identity: dict | None = None,
    ):
        super().__init__(model, None, optimizer)
        self.micro_batch_size = micro_batch_size
        self.device_type = next(model.parameters()).device.type
        self.amp_dtype = getattr(torch, amp_dtype) if amp_dtype else None
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=amp_dtype == "float16")
        self.log_period = log_period
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.max_damaged_fraction = max_damaged_fraction
        self.max_skipped_steps = max_skipped_steps
        self.output_dir = output_dir
        self.identity = identity or {}
        # [sum of losses, iterations, images skipped] of this process since the last record
        self._window = torch.zeros(3, dtype=torch.float64, device=next(model.parameters()).device)
        self._num_skipped = 0  # of all processes up to the last record
        self._num_skipped_steps = 0
        self._overflows = 0  # in a row
        self._window_start: float | None = None
        self._data_time = 0.0

    def run_step(self) -> None:
        if self._window_start is None:
            self._window_start = time.perf_counter()
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        self._data_time += time.perf_counter() - start
        for key, reason in batch["skipped"]:
            self._window[2] += 1
            logging.getLogger(__name__).warning(f"skipped image {key!r} ({reason}) at iteration {self.iter}")

        self.optimizer.zero_grad(set_to_none=True)
        parts = split_batch(batch, self.micro_batch_size)
        loss_of_step = torch.zeros((), device=self._window.device)
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            wait = isinstance(self.model, DistributedDataParallel) and not is_last
            with self.model.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(self.device_type, self.amp_dtype, enabled=self.amp_dtype is not None):
                    loss = sum(self.model(part).values())
                loss = loss * (len(part["image"]) / len(batch["image"]))
                self.grad_scaler.scale(loss).backward()
            loss_of_step += loss.detach()
        self.after_backward()
        is_good = self._numbers_are_good(loss_of_step, batch["keys"])
        if is_good:
            self._window[0] += loss_of_step
            self._window[1] += 1
        if (self.iter + 1) % self.log_period == 0 or self.iter + 1 >= self.max_iter:
            self._record()
        if is_good or self.grad_scaler.is_enabled():  # the scaler skips the step itself, and lowers its scale
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()

    def _numbers_are_good(self, loss: torch.Tensor, keys: list[str]) -> bool:
        """Whether loss and gradients are finite in all processes, which agree on it before any weight is changed.

        Raises:
            FloatingPointError: in all processes, when more steps were skipped than is allowed.
        """
        self.grad_scaler.unscale_(self.optimizer)
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)) if gradients else loss.new_zeros(1)
        bad = torch.stack([~torch.isfinite(loss), ~torch.isfinite(norms).all()]).to(torch.int32)
        mine = bad.clone()
        if comm.get_world_size() > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        bad_loss, bad_gradient = bad.tolist()
        if not bad_loss and not bad_gradient:
            self._overflows = 0
            return True
        if self.grad_scaler.is_enabled() and not bad_loss:
            self._overflows += 1
            if self._overflows <= _MAX_OVERFLOWS:
                return False
            raise FloatingPointError(
                f"the float16 gradients overflowed in {self._overflows} steps in a row, up to iteration {self.iter}; "
                "use SOLVER.AMP.DTYPE bfloat16, or lower SOLVER.LR_PER_256_IMAGES."
            )
        self._num_skipped_steps += 1
        name = f"bad_numbers_{self.iter:07d}_rank{comm.get_rank()}.json"
        content = {"iteration": self.iter, "here": bool(mine.any()), "loss": str(loss.item()), "keys": keys}
        with open(os.path.join(self.output_dir, name), "w") as file:
            json.dump(content, file)
        what = "loss" if bad_loss else "gradient"
        message = (
            f"the {what} of iteration {self.iter} is not finite; the keys of its images are in "
            f"{os.path.join(self.output_dir, name)} and its like of the other processes"
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

    def _record(self) -> None:
        """Averages the window over processes, stops on bad numbers on all of them, and writes to the storage."""
        iterations = self.iter % self.log_period + 1
        totals = self._window.clone()
        if comm.get_world_size() > 1:
            dist.all_reduce(totals)
        loss_sum, num_losses, skipped = totals.tolist()
        loss = loss_sum / num_losses if num_losses else math.nan  # all of its steps were skipped
        self._num_skipped += int(skipped)
        images_seen = (self.iter + 1) * self.batch_size
        seconds = time.perf_counter() - (self._window_start or 0.0)
        data_time, self._data_time = self._data_time / iterations, 0.0
        self._window.zero_()
        self._window_start = None
        allowed = max(_ALWAYS_ALLOWED_DAMAGED_IMAGES, self.max_damaged_fraction * images_seen)
        if self._num_skipped > allowed:
            raise DamagedImagesError(
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
            images_per_second=iterations * self.batch_size / max(seconds, 1e-9),
            skipped_images=self._num_skipped,
            skipped_steps=self._num_skipped_steps,
        )
        storage.put_scalar("data_time", data_time)

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "grad_scaler": self.grad_scaler.state_dict(),
            "num_skipped": self._num_skipped,
            "num_skipped_steps": self._num_skipped_steps,
            "identity": self.identity,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        differences = [
            f"{name} was {state_dict['identity'].get(name)!r}, is now {value!r}"
            for name, value in self.identity.items()
            if state_dict["identity"].get(name) != value
        ]
        if differences:
            raise ConfigError(
                "the checkpoint in OUTPUT_DIR belongs to another run: "
                + "; ".join(differences)
                + ". Restore the old values, or choose another OUTPUT_DIR."
            )
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self._num_skipped = state_dict["num_skipped"]
        self._num_skipped_steps = state_dict.get("num_skipped_steps", 0)


class WSLTrainer(ResumableTrainer):
    """Trains a HashtagClassifier on a hashtag dataset; writes ``backbone.pth`` at the end."""

    def build_train_loop(self, cfg, model, optimizer) -> PretrainLoop:
        dataset = training_dataset(cfg)
        return PretrainLoop(
            model,
            optimizer,
            micro_batch_size=cfg.SOLVER.IMS_PER_MICRO_BATCH,
            amp_dtype=cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else None,
            log_period=cfg.SOLVER.LOG_PERIOD,
            max_iter=cfg.SOLVER.MAX_ITER,
            batch_size=cfg.SOLVER.IMS_PER_BATCH,
            max_damaged_fraction=cfg.DATALOADER.MAX_DAMAGED_FRACTION,
            max_skipped_steps=cfg.SOLVER.MAX_SKIPPED_STEPS,
            output_dir=cfg.OUTPUT_DIR,
            identity={
                "vocabulary": dataset.vocabulary_checksum,
                "number of images": len(dataset),
                "SEED": cfg.SEED,
                "SOLVER.IMS_PER_BATCH": cfg.SOLVER.IMS_PER_BATCH,
                "DATALOADER.RESAMPLING.MODE": cfg.DATALOADER.RESAMPLING.MODE,
                "DATALOADER.RESAMPLING.THRESHOLD": cfg.DATALOADER.RESAMPLING.THRESHOLD,
                "DATALOADER.SHUFFLE_WINDOW_SHARDS": cfg.DATALOADER.SHUFFLE_WINDOW_SHARDS,
                "DATALOADER.READ_STREAMS": cfg.DATALOADER.READ_STREAMS,
                "DATALOADER.LABEL_NOISE": dict(cfg.DATALOADER.LABEL_NOISE),
            },
        )

    def build_statistics_hooks(self) -> list[AverageBatchNormStatistics]:
        return [AverageBatchNormStatistics(self.cfg.SOLVER.CHECKPOINT_PERIOD, self.cfg.TEST.EVAL_PERIOD)]

    def build_hooks(self) -> list:
        cfg = self.cfg
        provenance = {
            "vocabulary_checksum": training_dataset(cfg).vocabulary_checksum,
            "images_seen": cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH,
        }
        return [*super().build_hooks(), ExportBackbone(provenance)]

    @classmethod
    def build_model(cls, cfg):
        return super().build_model(cfg).to(memory_format=torch.channels_last)

    @classmethod
    def build_train_loader(cls, cfg, start_iteration: int = 0):
        return build_hashtag_train_loader(cfg, start_iteration)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_hashtag_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return HashtagEvaluator()

    @classmethod
    def load_weights(cls, cfg, model: torch.nn.Module, checkpointer, whole: bool = False) -> None:
        """Loads a backbone strictly to go on from; with ``whole`` the head, too, as evaluation needs it.

        Raises:
            IncompleteLoadError: the file does not fill the backbone, or with ``whole`` the head.
        """
        if not cfg.MODEL.WEIGHTS:
            return
        path = checkpointer.path_manager.get_local_path(cfg.MODEL.WEIGHTS)
        load_backbone(model, path)
        check_pixel_statistics(cfg, path)
        if whole:
            head = model.head.state_dict()
            source = convert_state_dict(read_checkpoint(path)["model"], "d2")
            missing = [f"head.{name}" for name in head if f"head.{name}" not in source]
            mismatched = {
                f"head.{name}": (str(tuple(source[f"head.{name}"].shape)), str(tuple(tensor.shape)))
                for name, tensor in head.items()
                if f"head.{name}" in source and source[f"head.{name}"].shape != tensor.shape
            }
            if missing or mismatched:
                raise IncompleteLoadError(
                    path, "the classifier's head does not fit", missing=missing, mismatched=mismatched
                )
            model.head.load_state_dict({name: source[f"head.{name}"] for name in head})

    def describe_length(self) -> str:
        """Returns the run's length in images, iterations and epochs; called by all processes together."""
        sampler = build_sampler(self.cfg, training_dataset(self.cfg))
        solver = self.cfg.SOLVER
        images = solver.MAX_ITER * solver.IMS_PER_BATCH
        return (
            f"{images:,} images in {solver.MAX_ITER:,} iterations of {solver.IMS_PER_BATCH}: "
            f"{images / sampler.epoch_length:.2f} epochs of {sampler.epoch_length:,} draws "
            f"({self.cfg.DATALOADER.RESAMPLING.MODE} resampling of {sampler.num_images:,} images); "
            f"peak learning rate {solver.BASE_LR:g}"
        )

    def train(self):
        logging.getLogger(__name__).info(self.describe_length())
        noise = self.cfg.DATALOADER.LABEL_NOISE
        if noise.FRACTION:
            logging.getLogger(__name__).warning(
                f"{noise.FRACTION:.0%} of the training labels are replaced (seed {noise.SEED})"
            )
        return super().train()


class DetectionTrainer(ResumableTrainer):
    """Detectron2's detection training, with a strict hand-over of pretrained backbones."""

    def build_train_loop(self, cfg, model, optimizer) -> SimpleTrainer:
        return (AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer)(model, None, optimizer)

    @classmethod
    def build_train_loader(cls, cfg, start_iteration: int = 0):
        return build_resumable_detection_train_loader(cfg, start_iteration)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        evaluator_type = MetadataCatalog.get(dataset_name).evaluator_type
        if evaluator_type != "coco":
            raise ConfigError(f"dataset {dataset_name!r} has evaluator type {evaluator_type!r}; only 'coco' is known.")
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))

    @classmethod
    def load_weights(cls, cfg, model: torch.nn.Module, checkpointer, whole: bool = False) -> None:
        """A whole detector goes through Detectron2's checkpointer; in any file the backbone is loaded strictly.

        Raises:
            IncompleteLoadError: the file does not fill the backbone.
            PixelStatisticsError: its pixel statistics are not those of the config.
        """
        weights = cfg.MODEL.WEIGHTS
        if not weights:
            return
        path = checkpointer.path_manager.get_local_path(weights)
        try:
            is_detector = holds_detector(read_checkpoint(path)["model"])
        except IncompleteLoadError:
            is_detector = False  # load_backbone raises the same error with the tensors it misses
        if is_detector:
            checkpointer.load(weights)
        load_backbone(model, path)
        check_pixel_statistics(cfg, path)
