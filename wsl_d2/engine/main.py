"""From command-line arguments to a finished run: the only copy of setup, main and launch."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from filelock import FileLock, Timeout

from wsl_d2.checkpoint import DownloadError, IncompleteLoadError, PixelStatisticsError
from wsl_d2.config import add_wsl_config
from wsl_d2.data import ShardError
from wsl_d2.data.build import build_sampler, get_hashtag_dataset, training_dataset
from wsl_d2.data.catalog import register_datasets
from wsl_d2.engine.checkpointer import AtomicCheckpointer, DamagedCheckpointError
from wsl_d2.engine.dry_run import dry_run
from wsl_d2.engine.schedule import ConfigError, check_periods, resolve_schedule
from wsl_d2.engine.trainer import DamagedImagesError, DetectionTrainer, WSLTrainer
from wsl_d2.hashtags import VocabularyError

# What a user can mend; shown as one line instead of a traceback.
USER_ERRORS = (
    ConfigError,
    DamagedCheckpointError,
    DamagedImagesError,
    DownloadError,
    FloatingPointError,
    FileNotFoundError,
    IncompleteLoadError,
    PixelStatisticsError,
    ShardError,
    VocabularyError,
)


def load_config(config_file: str, opts: list[str]) -> CfgNode:
    """Returns Detectron2's and wsl_d2's keys with a file and command-line overrides merged, not frozen.

    Raises:
        ConfigError: the file does not exist, or names a key that does not exist or has another type.
    """
    cfg = get_cfg()
    add_wsl_config(cfg)
    if config_file and not os.path.isfile(config_file):
        raise ConfigError(f"--config-file {config_file} does not exist.")
    try:
        if config_file:
            cfg.merge_from_file(config_file)
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"{config_file}: {_explain(error, cfg)}") from error
    try:
        cfg.merge_from_list(opts)
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"command line: {_explain(error, cfg)}") from error
    return cfg


def _explain(error: Exception, cfg: CfgNode) -> str:
    """Turns yacs' message into one that also names the nearest existing key."""
    message = str(error.args[0]) if error.args else str(error)
    key = message.rsplit(": ", 1)[-1].strip()
    close = difflib.get_close_matches(key, _keys(cfg), n=1)
    if not message.startswith("Non-existent"):
        return message
    return f"unknown config key {key}." + (f" Did you mean {close[0]}?" if close else "")


def _keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for name, value in node.items():
        keys.append(prefix + name)
        if isinstance(value, CfgNode):
            keys += _keys(value, f"{prefix}{name}.")
    return keys


@contextlib.contextmanager
def sole_user_of(output_dir: str) -> Iterator[None]:
    """Keeps a second run out of OUTPUT_DIR as long as this one lives, also after a kill at any moment.

    Raises:
        ConfigError: another run is in it; names its host and process.
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


def is_pretraining(cfg: CfgNode) -> bool:
    """Whether the config trains a hashtag classifier rather than a detector."""
    return cfg.MODEL.META_ARCHITECTURE == "HashtagClassifier"


def setup(args) -> CfgNode:
    """Merges the config, registers its datasets, fills in what follows from them, and starts logging.

    Args:
        args: of :func:`argument_parser`, or of ``detectron2.engine.default_argument_parser``.

    Returns:
        The frozen config.

    Raises:
        ConfigError: a key is unknown, or two keys or a key and a dataset contradict each other.
    """
    cfg = load_config(args.config_file, args.opts)
    register_datasets(cfg)
    if not torch.cuda.is_available() and cfg.MODEL.DEVICE == "cuda":
        raise ConfigError("MODEL.DEVICE is 'cuda', but no GPU can be used; add `MODEL.DEVICE cpu` to the command.")
    if is_pretraining(cfg):
        dataset = training_dataset(cfg)
        num_classes = cfg.MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES
        if num_classes not in (0, dataset.num_labels):
            raise ConfigError(
                f"MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES is {num_classes}, but the vocabulary of {cfg.DATASETS.TRAIN[0]} "
                f"({dataset.folder}) has {dataset.num_labels} labels; set it to 0 to follow the vocabulary."
            )
        cfg.MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES = dataset.num_labels
        check_periods(cfg)
        resolve_schedule(cfg, build_sampler(cfg, dataset).epoch_length)
        _check_same_vocabulary(cfg, dataset)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="wsl_d2")
    return cfg


def _check_same_vocabulary(cfg: CfgNode, dataset) -> None:
    for name in cfg.DATASETS.TEST:
        other = get_hashtag_dataset(name)
        if other.vocabulary_checksum != dataset.vocabulary_checksum:
            raise ConfigError(
                f"DATASETS.TEST {name} ({other.folder}) has vocabulary {other.manifest['vocabulary']!r} "
                f"{other.vocabulary_checksum[:12]}, but DATASETS.TRAIN {cfg.DATASETS.TRAIN[0]} ({dataset.folder}) "
                f"has {dataset.manifest['vocabulary']!r} {dataset.vocabulary_checksum[:12]}; labels would not agree. "
                "Prepare both with the same vocabulary.json."
            )


def main(args) -> dict:
    """Runs training, or evaluation with ``--eval-only``, in one process of the job; returns the last results."""
    if getattr(args, "dry_run", False):
        return _dry_run(args)
    cfg = setup(args)
    with sole_user_of(cfg.OUTPUT_DIR):
        return _train_or_evaluate(cfg, args)


def _dry_run(args) -> dict:
    """Builds all of a run in a folder that is removed again, does two iterations and prints its facts."""
    with tempfile.TemporaryDirectory() as folder:
        args.opts = [*args.opts, "OUTPUT_DIR", folder]
        cfg = setup(args)
        trainer = (WSLTrainer if is_pretraining(cfg) else DetectionTrainer)(cfg)
        trainer.resume_or_load(resume=False)
        facts = dry_run(trainer, args.images_per_second)
    if comm.is_main_process():
        print("\n".join(facts))
    return {}


def argument_parser() -> argparse.ArgumentParser:
    """Returns Detectron2's arguments and wsl_d2's."""
    parser = default_argument_parser()
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, do two iterations, print the run's facts, write nothing",
    )
    parser.add_argument("--images-per-second", type=float, help="with --dry-run: the speed to tell the hours for")
    return parser


def _train_or_evaluate(cfg: CfgNode, args) -> dict:
    trainer_class = WSLTrainer if is_pretraining(cfg) else DetectionTrainer
    if args.eval_only:
        model = trainer_class.build_model(cfg)
        checkpointer = AtomicCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        if args.resume and checkpointer.has_checkpoint():
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=True)
        else:
            trainer_class.load_weights(cfg, model, checkpointer, whole=True)
        results = trainer_class.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(args) -> None:
    """Starts ``main(args)`` in every process: under torchrun in this one, else through Detectron2's ``launch``."""
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        comm.synchronize()
        main(args)
        dist.destroy_process_group()
    else:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )


def run_command_line() -> None:
    """``tools/train_net.py``: parses Detectron2's arguments and runs; a user's mistake ends in one clear line."""
    try:
        run(argument_parser().parse_args())
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
