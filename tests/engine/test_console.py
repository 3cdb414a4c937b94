"""What a run says on the terminal, and what in its files."""

import logging
import os
import threading

import pytest
import yaml
from training_runs import train

from wsl_d2.engine.console import _survive_full_disk


def test_the_first_screen_is_short_and_the_log_holds_the_rest_without_colors(datasets, tmp_path):
    run = train(datasets, tmp_path, SOLVER__TOTAL_IMAGES=16, SOLVER__WARMUP_IMAGES=8, DATALOADER__NUM_WORKERS=1000)
    first = run.stdout[: run.stdout.index("Starting training")].splitlines()
    assert len(first) < 10 and any("log.txt (with environment, config and model)" in line for line in first)
    log = (tmp_path / "log.txt").read_text()
    assert all(part in log for part in ("Environment info", "RANDOM_RESIZED_CROP", "(conv1): Conv2d"))
    assert "\x1b" not in log + run.output
    written = yaml.unsafe_load((tmp_path / "config.yaml").read_text())
    assert written["DATALOADER"]["NUM_WORKERS"] == len(os.sched_getaffinity(0))


def test_a_log_on_a_full_disk_is_one_line_and_no_traceback(monkeypatch, capsys):
    stream = open("/dev/full", "w")
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("wsl_d2")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    _survive_full_disk()
    for _ in range(3):
        logger.error("a line")
    said = capsys.readouterr().err
    assert said == "wsl-d2: /dev/full: No space left on device; lines of the log may be missing, the run goes on\n"
    logger.error("a line of %s and %s", "one")  # a mistake in the code keeps its traceback
    assert "not enough arguments" in capsys.readouterr().err
    with pytest.raises(OSError):
        stream.close()
