import json
import math
import re
from pathlib import Path

import pytest
import yaml
from command_line import wsl_d2
from PIL import Image
from toy_detections import random_detections, random_keypoints, random_world

from wsl_d2.analysis import RunError, compare_runs
from wsl_d2.coco import CocoError
from wsl_d2.report.comparison import describe_gain, describe_settling, format_cell, write_report
from wsl_d2.report.gains import write_gains
from wsl_d2.report.study import write_study
from wsl_d2.study.study import Study, StudyError

ROOT = Path(__file__).parents[2]
CONFIG = {
    "DATASETS": {"TRAIN": ["t"], "TEST": ["v"]},
    "INPUT": {"MIN_SIZE_TEST": 128},
    "MODEL": {"WEIGHTS": "", "ROI_HEADS": {"NUM_CLASSES": 4}},
    "SOLVER": {"MAX_ITER": 300, "IMS_PER_BATCH": 8, "BASE_LR": 0.04, "STEPS": [200]},
}


def write_run(folder: Path, contents, seed, jitter, change=None, **solver) -> Path:
    """``change`` is applied to each detection."""
    (folder / "inference").mkdir(parents=True)
    config = CONFIG | {"SOLVER": CONFIG["SOLVER"] | solver}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records = [{"iteration": i, "total_loss": 3.0 / (i + 1), "loss_hashtag": 4.0 / (i + 1)} for i in range(0, 300, 20)]
    (folder / "metrics.json").write_text("\n".join(json.dumps(record) for record in records))
    results = random_detections(contents, seed, jitter=jitter)
    for row in results if change else []:
        change(row)
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
    assert comparison["initialization"] == {"SOLVER.BASE_LR": {"imagenet": [0.04], "wsl": [0.02]}}
    assert comparison["iou_types"] == ["bbox", "segm"] and comparison["left_out"] == {}
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
        compare_runs({n: [runs / n] for n in ("wsl", "imagenet")}, runs / "gt.json", ["imagenet"], 10)
    with pytest.raises(RunError, match="nothing to compare with wsl; give a run of another name"):
        compare_runs({"wsl": [runs / "wsl"]}, runs / "gt.json", ["wsl"], 10)
    with pytest.raises(RunError, match="the baseline 'x' is none of the runs wsl"):
        compare_runs({"wsl": [runs / "wsl"]}, runs / "gt.json", ["x"], 10)
    twice = {"imagenet": [runs / "imagenet"], "wsl": [runs / "wsl", runs / "." / "val" / ".." / "wsl"]}
    with pytest.raises(RunError, match="wsl is given 2 times; a run counts once"):
        compare_runs(twice, runs / "gt.json", ["imagenet"], 10)


def without_mask(row):
    del row["segmentation"]


def test_boxes_alone_are_compared_by_boxes(runs):
    """Ground truth with masks, detections without: no AP of box-shaped masks."""
    contents = json.loads((runs / "gt.json").read_text())
    for name, seed in (("a", 1), ("b", 2)):
        write_run(runs / name, contents, seed, 2.0, without_mask)
    comparison = compare_runs({"a": [runs / "a"], "b": [runs / "b"]}, runs / "gt.json", ["a"], 10)
    assert comparison["iou_types"] == ["bbox"] and "segm" not in comparison["runs"]["a"]
    comparison = compare_runs({"a": [runs / "imagenet"], "b": [runs / "b"]}, runs / "gt.json", ["a"], 10, force=True)
    assert comparison["iou_types"] == ["bbox"]
    assert comparison["left_out"] == {"segm": f"no masks in {runs / 'b' / 'inference/coco_instances_results.json'}"}
    for annotation in contents["annotations"]:
        del annotation["segmentation"]
    (runs / "boxes.json").write_text(json.dumps(contents))
    folders = {"a": [runs / "imagenet"], "b": [runs / "wsl"]}
    comparison = compare_runs(folders, runs / "boxes.json", ["a"], 10)
    assert comparison["left_out"] == {"segm": f"{runs / 'boxes.json'} has no masks"}
    write_report(comparison, runs / "page.html", title="t", image_folder=runs / "val")
    page = (runs / "page.html").read_text()
    assert "mask AP is not compared: " in page and "NaN" not in page and "nan" not in page.replace("nance", "")


def test_keypoints_are_compared_where_all_have_them(runs):
    contents = json.loads((runs / "gt.json").read_text())
    detections = {seed: random_detections(contents, seed, jitter=jitter) for seed, jitter in ((1, 5.0), (2, 1.0))}
    for found in detections.values():
        random_keypoints(contents, found)
    (runs / "keypoints.json").write_text(json.dumps(contents))
    for name, seed in (("imagenet", 1), ("wsl", 2)):
        path = runs / name / "inference" / "coco_instances_results.json"
        path.write_text(json.dumps(detections[seed]))
    folders = {"imagenet": [runs / "imagenet"], "wsl": [runs / "wsl"]}
    comparison = compare_runs(folders, runs / "keypoints.json", ["imagenet"], 20)
    assert comparison["iou_types"] == ["bbox", "segm", "keypoints"]
    row = comparison["gains"][0]["keypoints"]
    assert row["AP"]["candidate"] > 5 and "APs" not in row and "errors" not in row
    write_report(comparison, runs / "page.html", title="t")
    assert "keypoint AP" in (runs / "page.html").read_text()


def test_seeds_give_verdicts_about_the_method(runs):
    contents = json.loads((runs / "gt.json").read_text())
    for name, jitter in (("imagenet", 9.0), ("wsl", 1.0)):
        for seed in range(5):
            folder = write_run(runs / f"{name}{seed}", contents, 10 + seed, jitter)
            text = (folder / "config.yaml").read_text()
            (folder / "config.yaml").write_text(f"{text}SEED: {4 - seed if name == 'wsl' else seed}\n")
    folders = {name: [runs / f"{name}{seed}" for seed in range(5)] for name in ("imagenet", "wsl")}
    three = {name: members[:3] for name, members in folders.items()}
    row = compare_runs(three, runs / "gt.json", ["imagenet"], 50)["gains"][0]
    assert not row["paired"] and row["bbox"]["verdict"] == "gain"
    assert "over images and training seeds (" in describe_gain(row, "bbox") and "3 runs each" in describe_gain(
        row, "bbox"
    )
    assert describe_settling(row, "bbox").startswith("half as wide an interval: ")
    row = compare_runs(folders, runs / "gt.json", ["imagenet"], 50)["gains"][0]
    assert row["paired"] and len(row["bbox"]["AP"]["seed_sds"]) == 1
    row = compare_runs({"imagenet": [runs / "imagenet0"], "wsl": three["wsl"]}, runs / "gt.json", ["imagenet"], 50)
    assert row["gains"][0]["bbox"]["verdict"].startswith("these detectors only")
    one = {"imagenet": [runs / "imagenet"], "wsl": [runs / "wsl"]}
    row = compare_runs(one, runs / "gt.json", ["imagenet"], 50, seed_sd=0.3)["gains"][0]
    assert row["bbox"]["AP"]["seed_sds"] == [0.3, 0.3] and "whose spread is assumed" in describe_gain(row, "bbox")
    with pytest.raises(RunError, match="between seeds is -1; it must not be negative"):
        compare_runs(one, runs / "gt.json", ["imagenet"], 50, seed_sd=-1)
    with pytest.raises(RunError, match="the seed of the bootstrap is -3"):
        compare_runs(one, runs / "gt.json", ["imagenet"], 50, seed=-3)
    back = compare_runs(one, runs / "gt.json", ["wsl"], 50)["gains"][0]
    assert describe_gain(back, "bbox").startswith("imagenet costs these detectors ")
    with pytest.raises(RunError, match="number of resamples is 0; it must be at least 2"):
        compare_runs(one, runs / "gt.json", ["imagenet"], 0)


def test_what_starts_from_random_weights_comes_last(runs):
    contents = json.loads((runs / "gt.json").read_text())
    for name, weights, jitter in (("scratch", "", 8.0), ("old", "old.pth", 4.0), ("new", "new.pth", 5.0)):
        config = write_run(runs / name, contents, 3, jitter) / "config.yaml"
        config.write_text(config.read_text().replace("WEIGHTS: ''", f"WEIGHTS: '{weights}'"))
    folders = {name: [runs / name] for name in ("scratch", "old", "new")}
    comparison = compare_runs(folders, runs / "gt.json", ["old"], 20)
    assert list(comparison["runs"]) == ["new", "old", "scratch"]
    assert [row["candidate"] for row in comparison["gains"]] == ["new", "scratch"]
    write_report(comparison, runs / "page.html", title="t")
    headline = re.search(r'<h1>t</h1>\s*<p class="headline">([^<]*)', (runs / "page.html").read_text())[1]
    assert headline.startswith("new costs these detectors ") and "one run each" in headline
    low, high = map(float, re.search(r"95% interval (\S+) to (\S+) over images", headline).groups())
    assert low < float(re.search(r"(\S+) box AP", headline)[1]) < high


def test_sizes_without_objects_are_words(runs):
    contents = json.loads((runs / "gt.json").read_text())
    contents["annotations"] = [a for a in contents["annotations"] if a["area"] > 33**2]
    (runs / "large.json").write_text(json.dumps(contents))
    folders = {"imagenet": [runs / "imagenet"], "wsl": [runs / "wsl"]}
    comparison = compare_runs(folders, runs / "large.json", ["imagenet"], 20)
    row = comparison["gains"][0]
    assert math.isnan(row["bbox"]["APs"]["gain"])
    assert describe_gain(row, "bbox", "APs") == "wsl - imagenet, box APs: no small objects"
    assert format_cell(comparison["runs"]["wsl"]["bbox"]["APs"], "APs") == "no small objects"
    write_report(comparison, runs / "page.html", title="t")
    page = (runs / "page.html").read_text()
    assert "<td>no small objects</td>" in page and ">nan" not in page


def test_text_ids_are_shown_as_they_are(runs):
    contents = json.loads((runs / "gt.json").read_text())
    plain = compare_runs({"a": [runs / "imagenet"], "b": [runs / "wsl"]}, runs / "gt.json", ["a"], 20)
    for image in contents["images"]:
        image["id"] = f"photo {image['id']:03d}"
    for annotation in contents["annotations"]:
        annotation["image_id"] = f"photo {annotation['image_id']:03d}"
    (runs / "text.json").write_text(json.dumps(contents))
    for name in ("imagenet", "wsl"):
        path = runs / name / "inference" / "coco_instances_results.json"
        rows = json.loads(path.read_text())
        path.write_text(json.dumps([row | {"image_id": f"photo {row['image_id']:03d}"} for row in rows]))
    comparison = compare_runs({"a": [runs / "imagenet"], "b": [runs / "wsl"]}, runs / "text.json", ["a"], 20)
    assert comparison["gains"][0]["bbox"] == plain["gains"][0]["bbox"]
    shown = [f"photo {number:03d}" for number in plain["gains"][0]["images"]["best"]]
    assert comparison["gains"][0]["images"]["best"] == shown
    write_report(comparison, runs / "page.html", title="t", image_folder=runs / "val")
    assert "data:image/jpeg" in (runs / "page.html").read_text()


def test_runs_compared_by_force_say_so(runs):
    contents = json.loads((runs / "gt.json").read_text())
    write_run(runs / "long", contents, 3, 2.0, MAX_ITER=900)
    folders = {"imagenet": [runs / "imagenet"], "wsl": [runs / "long"]}
    comparison = compare_runs(folders, runs / "gt.json", ["imagenet"], 10, force=True)
    assert [line.partition(":")[0] for line in comparison["differences"]] == ["SOLVER.MAX_ITER"]
    write_report(comparison, runs / "page.html", title="t")
    assert "compared by force although they differ" in (runs / "page.html").read_text()


def test_a_run_without_metrics_and_one_without_detections_can_be_compared(runs):
    (runs / "wsl" / "metrics.json").unlink()
    (runs / "wsl" / "inference" / "coco_instances_results.json").write_text("[]")
    folders = {"imagenet": [runs / "imagenet"], "wsl": [runs / "wsl"]}
    comparison = compare_runs(folders, runs / "gt.json", ["imagenet"], 10)
    assert comparison["iou_types"] == ["bbox", "segm"] and comparison["runs"]["wsl"]["segm"]["AP"]["mean"] == 0
    write_report(comparison, runs / "page.html", title="t")
    with pytest.raises(RunError, match="metrics.json has no loss_hashtag; --curve is for runs of a pretraining"):
        (runs / "imagenet" / "metrics.json").write_text('{"iteration": 0, "total_loss": 1}')
        write_report(comparison, runs / "page.html", title="t", curves={"x": runs / "imagenet"})
    lvis = json.loads((runs / "gt.json").read_text())
    lvis["images"][0]["not_exhaustive_category_ids"] = []
    (runs / "lvis.json").write_text(json.dumps(lvis))
    with pytest.raises(CocoError, match="lvis.json is in LVIS's format"):
        compare_runs(folders, runs / "lvis.json", ["imagenet"], 10)


def test_the_images_that_differ_most_are_those_of_the_runs_that_are_shown(runs):
    contents = json.loads((runs / "gt.json").read_text())
    write_run(runs / "other", contents, 7, 9.0, BASE_LR=0.02)
    folders = {"imagenet": [runs / "imagenet"], "wsl": [runs / "wsl"]}
    one = compare_runs(folders, runs / "gt.json", ["imagenet"], num_resamples=10)
    folders["wsl"].append(runs / "other")
    two = compare_runs(folders, runs / "gt.json", ["imagenet"], num_resamples=10)
    assert one["gains"][0]["images"] == two["gains"][0]["images"] and one["gains"][0]["images"]["best"]


def test_what_differs_is_told_once_and_wraps(runs):
    contents = json.loads((runs / "gt.json").read_text())
    model = CONFIG["MODEL"] | {"WEIGHTS": "a/long/path/to/backbone.pth"}
    for seed in (3, 4):
        folder = write_run(runs / f"wsl{seed}", contents, seed, 1.0)
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"MODEL": model}))
    folders = {"imagenet": [runs / "imagenet"], "wsl": [runs / "wsl3", runs / "wsl4"]}
    options = {"title": "t", "command": "c", "num_resamples": 20}
    told = write_gains(folders, runs / "gt.json", ["imagenet"], runs / "report", **options)
    assert "MODEL.WEIGHTS differs: wsl: a/long/path/to/backbone.pth; imagenet: none" in told.splitlines()
    page = (runs / "report" / "report.html").read_text()
    assert '<td class="text">a/long/path/to/backbone.pth</td><td class="text">none</td>' in page


def test_the_tool_prints_the_table_and_writes_one_self_contained_page(runs):
    command = ["compare", "--baseline", "imagenet", "--num-resamples", "100"]
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
    printed = wsl_d2(*command)
    for metric in ("box AP", "mask AP"):
        pattern = (
            rf"wsl adds \d+\.\d {metric} to these detectors \(imagenet .*\), 95% interval .* over images; one run each"
        )
        assert re.search(pattern, printed)
    assert "SOLVER.BASE_LR differs: wsl: 0.02; imagenet: 0.04" in printed
    page = (runs / "report" / "report.html").read_text()
    assert "<script" not in page
    assert 'src="http' not in page and "url(http" not in page and "<link" not in page
    comparison = json.loads((runs / "report" / "ap_gain.json").read_text())
    shown = comparison["gains"][0]["images"]
    assert len(shown["best"]) == 4 and page.count("data:image/jpeg;base64,") == 3 * (4 + len(shown["worst"]))
    for heading in ("Gains", "Precision and recall", "Kinds of error", "by class", "held equal"):
        assert heading in page
    (runs / "val").rename(runs / "elsewhere")
    refused = wsl_d2(*command, code=2)
    assert "give the folder of the evaluated images" in refused and len(refused.strip().splitlines()) == 1
    text = (runs / "report" / "ap_gain.json").read_text()
    comparison = json.loads(text)
    assert "NaN" not in text  # JavaScript and others refuse it
    assert f"{comparison['runs']['wsl']['bbox']['AP']['mean']:.1f}" in page


def test_the_table_of_parts_says_where_the_gain_is(runs):
    contents = json.loads((runs / "gt.json").read_text())
    for category in contents["categories"]:
        category["supercategory"] = "odd" if category["id"] % 2 else "even"
    (runs / "grouped.json").write_text(json.dumps(contents))
    folders = [word for name in ("imagenet", "wsl") for word in ("--run", f"{name}={runs / name}")]
    out, rows = runs / "grouped", runs / "grouped.jsonl"
    call = ["compare", *folders, "--baseline", "imagenet", "--ground-truth", runs / "grouped.json", "--output", out]
    wsl_d2(*call, "--num-resamples", 20)
    wsl_d2("records", out, "--records", rows)
    table = wsl_d2("records", "--records", rows, "--table", "parts").splitlines()
    assert [line.split(" | ")[1] for line in table[2:]][-2:] == ["odd", "even"] and "small objects" in table[2]
    gain = json.loads((out / "ap_gain.json").read_text())["gains"][0]["bbox"]["supercategories"]["even"]["gain"]
    assert f" | {gain:+.1f} [" in table[-1] and table[-1].count("over images") == 2
    assert "<h2>Gains by supercategory</h2>" in (out / "report.html").read_text()


def test_a_study_has_a_page_for_each_value_that_changes_more_than_the_start(runs):
    (runs / "study.yaml").write_text(
        """
title: Schedules
axes: {iterations: [100, 300], arm: [imagenet, wsl], seed: [0, 1]}
stages:
  detect: {axes: [iterations, arm, seed], command: "wsl-d2 train {folder}", done: "{folder}/metrics.json", seconds: 1}
report:
  - {kind: comparison, stage: detect, arms: arm, baselines: [imagenet], ground_truth: GT, images: VAL, PAGES}
""".replace("GT", str(runs / "gt.json")).replace("VAL", str(runs / "val"))
    )
    text = (runs / "study.yaml").read_text()
    contents = json.loads((runs / "gt.json").read_text())
    for wrong in ("arm", "world"):
        (runs / "study.yaml").write_text(text.replace("PAGES", f"pages: [{wrong}]"))
        with pytest.raises(
            StudyError, match=f"pages '{wrong}' is no axis of stage detect but the arms'; iterations, seed"
        ):
            Study.load(runs / "study.yaml")
    (runs / "study.yaml").write_text(text.replace("PAGES", "pages: [iterations]"))
    study = Study.load(runs / "study.yaml")
    for cell in study.cells(runs / "out"):
        values = cell.values
        jitter = 300 / values["iterations"] * (3 if values["arm"] == "imagenet" else 1)
        write_run(cell.folder, contents, values["seed"], jitter, MAX_ITER=values["iterations"])
        cell.note(1.0)
    told = write_study(study, runs / "out").splitlines()
    assert [line for line in told if line.startswith("iterations=")] == ["iterations=100", "iterations=300"]
    gains = [
        json.loads((runs / "out" / "report" / f"iterations={n}" / "ap_gain.json").read_text())["gains"][0]
        for n in (100, 300)
    ]
    assert all(gain["bbox"]["AP"]["num_runs"] == [2, 2] for gain in gains)
    assert gains[0]["bbox"]["AP"]["gain"] != gains[1]["bbox"]["AP"]["gain"]
