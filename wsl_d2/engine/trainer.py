"""The two trainers, for hashtags and for detection, on Detectron2's DefaultTrainer."""

from __future__ import annotations

import copy
import logging
import shutil
import weakref
from collections import OrderedDict

import torch
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, TrainerBase, hooks
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules

from wsl_d2.checkpoint import WeightFile, check_tensors, load_backbone
from wsl_d2.data.read.detection import build_resumable_detection_train_loader
from wsl_d2.data.read.loaders import build_hashtag_train_loader, name_dead_workers
from wsl_d2.engine.agreement import Agreement, Heartbeat
from wsl_d2.engine.batch_norm import average_over_processes, running_statistics
from wsl_d2.engine.checkpointer import AtomicCheckpointer
from wsl_d2.engine.efficiency import peak_flops
from wsl_d2.engine.evaluate import evaluate
from wsl_d2.engine.fingerprint import check_fingerprint
from wsl_d2.engine.hooks import EarlyEstimate, ExportBackbone, PreciseBN, SaveCheckpoints, StopOnSignal
from wsl_d2.engine.parallel import build_sgd, data_parallel
from wsl_d2.engine.plan import RunPlan
from wsl_d2.engine.pretrain_loop import PretrainLoop
from wsl_d2.engine.random_state import get_random_state, set_random_state
from wsl_d2.engine.record import WriteRecord
from wsl_d2.engine.weight_average import AverageWeights
from wsl_d2.engine.writers import build_writers
from wsl_d2.errors import ConfigError
from wsl_d2.modeling.complexity import multiply_adds_per_image

_CHECKPOINTS_OF_FREE_DISK = 2.2  # room for one, for the next before it replaces the first, and for logs


class ResumableTrainer(DefaultTrainer):
    """DefaultTrainer whose runs resume exactly: data order, random numbers, and atomic checkpoints.

    Subclasses define ``build_train_loop``, ``build_loader(start_iteration)`` and ``load_weights``.

    Args:
        plan: of the run.
        override_resume: continue a checkpoint of other settings anyway, and record the differences.

    Attributes:
        agreement: flags that all processes agree on in every step.
        heartbeat: names lost processes, and ends this one if it hangs.
        average: the moving average of the weights, or None.
    """

    def __init__(self, plan: RunPlan, override_resume: bool = False):
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(plan.cfg, comm.get_world_size())
        self.plan = plan
        self.cfg = cfg
        self.override_resume = override_resume
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self.average = AverageWeights(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY > 0 else None
        self._statistics = running_statistics(model)
        model = data_parallel(model, cfg.SOLVER.GRADIENT_COMPRESSION)
        self.agreement = Agreement(next(model.parameters()).device)
        self.heartbeat = Heartbeat(cfg.SOLVER.PROCESS_TIMEOUT_SECONDS)
        self._trainer = self.build_train_loop(cfg, model, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self._random_states: list[dict] = []
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_sgd(cfg, model)

    def build_hooks(self) -> list:
        """Returns the hooks in their order: first those that change what is saved, then saving, then evaluation."""
        cfg = self.cfg

        def test():
            self._last_eval_results = self.test_all()
            return self._last_eval_results

        saving = SaveCheckpoints(
            cfg.SOLVER.CHECKPOINT_PERIOD,
            cfg.SOLVER.CHECKPOINTS_TO_KEEP,
            cfg.SOLVER.CHECKPOINT_MILESTONES,
            cfg.SOLVER.CHECKPOINT_IN_BACKGROUND,
        )
        result = [hooks.IterationTimer(), hooks.LRScheduler()]
        if self.average is not None:
            result.append(self.average)
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            result.append(
                PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, lambda: self.build_loader(0), cfg.TEST.PRECISE_BN.NUM_ITER)
            )
        result += [saving, hooks.EvalHook(cfg.TEST.EVAL_PERIOD, test)]
        if comm.is_main_process():
            result.append(EarlyEstimate(cfg.SOLVER.LOG_PERIOD))
            result.append(hooks.PeriodicWriter(build_writers(cfg, self.max_iter), period=cfg.SOLVER.LOG_PERIOD))
        result.append(WriteRecord())
        result.append(StopOnSignal(saving, exchange=not isinstance(self._trainer, PretrainLoop)))
        return result

    def run_step(self) -> None:
        super().run_step()
        average_over_processes(self._statistics)

    def test_all(self) -> OrderedDict:
        """Evaluates the model, and the average of its weights where there is one (names end in "_ema")."""
        results = evaluate(self.plan, self.model)
        if self.average is not None:
            self.average.copy_buffers()
            averaged = evaluate(self.plan, self.average.model)
            results |= {f"{task}_ema": values for task, values in averaged.items()}
        return results

    def origin_of_weights(self) -> dict:
        """Returns the provenance of the backbone in checkpoints and exports; empty if it is not to be exported."""
        return {}

    def prepare_saving(self) -> None:
        """Gathers from all processes what a checkpoint holds; called by all of them before one of them saves."""
        if self.average is not None:
            self.average.copy_buffers()
        self._random_states = comm.gather(get_random_state())
        if isinstance(self._trainer, PretrainLoop):
            self._trainer.prepare_saving()

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "fingerprint": self.plan.fingerprint,
            "random_states": self._random_states,
            "world_size": comm.get_world_size(),
        }

    def _check_checkpoint(self, checkpoint: dict) -> None:
        """Refuses a checkpoint of another run before anything of it is loaded.

        Raises:
            ConfigError: its settings differ, or differ in what ``--override-resume`` cannot change.
        """
        state = checkpoint["trainer"]
        check_fingerprint(
            state["fingerprint"],
            self.plan.fingerprint,
            self.cfg.OUTPUT_DIR if comm.is_main_process() else "",
            self.override_resume,
            state["iteration"],
            self._find_misfit(checkpoint["model"], state["_trainer"]["optimizer"]["param_groups"]),
        )

    def _find_misfit(self, weights: dict, groups: list[dict]) -> str:
        """What of a checkpoint does not fit the model and its optimizer; empty if all does."""
        shapes, own = ({name: list(tensor.shape) for name, tensor in one.items()} for one in (weights, self._weights()))
        for name in sorted(shapes.keys() | own.keys(), key=lambda name: (name in shapes and name in own, name)):
            if shapes.get(name) != own.get(name):
                return f"its tensor {name} is {shapes.get(name, 'not there')}, the model's {own.get(name, 'not there')}"
        numbers = [[len(group["params"]) for group in one] for one in (groups, self._trainer.optimizer.param_groups)]
        if numbers[0] != numbers[1]:
            return (
                f"its optimizer has parameter groups of {numbers[0]} tensors, this config's of {numbers[1]} "
                "(SOLVER.WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS, BIAS_LR_FACTOR, MODEL.BACKBONE.FREEZE_AT)"
            )
        return ""

    def _weights(self) -> dict:
        return getattr(self._trainer.model, "module", self._trainer.model).state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if self.override_resume:  # of optimizer and schedule, the settings of the config count
            self._follow_config()
        if state_dict["world_size"] == comm.get_world_size():
            set_random_state(state_dict["random_states"][comm.get_rank()])
        else:
            logging.getLogger(__name__).warning(
                f"the run had {state_dict['world_size']} processes and now has {comm.get_world_size()}: images and "
                "crops stay the same, random numbers drawn by the model do not"
            )

    def _follow_config(self) -> None:
        fresh = self.build_optimizer(self.cfg, self.build_model(self.cfg))
        own = {"lr", "initial_lr", "weight_decay", "momentum", "nesterov"}
        for group, new in zip(self._trainer.optimizer.param_groups, fresh.param_groups, strict=True):
            group.update({key: new[key] for key in own & new.keys()} | {"initial_lr": new["lr"]})
        last, before = self.scheduler.last_epoch, max(group["lr"] for group in self._trainer.optimizer.param_groups)
        self.scheduler = self.build_lr_scheduler(self.cfg, self._trainer.optimizer)
        self.scheduler.last_epoch = last - 1
        self.scheduler.step()
        if last < self.max_iter:
            schedule, end = self.scheduler._multiplier, self.max_iter - 1
            now, lowest = (self.cfg.SOLVER.BASE_LR * schedule(i / self.max_iter) for i in (last, end))
            logging.getLogger(__name__).warning(
                f"the learning rate goes from {before:.3g} to {now:.3g}, and from iteration {last} to {end} down to "
                f"{lowest:.3g}: as of a run of {self.max_iter} iterations"
            )

    def resume_or_load(self, resume: bool = True) -> None:
        """Resumes the run in OUTPUT_DIR if there is one, else loads MODEL.WEIGHTS.

        Raises:
            IncompleteLoadError: a tensor is missing, left over or of another shape.
            PixelStatisticsError: the weights' pixel statistics contradict INPUT.FORMAT, MODEL.PIXEL_MEAN or PIXEL_STD.
            ConfigError: the checkpoint belongs to a run of other settings.
        """
        if resume and self.checkpointer.has_checkpoint():
            self.checkpointer.before_loading = self._check_checkpoint
            super().resume_or_load(resume=True)
        else:
            self.load_weights(self.cfg, self._trainer.model, self.checkpointer)
            if self.average is not None:
                self.average = self._replace_average()

    def _replace_average(self) -> AverageWeights:
        """Starts the average from the loaded weights."""
        fresh = AverageWeights(self.model, self.cfg.SOLVER.EMA_DECAY)
        self._hooks[self._hooks.index(self.average)] = fresh
        fresh.trainer = weakref.proxy(self)
        return fresh

    def check_disk(self) -> None:
        """Refuses to start a run whose first checkpoints do not fit on the disk.

        Raises:
            ConfigError: names the bytes that are free and needed.
        """
        size = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        size *= 2 + (self.average is not None)  # weights, momentum, average
        free = shutil.disk_usage(self.cfg.OUTPUT_DIR).free
        if free < _CHECKPOINTS_OF_FREE_DISK * size:
            raise ConfigError(
                f"OUTPUT_DIR {self.cfg.OUTPUT_DIR} has {free / 1e9:.2f} GB of free disk; a checkpoint takes about "
                f"{size / 1e9:.2f} GB, and {_CHECKPOINTS_OF_FREE_DISK} times as much is needed. Free some, or "
                "choose another OUTPUT_DIR."
            )

    def train(self):
        """Trains from ``start_iter``; the loader is built here, since only now the first batch is known."""
        if comm.is_main_process():
            self.check_disk()
        if self.start_iter < self.max_iter:
            self._trainer.reset_data_loader(lambda: self.build_loader(self.start_iter))
        try:
            with self.heartbeat.name_lost_processes():
                return super().train()
        finally:
            if hasattr(self._trainer._data_loader_iter_obj, "close"):
                self._trainer._data_loader_iter_obj.close()  # ends the workers


class WSLTrainer(ResumableTrainer):
    """Trains a HashtagClassifier on a hashtag dataset; writes ``backbone.pth`` at the end."""

    def build_train_loop(self, cfg, model, optimizer) -> PretrainLoop:
        amp_dtype = cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else None
        peak = peak_flops(cfg.SOLVER.PEAK_TFLOPS, amp_dtype is not None)
        plain = getattr(model, "module", model)
        multiply_adds = plain.head.weight.numel()
        if peak:
            multiply_adds += multiply_adds_per_image(plain.backbone, cfg.INPUT.RANDOM_RESIZED_CROP.SIZE)
        if cfg.MODEL.COMPILE.ENABLED:
            plain.backbone.compile(backend=cfg.MODEL.COMPILE.BACKEND)  # in place: names in checkpoints stay
        return PretrainLoop(
            model,
            optimizer,
            num_micro_batches=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size() // cfg.SOLVER.IMS_PER_MICRO_BATCH,
            amp_dtype=amp_dtype,
            log_period=cfg.SOLVER.LOG_PERIOD,
            max_iter=cfg.SOLVER.MAX_ITER,
            batch_size=cfg.SOLVER.IMS_PER_BATCH,
            max_damaged_fraction=cfg.DATALOADER.MAX_DAMAGED_FRACTION,
            max_skipped_steps=cfg.SOLVER.MAX_SKIPPED_STEPS,
            output_dir=cfg.OUTPUT_DIR,
            flops_per_image=3 * 2 * multiply_adds,  # forward, and twice as much backward
            peak_flops=peak,
            agreement=self.agreement,
            heartbeat=self.heartbeat,
        )

    def build_hooks(self) -> list:
        return [*super().build_hooks(), ExportBackbone()]

    def origin_of_weights(self) -> dict:
        return {
            "vocabulary_checksum": self.plan.fingerprint["vocabulary"],
            "images_seen": min(self.iter + 1, self.max_iter) * self.cfg.SOLVER.IMS_PER_BATCH,
        }

    @classmethod
    def build_model(cls, cfg):
        return super().build_model(cfg).to(memory_format=torch.channels_last)

    def build_loader(self, start_iteration: int):
        assert self.plan.dataset is not None and self.plan.sampler is not None
        sampler = copy.copy(self.plan.sampler)
        sampler.start_iteration = start_iteration
        return build_hashtag_train_loader(self.cfg, self.plan.dataset, sampler)

    @classmethod
    def load_weights(cls, cfg, model: torch.nn.Module, checkpointer, for_evaluation: bool = False) -> None:
        """Loads the backbone strictly; with ``for_evaluation`` also the head.

        Raises:
            IncompleteLoadError: the file does not fill the backbone, or the head where that is needed.
        """
        if not cfg.MODEL.WEIGHTS:
            return
        file = WeightFile.read(cfg.MODEL.WEIGHTS)
        load_backbone(model, file, cfg)
        if for_evaluation:
            head = file.backbone().head
            named = [{f"head.{name}": t for name, t in state.items()} for state in (head, model.head.state_dict())]
            check_tensors(file.path, *named, reason="the classifier's head does not fit")
            model.head.load_state_dict(head)

    def train(self):
        logging.getLogger(__name__).info(self.plan.describe_length())
        with name_dead_workers():
            return super().train()


class DetectionTrainer(ResumableTrainer):
    """Detectron2's detection training, with strict loading of pretrained backbones."""

    def build_train_loop(self, cfg, model, optimizer) -> SimpleTrainer:
        return (AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer)(model, None, optimizer)

    def run_step(self) -> None:
        self.heartbeat.note(self.iter, "waiting for data, or computing")
        super().run_step()
        self.heartbeat.pause()

    def build_loader(self, start_iteration: int):
        return build_resumable_detection_train_loader(self.cfg, start_iteration)

    @classmethod
    def load_weights(cls, cfg, model: torch.nn.Module, checkpointer, for_evaluation: bool = False) -> None:
        """Loads the backbone strictly; of a file that holds a detector, the rest by Detectron2's checkpointer.

        Raises:
            IncompleteLoadError: the file does not fill the backbone.
            PixelStatisticsError: its pixel statistics are not those of the config.
        """
        if not cfg.MODEL.WEIGHTS:
            return
        file = WeightFile.read(cfg.MODEL.WEIGHTS)
        if file.is_detector:
            checkpointer.load(cfg.MODEL.WEIGHTS)
        load_backbone(model, file, cfg)
