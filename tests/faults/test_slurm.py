"""Row 29 of the fault matrix: a run and a study on a real SLURM, cancelled, out of time, killed, and left alone."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_cluster
from training_runs import (
    OPTS,
    ROOT,
    assert_same_state,
    command,
    environment,
    losses,
    survives,
    train,
    train_together,
)
from waiting import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(1800)]
FAULT = "on SLURM: cancelled, out of time, kill -9 of a task, Ctrl-C while waiting"
SLURM = ["--cluster", "slurm", "--cluster-parameter", "timeout_min=30"]


@pytest.fixture(scope="module")
def slurm():
    if reason := slurm_cluster.why_not():
        pytest.skip(reason)
    pytest.importorskip("submitit")
    with slurm_cluster.cluster() as cluster:
        yield cluster


def submit(slurm, datasets, output, *parameters, **opts) -> str:
    """Submits a run, and returns the number of its job."""
    flags = [*SLURM, *(word for parameter in parameters for word in ("--cluster-parameter", parameter))]
    words = train(datasets, output, flags=flags, environ=slurm.environ, **opts).stdout.split()
    return words[words.index("job") + 1].rstrip(";")


def logs(output: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(output.rglob("*_log.*")))


def records(output: Path) -> int:
    path = output / "metrics.json"
    return len(path.read_text().splitlines()) if path.exists() else 0


def runs_of(output: Path) -> list[int]:
    """The processes that work in a folder as tasks of a job; not srun, which catches signals before there are tasks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            is_task = b"submitit.core._submit" in words and Path(os.fsdecode(words[0])).name != "srun"
            if is_task and any(os.fsencode(output) in word for word in words):
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return sorted(found)


def test_a_killed_task_is_requeued_up_to_a_limit_and_scancel_saves_and_ends(slurm, datasets, tmp_path, survived):
    number = submit(
        slurm, datasets, tmp_path, "tasks_per_node=2", SOLVER__TOTAL_IMAGES=80000, SOLVER__CHECKPOINT_PERIOD=5
    )
    wait_until(lambda: records(tmp_path) >= 8, lambda: logs(tmp_path))
    os.kill(runs_of(tmp_path)[-1], signal.SIGKILL)
    slurm.wait_for_requeue(number, lambda: logs(tmp_path))
    assert "processes of the job died (status 137): restart 1 of 3" in logs(tmp_path)
    before = records(tmp_path)
    wait_until(lambda: records(tmp_path) >= before + 5, lambda: logs(tmp_path))
    slurm.call("scancel", number)
    wait_until(lambda: slurm.job(number)["JobState"] == "CANCELLED" and not runs_of(tmp_path))
    assert "SIGTERM: saved after" in logs(tmp_path) and "scontrol" not in logs(tmp_path)
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{max(losses(tmp_path)):07d}.pth"
    assert sorted(losses(tmp_path)) == list(range(max(losses(tmp_path)) + 1))
    assert slurm.job(number)["Restarts"] == "1"
    survived(
        35, FAULT, 2, "a killed task: requeued and resumed, at most --max-restarts times; scancel: saved and ended"
    )


def test_a_run_whose_time_is_over_is_requeued_also_in_its_imports(slurm, datasets, whole_run, tmp_path, survived):
    number = submit(slurm, datasets, tmp_path)
    wait_until(lambda: any(survives(pid, signal.SIGUSR2) for pid in runs_of(tmp_path)))
    slurm.call("scancel", "--signal=USR2", number)  # as SLURM sends it before the time limit
    slurm.wait_for_requeue(number, lambda: logs(tmp_path))
    assert f"scontrol requeue {number}: done" in logs(tmp_path)
    slurm.wait_for_end(number, lambda: logs(tmp_path))
    assert "Traceback" not in logs(tmp_path)
    assert_same_state(tmp_path, whole_run)
    survived(29, FAULT, 1, "out of time: saved, requeued, bit-identical")


STUDY = """
title: Two runs
axes: {{seed: [0, 1]}}
stages:
  pretrain:
    axes: [seed]
    environment: {{OMP_NUM_THREADS: "1"}}
    command: wsl-d2 train --config-file {config} --resume {opts} OUTPUT_DIR {{folder}} SEED {{seed}}
    done: "{{folder}}/model_final.pth"
    seconds: 60
results: {{loss: {{stage: pretrain, file: metrics.json, key: total_loss}}}}
report: [{{kind: levels, x: seed, baseline: 0, y: loss}}]
"""


@pytest.mark.long
def test_a_study_goes_on_after_ctrl_c_and_its_cells_after_their_time(slurm, datasets, tmp_path, request, survived):
    config = ROOT / "configs" / "Base-Miniworld-Pretraining.yaml"
    opts = OPTS | {"SOLVER.TOTAL_IMAGES": "2400", "SOLVER.CHECKPOINT_PERIOD": "1000"}
    pairs = [f'{key} "{value}"' for key, value in opts.items()]
    study, output = tmp_path / "two.yaml", tmp_path / "out"
    study.write_text(STUDY.format(config=config, opts=" ".join(pairs)))
    arguments = [sys.executable, "-m", "wsl_d2", "study", str(study), "--output", str(output), *SLURM]

    def start() -> subprocess.Popen:
        environ = environment(datasets) | slurm.environ
        process = subprocess.Popen(arguments, env=environ, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        request.addfinalizer(process.kill)
        return process

    cells = [output / "pretrain" / f"seed={seed}" for seed in (0, 1)]
    before = len(slurm.jobs())
    first = start()
    wait_until(lambda: records(cells[0]) >= 3 or first.poll() is not None, lambda: logs(output))
    array = json.loads(next(output.rglob("jobs.json")).read_text())[f"pretrain/{cells[0].name}"].split("_")[0]
    slurm.call("scancel", "--signal=USR2", f"{array}_0")
    number = next(job["JobId"] for job in slurm.jobs() if job.get("ArrayTaskId") == "0")
    slurm.wait_for_requeue(number, lambda: logs(output))
    first.send_signal(signal.SIGINT)
    text = first.communicate()[0]
    assert first.returncode == 130 and "the same command waits for them again" in text, text
    again = start()
    text = again.communicate()[0]
    assert again.returncode == 0 and "in the queue from before" in text, text
    assert all(sorted(losses(cell)) == list(range(300)) for cell in cells)
    jobs = slurm.jobs()
    assert len(jobs) == before + 2  # nothing was submitted twice
    assert sorted(job["Restarts"] for job in jobs if job.get("ArrayJobId") == array) == ["0", "1"]
    assert ": saved after" in (cells[0] / "study_cell.log").read_text()
    survived(29, FAULT, 2, "a study finds its jobs again; its cells go on after their time limit")


@pytest.mark.long
def test_the_tasks_of_srun_are_one_run_that_the_documented_script_requeues(slurm, datasets, tmp_path, survived):
    train_together(datasets, tmp_path / "whole", 2)
    script = (ROOT / "configs" / "README.md").read_text().partition("#!/bin/bash")[2].partition("```")[0]
    arguments = command(tmp_path / "run", launcher=["srun", sys.executable])
    script = re.sub("(?m)^srun .*$", lambda _: shlex.join(arguments), script)
    script = re.sub("--nodes=.*", f"--ntasks-per-node=2 --output={tmp_path}/job_log.out", script)
    (tmp_path / "run.sh").write_text("#!/bin/bash" + script)
    number = slurm.call("sbatch", "--parsable", str(tmp_path / "run.sh"), **environment(datasets)).strip()
    wait_until(lambda: records(tmp_path / "run") >= 3, lambda: logs(tmp_path))
    slurm.call("scancel", "--signal=USR1", number)
    slurm.wait_for_requeue(number, lambda: logs(tmp_path))
    slurm.wait_for_end(number, lambda: logs(tmp_path))
    assert logs(tmp_path).count("SIGUSR1: saved after") == 1
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    survived(29, FAULT, 1, "out of time: saved, requeued, bit-identical")
