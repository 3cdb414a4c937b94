"""Runs what a study still misses, on this machine or as SLURM arrays."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tabulate import tabulate

from wsl_d2.engine.cluster import make_executor, on_cluster
from wsl_d2.engine.signals import Stopped
from wsl_d2.files import write_atomically
from wsl_d2.jobs import queued_jobs, submitting
from wsl_d2.process import start_program, stop_programs
from wsl_d2.study.study import Cell, Study, StudyError

_SECONDS_BETWEEN_LOOKS = 5.0  # at the queue
_LOSS_NOT_FINITE = "not finite"  # in the last line of a training that stopped for it


def expected_seconds(cell: Cell, finished: list[Cell]) -> float:
    """A cell's cost on one core: the mean of the finished cells of its stage, or the study file's guess."""
    taken = [other.seconds_taken() for other in finished if other.stage == cell.stage]
    known = [seconds for seconds in taken if seconds]
    return sum(known) / len(known) if known else cell.expected_seconds


def describe_plan(study: Study, cells: list[Cell], jobs: int) -> str:
    """Returns the table that is shown before anything runs: per stage its runs, those finished, and the cost left."""
    finished = [cell for cell in cells if cell.is_finished()]
    rows = [["stage", "runs", "finished", "each", "left"]]
    work = total = 0.0
    for stage in study.stages:
        members = [cell for cell in cells if cell.stage == stage]
        if not members:  # none of the chosen values needs it
            continue
        missing = [cell for cell in members if cell not in finished]
        each = expected_seconds(members[0], finished)
        left = each * len(missing)
        work += left
        total += left / (1 if members[0].all_cores else jobs)
        numbers = f"{len(members):,}", f"{len(members) - len(missing):,}"
        rows.append([stage, *numbers, format_duration(each), format_duration(left)])
    rows.append(["total", f"{len(cells):,}", f"{len(finished):,}", "", format_duration(work)])
    columns = ["left", *["right"] * 4]
    plan = tabulate(rows, headers="firstrow", tablefmt="plain", disable_numparse=True, colalign=columns)
    return f"{study.title}\n{plan}\nabout {format_duration(total)} left with {jobs} run(s) at a time"


def run_locally(
    cells: list[Cell],
    *,
    jobs: int,
    root: Path,
    say: Callable[[str], None] = print,
) -> None:
    """Runs the unfinished cells, ``jobs`` at a time, each once those it needs are finished.

    A run's output goes to ``study_cell.log`` in its folder. After an interruption the same call
    goes on; a run that was cut off is started again with the same command, which for training resumes.

    Raises:
        StudyError: a run failed, or ended without its result; the message has the last line of its log. The others are
            stopped.
        KeyboardInterrupt, Stopped: after the running ones were asked to stop, and did.
    """
    done = {cell.name for cell in cells if cell.is_finished()}
    everything = list(cells)
    waiting = [cell for cell in cells if cell.name not in done]
    running: dict[str, tuple[Cell, subprocess.Popen, float]] = {}
    begin, last_line = time.monotonic(), time.monotonic()
    cores = int(os.environ.get("SLURM_CPUS_ON_NODE") or os.cpu_count() or 1)  # of the job, not of the machine
    threads = max(1, cores // jobs)

    def tell(text: str) -> None:
        finished = [cell for cell in everything if cell.name in done]
        left = _seconds_left(waiting, [(cell, start) for cell, _, start in running.values()], finished, jobs)
        say(f"[{format_duration(time.monotonic() - begin)}, about {format_duration(left)} left] {text}")

    try:
        while waiting or running:
            for cell in list(waiting):
                alone = any(other.all_cores for other, _, _ in running.values()) or (cell.all_cores and running)
                if len(running) >= jobs or alone or not set(cell.needs) <= done:
                    continue
                waiting.remove(cell)
                so_far = cell.seconds_so_far()
                cell.note(None, seconds_so_far=so_far)
                tell(f"{cell.name}: {shlex.join(cell.command)}")
                command = ["-m", "wsl_d2", *cell.command[1:]] if cell.command[0] == "wsl-d2" else cell.command
                with open(cell.folder / "study_cell.log", "ab") as log:
                    process = start_program(
                        [sys.executable, *command],
                        cwd=root,
                        env=os.environ | {"OMP_NUM_THREADS": str(threads)} | cell.environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                running[cell.name] = (cell, process, time.monotonic() - so_far)
            time.sleep(0.2)
            for name, (cell, process, start) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[name]
                if status != 0 and cell.may_diverge and _LOSS_NOT_FINITE in last_line_of_log(cell):
                    cell.note(time.monotonic() - start, diverged=True)
                    done.add(name)
                    tell(f"{name}: diverged")
                    continue
                if status != 0 or not cell.done.is_file():
                    raise StudyError(
                        f"{name} ended with status {status}"
                        + ("" if status else f" but without {cell.done}")
                        + f"; {cell.folder / 'study_cell.log'} ends with: {last_line_of_log(cell)}"
                    )
                cell.note(time.monotonic() - start)
                done.add(name)
                tell(f"{name}: finished in {format_duration(time.monotonic() - start)}")
            if running and time.monotonic() - last_line > 30:
                last_line = time.monotonic()
                for cell, _, start in running.values():
                    cell.note(None, seconds_so_far=last_line - start)
                tell(
                    f"{len(done)} of {len(everything)} runs finished; now {', '.join(map(_progress, running.values()))}"
                )
    finally:
        stop_programs(process for _, process, _ in running.values())
        for cell, _, start in running.values():
            cell.note(None, seconds_so_far=time.monotonic() - start)


def _seconds_left(waiting: list[Cell], running: list[tuple[Cell, float]], finished: list[Cell], jobs: int) -> float:
    """Of the whole study; a training's own estimate counts where it has given one."""
    left = sum(expected_seconds(cell, finished) / (1 if cell.all_cores else jobs) for cell in waiting)
    of_running = [0.0]
    for cell, start in running:
        elapsed = time.monotonic() - start
        record = _last_record(cell)
        guess = max(0.0, expected_seconds(cell, finished) - elapsed)
        of_running.append(record["eta_seconds"] if "eta_seconds" in record else guess)
    return left + max(max(of_running), sum(of_running) / jobs)


def _progress(entry: tuple[Cell, subprocess.Popen, float]) -> str:
    cell, _, _ = entry
    iteration = _last_record(cell).get("iteration")
    return cell.name if iteration is None else f"{cell.name} at iteration {iteration + 1:,}"


def _last_record(cell: Cell) -> dict:
    """The last whole line of a training's metrics.json, empty for other runs."""
    path = cell.folder / "metrics.json"
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "eta_seconds" in record:
            return record
    return {}


def run_on_cluster(
    cells: list[Cell],
    *,
    folder: Path,
    root: Path,
    cluster: str = "slurm",
    parameters: dict | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Submits the unfinished cells through submitit, stage by stage, each stage as one array, and waits for them.

    Cells whose jobs are in SLURM's queue from a call before are not submitted again, but waited for.

    Args:
        folder: for submitit's logs and results; nobody else should be able to write there.
        cluster: "slurm", or "local" for processes of this machine.
        parameters: of the executor, such as {"slurm_partition": "gpu", "gpus_per_node": 8, "timeout_min": 1440}.

    Raises:
        ConfigError: submitit is not installed, or a parameter is wrong; see :func:`wsl_d2.engine.cluster.submit`.
        StudyError: runs failed; the message has the last line of the first one's log.
    """
    executor = make_executor(folder, cluster, parameters or {}, "wsl_d2_study")
    noted = folder / "jobs.json"  # name of a cell -> the job it was last submitted as
    for stage in dict.fromkeys(cell.stage for cell in cells):
        missing = [cell for cell in cells if cell.stage == stage and not cell.is_finished()]
        ids = json.loads(noted.read_text()) if noted.is_file() else {}
        queue = _queued_jobs() if cluster == "slurm" else set()
        new = [cell for cell in missing if ids.get(cell.name) not in queue]
        if len(new) < len(missing):
            say(f"{stage}: {len(missing) - len(new)} run(s) are in the queue from before")
        jobs = {}
        if new:
            with submitting("--cluster"):
                jobs = dict(zip([cell.name for cell in new], executor.map_array(CellJob(root), new), strict=True))
            ids |= {name: job.job_id for name, job in jobs.items()}
            write_atomically(noted, json.dumps(ids, indent=1) + "\n")
            say(f"{stage}: {len(new)} run(s) submitted as {ids[new[0].name].split('_')[0]}")

        def at_work(missing=missing, ids=ids, jobs=jobs) -> set[str]:
            if cluster != "slurm":
                return {name for name, job in jobs.items() if not job.done()}
            queue = _queued_jobs()
            return {cell.name for cell in missing if ids[cell.name] in queue}

        try:
            failed = _wait_for(missing, at_work, say)
        except (KeyboardInterrupt, Stopped):
            if cluster == "slurm":
                numbers = sorted({ids[cell.name].split("_")[0] for cell in missing})
                say(f"the jobs run on; the same command waits for them again, `scancel {' '.join(numbers)}` ends them")
            raise
        if failed:
            raise StudyError(
                f"{len(failed)} of {len(missing)} run(s) of {stage} failed, the first {failed[0].name}; its log ends "
                f"with: {last_line_of_log(failed[0])} (see also the job's own in {folder})"
            )


def _wait_for(cells: list[Cell], at_work: Callable[[], set[str]], say: Callable[[str], None]) -> list[Cell]:
    """Waits until none of the cells is at work; returns those that are not finished then."""
    waiting, failed = list(cells), []
    while waiting:
        names = at_work()
        for cell in [cell for cell in waiting if cell.name not in names]:
            waiting.remove(cell)
            for _ in range(10):  # on a shared file system its last file may be late
                if cell.is_finished():
                    say(f"{cell.name}: finished in {format_duration(cell.seconds_taken() or 0)}")
                    break
                time.sleep(1)
            else:
                failed.append(cell)
                say(f"{cell.name}: failed: {last_line_of_log(cell)}")
        time.sleep(_SECONDS_BETWEEN_LOOKS if waiting else 0)
    return failed


def _queued_jobs() -> set[str]:
    """Returns the ids of this user's jobs that SLURM has not ended; waits while its controller does not answer."""
    while True:
        queue, problem = queued_jobs()
        if not problem:
            return queue
        print(f"squeue: {problem}; trying again", file=sys.stderr)
        time.sleep(_SECONDS_BETWEEN_LOOKS)


class CellJob:
    """Runs a cell in a job; one that is stopped before its time limit goes on from its checkpoint when requeued.

    Args:
        root: the folder to run in.
    """

    def __init__(self, root: Path):
        self.root = root

    def __call__(self, cell: Cell) -> None:
        with on_cluster():
            run_locally([replace(cell, needs=())], jobs=1, root=self.root)


def last_line_of_log(cell: Cell) -> str:
    """Returns the last line of a run's log that says something."""
    path = cell.folder / "study_cell.log"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "(no log)")


def format_duration(seconds: float) -> str:
    """Returns seconds as "3:07", "12:03:07", or from 48 hours on "2.5 days"."""
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:.1f} days"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
