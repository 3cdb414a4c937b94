"""How a process of a run finds the others, and how its error reaches the user."""

import argparse
import socket

import pytest
from processes import in_processes
from torch.multiprocessing import ProcessRaisedException

from wsl_d2.engine import launch
from wsl_d2.engine.launch import start
from wsl_d2.errors import UserError

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
