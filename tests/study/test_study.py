"""Study files: what they plan, what they refuse, that finished runs are kept, and what the report says."""

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import wsl_d2
from waiting import wait_until

from wsl_d2.analysis.records import RunError
from wsl_d2.cli.main import VERBS, build_parser
from wsl_d2.report.study import analyze, format_text, sentences_of_item, write_report
from wsl_d2.study.runner import describe_plan, format_duration, run_locally, run_on_cluster
from wsl_d2.study.study import Study, StudyError

ROOT = Path(__file__).parents[2]
TOY = """
title: Toy
axes:
  n: [10, 100, 1000]
  size: {small: [--slope, 1], large: [--slope, 2]}
  seed: [0, 1]
stages:
  data:
    axes: [n]
    command: WRITE {folder}/data.json --value {n}
    done: "{folder}/data.json"
    seconds: 1
  fit:
    axes: [n, size, seed]
    needs: [data]
    command: FIT {folder}/fit.json --data {data}/data.json --seed {seed} @size
    done: "{folder}/fit.json"
    seconds: 3
results:
  score: {stage: fit, file: fit.json, key: score}
report:
  - {kind: scaling, x: n, series: size, y: score}
  - {kind: levels, x: size, baseline: small, y: score}
"""
SCRIPT = """
import argparse, json, math, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("output"), parser.add_argument("--value"), parser.add_argument("--data")
parser.add_argument("--seed", type=int), parser.add_argument("--slope", type=float)
args = parser.parse_args()
n = float(args.value or json.load(open(args.data))["score"])
score = n if args.value else args.slope * math.log10(n) + 0.1 * args.seed
with open("calls.txt", "a") as calls:
    calls.write(args.output + "\\n")
pathlib.Path(args.output).write_text(json.dumps({"score": score}))
"""


@pytest.fixture()
def toy(tmp_path):
    (tmp_path / "tool.py").write_text(SCRIPT)
    path = tmp_path / "toy.yaml"
    path.write_text(TOY.replace("WRITE", "tool.py").replace("FIT", "tool.py"))
    return path


def run(path, jobs=2):
    study = Study.load(path)
    cells = study.cells(path.parent / "out")
    run_locally(cells, jobs=jobs, root=path.parent, say=lambda text: None)
    return study, cells


def num_calls(path):
    calls = path.parent / "calls.txt"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def test_every_study_of_the_repository_can_be_planned(tmp_path):
    paths = sorted((ROOT / "configs" / "Studies").glob("*.yaml"))
    assert len(paths) >= 5
    for path in paths:
        study = Study.load(path)
        cells = study.cells(tmp_path)
        assert len({cell.name for cell in cells}) == len(cells) > 5
        assert "left with 2 run(s) at a time" in describe_plan(study, cells, 2)
        for cell in cells:
            assert cell.command[0] == "wsl-d2" or (ROOT / cell.command[0]).is_file(), cell.command
            if cell.command[0] == "wsl-d2":
                build_parser().parse_args(cell.command[1:])
            if "--config-file" in cell.command:
                assert (ROOT / cell.command[cell.command.index("--config-file") + 1]).is_file()


def test_runs_once_and_reads_back(toy):
    study, cells = run(toy)
    assert num_calls(toy) == 3 + 12
    run(toy)
    assert num_calls(toy) == 15
    scaling, levels = analyze(study, study.read_results(toy.parent / "out"))
    small, large = scaling["lines"]
    assert small["slope_per_decade"] == pytest.approx(1) and large["slope_per_decade"] == pytest.approx(2)
    assert scaling["differences"][0]["slope_difference"] == pytest.approx(1)
    assert scaling["differences"][0]["p_value"] < 0.01
    assert small["prediction"]["x"] == 10000 and small["prediction"]["value"] == pytest.approx(4.05)
    assert levels["paired_by"] == ["n", "seed"] and levels["levels"][1]["difference"] == pytest.approx(2)
    assert "per tenfold n" in format_text(study, [scaling, levels])


def test_the_plan_is_a_table_with_a_total_whose_columns_stay_apart(toy):
    toy.write_text(
        toy.read_text().replace("seconds: 1\n", "seconds: 59\n").replace("seconds: 3\n", "seconds: 8.9e+5\n")
    )
    study = Study.load(toy)
    _, head, data, fit, total, about = describe_plan(study, study.cells(toy.parent / "out"), 2).splitlines()
    assert head.split() == ["stage", "runs", "finished", "each", "left"]
    assert data.split() == ["data", "3", "0", "0:59", "2:57"]
    assert fit.split("  ")[0] == "fit" and [column.strip() for column in fit[3:].split("  ") if column.strip()] == [
        *("12", "0", "10.3 days", "123.6 days")
    ]
    assert total.split() == ["total", "15", "0", "123.6", "days"] and about.startswith("about 61.8 days left with 2")
    assert len({len(line) for line in (head, data, fit, total)}) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "0:05"), (3599, "59:59"), (3600, "1:00:00"), (172_799, "47:59:59"), (172_800, "2.0 days")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_runs_share_the_cores_of_a_job_and_not_of_its_machine(toy, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "6")
    (toy.parent / "tool.py").write_text("import os\nopen('threads.txt', 'a').write(os.environ['OMP_NUM_THREADS'])")
    with pytest.raises(StudyError, match="ended with status 0 but without"):
        run(toy, jobs=2)
    assert set((toy.parent / "threads.txt").read_text()) == {"3"}


def test_what_is_missing_is_run_again_and_failures_are_named(toy):
    _, cells = run(toy)
    cells[5].done.unlink()
    run(toy)
    assert num_calls(toy) == 16
    cells[6].done.unlink()
    (toy.parent / "tool.py").write_text("raise SystemExit('out of luck')")
    with pytest.raises(StudyError, match="(?s)ended with status 1.*out of luck"):
        run(toy)
    (toy.parent / "tool.py").write_text("")
    with pytest.raises(StudyError, match="status 0 but without"):
        run(toy)


def test_the_seconds_of_a_run_are_those_of_all_its_starts(toy):
    study = Study.load(toy)
    (cell,) = [c for c in study.cells(toy.parent / "out") if c.name == "data/n=10"]
    (toy.parent / "tool.py").write_text("import time\ntime.sleep(1)\n" + SCRIPT)
    cell.note(None, seconds_so_far=1000.0)
    run_locally([cell], jobs=1, root=toy.parent, say=lambda text: None)
    assert 1001 < cell.seconds_taken() < 1060
    cell.done.unlink()  # made again from its beginning
    run_locally([cell], jobs=1, root=toy.parent, say=lambda text: None)
    assert 1 < cell.seconds_taken() < 60


TRAINING = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]).parent
def save(*_):
    (folder / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
(folder / "begun").touch()
time.sleep(600)
"""


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGKILL,
        *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)),
    ],
)
def test_a_signal_to_a_study_lets_its_trainings_save_and_leaves_no_process(toy, number):
    (toy.parent / "tool.py").write_text(TRAINING)
    command = [sys.executable, "-m", "wsl_d2", "study", toy, "--output", toy.parent / "out", "--jobs", "2"]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    if number != signal.SIGKILL:  # heeded also where `nohup` runs the tests
        options["preexec_fn"] = functools.partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=toy.parent, **options)
    try:
        while len(list(toy.parent.rglob("begun"))) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    if number == signal.SIGKILL:
        assert process.returncode == -number
        wait_until(lambda: not processes_with(str(toy.parent)), seconds=60)
    else:
        assert process.returncode == (130 if number == signal.SIGINT else 75), errors
        assert errors.strip() == "wsl-d2 study: stopped; finished runs are kept, and the same command goes on."
    assert len(list(toy.parent.rglob("saved"))) == 2 and not processes_with(str(toy.parent))
    if number != signal.SIGKILL:
        cells = [json.loads(path.read_text()) for path in toy.parent.rglob("study_cell.json")]
        assert len(cells) == 2 and all(cell["seconds"] is None and cell["seconds_so_far"] > 0 for cell in cells)


def processes_with(text):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [line] if text in (line := path.read_bytes().decode(errors="replace")) else []
    return found


def test_every_verb_that_starts_runs_stops_them():
    assert all(VERBS[name].starts_runs for name in ("study", "demo", "gain", "pretrain"))


def test_unfinished_studies_and_other_commands_are_refused(toy):
    study = Study.load(toy)
    with pytest.raises(StudyError, match="is not finished"):
        study.read_results(toy.parent / "out")
    run(toy)
    toy.write_text(toy.read_text().replace("--seed {seed}", "--seed 1{seed}"))
    with pytest.raises(StudyError, match="holds a run of another command.*--seed 0.*--seed 10"):
        run(toy)


def test_values_are_selected_by_the_file_and_by_the_command_line(toy):
    def names(select=None):
        return [cell.name for cell in Study.load(toy, select).cells(toy.parent / "out") if cell.stage == "fit"]

    toy.write_text(toy.read_text() + "select: {seed: [1], size: [small]}\n")
    assert names() == [f"fit/n={n},size=small,seed=1" for n in (10, 100, 1000)]
    assert names({"seed": [7], "n": [10]}) == ["fit/n=10,size=small,seed=7"]
    with pytest.raises(StudyError, match="size has no value 'huge'; choose among small, large"):
        names({"size": ["huge"]})
    with pytest.raises(StudyError, match="no axis sed to select from; there are n, size, seed"):
        names({"sed": [0]})


def test_stages_and_baselines_of_values_that_are_not_run_fall_away(tmp_path):
    demo = ROOT / "configs" / "Studies" / "miniworld.yaml"
    study = Study.load(demo)
    assert "self_supervised" not in describe_plan(study, study.cells(tmp_path), 2)
    assert study.report[0]["baselines"] == ["imagenet", "imagenet_equal_views"]
    study = Study.load(demo, {"arm": ["wsl", "self_supervised"]})
    assert "self_supervised" in describe_plan(study, study.cells(tmp_path), 2)
    assert study.report[0]["baselines"] == ["self_supervised"]
    with pytest.raises(StudyError, match="baseline 'imagenet' is no value of arm; there are wsl"):
        Study.load(demo, {"arm": ["wsl"]})


def test_a_stage_may_have_only_some_values_and_what_it_does_not_make_is_not_needed(toy):
    toy.write_text(toy.read_text().replace("axes: [n]\n", "axes: [n]\n    only: {n: [10, 100]}\n"))
    cells = Study.load(toy).cells(toy.parent / "out")
    assert [cell.name for cell in cells if cell.stage == "data"] == ["data/n=10", "data/n=100"]
    assert {cell.needs for cell in cells if cell.values["n"] == 1000} == {()}


def test_a_diverged_run_is_a_result_where_the_study_says_so(toy):
    (toy.parent / "tool.py").write_text(SCRIPT + "if n > 100: raise SystemExit('the loss is not finite: stop')\n")
    with pytest.raises(StudyError, match="the loss is not finite"):
        run(toy)
    toy.write_text(toy.read_text().replace("seconds: 3", "seconds: 3\n    may_diverge: true"))
    toy.write_text(toy.read_text().replace("seconds: 1\n", "seconds: 1\n    may_diverge: true\n"))
    study, cells = run(toy)
    diverged = [cell.name for cell in cells if cell.has_diverged()]
    assert diverged == [cell.name for cell in cells if cell.values["n"] == 1000]
    rows = study.read_results(toy.parent / "out")
    assert [row for row in rows if row["score"] is None] == [row for row in rows if row["n"] == 1000]
    calls = num_calls(toy)
    run(toy)
    assert num_calls(toy) == calls


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: Toy", "name: Toy", "title missing"),
        ("axes: [n]", "axes: [m]", "stage data: no axis m"),
        ("needs: [data]", "needs: [fit]", "needs 'fit', which is no earlier stage"),
        ("    seconds: 3", "    second: 3", "stage fit: unknown second"),
        ("{stage: fit, file", "{stage: probe, file", "result score needs stage"),
        ("y: score}\n  - {kind: levels", "y: top1}\n  - {kind: levels", "y 'top1' is no result"),
        (
            "y: score}\n  - {kind: levels, x: size, baseline: small",
            "y: score}\n  - {kind: sweep, x: size, series: n",
            "sweep needs an axis of numbers above 0; size has small, large",
        ),
        (
            "report:",
            "labels: {top1: x}\nreport:",
            "labels: 'top1' is no axis or result; there are n, size, seed, score",
        ),
        ("baseline: small", "baseline: tiny", "baseline 'tiny' is no value of size"),
        ("kind: scaling", "kind: pie", "kind is one of"),
        ("--value {n}", "--value {m}", "names 'm'"),
        ("@size", "@n_images", "names no axis of the stage"),
        ("n: [10, 100, 1000]", "n: 10", "axis n needs a list"),
    ],
)
def test_a_wrong_study_file_is_refused(toy, old, new, message):
    assert old in toy.read_text()
    toy.write_text(toy.read_text().replace(old, new))
    with pytest.raises(StudyError, match=message):
        Study.load(toy).cells(toy.parent / "out")


def test_submitit_runs_the_same_cells(toy):
    study = Study.load(toy)
    cells = study.cells(toy.parent / "out")
    run_on_cluster(cells, folder=toy.parent / "jobs", root=toy.parent, cluster="debug", say=lambda text: None)
    assert num_calls(toy) == 15 and all(cell.is_finished() for cell in cells)


def test_the_tool_reports(toy):
    (toy.parent / "tools").mkdir()
    command = ["study", toy, "--output", toy.parent / "out"]
    assert "fit" in wsl_d2(*command, "--plan") and not (toy.parent / "out").exists()
    run(toy)
    wsl_d2(*command, "--report-only")
    page = (toy.parent / "out" / "report.html").read_text()
    assert "<svg" in page and 'src="http' not in page and "href=" not in page.split("<svg")[0]
    assert json.loads((toy.parent / "out" / "report.json").read_text())["analysis"][0]["kind"] == "scaling"
    assert len((toy.parent / "out" / "results.csv").read_text().splitlines()) == 13


def toy_rows(study, score):
    cells = [cell.values for cell in study.cells("out") if cell.stage == "fit"]
    return [values | {"score": score(**values)} for values in cells]


def written(study, rows, folder):
    analysis = analyze(study, rows)
    return analysis, format_text(study, analysis), write_report(study, rows, analysis, folder).read_text()


SIZES = ("small", "large")
SWEEP = "  - {kind: sweep, x: n, series: size, y: score}\n"


def test_a_sweep_names_the_best_and_shows_what_diverged(toy, tmp_path):
    head = toy.read_text().partition("report:")[0].replace("[10, 100, 1000]", "[0.1, 0.001, 0.01]")
    toy.write_text(head + 'labels: {n: rate, score: "AP, points"}\nreport:\n' + SWEEP)
    study = Study.load(toy)

    def score(n, size, seed):
        if n == 0.1 and (size == "large" or seed == 1):
            return None
        return {0.1: 9.0, 0.01: 5.0, 0.001: 4.0 if size == "small" else 6.0}[n] + seed

    (item,), text, page = written(study, toy_rows(study, score), tmp_path)
    small, large = item["lines"]
    assert [point["x"] for point in small["points"]] == [0.001, 0.01, 0.1]
    assert [point["diverged"] for point in small["points"]] == [0, 0, 1] and small["best"] == 0.01
    assert large["best"] == 0.001 and (small["at_end"], large["at_end"]) == ("", "lowest")
    assert "Best rate by AP: small 0.01 (5.5\u00a0±\u00a06.4), large 0.001 (6.5\u00a0±\u00a06.4)." in text
    assert "The best of large is the lowest that was tried; try lower ones." in text
    assert "<td>9.0 (1 of 2 diverged)</td>" in page and "<td>diverged</td>" in page
    assert ">AP, points</text>" in page and ">diverged</text>" in page and "nan" not in page
    assert "<td>0.001</td><td>small</td><td>0</td><td>4.00</td>" in page


def test_a_sweep_in_which_all_diverge_has_no_best(toy, tmp_path):
    toy.write_text(toy.read_text().partition("report:")[0] + "report:\n" + SWEEP)
    study = Study.load(toy)
    (item,), text, _ = written(study, toy_rows(study, lambda n, size, seed: 1 if size == "small" else None), tmp_path)
    assert item["lines"][1]["best"] is None and "large none" in text
    with pytest.raises(RunError, match="no run has both n and score"):
        analyze(study, toy_rows(study, lambda **values: None))


def test_one_seed_says_so_and_numbers_ascend(toy, tmp_path):
    toy.write_text(toy.read_text() + "  - {kind: levels, x: n, baseline: 10, y: score}\n")
    study = Study.load(toy, {"seed": [0], "size": ["small"], "n": [1000, 10, 100]})
    analysis, text, page = written(study, toy_rows(study, lambda n, size, seed: n / 10 + (n == 100)), tmp_path)
    assert [level["value"] for level in analysis[2]["levels"]] == [10, 100, 1000]
    assert "n 1000 has the highest score: 100.0, +99.0 (one run) against 10." in text
    assert "One run of each n: no interval" in text and "nan" not in text and "nan" not in page


@pytest.mark.parametrize(("noise", "told"), [(0.5, " against 10."), (400.0, " against 10, which may be chance.")])
def test_the_answer_about_levels_says_whether_it_may_be_chance(toy, tmp_path, noise, told):
    toy.write_text(toy.read_text() + "  - {kind: levels, x: n, baseline: 10, y: score}\n")
    study = Study.load(toy, {"seed": [0, 1, 2], "size": ["small"], "n": [10, 1000]})
    _, text, _ = written(study, toy_rows(study, lambda n, size, seed: n / 10 + noise * (seed - 1) * (n > 10)), tmp_path)
    (answer,) = (line for line in text.splitlines() if "n 1000 has the highest score" in line)
    assert answer.strip().endswith(told)


def test_levels_and_series_without_runs_of_a_result_are_left_out(toy, tmp_path):
    head, _, report = toy.read_text().partition("results:")
    toy.write_text(
        f"{head}  slow:\n    axes: [n, size, seed]\n    only: {{n: [10, 1000], size: [large]}}\n    needs: [fit]\n"
        f'    command: {toy.parent}/tool.py {{folder}} {{n}} 1\n    done: "{{folder}}/result.json"\n    seconds: 3\n'
        f"results:\n  slow: {{stage: slow, file: result.json, key: score}}{report}"
        "  - {kind: scaling, x: n, series: size, y: slow}\n  - {kind: levels, x: n, baseline: 10, y: slow}\n"
    )
    study = Study.load(toy)
    rows = toy_rows(study, lambda n, size, seed: n / 10 + seed)
    rows = [
        row | ({"slow": row["n"] + row["seed"]} if row["n"] != 100 and row["size"] == "large" else {}) for row in rows
    ]
    analysis, text, page = written(study, rows, tmp_path)
    assert [level["value"] for level in analysis[-1]["levels"]] == [10, 1000]
    (line,) = analysis[-2]["lines"]
    assert line["series"] == "large" and [point["x"] for point in line["points"]] == [10, 1000]
    assert analysis[-1]["levels"][1]["difference"] == pytest.approx(990)
    assert "diverged" not in text + page and "no run" not in text


def test_a_study_file_that_is_not_there_is_told_in_words(tmp_path):
    with pytest.raises(StudyError, match=r"none\.yaml does not exist, or is no file; studies of the mini-world are in"):
        Study.load(tmp_path / "none.yaml")


def test_a_line_that_levels_off_is_not_drawn_on(toy, tmp_path):
    toy.write_text(toy.read_text().replace("[10, 100, 1000]", "[10, 100, 1000, 10000]"))
    study = Study.load(toy)
    jitter = {0: 0.1, 1: -0.1}

    def score(n, size, seed):
        return 5 * math.log10(n) + jitter[seed] if size == "small" else 80 - 60 / n**0.5 + jitter[seed]

    _, text, _ = written(study, toy_rows(study, score), tmp_path)
    small, large = (next(line for line in text.splitlines() if line.startswith(f"{size}: +")) for size in SIZES)
    assert "a new run with 100,000 would give 25.0" in small and large.endswith(" score per tenfold n.")
    assert "large: a curve that levels off describes the results better than the line" in text


def test_records_tell_what_the_page_tells(toy, tmp_path):
    toy.write_text(toy.read_text() + "  - {kind: levels, x: n, baseline: 10, y: score}\n")
    study = Study.load(toy, {"n": [10, 100, 1000]})
    rows = toy_rows(study, lambda n, size, seed: None if n == 1000 else n / 10 + seed)
    rows = [row for row in rows if row["n"] > 10 or row["seed"] == 0]  # one run alone at a place
    written(study, rows, tmp_path)
    records = tmp_path / "records.jsonl"
    assert "1 of kind study" in wsl_d2("records", tmp_path, "--records", records)
    table = wsl_d2("records", "--records", records, "--table", "studies")
    assert all(f"- {sentence}" in table for item in analyze(study, rows) for sentence in sentences_of_item(item))
    assert "nan" not in table and "| small | 1.0 |" in table and "| 1000 | diverged |" in table
