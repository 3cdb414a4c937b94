"""Starts ``main`` in every process of a run: in one of torchrun's or srun's, or through Detectron2's launcher."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import multiprocessing.resource_tracker
import os
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from detectron2.engine.launch import _distributed_worker, launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from wsl_d2.engine.agreement import reason_of_loss
from wsl_d2.engine.signals import INTERRUPTED_EXIT_CODE, REQUEUE_EXIT_CODE, STOP_SIGNALS, Stopped, handle
from wsl_d2.errors import ConfigError, LostProcessError, UserError
from wsl_d2.process import end_with_parent

_OWN_ERROR = re.compile(r"^wsl_d2\.[\w.]+Error: ", re.MULTILINE)
_TORCHRUN_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
_SECONDS_BETWEEN_NOTES = 30.0  # while other processes do not come
_SECONDS_BEYOND_TIMEOUT = 10.0  # for torch to end by itself


def start(main: Callable, args: Namespace, timeout_seconds: float) -> None:
    """Calls ``main(args)`` in every process: under torchrun or srun in this one, else through Detectron2's ``launch``.

    Args:
        main: of one process.
        args: of :mod:`wsl_d2.engine.arguments`.
        timeout_seconds: the collective timeout.

    Raises:
        Stopped: a signal has ended the run.
        UserError: a process of the run has met one.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if args.num_gpus == args.num_machines == 1 and not _TORCHRUN_VARIABLES <= os.environ.keys():
        os.environ |= variables_of_srun()
    if _TORCHRUN_VARIABLES <= os.environ.keys():
        if "TORCHELASTIC_RUN_ID" in os.environ:  # save and end with torchrun, also where a signal has ended that alone
            end_with_parent(signal.SIGTERM, os.getppid())
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        with _meeting(f"the {os.environ['WORLD_SIZE']} processes of the run at {where}", timeout_seconds):
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
            # torchrun keeps the store when it restarts the processes: they must not find the addresses of before.
            store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
            comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            comm.synchronize()
        main(args)
        dist.destroy_process_group()
        return
    options = {"dist_url": args.dist_url, "args": (args,), "timeout": timeout}
    if args.num_gpus * args.num_machines == 1:
        launch(main, args.num_gpus, **options)
    elif args.num_machines == 1:
        _launch_processes(lambda: launch(main, args.num_gpus, **options))
    else:
        began, met = (torch.multiprocessing.get_context("spawn").Event() for _ in range(2))
        world_size = args.num_gpus * args.num_machines
        arguments = (
            began,
            _Met(main, met),
            world_size,
            args.num_gpus,
            args.machine_rank,
            args.dist_url,
            (args,),
            timeout,
        )
        with _meeting(f"the {args.num_machines} machines of the run at {args.dist_url}", timeout_seconds, began, met):
            _launch_processes(lambda: torch.multiprocessing.start_processes(_begin, arguments, args.num_gpus))


def _begin(local_rank: int, began, *arguments) -> None:
    """A process of Detectron2's launch, which says that its imports are over."""
    began.set()
    _distributed_worker(local_rank, *arguments)


class _Met:
    """``main`` of a process, which says first that all processes have met."""

    def __init__(self, main: Callable, met):
        self.main, self.met = main, met

    def __call__(self, args: Namespace) -> None:
        self.met.set()
        self.main(args)


def _launch_processes(start_them: Callable[[], None]) -> None:
    """Starts processes and waits for them; signals to this process are sent on to them."""
    received: list[int] = []

    def send_on(number: int, frame) -> None:
        received.append(number)
        # The terminal has sent Ctrl-C to all of them already, and another SIGINT would be a second one.
        for child in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid or 0, signal.SIGTERM if number == signal.SIGINT else number)

    # Python's process that cleans up after the others would die of a signal to the whole group.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    multiprocessing.resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    previous = handle(STOP_SIGNALS, send_on)
    try:
        start_them()
        if received:  # before training, torch's processes end with status 0 on Ctrl-C
            raise Stopped(received[0])
    except (ProcessRaisedException, ProcessExitedException) as error:  # holds the traceback of one process as text
        if found := list(_OWN_ERROR.finditer(str(error))):
            raise UserError(str(error)[found[-1].end() :]) from error
        if received:
            raise Stopped(received[0]) from None
        if getattr(error, "exit_code", None) in (REQUEUE_EXIT_CODE, INTERRUPTED_EXIT_CODE):  # signalled themselves
            raise SystemExit(error.exit_code) from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _meeting(processes: str, timeout_seconds: float, began=None, met=None) -> Iterator[None]:
    """Around the meeting of a run's processes.

    Every half a minute it says what is waited for and how long. torch's store has no time-out where a host is cut off
    while it waits for an answer: this process and its children then end by force.

    Args:
        processes: for messages.
        timeout_seconds: the collective timeout.
        began: event that begins the meeting, after a child's imports; None: it begins at once.
        met: event that ends it; None: the end of the block does.

    Raises:
        LostProcessError: not all processes came, or one was lost.
    """
    met = met or threading.Event()
    failure = f"{processes} did not all meet within {timeout_seconds:.0f} s (SOLVER.PROCESS_TIMEOUT_SECONDS)"
    help = "Start all of them, on several machines with one --num-machines and --dist-url, and see that it is reached."

    def watch() -> None:
        start = noted = time.monotonic()
        while not met.wait(min(1.0, _SECONDS_BETWEEN_NOTES)):
            now = time.monotonic()
            if began is not None and not began.is_set():
                start = now
            left = timeout_seconds - (now - start)
            if left < -0.2 * timeout_seconds - _SECONDS_BEYOND_TIMEOUT:
                print(f"wsl-d2: {failure}. {help}", file=sys.stderr, flush=True)
                for child in multiprocessing.active_children():
                    child.kill()
                os._exit(2)
            if now - noted >= _SECONDS_BETWEEN_NOTES:
                noted = now
                print(
                    f"waiting for {processes}; {max(0, left):.0f} s left (SOLVER.PROCESS_TIMEOUT_SECONDS)", flush=True
                )

    threading.Thread(target=watch, name="meeting", daemon=True).start()
    try:
        yield
    except (RuntimeError, ProcessRaisedException) as error:  # the second holds the traceback of one process as text
        is_text = isinstance(error, ProcessRaisedException)
        reason = reason_of_loss(str(error).strip().splitlines()[-1].partition("Error: ")[2] if is_text else str(error))
        if isinstance(error, UserError) or not reason:
            raise
        raise LostProcessError(f"{failure}: {reason}. {help}") from error
    finally:
        met.set()


def variables_of_srun() -> dict[str, str]:
    """Returns torchrun's variables for a task of ``srun`` with several tasks, from SLURM's; empty elsewhere.

    Raises:
        ConfigError: the tasks are not spread equally over the nodes.
    """
    number = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # of srun, not of the script of sbatch
    if number == "1":
        return {}
    layout = os.environ["SLURM_STEP_TASKS_PER_NODE"]  # such as "8(x4)"
    of_node = re.fullmatch(r"(\d+)(\(x\d+\))?", layout)
    if not of_node:
        raise ConfigError(f"srun starts {layout} tasks on its nodes; use as many on each, as with --ntasks-per-node=8.")
    names = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    first = subprocess.run(names, capture_output=True, text=True, check=True).stdout.split()[0]
    step = int(os.environ["SLURM_JOB_ID"]) + 97 * int(os.environ["SLURM_STEP_ID"])
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": number,
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": of_node[1],
        "MASTER_ADDR": first,
        "MASTER_PORT": str(20000 + step % 20000),  # steps of one node have ports of their own
    }
