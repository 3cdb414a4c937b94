"""The real commands, end to end, on a world of a few dozen images."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command_line import wsl_d2

from wsl_d2.cli.main import main
from wsl_d2.study.study import Study

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "configs" / "Studies" / "miniworld.yaml"
SHORT = {
    "world": "--tiny",
    "pretrain": "SOLVER.TOTAL_IMAGES 320 SOLVER.WARMUP_IMAGES 64 SOLVER.IMS_PER_BATCH 16 SOLVER.CHECKPOINT_PERIOD 5 "
    "SOLVER.LOG_PERIOD 1",
    "detect": "SOLVER.MAX_ITER 6 SOLVER.STEPS (4,) SOLVER.WARMUP_ITERS 2 SOLVER.IMS_PER_BATCH 2 SOLVER.LOG_PERIOD 1",
}


@pytest.fixture()
def study(tmp_path):
    """The demo's study, each of its runs short, and the folder of its results."""
    content = yaml.safe_load(STUDY.read_text())
    for stage, words in SHORT.items():
        content["stages"][stage]["command"] += f" {words}"
    path = tmp_path / "configs" / "miniworld.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path, tmp_path / "out"


def command(study) -> list[str]:
    path, output = study
    return [sys.executable, "-u", "-m", "wsl_d2", "study", str(path), "--output", str(output), "--jobs", "2"]


def run(study) -> str:
    result = subprocess.run(command(study), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def interrupt(study, during: str) -> str:
    """Presses Ctrl-C as soon as a run has started; returns what was printed."""
    process = subprocess.Popen(
        command(study),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test in the background may ignore it
    )
    printed = ""
    for line in process.stdout:
        printed += line
        if f"] {during}: wsl-d2" in line:
            process.send_signal(signal.SIGINT)
            break
    printed += process.communicate(timeout=60)[0]
    assert process.returncode == 130, printed
    return printed


def test_demo_from_rendering_to_the_page(study):
    stopped = interrupt(study, during="pretrain/world=0,seed=0,arm=imagenet")
    assert stopped.splitlines()[-1] == ("wsl-d2 study: stopped; finished runs are kept, and the same command goes on.")
    first = run(study)
    output = study[1]
    assert re.search(r"world +1 +1 ", first) and "] world/world=0" not in first
    for stage, arm in (("pretrain", "wsl"), ("pretrain", "imagenet"), ("detect", "scratch"), ("detect", "wsl")):
        assert re.search(rf"\] {stage}/world=0,seed=0,arm={arm}: finished in \d+:\d\d", first), (stage, arm)
    assert re.search(r"about \d+:\d\d left", first)
    report = output / "report" / "world=0"
    page = (report / "report.html").read_text()
    assert "scratch" in page and "wsl" in page and 'src="http' not in page
    gains = json.loads((report / "ap_gain.json").read_text())["gains"]
    assert [row["candidate"] for row in gains] == ["wsl"] * 2 + ["scratch"] * 2
    assert str(report / "report.html") in first

    # The backbone in the detector is the pretrained one: loaded bit for bit before training.
    pretraining, detection = (output / stage / "world=0,seed=0,arm=wsl" for stage in ("pretrain", "detect"))
    assert re.search(
        r"(\d+) of \1 backbone tensors loaded from .*pretrain/.*backbone.pth", (detection / "log.txt").read_text()
    )
    exported = torch.load(pretraining / "backbone.pth", weights_only=True)
    trained = torch.load(pretraining / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(tensor, trained[f"backbone.{name}"]) for name, tensor in exported["model"].items())

    # A second call does nothing again but the page; a lost run alone is done anew.
    (detection / "record.json").unlink()
    second = run(study)
    assert len(re.findall(r": finished in", second)) == 1 and "] detect/world=0,seed=0,arm=wsl: finished in" in second

    # A detector that was trained predicts, and all records are kept in one file.
    found = output / "found"
    images = output / "world" / "world=0" / "miniworld" / "detection" / "val"
    assert "a lower --threshold" in wsl_d2("predict", detection, images, "--output", found, "--threshold", 1)
    wsl_d2("predict", detection, images, "--output", found, "--threshold", 0)
    assert len(list(found.glob("*.jpg"))) == len(list(images.glob("*.jpg"))) > 0
    assert {row["category"] for row in json.loads((found / "predictions.json").read_text())} <= categories(images)
    assert main(["records", str(output), "--records", str(output / "records.jsonl")]) == 0
    kinds = [json.loads(line)["kind"] for line in (output / "records.jsonl").read_text().splitlines()]
    assert (kinds.count("run"), kinds.count("comparison")) == (7, 1)


def categories(images: Path) -> set[str]:
    content = json.loads((images.parent / "annotations" / "instances_val.json").read_text())
    return {row["name"] for row in content["categories"]}


def test_a_changed_study_in_the_same_folder_is_refused(study, capsys):
    path, output = study
    cell = Study.load(path).cells(output)[0]
    cell.note(1.0)
    path.write_text(path.read_text().replace("--tiny", "--tiny --num-train 9"))
    assert main(command(study)[4:]) == 2
    message = capsys.readouterr().err
    assert "holds a run of another command" in message and "--num-train 9" in message and "another --output" in message


def test_the_demo_can_be_planned(tmp_path, capsys):
    assert (
        main(
            [
                "demo",
                "--plan",
                "--axis",
                "seed=0,1,2",
                "--axis",
                "world=0,held_out_styles",
                "--output",
                str(tmp_path / "demo"),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert [re.search(rf"^{stage} +(\d+)", printed, re.M)[1] for stage in SHORT] == ["2", "18", "24"]
    assert not (tmp_path / "demo").exists()
    assert main(["demo", "--plan", "--axis", "world=9"]) == 2
    assert "world has no value 9; choose among 0, 1, 2, held_out_styles" in capsys.readouterr().err
