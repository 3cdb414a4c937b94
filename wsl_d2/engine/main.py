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
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from filelock import FileLock, Timeout

from wsl_d2.config import add_wsl_config
from wsl_d2.data.read.catalog import register_datasets
from wsl_d2.engine.checkpointer import AtomicCheckpointer
from wsl_d2.engine.dry_run import dry_run
from wsl_d2.engine.evaluate import evaluate
from wsl_d2.engine.launch import start, submit, without_cluster_options
from wsl_d2.engine.plan import RunPlan, open_plan
from wsl_d2.engine.trainer import DetectionTrainer, ResumableTrainer, WSLTrainer
from wsl_d2.errors import ConfigError, UserError


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
def lock_folder(output_dir: str) -> Iterator[None]:
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


def trainer_class(plan: RunPlan) -> type[ResumableTrainer]:
    """The trainer for a run's kind of model."""
    return WSLTrainer if plan.is_pretraining else DetectionTrainer


def setup(args) -> RunPlan:
    """Merges the config, opens the run's plan, and starts logging.

    Args:
        args: of :func:`argument_parser`, or of ``detectron2.engine.default_argument_parser``.

    Returns:
        The plan, with the frozen config in it.

    Raises:
        ConfigError: a key is unknown, or two keys or a key and a dataset contradict each other.
    """
    cfg = load_config(args.config_file, args.opts)
    register_datasets(cfg)
    if not torch.cuda.is_available() and cfg.MODEL.DEVICE == "cuda":
        raise ConfigError("MODEL.DEVICE is 'cuda', but no GPU can be used; add `MODEL.DEVICE cpu` to the command.")
    plan = open_plan(cfg, args.resume)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="wsl_d2")
    return plan


def main(args) -> dict:
    """Runs training, or evaluation with ``--eval-only``, in one process of the job; returns the last results."""
    if getattr(args, "dry_run", False):
        return _dry_run(args)
    plan = setup(args)
    with lock_folder(plan.cfg.OUTPUT_DIR):
        return _train_or_evaluate(plan, args)


def _dry_run(args) -> dict:
    """Builds all of a run in a folder that is removed again, does two iterations and prints its facts."""
    with tempfile.TemporaryDirectory() as folder:
        args.opts = [*args.opts, "OUTPUT_DIR", folder]
        plan = setup(args)
        trainer = trainer_class(plan)(plan)
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


def _train_or_evaluate(plan: RunPlan, args) -> dict:
    cfg, kind = plan.cfg, trainer_class(plan)
    if args.eval_only:
        model = kind.build_model(cfg)
        checkpointer = AtomicCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        if args.resume and checkpointer.has_checkpoint():
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=True)
        else:
            kind.load_weights(cfg, model, checkpointer, whole=True)
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
    except (UserError, FloatingPointError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
