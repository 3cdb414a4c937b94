"""How a process of a run finds the others, and how its error reaches the user."""

import argparse
import multiprocessing
import signal
import socket
import subprocess
import threading
import time

import pytest
import torch
from processes import in_processes
from torch.multiprocessing import ProcessRaisedException

from wsl_d2.engine import launch
from wsl_d2.engine.arguments import add_arguments
from wsl_d2.engine.launch import start
from wsl_d2.engine.main import run
from wsl_d2.errors import ConfigError, LostProcessError, UserError

ARGS = argparse.Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")


def under_torchrun(port, function):
    """Calls ``start`` with the variables of torchrun, in a process that knows no others yet."""
    import os

    import torch.distributed as dist
    from detectron2.utils import comm

    rank, size = comm.get_rank(), comm.get_world_size()
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": "1"}
    comm._LOCAL_PROCESS_GROUP = None
    comm.create_local_process_group.cache_clear()
    found = []
    start(lambda args: found.append(function(args)), ARGS, timeout_seconds=50)
    return found[0], dist.is_initialized()


def whereabouts(args):
    import torch.distributed as dist
    from detectron2.utils import comm

    return comm.get_rank(), comm.get_local_rank(), comm.get_world_size(), dist.get_backend(), comm.all_gather(args)


def test_under_torchrun_a_process_joins_the_others_and_leaves_them():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = in_processes(2, under_torchrun, port, whereabouts)
    for rank, (where, is_left) in enumerate(found):
        assert where == (rank, rank, 2, "gloo", [ARGS, ARGS]) and not is_left


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_WORLD_SIZE"])
def test_without_all_variables_of_torchrun_detectron2_launches(monkeypatch, variable):
    for name in launch._TORCHRUN_VARIABLES - {variable}:
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv(variable, raising=False)
    calls = []
    monkeypatch.setattr(launch, "launch", lambda *args, **kwargs: calls.append((args, kwargs)))
    start(print, ARGS, timeout_seconds=5)
    ((main, number), options), *more = calls
    assert (main, number, more) == (print, 2, [])
    assert options["args"] == (ARGS,) and options["timeout"].total_seconds() == 5


def test_processes_that_do_not_come_are_announced_with_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(launch, "_SECONDS_BETWEEN_NOTES", 0.01)
    with launch._meeting("the 2 machines of the run at tcp://n1:1", 1800):
        time.sleep(0.2)
    assert capsys.readouterr().out.startswith(
        "waiting for the 2 machines of the run at tcp://n1:1; 1800 s left (SOLVER.PROCESS_TIMEOUT_SECONDS)\n"
    )


def test_a_meeting_that_torch_does_not_end_is_ended_by_force_with_its_children(monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(launch, "_SECONDS_BEYOND_TIMEOUT", 0.1)
    monkeypatch.setattr(launch.os, "_exit", lambda status: (ended.set(), threading.Event().wait()))
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    with launch._meeting("the 2 machines of the run at tcp://n1:1", 0.1):
        assert ended.wait(30)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert "wsl-d2: the 2 machines of the run at tcp://n1:1 did not all meet within 0 s" in capsys.readouterr().err


def test_processes_that_do_not_meet_are_one_line(monkeypatch):
    with pytest.raises(LostProcessError, match=r"did not all meet within 9 s .*: Timed out after 9 seconds waiting"):
        with launch._meeting("the 2 machines", 9):
            text = "Traceback\ntorch.distributed.DistStoreError: Timed out after 9 seconds waiting"
            raise ProcessRaisedException(text, 0, 1)
    for error in (RuntimeError("of another kind"), ConfigError("the peer of a key")):
        with pytest.raises(type(error), match=str(error)), launch._meeting("the 2 machines", 9):
            raise error


SRUN = {
    "STEP_NUM_TASKS": "16",
    "STEP_TASKS_PER_NODE": "8(x2)",
    "PROCID": "9",
    "LOCALID": "1",
    "STEP_NODELIST": "n[1-2]",
}


def test_tasks_of_srun_are_processes_of_one_run(monkeypatch):
    names = subprocess.CompletedProcess([], 0, "n1\nn2\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: names)
    assert launch.variables_of_srun() == {}
    for name, value in (SRUN | {"JOB_ID": "41", "STEP_ID": "0"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = launch.variables_of_srun()
    assert found.keys() == launch._TORCHRUN_VARIABLES | {"MASTER_ADDR", "MASTER_PORT"}
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("9", "16", "1", "8")
    assert found["MASTER_ADDR"] == "n1"
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert launch.variables_of_srun()["MASTER_PORT"] != found["MASTER_PORT"]
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "8,4")
    with pytest.raises(ConfigError, match="srun starts 8,4 tasks on its nodes; use as many on each"):
        launch.variables_of_srun()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_found_before_processes_are_started():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    config = ["--config-file", "Hashtag-Pretraining/X_101_32x8d_17k.yaml"]
    with pytest.raises(ConfigError, match="MODEL.DEVICE is 'cuda', but no GPU can be used; add `MODEL.DEVICE cpu`"):
        run(parser.parse_args([*config, "--num-gpus", "8", "MODEL.DEVICE", "cuda"]))


TRACEBACK = """

-- Process 1 terminated with the following error:
Traceback (most recent call last):
  File "main.py", line 1, in main
    raise ConfigError("SEED is wrong")
{error}
"""


def test_a_users_mistake_in_a_process_is_its_one_line(monkeypatch):
    def fail(error):
        def launch_and_fail(*_, **__):
            raise ProcessRaisedException(TRACEBACK.format(error=error), 1, 123)

        monkeypatch.setattr(launch, "launch", launch_and_fail)
        start(print, ARGS, timeout_seconds=5)

    with pytest.raises(UserError) as caught:
        fail("wsl_d2.errors.ConfigError: SEED is wrong; set another.")
    assert str(caught.value).strip() == "SEED is wrong; set another."
    with pytest.raises(ProcessRaisedException, match="ZeroDivisionError"):
        fail("ZeroDivisionError: division by zero")
