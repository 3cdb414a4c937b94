"""Runs a function in several processes that can communicate, as those of a run do."""

import datetime
import multiprocessing
import pickle
import tempfile
import traceback
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from detectron2.utils import comm

_FORK = multiprocessing.get_context("fork")


def in_processes(number: int, function, *arguments) -> list:
    """Returns what ``function(*arguments)`` returns in each of so many processes, in the order of their ranks.

    The processes are forks of this one, so that the function may be a closure; what it returns is pickled by value.
    """
    pipes = [_FORK.Pipe(duplex=False) for _ in range(number)]
    with tempfile.TemporaryDirectory() as folder:
        url = f"file://{folder}/store"
        processes = [
            _FORK.Process(target=_work, args=(url, rank, number, pipes[rank][1], function, arguments))
            for rank in range(number)
        ]
        for process in processes:
            process.start()
        try:
            for rank, process in enumerate(processes):
                pipes[rank][1].close()  # so that the death of the process ends the wait
                assert pipes[rank][0].poll(120), f"rank {rank} does not answer"
                process.outcome = pickle.loads(pipes[rank][0].recv_bytes())
        finally:
            for process in processes:
                process.kill()
                process.join()
    for rank, process in enumerate(processes):
        is_done, value = process.outcome
        assert is_done, f"rank {rank}:\n{value}"
    return [process.outcome[1] for process in processes]


def _work(url: str, rank: int, number: int, pipe: Connection, function, arguments) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=number, timeout=timeout)
    comm.create_local_process_group(number)
    try:
        outcome = True, function(*arguments)
    except BaseException:
        outcome = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(outcome))
    pipe.close()
    if dist.is_initialized():
        dist.barrier()  # rank 0 keeps the store
