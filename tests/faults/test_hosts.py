"""Two hosts in network namespaces: the link between them cut or bad, one of them killed and started again."""

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from network import Hosts
from training_runs import Run, assert_same_state, descendants, losses, train_together, wait_for_records

pytestmark = [pytest.mark.fault, pytest.mark.hosts]

TIMEOUT = 8
ENDLESS = {"SOLVER__TOTAL_IMAGES": 800_000, "SOLVER__CHECKPOINT_PERIOD": 5, "TEST__EVAL_PERIOD": 15}


@pytest.fixture()
def hosts():
    try:
        found = Hosts()
    except OSError as error:
        pytest.skip(f"needs network namespaces: {error}")
    yield found
    found.remove()


@pytest.fixture(scope="module")
def whole_run_of_two(datasets, tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    train_together(datasets, output, 2)
    return output


def start(datasets, output, hosts, flags=(), script="", **options) -> list[Run]:
    """Starts a run on both hosts; the second one injects the fault of ``script``."""
    runs = []
    for host in (0, 1):
        arguments = hosts.run(host, script if host else "")
        arguments["flags"] = [*flags, *arguments["flags"]]
        options.setdefault("SOLVER__PROCESS_TIMEOUT_SECONDS", TIMEOUT)
        runs.append(Run(datasets, output, **arguments, **options))
    return runs


def kill(run: Run) -> None:
    for pid in [run.pid, *descendants(run.pid)]:
        os.kill(pid, signal.SIGKILL)


def cut_at(moment: float, datasets, output) -> tuple[list[str], float]:
    """Cuts the link so many seconds after the first record, or, if negative, after the start of the run.

    Returns:
        The last line that each host has printed to stderr, and the seconds until both had ended.
    """
    hosts = Hosts()
    runs = start(datasets, output, hosts, **ENDLESS)
    try:
        if moment >= 0:
            wait_for_records(runs[0], output, 1)
        time.sleep(abs(moment))
        hosts.cut()
        cut = time.monotonic()
        for run in runs:
            assert run.wait(timeout=TIMEOUT + 60) == 2, run.output[-3000:]
        return [run.stderr.strip().splitlines()[-1] for run in runs], time.monotonic() - cut
    finally:
        for run in runs:
            if run.returncode is None:
                kill(run)
        hosts.remove()


@pytest.mark.parametrize("number", [2, pytest.param(20, marks=pytest.mark.long)])
def test_a_cut_link_ends_both_hosts_and_each_names_the_other(datasets, tmp_path, hosts, number, survived):
    rng = random.Random(number)
    moments = [rng.uniform(-2, 5) for _ in range(number - 2)] + [-0.3, 1.0]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(cut_at, moment, datasets, tmp_path / str(i)) for i, moment in enumerate(moments)]
        ends = [job.result() for job in jobs]
    for lines, _ in ends:
        if "did not all meet" not in "".join(lines):
            assert "rank 0 lost contact with rank 1 " in lines[0], lines
            assert "rank 1 lost contact with rank 0 (10.77.0.1) " in lines[1], lines
    seconds = [seconds for _, seconds in ends]
    survived(
        35,
        f"the link between two hosts cut at random moments, time-out {TIMEOUT} s",
        number,
        f"{number} of {number}: both end, each in one line that names the other (before they have met: the address), "
        f"after {max(seconds):.0f} s at most",
    )


def test_a_killed_host_ends_the_other_and_both_start_again(datasets, whole_run_of_two, tmp_path, hosts, survived):
    runs = start(datasets, tmp_path, hosts, script="before_step(lambda loop: time.sleep(0.2))")
    wait_for_records(runs[0], tmp_path, 9)
    kill(runs[1])
    killed = time.monotonic()
    assert runs[0].wait(timeout=60) == 2
    seconds = time.monotonic() - killed
    assert "rank 0 lost contact with rank 1 at iteration" in runs[0].stderr
    resumed = start(datasets, tmp_path, hosts, flags=["--resume"])
    assert [run.wait() for run in resumed] == [0, 0], resumed[0].output[-3000:]
    assert "Starting training from iteration 7" in resumed[0].output
    assert losses(tmp_path) == losses(whole_run_of_two)
    assert_same_state(tmp_path, whole_run_of_two)
    survived(36, "one of two hosts killed and started again", 1, f"the other ends after {seconds:.0f} s; bit-identical")


def test_lost_packets_and_a_wrong_clock_change_nothing(datasets, whole_run_of_two, tmp_path, hosts, survived):
    try:
        hosts.lose_packets(5)
    except OSError as error:
        pytest.skip(f"needs nftables: {error}")
    ahead = "clock = time.time\ntime.time = lambda: clock() + 86400"
    for run in start(datasets, tmp_path, hosts, script=ahead, SOLVER__PROCESS_TIMEOUT_SECONDS=60):
        assert run.wait() == 0, run.output[-3000:]
    assert hosts.count_lost_packets() > 10
    assert losses(tmp_path) == losses(whole_run_of_two)
    assert_same_state(tmp_path, whole_run_of_two)
    survived(37, "5% of packets lost, the clock of one of two hosts a day ahead", 1, "bit-identical")
