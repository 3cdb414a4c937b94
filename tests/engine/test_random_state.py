"""States of random number generators, there and back through a checkpoint."""

import random

import numpy as np
import torch

from wsl_d2.engine.random_state import get_random_state, set_random_state


def draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(), torch.rand(2).tolist()


def test_draws_continue_after_the_state_went_through_a_file_that_runs_no_code(tmp_path):
    draw()  # of the two numbers that a pair of Gaussians is made of, one is left in the generators
    torch.save(get_random_state(), tmp_path / "state.pth")
    expected = [draw(), draw()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert draw() != expected[0]
    set_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert [draw(), draw()] == expected


def test_a_state_is_a_copy():
    state = get_random_state()
    first = draw()
    set_random_state(state)
    assert draw() == first
    set_random_state(state)
    assert draw() == first
