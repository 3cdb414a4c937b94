"""Processes and jobs: every part once, errors as they are, and a process that dies."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wsl_d2.data.runner import Cluster, run_parts
from wsl_d2.errors import UserError


def scaled(factor, part):
    return factor * part


def failing(_, part):
    if part == 3:
        raise ValueError("part 3")
    return part


def dying(_, part):
    if part == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return part


def dying_once(folder, part):
    if part == 3 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return part


def has_detectron2(_, part):
    return "detectron2" in sys.modules


@pytest.mark.parametrize("workers", [1, 2])
def test_every_part_is_done_once(workers):
    assert sorted(run_parts(scaled, range(9), 10, workers=workers)) == [10 * part for part in range(9)]
    with pytest.raises(ValueError, match="part 3"):
        list(run_parts(failing, range(9), None, workers=workers))


def test_a_part_whose_process_was_killed_is_done_again(tmp_path, caplog):
    assert sorted(run_parts(dying_once, range(9), tmp_path, workers=2)) == list(range(9))
    assert "3: the process that did this was killed" in caplog.text
    with pytest.raises(UserError, match="^3: .* was killed 3 times.*repeat the command"):
        list(run_parts(dying, range(9), None, workers=2))


@pytest.mark.slow
def test_jobs_do_the_same(tmp_path, caplog):
    cluster = Cluster(2, tmp_path / "jobs", "local", {"timeout_min": 5})
    assert sorted(run_parts(dying_once, [1, 3], tmp_path, workers=cluster)) == [1, 3]
    assert re.search("^3: the process that did this was killed.*log.err", caplog.messages[0])
    assert not cluster.folder.exists()
    assert list(run_parts(has_detectron2, [0], None, workers=cluster)) == [False]
    with pytest.raises(ValueError, match="part 3"):
        list(run_parts(failing, [3], None, workers=cluster))


def test_what_the_cluster_refuses_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nonsense"):
        list(run_parts(scaled, range(9), 10, workers=Cluster(2, tmp_path / "jobs", "local", {"nonsense": 1})))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_while_processes_import_ends_all_of_them(tmp_path, number):
    from waiting import wait_until  # not at the top: jobs that import this module do not have the tests' folder

    (tmp_path / "posts.csv").write_text("key,hashtags\n" + "".join(f"p{i},#dog{i}\n" for i in range(300_000)))
    command = [sys.executable, "-m", "wsl_d2", "hashtags", "count", "posts.csv", "--output", "counts", "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    while run.poll() is None and b"spawn_main" not in b"".join(
        Path(f"/proc/{child}/cmdline").read_bytes() for child in children.read_text().split()
    ):
        time.sleep(0.05)
    started = children.read_text().split()
    os.killpg(run.pid, number) if number == signal.SIGINT else run.kill()
    errors = run.communicate()[1].decode()  # once no process has the pipe
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in started))
    if number == signal.SIGINT:  # one line
        assert run.returncode == 130 and "Traceback" not in errors and "stopped;" in errors.splitlines()[-1]
