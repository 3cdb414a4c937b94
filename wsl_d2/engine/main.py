"""From command-line arguments to a finished run: setup and main."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from filelock import FileLock, Timeout

from wsl_d2.checkpoint import WeightFile
from wsl_d2.config import find_config_file, load_config
from wsl_d2.data.read.catalog import register_datasets
from wsl_d2.data.read.detection_check import check_run
from wsl_d2.engine.checkpointer import AtomicCheckpointer
from wsl_d2.engine.console import start_logging
from wsl_d2.engine.dry_run import dry_run
from wsl_d2.engine.evaluate import evaluate
from wsl_d2.engine.launch import start
from wsl_d2.engine.plan import RunPlan, open_plan
from wsl_d2.engine.trainer import DetectionTrainer, ResumableTrainer, WSLTrainer
from wsl_d2.errors import ConfigError


@contextlib.contextmanager
def lock_folder(output_dir: str) -> Iterator[None]:
    """Locks OUTPUT_DIR against a second run until this process ends, however it ends.

    Raises:
        ConfigError: another run uses it; names its host and process.
    """
    if not comm.is_main_process():
        yield
        return
    owner = os.path.join(output_dir, ".lock.owner")
    lock = FileLock(os.path.join(output_dir, ".lock"), thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        name = Path(owner).read_text() if os.path.exists(owner) else "another process"
        raise ConfigError(f"OUTPUT_DIR {output_dir} is in use by {name}; stop it, or choose another.") from error
    try:
        Path(owner).write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()


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
    args.config_file = find_config_file(args.config_file)  # Detectron2 logs the file
    cfg = load_config(args.config_file, args.opts)
    register_datasets(cfg)
    if not torch.cuda.is_available() and cfg.MODEL.DEVICE == "cuda":
        raise ConfigError("MODEL.DEVICE is 'cuda', but no GPU can be used; add `MODEL.DEVICE cpu` to the command.")
    is_resumed = args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if cfg.MODEL.WEIGHTS and not is_resumed:
        WeightFile.locate(cfg.MODEL.WEIGHTS)
    cores = len(os.sched_getaffinity(0)) // comm.get_local_size()  # more workers than these take turns
    cfg.DATALOADER.NUM_WORKERS = min(cfg.DATALOADER.NUM_WORKERS, max(1, cores))
    plan = open_plan(cfg, args.resume)
    found = [] if plan.is_pretraining else check_run(cfg, args.eval_only)
    logger = start_logging(cfg, args)
    for line in found:
        logger.info(line)
    return plan


def main(args) -> dict:
    """Runs training, or evaluation with ``--eval-only``, in one process of the job; returns the last results."""
    if getattr(args, "dry_run", False):
        return _dry_run(args)
    plan = setup(args)
    with lock_folder(plan.cfg.OUTPUT_DIR):
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
    """Starts ``main(args)`` in every process of the run; see :func:`wsl_d2.engine.launch.start`."""
    start(main, args, load_config(args.config_file, args.opts).SOLVER.PROCESS_TIMEOUT_SECONDS)
