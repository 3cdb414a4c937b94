"""The pool of processes: every part once, errors as they are, and a process that dies."""

import os

import pytest

from wsl_d2.data.runner import run_parts
from wsl_d2.errors import UserError


def scaled(factor, part):
    return factor * part


def failing(_, part):
    if part == 3:
        raise ValueError("part 3")
    return part


def dying(_, part):
    if part == 3:
        os._exit(9)
    return part


@pytest.mark.parametrize("workers", [1, 2])
def test_every_part_is_done_once(workers):
    assert sorted(run_parts(scaled, range(9), 10, workers=workers)) == [10 * part for part in range(9)]
    with pytest.raises(ValueError, match="part 3"):
        list(run_parts(failing, range(9), None, workers=workers))


def test_a_process_that_was_killed_is_one_clear_error():
    with pytest.raises(UserError, match="a process was killed.*fewer --workers"):
        list(run_parts(dying, range(9), None, workers=2))
