import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from toy_detections import random_detections, random_world

from wsl_d2.analysis import RunError, compare_runs, read_metrics

ROOT = Path(__file__).parents[2]
CONFIG = {
    "DATASETS": {"TRAIN": ["t"], "TEST": ["v"]},
    "INPUT": {"MIN_SIZE_TEST": 128},
    "MODEL": {"WEIGHTS": "", "ROI_HEADS": {"NUM_CLASSES": 4}},
    "SOLVER": {"MAX_ITER": 300, "IMS_PER_BATCH": 8, "BASE_LR": 0.04, "STEPS": [200]},
}


def write_run(folder: Path, contents, seed, jitter, **solver) -> Path:
    (folder / "inference").mkdir(parents=True)
    config = CONFIG | {"SOLVER": CONFIG["SOLVER"] | solver}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records = [{"iteration": i, "total_loss": 3.0 / (i + 1), "loss_hashtag": 4.0 / (i + 1)} for i in range(0, 300, 20)]
    (folder / "metrics.json").write_text("\n".join(json.dumps(record) for record in records))
    results = random_detections(contents, seed, jitter=jitter)
    (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture()
def runs(tmp_path):
    contents = random_world(0)
    contents["categories"][0]["name"] = "<script>alert(1)</script>"
    (tmp_path / "val").mkdir()
    for image in contents["images"]:
        Image.new("RGB", (240, 240), (200, 180, 160)).save(tmp_path / "val" / image["file_name"])
    (tmp_path / "gt.json").write_text(json.dumps(contents))
    write_run(tmp_path / "imagenet", contents, 1, 6.0)
    write_run(tmp_path / "wsl", contents, 2, 1.0, BASE_LR=0.02)
    return tmp_path


def test_table_and_gains(runs):
    folders = {"imagenet": [runs / "imagenet"], "wsl": [runs / "wsl"]}
    comparison = compare_runs(folders, runs / "gt.json", ["imagenet"], num_resamples=100)
    row = comparison["gains"][0]
    assert (row["candidate"], row["baseline"]) == ("wsl", "imagenet")
    means = {name: run["bbox"]["AP"]["mean"] for name, run in comparison["runs"].items()}
    assert (
        row["bbox"]["AP"]["gain"] == pytest.approx(means["wsl"] - means["imagenet"]) and row["bbox"]["AP"]["gain"] > 0
    )
    assert comparison["runs"]["wsl"]["base_lr"] == [0.02]
    json.dumps(comparison)


def test_runs_of_other_schedules_are_refused_with_the_difference(runs):
    contents = json.loads((runs / "gt.json").read_text())
    write_run(runs / "long", contents, 3, 2.0, MAX_ITER=900)
    folders = {"imagenet": [runs / "imagenet"], "wsl": [runs / "long"]}
    with pytest.raises(RunError, match=r"SOLVER.MAX_ITER: 300 in imagenet \(.*\), 900 in wsl"):
        compare_runs(folders, runs / "gt.json", ["imagenet"], 10)
    compare_runs(folders, runs / "gt.json", ["imagenet"], 10, force=True)


def test_a_missing_file_and_an_unknown_baseline_are_named(runs):
    (runs / "wsl" / "inference" / "coco_instances_results.json").unlink()
    with pytest.raises(RunError, match="coco_instances_results.json does not exist; finish the run with"):
        compare_runs({"wsl": [runs / "wsl"]}, runs / "gt.json", ["wsl"], 10)
    with pytest.raises(RunError, match="the baseline 'x' is none of the runs wsl"):
        compare_runs({"wsl": [runs / "wsl"]}, runs / "gt.json", ["x"], 10)


def test_metrics_of_a_resumed_run_count_the_last_record(tmp_path):
    lines = [
        {"iteration": 0, "a": 1.0},
        {"iteration": 20, "a": 2.0},
        {"iteration": 20, "a": 3.0},
        {"iteration": 40, "b": 1},
    ]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + '\n{"iteration": 60, "a"')
    assert read_metrics(tmp_path) == {"a": ([0, 20], [1.0, 3.0]), "b": ([40], [1])}


def test_the_tool_prints_the_table_and_writes_one_self_contained_page(runs):
    command = [
        sys.executable,
        str(ROOT / "tools" / "compare_ap.py"),
        "--baseline",
        "imagenet",
        "--num-resamples",
        "100",
    ]
    for name in ("imagenet", "wsl"):
        command += ["--run", f"{name}={runs / name}", "--curve", f"{name}={runs / name}"]
    command += [
        "--ground-truth",
        str(runs / "gt.json"),
        "--images",
        str(runs / "val"),
        "--output",
        str(runs / "report"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert "wsl - imagenet: +" in result.stdout and "box AP" in result.stdout and "mask AP" in result.stdout
    page = (runs / "report" / "report.html").read_text()
    assert "<script" not in page
    assert 'src="http' not in page and "url(http" not in page and "<link" not in page
    comparison = json.loads((runs / "report" / "ap_gain.json").read_text())
    shown = comparison["gains"][0]["images"]
    assert len(shown["best"]) == 4 and page.count("data:image/jpeg;base64,") == 3 * (4 + len(shown["worst"]))
    for heading in ("Gains", "Precision and recall", "What kinds of error cost", "by class", "held equal"):
        assert heading in page
    (runs / "val").rename(runs / "elsewhere")
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 1 and "give the folder of the evaluated images" in result.stderr
    text = (runs / "report" / "ap_gain.json").read_text()
    comparison = json.loads(text)
    assert "NaN" not in text  # JavaScript and others refuse it
    assert f"{comparison['runs']['wsl']['bbox']['AP']['mean']:.1f}" in page
