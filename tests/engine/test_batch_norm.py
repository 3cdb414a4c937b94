"""Ghost batch norm: running statistics by their closed form, for any number of ghost batches and processes."""

import pytest
import torch
from processes import in_processes
from torch import nn

from wsl_d2.engine.batch_norm import GhostBatchStatistics, average_over_processes, running_statistics

MOMENTUM = 0.1


def make_norm():
    norm = nn.BatchNorm2d(3, momentum=MOMENTUM)
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    return norm.train()


def batches(number):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, 4, 3, 5, 5, generator=generator, dtype=torch.float32) * 3 + 1


def closed_form(images, mean, variance):
    """The running statistics after a step on (G, N, C, H, W) images: G ghost batches of N."""
    means = images.mean(dim=(1, 3, 4))
    variances = images.transpose(1, 2).flatten(2).var(dim=2)  # unbiased, as torch keeps it
    mean = (1 - MOMENTUM) * mean + MOMENTUM * means.mean(0)
    return mean, (1 - MOMENTUM) * variance + MOMENTUM * variances.mean(0)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_running_statistics_are_the_mean_over_ghost_batches(number):
    norm = make_norm()
    ghost_batches = GhostBatchStatistics(norm, number)
    expected = norm.running_mean.clone(), norm.running_var.clone()
    for step in range(3):
        images = batches(number) + step
        ghost_batches.before_step()
        for place, batch in enumerate(images):
            norm(batch)
            ghost_batches.after_batch(place)
        expected = closed_form(images, *expected)
        torch.testing.assert_close(norm.running_mean, expected[0])
        torch.testing.assert_close(norm.running_var, expected[1])
        assert norm.num_batches_tracked == step + 1


def test_norms_in_evaluation_mode_are_left_alone():
    model = nn.Sequential(make_norm(), make_norm().eval())
    assert [statistic.data_ptr() for statistic in running_statistics(model)] == [
        model[0].running_mean.data_ptr(),
        model[0].running_var.data_ptr(),
    ]


def average():
    from detectron2.utils import comm

    norm = make_norm()
    norm(batches(2)[comm.get_rank()])
    average_over_processes(running_statistics(norm))
    return norm.running_mean, norm.running_var


def test_processes_hold_the_statistics_of_one_that_computes_all():
    one = make_norm()
    ghost_batches = GhostBatchStatistics(one, 2)
    ghost_batches.before_step()
    for place, batch in enumerate(batches(2)):
        one(batch)
        ghost_batches.after_batch(place)
    for mean, variance in in_processes(2, average):
        torch.testing.assert_close(mean, one.running_mean)
        torch.testing.assert_close(variance, one.running_var)
