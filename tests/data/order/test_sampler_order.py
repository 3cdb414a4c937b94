"""How evenly the keyed permutation spreads: bucket counts at a billion positions' scale, and every order of few."""

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from wsl_d2.data.order.sampler import keyed_permutation


@pytest.mark.parametrize("size", [1_000_003, 3_500_000_000])
def test_consecutive_positions_fall_evenly_and_independently_into_buckets(size):
    start = size // 3
    permuted = keyed_permutation(np.arange(start, start + 200_000), size, seed=3, epoch=1)
    assert len(np.unique(permuted)) == 200_000
    buckets = permuted * 32 // size
    pairs = np.bincount(buckets[:-1] * 32 + buckets[1:], minlength=1024)
    assert chisquare(pairs).pvalue > 1e-4


@pytest.mark.parametrize("size, orders", [(1, 1), (2, 2), (3, 6)])
def test_every_order_of_a_tiny_set_comes_about_equally_often(size, orders):
    counts = Counter(tuple(keyed_permutation(np.arange(size), size, 0, epoch)) for epoch in range(600))
    assert len(counts) == orders
    assert min(counts.values()) > 0.5 * 600 / orders
