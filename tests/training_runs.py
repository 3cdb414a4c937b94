"""Runs of tools/train_net.py on a toy dataset, each in its own process; and what they leave behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from forks import fork, new_log, read_log

ROOT = Path(__file__).parents[1]
OPTS = {
    "DATASETS.HASHTAG_FOLDERS": "[['toy_train', 'toy/train'], ['toy_val', 'toy/val']]",
    "DATASETS.TRAIN": "('toy_train',)",
    "DATASETS.TEST": "('toy_val',)",
    "INPUT.RANDOM_RESIZED_CROP.SIZE": "32",
    "SOLVER.IMS_PER_BATCH": "8",
    "SOLVER.LR_PER_256_IMAGES": "0.4",
    "SOLVER.TOTAL_IMAGES": "240",
    "SOLVER.WARMUP_IMAGES": "40",
    "SOLVER.LOG_PERIOD": "1",
    "SOLVER.CHECKPOINT_PERIOD": "7",
}


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def solver_config(**solver):
    """The default config with keys of SOLVER."""
    from detectron2.config import get_cfg

    from wsl_d2 import add_wsl_config

    cfg = get_cfg()
    add_wsl_config(cfg)
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


def command(output: Path, launcher=(), flags=(), **opts) -> list[str]:
    config = ROOT / "configs" / "Base-Miniworld-Pretraining.yaml"
    merged = OPTS | {key.replace("__", "."): str(value) for key, value in opts.items()} | {"OUTPUT_DIR": str(output)}
    pairs = [text for pair in merged.items() for text in pair]
    return [*launcher, str(ROOT / "tools" / "train_net.py"), "--config-file", str(config), *flags, *pairs]


# Begins a script that is run in place of tools/train_net.py.
_RUN = """
import sys
import wsl_d2
from wsl_d2.cli.main import main

def run_command_line():
    sys.exit(main(["train", *sys.argv[1:]]))

"""


class Run:
    """A run of tools/train_net.py in a process of its own: forked, or started by ``launcher``.

    Args:
        script: in place of tools/train_net.py, to inject a fault.
        environ: added to the environment, such as torchrun's variables.
        namespace: of the network, for a forked run; see network.py.
        own_group: with ``launcher``: it leads a group of processes, to which signals can be sent.
        kwargs: of :func:`command`.
    """

    def __init__(
        self, datasets, output, *, script="", launcher=None, environ=None, namespace="", own_group=False, **kwargs
    ):
        self.log = new_log()
        everything = environment(datasets) | (environ or {})
        arguments = command(output, launcher=launcher or (), **kwargs)
        if launcher:
            if script:
                path = Path(f"{self.log}.py")
                path.write_text(script)
                arguments[arguments.index(str(ROOT / "tools" / "train_net.py"))] = str(path)
            with open(f"{self.log}.stdout", "w") as out, open(f"{self.log}.stderr", "w") as err:
                self.process = subprocess.Popen(
                    arguments, env=everything, stdout=out, stderr=err, start_new_session=own_group
                )
        else:
            script = script or f"{_RUN}run_command_line()"
            self.process = fork(script, arguments, everything, self.log, namespace=namespace)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def wait(self, timeout: float = 240) -> int:
        if isinstance(self.process, subprocess.Popen):
            return self.process.wait(timeout)
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()  # else the tests' own process would wait for it at its end
            raise TimeoutError(f"the run still goes on after {timeout} s:\n{self.output[-3000:]}")
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        return read_log(self.log, "stdout")

    @property
    def stderr(self) -> str:
        return read_log(self.log, "stderr")

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def train(datasets, output, check=True, **kwargs) -> Run:
    run = Run(datasets, output, **kwargs)
    try:
        run.wait()
    except BaseException:
        run.send_signal(signal.SIGKILL)
        raise
    if check:
        assert run.returncode == 0, run.output[-5000:]
    return run


def start_processes(datasets, output, number: int, **kwargs) -> list[Run]:
    """Starts the processes of one run as torchrun would, without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Run(
            datasets,
            output,
            environ={name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            **kwargs,
        )
        for rank in range(number)
    ]


def train_together(datasets, output, number: int, **kwargs) -> list[Run]:
    """Runs so many processes to their end."""
    runs = start_processes(datasets, output, number, **kwargs)
    for run in runs:
        assert run.wait() == 0, "".join(run.output[-3000:] for run in runs)
    return runs


def environment(datasets) -> dict:
    return os.environ | {"DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"}


# Begins a script that injects a fault: ``before_step(function)`` has it called with the loop before each step.
INJECT = f"""
{_RUN}
import os, signal, time
import torch
from detectron2.utils import comm
from wsl_d2.engine import pretrain_loop
from wsl_d2.engine.pretrain_loop import PretrainLoop

def before_step(function, step=PretrainLoop.run_step):
    def run_step(self):
        function(self)
        step(self)
    PretrainLoop.run_step = run_step
"""


def dies_at(iteration: int) -> str:
    """A script of a run whose processes are all killed before that step."""
    return f"""{INJECT}
before_step(lambda loop: os.kill(os.getpid(), signal.SIGKILL) if loop.iter == {iteration} else None)
run_command_line()
"""


# Begins a script whose last process waits at iteration 12 for a signal: one that is sent to it never comes too late.
WAITS_FOR_SIGNAL = f"""{INJECT}
def wait(loop):
    waits = loop.iter == 12 and comm.get_rank() == comm.get_world_size() - 1
    while waits and not loop.agreement.signal:
        time.sleep(0.001)

before_step(wait)
"""


def losses(output: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {record["iteration"]: record["loss_hashtag"] for record in records if "loss_hashtag" in record}


def merged_records(output: Path) -> dict:
    """The last value of every metric."""
    merged = {}
    for line in (output / "metrics.json").read_text().splitlines():
        merged |= json.loads(line)
    return merged


def weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


def assert_same_state(ours: Path, theirs: Path) -> None:
    """Requires two finished runs to be equal bit by bit: weights, optimizer, averages, random states, everything."""
    one, two = (torch.load(output / "model_final.pth", weights_only=True) for output in (ours, theirs))
    differences = list(_differences(one, two, ""))
    assert not differences, differences


def _differences(one, two, name):
    if isinstance(one, torch.Tensor):
        if not torch.equal(one, two):
            yield name
    elif isinstance(one, dict) or isinstance(one, list | tuple):
        items = [obj if isinstance(obj, dict) else dict(enumerate(obj)) for obj in (one, two)]
        if items[0].keys() != items[1].keys():
            yield name
        for key in items[0].keys() & items[1].keys():
            yield from _differences(items[0][key], items[1][key], f"{name}.{key}")
    elif one != two:
        yield name


def wait_for_records(run: Run, output: Path, number: int) -> None:
    metrics = output / "metrics.json"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= number):
        assert run.returncode is None and time.monotonic() < deadline, run.output[-3000:]
        time.sleep(0.002)


def survives(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, or keeps it pending."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = [int(re.search(rf"{name}:\s*(\w+)", status)[1], 16) for name in ("SigCgt", "SigBlk")]
    return any(mask & 1 << (number - 1) for mask in masks)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [number for child in map(int, children) for number in (child, *descendants(child))]
