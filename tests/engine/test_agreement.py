"""Flags that all processes agree on, and the names of processes that are lost."""

import socket
import threading
import types

import pytest
import torch
from processes import in_processes

from wsl_d2.engine import agreement
from wsl_d2.engine.agreement import Agreement, Heartbeat
from wsl_d2.errors import LostProcessError


def agree(signals, failed_saves, flags):
    """In each process: its own signal, failed saves and flags; returns what was agreed on."""
    from detectron2.utils import comm

    rank = comm.get_rank()
    own = Agreement("cpu")
    own.signal, own.failed_saves = signals[rank], failed_saves[rank]
    agreed = own.exchange([torch.tensor(flag) for flag in flags[rank]])
    return own.agreed_signal, own.agreed_failed_saves, agreed


def test_a_lone_process_agrees_with_itself():
    assert agree([15], [2], [[True, False]]) == (15, 2, [True, False])
    assert agree([0], [0], [[]]) == (0, 0, [])


def test_processes_agree_on_the_largest():
    flags = [[True, False, False], [False, False, True]]
    assert in_processes(2, agree, [0, 10], [3, 1], flags) == [(10, 3, [True, False, True])] * 2


def test_what_was_agreed_stays_until_the_next_exchange():
    own = Agreement("cpu")
    own.signal = 15
    assert own.agreed_signal == 0
    own.exchange()
    own.signal = 0
    assert own.agreed_signal == 15
    own.exchange()
    assert own.agreed_signal == 0


def lose_contact():
    """Rank 1 waits for data at iteration 3, rank 0 computes iteration 4."""
    import torch.distributed as dist
    from detectron2.utils import comm

    heartbeat = Heartbeat()
    heartbeat.note(4 - comm.get_rank(), ["computing", "waiting for data"][comm.get_rank()])
    dist.barrier()
    with pytest.raises(LostProcessError) as lost, heartbeat.name_lost_processes():
        raise RuntimeError("[/gloo/pair.cc:78] Connection closed by peer [127.0.0.1]\nmore lines")
    with pytest.raises(RuntimeError, match="of another kind"), heartbeat.name_lost_processes():
        raise RuntimeError("of another kind")
    return str(lost.value)


def test_processes_that_are_behind_are_named_first():
    lost = in_processes(2, lose_contact)
    for rank in range(2):
        assert lost[rank].startswith(
            f"rank {rank} lost contact with other processes at iteration {4 - rank} (Connection closed by peer"
        )
        host = socket.gethostname()
        states = f"rank 1: iteration 3, waiting for data on {host}, rank 0: iteration 4, computing on {host}."
        assert f"Last known state: {states}" in lost[rank]
        assert "more lines" not in lost[rank] and "--resume" in lost[rank]


def lose_the_last():
    """Rank 2 has lost nothing: it does not answer. Returns what the others say, and whether they were ended."""
    import torch.distributed as dist
    from detectron2.utils import comm

    ended = threading.Event()
    agreement._SECONDS_TO_ANSWER, agreement._SECONDS_TO_END = 1.0, 0.1
    agreement.os = types.SimpleNamespace(_exit=lambda status: ended.set())
    heartbeat = Heartbeat()
    heartbeat.note(7, "computing")
    dist.barrier()
    if comm.get_rank() == 2:
        return ""
    with pytest.raises(LostProcessError) as lost, heartbeat.name_lost_processes():
        raise RuntimeError("Timed out waiting 1000ms for recv operation to complete")
    assert ended.wait(30)
    return str(lost.value)


def test_the_lost_process_alone_is_named_and_the_others_end_whatever_they_wait_for():
    for text in in_processes(3, lose_the_last)[:2]:
        assert "lost contact with rank 2 at iteration 7" in text
        assert "Last known state: rank 2: iteration 7, computing on " in text and "rank 1:" not in text


class SilentStore:
    """The store of a host that is cut off."""

    host = "node0"

    def set(self, key, value):
        threading.Event().wait()


def test_a_store_that_does_not_answer_is_the_lost_one(monkeypatch):
    monkeypatch.setattr(agreement, "_SECONDS_TO_ANSWER", -1.9)  # 0.1 s in all
    heartbeat = Heartbeat()
    heartbeat._store = SilentStore()
    assert heartbeat.find_lost() == ("rank 0 (node0)", "unknown, as it is kept there")


def test_errors_of_a_lone_process_are_its_own():
    with pytest.raises(RuntimeError, match="Connection closed"), Heartbeat().name_lost_processes():
        raise RuntimeError("Connection closed by peer")


def test_a_process_that_hangs_is_ended_and_one_that_pauses_is_not(monkeypatch, caplog):
    heartbeat = Heartbeat(timeout_seconds=1.0)
    exits: list[int] = []
    ended = threading.Event()

    def end(code):
        exits.append(code)
        heartbeat._limit = 1e9
        ended.set()

    monkeypatch.setattr(agreement.os, "_exit", end)
    monkeypatch.setattr(agreement.faulthandler, "dump_traceback", lambda **_: None)
    assert heartbeat._limit > 1.0
    heartbeat._limit = 0.05
    heartbeat.note(6, "computing")
    heartbeat.pause()
    assert not ended.wait(0.3)
    heartbeat.note(7, "waiting for data")
    assert ended.wait(30) and exits == [1]
    assert "rank 0 hangs: waiting for data at iteration 7" in caplog.text


def test_without_a_timeout_nothing_watches():
    heartbeat = Heartbeat(timeout_seconds=0)
    heartbeat.note(1, "computing")
    assert heartbeat._watcher is None
