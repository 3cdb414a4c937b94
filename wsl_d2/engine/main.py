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
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from filelock import FileLock, Timeout

from wsl_d2.checkpoint import DownloadError, IncompleteLoadError, PixelStatisticsError
from wsl_d2.config import add_wsl_config
from wsl_d2.data import ShardError
from wsl_d2.data.read.catalog import register_datasets
from wsl_d2.data.read.loaders import WorkerError, build_sampler, get_hashtag_dataset, training_dataset
from wsl_d2.engine.agreement import LostProcessError
from wsl_d2.engine.checkpointer import AtomicCheckpointer, DamagedCheckpointError
from wsl_d2.engine.dry_run import dry_run
from wsl_d2.engine.hooks import UnsavedError
from wsl_d2.engine.launch import start, submit, without_cluster_options
from wsl_d2.engine.parallel import images_per_group
from wsl_d2.engine.pretrain_loop import DamagedImagesError
from wsl_d2.engine.schedule import ConfigError, resolve_schedule
from wsl_d2.engine.trainer import DetectionTrainer, ResumableTrainer, WSLTrainer
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
    LostProcessError,
    PixelStatisticsError,
    ShardError,
    UnsavedError,
    VocabularyError,
    WorkerError,
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
        cfg.merge_from_list(_whole_numbers_as_floats(cfg, opts))
    except (KeyError, ValueError, AssertionError) as error:
        raise ConfigError(f"command line: {_explain(error, cfg)}") from error
    return cfg


def _whole_numbers_as_floats(cfg: CfgNode, opts: list[str]) -> list[str]:
    """Lets `SOLVER.BASE_LR 1` stand for 1.0, which yacs refuses."""
    changed = list(opts)
    for place, (key, value) in enumerate(zip(opts[::2], opts[1::2], strict=False)):
        node: object = cfg
        for part in key.split("."):
            node = node.get(part) if isinstance(node, CfgNode) else None
        if isinstance(node, float) and value.lstrip("+-").isdecimal():
            changed[2 * place + 1] = f"{value}.0"
    return changed


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


def trainer_class(cfg: CfgNode) -> type[ResumableTrainer]:
    """The trainer for the config's kind of model."""
    return WSLTrainer if is_pretraining(cfg) else DetectionTrainer


def _images_per_group(cfg: CfgNode, resume: bool) -> int:
    """The images of a batch-norm group; a resumed run keeps those it began with unless the config names a number."""
    saved = None
    if resume:
        with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
            with open(os.path.join(cfg.OUTPUT_DIR, "config.yaml")) as file:
                saved = int(yaml.safe_load(file)["SOLVER"]["IMS_PER_MICRO_BATCH"])
        comm.synchronize()  # the file is written again in a moment
    return images_per_group(cfg, saved)


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
        cfg.SOLVER.IMS_PER_MICRO_BATCH = _images_per_group(cfg, args.resume)
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
        trainer = trainer_class(cfg)(cfg)
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
    parser.add_argument(
        "--override-resume",
        action="store_true",
        help="with --resume: continue although the config differs from the checkpoint's, and note the differences",
    )
    parser.add_argument(
        "--cluster",
        choices=["slurm", "local"],
        help="submit the run through submitit; it resumes by itself, also after its time was over",
    )
    parser.add_argument(
        "--cluster-parameter",
        type=_setting,
        action="append",
        default=[],
        help="NAME=VALUE for submitit's executor, such as nodes, tasks_per_node, gpus_per_node or timeout_min",
    )
    return parser


def _setting(text: str) -> tuple[str, int | str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, int(value) if value.isdecimal() else value


def _train_or_evaluate(cfg: CfgNode, args) -> dict:
    kind = trainer_class(cfg)
    if args.eval_only:
        model = kind.build_model(cfg)
        checkpointer = AtomicCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        if args.resume and checkpointer.has_checkpoint():
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=True)
        else:
            kind.load_weights(cfg, model, checkpointer, whole=True)
        results = kind.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = kind(cfg, override_resume=getattr(args, "override_resume", False))
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(args) -> None:
    """Starts ``main(args)`` in every process of the run; see :func:`wsl_d2.engine.launch.start`."""
    start(main, args, load_config(args.config_file, args.opts).SOLVER.PROCESS_TIMEOUT_SECONDS)


def _submit(args, arguments: list[str]) -> None:
    """Hands the run to a cluster and tells where its logs will be."""
    folder = Path(load_config(args.config_file, args.opts).OUTPUT_DIR) / "submitit"
    job = submit(arguments, folder, args.cluster, dict(args.cluster_parameter))
    print(f"job {job.job_id}; its logs are in {job.paths.folder}")


def run_command_line() -> None:
    """``tools/train_net.py``: parses Detectron2's arguments and runs; a user's mistake ends in one clear line."""
    args = argument_parser().parse_args()
    try:
        if args.cluster:
            _submit(args, without_cluster_options(sys.argv[1:]))
        else:
            run(args)
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
