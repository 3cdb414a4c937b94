"""From command-line arguments to a finished run: setup and main."""

from __future__ import annotations

import contextlib
import os
import tempfile

from detectron2.evaluation import verify_results
from detectron2.utils import comm

from wsl_d2.checkpoint import WeightFile
from wsl_d2.config import check_devices, find_config_file, load_config
from wsl_d2.data.read.catalog import register_datasets
from wsl_d2.data.read.detection_check import check_run
from wsl_d2.engine.agreement import Heartbeat
from wsl_d2.engine.checkpointer import AtomicCheckpointer
from wsl_d2.engine.console import start_logging
from wsl_d2.engine.dry_run import dry_run
from wsl_d2.engine.evaluate import evaluate
from wsl_d2.engine.folder import begin_folder, lock_folder
from wsl_d2.engine.launch import start
from wsl_d2.engine.plan import RunPlan, open_plan
from wsl_d2.engine.signals import stop_at_once
from wsl_d2.engine.trainer import DetectionTrainer, ResumableTrainer, WSLTrainer
from wsl_d2.errors import ConfigError, UserError
from wsl_d2.process import keep_freed_memory

# Set by what starts a process again, which does so with the same command line.
_RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def _all_or_none(error: UserError | None) -> None:
    """Raises in all processes what one of them has met."""
    for found in comm.all_gather(error):
        if found is not None:
            raise found


def trainer_class(plan: RunPlan) -> type[ResumableTrainer]:
    """The trainer for a run's kind of model."""
    return WSLTrainer if plan.is_pretraining else DetectionTrainer


def setup(args) -> RunPlan:
    """Merges the config, opens the run's plan, and starts logging.

    Args:
        args: of :mod:`wsl_d2.engine.arguments`, or of ``detectron2.engine.default_argument_parser``.

    Returns:
        The plan, with the frozen config in it.

    Raises:
        ConfigError: a key is unknown, or two keys or a key and a dataset contradict each other.
        MissingFileError: MODEL.WEIGHTS does not exist.
        FaultsError: a detection dataset has errors, one line for each.
    """
    plan, findings = _check(args)
    _begin_logging(plan, args, findings)
    return plan


def _check(args) -> tuple[RunPlan, list[str]]:
    """Opens the plan, and returns it with what is to be logged about a detection dataset; writes nothing."""
    args.config_file = find_config_file(args.config_file)  # Detectron2 logs the file
    cfg = load_config(args.config_file, args.opts)
    register_datasets(cfg)
    check_devices(cfg)
    is_resumed = args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if cfg.MODEL.WEIGHTS and not is_resumed:
        WeightFile.locate(cfg.MODEL.WEIGHTS)
    cores = len(os.sched_getaffinity(0)) // comm.get_local_size()  # more workers than these take turns
    cfg.DATALOADER.NUM_WORKERS = min(cfg.DATALOADER.NUM_WORKERS, max(1, cores))
    plan = open_plan(cfg, args.resume)
    return plan, [] if plan.is_pretraining else check_run(cfg, args.eval_only)


def _begin_logging(plan: RunPlan, args, findings: list[str]) -> None:
    logger = start_logging(plan.cfg, args)
    for line in findings:
        logger.info(line)


def main(args) -> dict:
    """Runs training, or evaluation with ``--eval-only``, in one process of the job; returns the last results."""
    stop_at_once()  # until training begins
    if getattr(args, "dry_run", False):
        return _dry_run(args)
    if not args.eval_only and any(int(os.environ.get(name) or 0) > 0 for name in _RESTART_COUNTS):
        args.resume, args.overwrite = True, False
    heartbeat = Heartbeat()
    heartbeat.note(-1, "starting")
    with heartbeat.name_lost_processes(), contextlib.ExitStack() as stack:
        plan, findings = _check(args)
        folder = plan.cfg.OUTPUT_DIR
        error = None
        try:
            stack.enter_context(lock_folder(folder))
            if comm.is_main_process() and not args.eval_only:
                begin_folder(folder, args.resume, getattr(args, "overwrite", False))
        except ConfigError as found:
            error = found
        _all_or_none(error)
        _begin_logging(plan, args, findings)
        return _train_or_evaluate(plan, args)


def _dry_run(args) -> dict:
    """Builds a run in a temporary folder, does two iterations and prints what the run will be."""
    with tempfile.TemporaryDirectory() as folder:
        args.opts = [*args.opts, "OUTPUT_DIR", folder]
        plan = setup(args)
        trainer = trainer_class(plan)(plan)
        trainer.resume_or_load(resume=False)
        facts = dry_run(trainer, args.images_per_second)
    if comm.is_main_process():
        print("\n".join(facts))
    return {}


def _train_or_evaluate(plan: RunPlan, args) -> dict:
    cfg, kind = plan.cfg, trainer_class(plan)
    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
    if args.eval_only:
        model = kind.build_model(cfg)
        checkpointer = AtomicCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        if args.resume and checkpointer.has_checkpoint():
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=True)
        else:
            kind.load_weights(cfg, model, checkpointer, for_evaluation=True)
        results = evaluate(plan, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = kind(plan, override_resume=getattr(args, "override_resume", False))
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(args) -> None:
    """Starts ``main(args)`` in every process of the run; see :func:`wsl_d2.engine.launch.start`.

    Raises:
        ConfigError: there is no GPU for every process; found before any of them is started.
    """
    cfg = load_config(args.config_file, args.opts)
    check_devices(cfg, args.num_gpus)
    start(main, args, cfg.SOLVER.PROCESS_TIMEOUT_SECONDS)
