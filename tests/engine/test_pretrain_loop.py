"""One step of pretraining, on a model of one weight whose gradients are known."""

import json
import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from wsl_d2.engine.pretrain_loop import PretrainLoop, TooManyDamagedImagesError


class OneWeight(nn.Module):
    """The loss is weight * mean of the images, so that the gradient is that mean."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch):
        return {"loss_hashtag": self.weight * batch["image"].mean()}


def batch(*values, skipped=()):
    keys = [f"key{value:g}" for value in values]
    return {"image": torch.tensor(values, dtype=torch.float32), "keys": keys, "skipped": list(skipped)}


def make_loop(batches, lr=0.1, **options):
    model = OneWeight()
    options = {"log_period": 2, "max_iter": 100, "batch_size": 2} | options
    loop = PretrainLoop(model, torch.optim.SGD(model.parameters(), lr=lr), **options)
    loop.reset_data_loader(lambda: iter(batches))
    return loop


def run(loop, first, last):
    """Does the iterations from ``first`` to before ``last``; returns iteration -> metrics recorded there."""
    found: dict[int, dict] = {}
    with EventStorage(first) as storage:
        for loop.iter in range(first, last):
            loop.run_step()
            for name, (value, iteration) in storage.latest().items():
                if iteration == loop.iter:
                    found.setdefault(iteration, {})[name] = value
            storage.step()
    return found


def test_gradients_of_micro_batches_are_those_of_the_whole_batch():
    whole = make_loop([batch(1, 2, 3, 6)])
    parts = make_loop([batch(1, 2), batch(3, 6)], num_micro_batches=2)
    run(whole, 0, 1), run(parts, 0, 1)
    assert whole.model.weight.item() == parts.model.weight.item() == pytest.approx(1 - 0.1 * 3)


def test_the_recorded_loss_is_the_mean_of_its_period():
    found = run(make_loop([batch(1), batch(3), batch(5), batch(7)], lr=0.0), 0, 4)
    assert sorted(found) == [1, 3]
    assert [found[iteration]["loss_hashtag"] for iteration in (1, 3)] == [2.0, 6.0]
    assert [found[iteration]["images_seen"] for iteration in (1, 3)] == [4, 8]
    assert found[3]["skipped_images"] == found[3]["skipped_steps"] == 0


def test_the_last_iteration_is_recorded_whatever_the_period():
    assert sorted(run(make_loop([batch(1)] * 3, log_period=20, max_iter=3), 0, 3)) == [2]


def test_a_step_that_is_not_finite_leaves_the_weights_and_names_its_images(tmp_path):
    loop = make_loop([batch(1), batch(math.nan), batch(3)], output_dir=str(tmp_path), max_skipped_steps=1, max_iter=3)
    found = run(loop, 0, 3)
    assert loop.model.weight.item() == pytest.approx(1 - 0.1 * (1 + 3))
    assert found[2]["skipped_steps"] == 1
    (path,) = tmp_path.iterdir()
    assert path.name == "not_finite_0000001_rank0.json"
    content = json.loads(path.read_text())
    assert content == {"iteration": 1, "here": True, "loss": "nan", "keys": ["keynan"]}


def test_a_loss_of_skipped_steps_alone_is_nan(tmp_path):
    loop = make_loop([batch(math.inf)] * 2, output_dir=str(tmp_path), max_skipped_steps=2)
    assert math.isnan(run(loop, 0, 2)[1]["loss_hashtag"])


def test_more_of_them_than_allowed_end_the_run(tmp_path):
    loop = make_loop([batch(1), batch(math.inf), batch(math.inf)], output_dir=str(tmp_path), max_skipped_steps=1)
    with pytest.raises(
        FloatingPointError, match="the loss of iteration 2 is not finite; .* 1 steps were skipped before"
    ):
        run(loop, 0, 3)


def test_float16_overflows_lower_the_scale_and_are_not_counted_as_bad_steps(tmp_path):
    loop = make_loop([batch(1), batch(1e5), batch(1)], amp_dtype="float16", output_dir=str(tmp_path), max_iter=3)
    loop.model.weight.register_hook(lambda gradient: gradient * (math.inf if loop.iter == 1 else 1.0))
    scale = loop.grad_scaler.get_scale()
    found = run(loop, 0, 3)
    assert loop.grad_scaler.get_scale() == scale / 2
    assert loop.model.weight.item() == pytest.approx(1 - 0.1 * 2)
    assert found[2]["overflow_steps"] == 1 and found[2]["skipped_steps"] == 0 and not list(tmp_path.iterdir())


def test_a_few_damaged_images_are_counted_and_more_than_allowed_end_the_run(caplog):
    damaged = [("bad", "truncated")] * 4
    loop = make_loop([batch(1, skipped=damaged), batch(1), batch(1), batch(1)], max_damaged_fraction=0.0)
    assert run(loop, 0, 2)[1]["skipped_images"] == 4
    assert "skipped image 'bad' (truncated) at iteration 0" in caplog.text
    loop = make_loop([batch(1, skipped=damaged)] * 4, max_damaged_fraction=0.0, log_period=4)
    with pytest.raises(
        TooManyDamagedImagesError, match="16 of 8 images could not be decoded, more than DATALOADER.MAX"
    ):
        run(loop, 0, 4)
    loop = make_loop([batch(1, skipped=damaged)] * 4, max_damaged_fraction=2.0, log_period=4)
    assert run(loop, 0, 4)[3]["skipped_images"] == 16


def test_a_loop_restored_within_a_period_records_what_an_unbroken_one_does(tmp_path):
    batches = [batch(1), batch(4), batch(2), batch(7, skipped=[("bad", "empty")])]
    unbroken = make_loop(batches, log_period=4)
    expected = run(unbroken, 0, 4)
    first = make_loop(batches, log_period=4)
    run(first, 0, 3)
    first.prepare_saving()
    torch.save({"loop": first.state_dict(), "model": first.model.state_dict()}, tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    second = make_loop(batches[3:], log_period=4)
    second.model.load_state_dict(state["model"])
    second.load_state_dict(state["loop"])
    found = run(second, 3, 4)
    counted = ("loss_hashtag", "images_seen", "skipped_images", "skipped_steps")
    assert {name: found[3][name] for name in counted} == {name: expected[3][name] for name in counted}
    assert torch.equal(second.model.weight, unbroken.model.weight)


def test_speed_and_utilization_are_recorded_where_the_peak_is_known():
    found = run(make_loop([batch(1)] * 2, flops_per_image=1e6, peak_flops=1e12), 0, 2)[1]
    assert found["mfu_percent"] == pytest.approx(100 * found["images_per_second"] * 1e6 / 1e12)
    assert 0 <= found["data_wait_percent"] <= 100
    assert "mfu_percent" not in run(make_loop([batch(1)] * 2), 0, 2)[1]
