"""The exponential moving average of the weights."""

import torch
from torch import nn

from wsl_d2.engine.weight_average import AverageWeights


def test_the_average_is_the_closed_form():
    model = nn.Linear(2, 1, bias=False)
    average = AverageWeights(model, decay=0.8)
    history = [model.weight.detach().clone()]
    average.after_step()  # torch's average starts as a copy of the first weights it sees
    for step in range(4):
        with torch.no_grad():
            model.weight.add_(step + 1.0)
        history.append(model.weight.detach().clone())
        average.after_step()
    expected = history[0]
    for value in history[1:]:
        expected = 0.8 * expected + 0.2 * value
    torch.testing.assert_close(average.model.weight.detach(), expected)


def test_running_statistics_are_the_models_own():
    model = nn.BatchNorm1d(2)
    average = AverageWeights(model, decay=0.5)
    average.after_step()
    with torch.no_grad():
        model.running_mean.fill_(3.0), model.weight.fill_(5.0)
    average.after_step()
    average.copy_buffers()
    assert average.model.running_mean.tolist() == [3.0, 3.0]
    assert average.model.weight.tolist() == [3.0, 3.0]  # half of 1 and of 5


def test_a_restored_average_goes_on():
    models = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    averages = [AverageWeights(model, decay=0.5) for model in models]
    averages[0].after_step()
    with torch.no_grad():
        models[0].weight.fill_(8.0), models[1].weight.fill_(8.0)
    averages[1].load_state_dict(averages[0].state_dict())
    for average in averages:
        average.after_step()
    assert torch.equal(averages[0].model.weight, averages[1].model.weight)
