"""What a run says on the terminal, and what in its log.txt alone."""

from __future__ import annotations

import functools
import logging
import re
import sys
import threading
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

_FILE_ALONE = ("default_setup", "build_model")  # Detectron2's environment, config and model: some 600 lines
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def _not_for_a_terminal(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or record.funcName not in _FILE_ALONE


def _without_colors(record: logging.LogRecord) -> bool:
    record.msg = _ANSI.sub("", str(record.msg))
    return True


def _survive_full_disk() -> None:
    """Lets log lines that cannot be written, as on a full disk, cost one line on stderr in place of a traceback."""
    told: list[str] = []

    def tell(handler: logging.Handler, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            logging.Handler.handleError(handler, record)
            return
        name = getattr(getattr(handler, "stream", None), "name", "the log")
        if name not in told:
            told.append(name)
            print(
                f"wsl-d2: {name}: {error.strerror}; lines of the log may be missing, the run goes on", file=sys.stderr
            )

    for name in ("detectron2", "fvcore", "wsl_d2"):
        for handler in logging.getLogger(name).handlers:
            handler.handleError = functools.partial(tell, handler)  # type: ignore[method-assign]
    threading.excepthook = functools.partial(_tell_of_thread, threading.excepthook)


def _tell_of_thread(hook: Callable, args) -> None:
    if not type(args.thread).__module__.startswith("tensorboard"):  # which raises it again at the next record
        hook(args)


def start_logging(cfg: CfgNode, args) -> logging.Logger:
    """Runs Detectron2's ``default_setup`` with a short first screen: what it says of environment, config and model is
    in ``log.txt`` alone, without codes of colors.

    Args:
        cfg: with OUTPUT_DIR.
        args: of the command line.

    Returns:
        wsl_d2's logger, which writes to the same places.
    """
    rank = comm.get_rank()
    for handler in setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank).handlers:  # as default_setup asks for it
        is_terminal = getattr(handler, "stream", None) in (sys.stdout, sys.stderr)
        handler.addFilter(_not_for_a_terminal if is_terminal else _without_colors)
    default_setup(cfg, args)
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="wsl_d2")
    _survive_full_disk()
    logger.info(f"log.txt (with environment, config and model), metrics.json and checkpoints are in {cfg.OUTPUT_DIR}")
    return logger
