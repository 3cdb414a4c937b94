"""Rows 15 and 16 of the fault matrix: numbers that are not finite."""

import json

import pytest
import torch
from training_runs import INJECT, losses, merged_records, start_processes, train, weights

pytestmark = pytest.mark.fault

# The last process multiplies its loss by {factor} in some iterations, so that its gradients are not finite.
SCRIPT = (
    INJECT
    + """
backward = torch.Tensor.backward

def spoil(loop):
    bad = loop.iter in {iterations} and comm.get_rank() == comm.get_world_size() - 1
    torch.Tensor.backward = (lambda loss, *a, **k: backward(loss * {factor}, *a, **k)) if bad else backward

before_step(spoil)
run_command_line()
"""
)


def script(iterations, factor="float('nan')") -> str:
    return SCRIPT.replace("{iterations}", repr(iterations)).replace("{factor}", factor)


@pytest.mark.parametrize("processes, log_period", [(1, 1), (2, 1), (2, 20)])
def test_a_bad_number_on_one_process_stops_all_before_the_weights_change(
    datasets, tmp_path, processes, log_period, survived
):
    out = tmp_path / "out"
    for run in start_processes(datasets, out, processes, script=script([9]), SOLVER__LOG_PERIOD=log_period):
        assert run.wait() == 2
        assert "the gradient of iteration 9 is not finite" in run.stderr
    saved = [json.loads(file.read_text()) for file in sorted(out.glob("not_finite_*.json"))]
    assert len(saved) == processes and all(entry["iteration"] == 9 for entry in saved)
    assert all(len(entry["keys"]) == 8 // processes for entry in saved)
    if log_period == 1:
        assert sorted(losses(out)) == list(range(9))
    assert (out / "last_checkpoint").read_text() == "model_0000006.pth"
    state = torch.load(out / "model_0000006.pth", weights_only=True)["model"]
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    survived(15, "NaN in the gradient of one process", 1, "all processes stop in that step, keys of its images saved")


def test_a_few_bad_steps_are_skipped_and_counted_if_allowed(datasets, tmp_path, survived):
    out = tmp_path / "out"
    train(datasets, out, script=script([3, 8]), SOLVER__MAX_SKIPPED_STEPS=2)
    assert merged_records(out)["skipped_steps"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in weights(out).values())
    assert len(list(out.glob("not_finite_*.json"))) == 2
    survived(15, "", 2, "or, if allowed, skip it and count it")


def test_float16_overflows_in_a_row_stop_the_run(datasets, tmp_path, survived):
    options = {"SOLVER__AMP__ENABLED": True, "SOLVER__AMP__DTYPE": "float16", "SOLVER__TOTAL_IMAGES": 400}
    storm = script(list(range(5, 35)), "float('inf')")
    run = train(datasets, tmp_path / "storm", check=False, script=storm, **options)
    assert run.returncode == 2
    assert "the float16 gradients overflowed in 21 steps in a row, up to iteration 25" in run.stderr
    train(datasets, tmp_path / "few", script=script([5, 6, 7, 20], "float('inf')"), **options)
    last = merged_records(tmp_path / "few")
    assert last["overflow_steps"] == 4 and last["skipped_steps"] == 0
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "few").values())
    survived(16, "30 float16 overflows in a row", 1, "stopped after 20; single ones are skipped and counted")
