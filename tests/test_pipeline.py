"""The real tools, end to end, on a world of a few dozen images."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def demo(output: Path) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [sys.executable, "tools/demo.py", "--tiny", "--output", str(output)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result


def interrupt_demo(output: Path, during: str) -> str:
    """Presses Ctrl-C as soon as a stage has started; returns what was printed."""
    process = subprocess.Popen(
        [sys.executable, "-u", "tools/demo.py", "--tiny", "--output", str(output)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test in the background may ignore it
    )
    printed = ""
    for line in process.stdout:
        printed += line
        if f"] {during}: tools" in line:
            process.send_signal(signal.SIGINT)
            break
    printed += process.communicate(timeout=60)[0]
    assert process.returncode == 1
    return printed


def test_demo_from_rendering_to_the_page(tmp_path):
    assert "stopped; the same command goes on from here" in interrupt_demo(tmp_path, during="pretrain_wsl")
    first = demo(tmp_path)
    assert "world: done before" in first.stdout
    run = tmp_path / "seed0"
    stages = ["pretrain_wsl", "pretrain_imagenet", "detection_scratch", "detection_wsl", "report"]
    for stage in stages:
        assert re.search(rf"\] {stage}: done in \d+:\d\d", first.stdout), stage
    assert re.search(r"about \d+:\d\d left", first.stdout)
    page = (run / "report" / "report.html").read_text()
    assert "scratch" in page and "wsl" in page and 'src="http' not in page
    table = json.loads((run / "report" / "ap_gain.json").read_text())
    assert "wsl" in json.dumps(table)
    assert str(run / "report" / "report.html") in first.stdout

    # The backbone in the detector is the pretrained one: loaded bit for bit before training.
    log = (run / "detection_wsl" / "log.txt").read_text()
    assert re.search(r"(\d+) of \1 backbone tensors loaded from .*pretrain_wsl/backbone.pth", log)
    exported = torch.load(run / "pretrain_wsl" / "backbone.pth", weights_only=True)
    trained = torch.load(run / "pretrain_wsl" / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(tensor, trained[f"backbone.{name}"]) for name, tensor in exported["model"].items())

    # A second call does nothing again but the page; a lost stage alone is done anew.
    for name in ("coco_instances_results.json",):
        (run / "detection_wsl" / "inference" / name).unlink()
    second = demo(tmp_path)
    for stage in ("world", "pretrain_wsl", "detection_scratch"):
        assert f"{stage}: done before" in second.stdout
    assert re.search(r"detection_wsl: done in", second.stdout)


def test_another_world_in_the_same_folder_is_refused(tmp_path):
    (tmp_path / "demo.json").write_text(json.dumps({"world_seed": 3, "held_out_styles": "", "tiny": True}))
    result = subprocess.run(
        [sys.executable, "tools/demo.py", "--tiny", "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "holds a demo with {'world_seed': 3" in result.stderr and "choose another --output" in result.stderr


def test_the_whole_demo_can_be_planned(tmp_path):
    """The stages of full size are never run here, so at least their configs and overrides are read."""
    plan = [sys.executable, "tools/demo.py", "--plan", "--size", "full", "--output", str(tmp_path / "demo")]
    printed = subprocess.run(plan, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line in ("world", "pretrain_wsl", "pretrain_wsl_2000_images", "detection_scratch", "report"):
        assert re.search(rf"^{line}: tools/|^{line}: datasets/", printed, re.MULTILINE), printed
    assert not (tmp_path / "demo").exists()
