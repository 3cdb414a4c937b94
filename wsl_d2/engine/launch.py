"""Starts ``main`` in every process of a run: through Detectron2's launcher, or as one process of torchrun's."""

from __future__ import annotations

import datetime
import os
import re
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessRaisedException

from wsl_d2.errors import UserError

_OWN_ERROR = re.compile(r"^wsl_d2\.[\w.]+Error: ", re.MULTILINE)
_TORCHRUN_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}


def start(main: Callable, args: Namespace, timeout_seconds: float) -> None:
    """Calls ``main(args)`` in every process: under torchrun in this one, else through Detectron2's ``launch``.

    Args:
        main: of one process.
        args: of :mod:`wsl_d2.engine.arguments`.
        timeout_seconds: the collective timeout.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if _TORCHRUN_VARIABLES <= os.environ.keys():
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps the store when it restarts the processes: they must not find the addresses of the ones before.
        store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        comm.synchronize()
        main(args)
        dist.destroy_process_group()
    else:
        try:
            launch(
                main,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
                timeout=timeout,
            )
        except ProcessRaisedException as error:  # holds the traceback of one process as text
            if found := list(_OWN_ERROR.finditer(str(error))):
                raise UserError(str(error)[found[-1].end() :]) from error
            raise
