"""What a run says on the terminal, and what in its files."""

import os

import yaml
from training_runs import train


def test_the_first_screen_is_short_and_the_log_holds_the_rest_without_colors(datasets, tmp_path):
    run = train(datasets, tmp_path, SOLVER__TOTAL_IMAGES=16, SOLVER__WARMUP_IMAGES=8, DATALOADER__NUM_WORKERS=1000)
    first = run.stdout[: run.stdout.index("Starting training")].splitlines()
    assert len(first) < 10 and any("log.txt (with environment, config and model)" in line for line in first)
    log = (tmp_path / "log.txt").read_text()
    assert all(part in log for part in ("Environment info", "RANDOM_RESIZED_CROP", "(conv1): Conv2d"))
    assert "\x1b" not in log + run.output
    written = yaml.unsafe_load((tmp_path / "config.yaml").read_text())
    assert written["DATALOADER"]["NUM_WORKERS"] == len(os.sched_getaffinity(0))
