"""Writers of metrics, none of whose failures ends a run; W&B follows TensorBoard's files."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter, get_event_storage

from wsl_d2.errors import ConfigError


class GuardedWriter(EventWriter):
    """Wraps a writer; its failures are logged once, and training goes on.

    Args:
        writer: tried again at every record, since a full disk or a lost connection may recover.
    """

    def __init__(self, writer: EventWriter):
        self.writer = writer
        self._has_failed = False

    def write(self) -> None:
        self._try(self.writer.write)

    def close(self) -> None:
        self._try(self.writer.close)

    def _try(self, action) -> None:
        try:
            action()
        except Exception as error:  # whatever a logging service raises
            if not self._has_failed:
                logging.getLogger(__name__).warning(
                    f"{type(self.writer).__name__} failed ({type(error).__name__}: {error}); training goes on, metrics "
                    "may be missing there. Further failures of it are not logged."
                )
            self._has_failed = True


_LONGEST_LINE = 1 << 20  # bytes


class WholeLines:
    """A text file to which whole lines are appended, or none; those that the disk has no room for wait for it.

    Args:
        path: what a killed process has left of a last line is removed.
    """

    def __init__(self, path: Path):
        self._file = open(path, "a+b", buffering=0)
        self._waiting = b""
        start = self._file.seek(max(0, self._file.seek(0, os.SEEK_END) - _LONGEST_LINE))
        self._file.truncate(start + self._file.read().rfind(b"\n") + 1)

    def write(self, text: str) -> None:
        self._waiting += text.encode()

    def flush(self) -> None:
        """Raises: OSError, such as on a full disk."""
        end, left = self._file.seek(0, os.SEEK_END), self._waiting
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(end)
            raise
        self._waiting = b""

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self.flush()
        self._file.close()


class MetricsWriter(JSONWriter):
    """Detectron2's writer of ``metrics.json``, without torn lines.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        super().__init__(os.devnull)
        self._file_handle: Any = WholeLines(path)


class PretrainingPrinter(CommonMetricPrinter):
    """Detectron2's line of losses, rate and time left, and a second one of pretraining's own metrics."""

    # metric -> how it is printed
    _SHOWN = {
        "images_seen": "{:,.0f} images seen",
        "images_per_second": "{:,.1f} images/s",
        "data_wait_percent": "{:.1f}% waiting for data",
        "mfu_percent": "{:.1f}% MFU",
        "memory_gb": "{:.1f} GB",
        "skipped_images": "{:.0f} images skipped",
        "skipped_steps": "{:.0f} steps skipped",
    }

    def write(self) -> None:
        super().write()
        storage = get_event_storage()
        latest = {name: value for name, (value, iteration) in storage.latest().items() if iteration == storage.iter}
        if "images_seen" in latest:
            shown = [text.format(latest[name]) for name, text in self._SHOWN.items() if name in latest]
            self.logger.info(" " + ", ".join(shown))


def start_wandb(project: str, output_dir: str, config: dict) -> None:
    """Has Weights & Biases follow the TensorBoard files of this process, and end with it.

    A resumed run continues its W&B run, found by the name of its folder.

    Args:
        project: of W&B.
        output_dir: of the run; W&B's own files go there, too.
        config: logged with the run.

    Raises:
        ConfigError: wandb is not installed, or cannot start, such as without a login.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"WANDB.PROJECT is {project!r}, but wandb is not installed; run `pip install wandb`, or leave it empty."
        ) from error
    identifier = "".join(c if c.isalnum() else "-" for c in output_dir).strip("-")[-64:]
    try:
        wandb.init(project=project, id=identifier, resume="allow", dir=output_dir, config=config, sync_tensorboard=True)
    except Exception as error:  # wandb's own, requests', grpc's
        raise ConfigError(
            f"WANDB.PROJECT is {project!r}, but W&B did not start ({' '.join(str(error).split())}); run `wandb login`, "
            "set WANDB_MODE=offline, or leave the key empty."
        ) from error


def build_writers(cfg, max_iter: int) -> list[EventWriter]:
    """Builds the writers of a run.

    Args:
        cfg: reads OUTPUT_DIR and WANDB.
        max_iter: for the time that is left.
    """
    if cfg.WANDB.PROJECT:
        start_wandb(cfg.WANDB.PROJECT, cfg.OUTPUT_DIR, cfg)  # before TensorBoard's writer is made
    folder = cfg.OUTPUT_DIR
    writers = PretrainingPrinter(max_iter), MetricsWriter(Path(folder) / "metrics.json"), TensorboardXWriter(folder)
    return [GuardedWriter(writer) for writer in writers]
