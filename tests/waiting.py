"""Waits for what other processes do."""

import time
from collections.abc import Callable


def wait_until(happens: Callable[[], object], log: Callable[[], str] = str, seconds: float = 400):
    """Returns the first true value of a function."""
    end = time.monotonic() + seconds
    while not (value := happens()):
        assert time.monotonic() < end, log()
        time.sleep(0.2)
    return value
