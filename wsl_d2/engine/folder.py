"""OUTPUT_DIR: one run at a time works in it, and none mixes its files with another's."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from detectron2.utils import comm
from filelock import FileLock, Timeout

from wsl_d2.errors import ConfigError

# What a run writes into OUTPUT_DIR; other files there are not touched.
_FILES_OF_A_RUN = (
    "metrics.json",
    "model_*.pth",
    "model_*.pth.sha256",
    "last_checkpoint",
    "backbone.pth",
    "backbone_ema.pth",
    "config.yaml",
    "log.txt*",
    "record.json",
    "resume_overrides.json",
    "not_finite_*.json",
    "events.out.tfevents.*",
    "inference",
)
_FILES_OF_PROGRESS = _FILES_OF_A_RUN[:4]
_SECONDS_TO_END = 5  # for a run that is being stopped


@contextlib.contextmanager
def lock_folder(output_dir: str) -> Iterator[None]:
    """Locks OUTPUT_DIR against a second run until this process ends, however it ends.

    Raises:
        ConfigError: another run uses it; names its host and process. Or it cannot be written to, or not be locked.
    """
    if not comm.is_main_process():
        yield
        return
    owner = os.path.join(output_dir, ".lock.owner")
    lock = FileLock(os.path.join(output_dir, ".lock"), thread_local=False)
    try:
        os.makedirs(output_dir, exist_ok=True)
        lock.acquire(timeout=_SECONDS_TO_END)
        Path(owner).write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout as error:
        name = Path(owner).read_text() if os.path.exists(owner) else "another process"
        raise ConfigError(f"OUTPUT_DIR {output_dir} is in use by {name}; stop it, or choose another.") from error
    except (OSError, NotImplementedError) as error:  # the second is filelock's, where there are no locks
        code = getattr(error, "errno", None) or errno.ENOSYS
        is_lock = code in (errno.ENOLCK, errno.ENOSYS)
        reason = "its file system cannot lock files" if is_lock else f"cannot be written to: {os.strerror(code)}"
        raise ConfigError(f"OUTPUT_DIR {output_dir}: {reason}; choose another.") from error
    try:
        yield
    finally:
        lock.release()


def begin_folder(output_dir: str, resume: bool, overwrite: bool) -> None:
    """Refuses OUTPUT_DIR if it holds a run that is not to be continued, or removes that run's files.

    Args:
        output_dir: locked, so that no run is at work there.
        resume: ``--resume`` was given.
        overwrite: ``--overwrite`` was given.

    Raises:
        ConfigError: there is a run, and neither was given; or both.
    """
    if resume and overwrite:
        raise ConfigError("--resume continues the run in OUTPUT_DIR and --overwrite removes it; give one of them.")
    found = sorted(path for name in _FILES_OF_PROGRESS for path in Path(output_dir).glob(name))
    if resume or not found:
        return
    if not overwrite:
        names = ", ".join(path.name for path in found[:3]) + (", ..." if len(found) > 3 else "")
        raise ConfigError(
            f"OUTPUT_DIR {output_dir} holds the files of a run ({names}); continue it with --resume, remove it with "
            "--overwrite, or choose another OUTPUT_DIR."
        )
    for path in (path for name in _FILES_OF_A_RUN for path in Path(output_dir).glob(name)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
