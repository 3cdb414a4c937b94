import itertools

import numpy as np
import pytest
from detectron2.data.samplers import RepeatFactorTrainingSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_data import random_index

from wsl_d2.data import HashtagSampler, image_repeat_factors, repeat_factors
from wsl_d2.data.order.sampler import PositionSampler, keyed_permutation


@pytest.mark.parametrize("mode, sqrt", [("sqrt", True), ("uniform", False)])
def test_repeat_factors_equal_detectron2s(mode, sqrt):
    index = random_index()
    dicts = [
        {"annotations": [{"category_id": int(label)} for label in index.labels[a:b]]}
        for a, b in itertools.pairwise(index.indptr)
    ]
    expected = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, 0.3, sqrt=sqrt)
    ours = image_repeat_factors(index, 0.3, mode)
    assert ours.max() > 1.5
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


def test_repeat_factors_by_hand():
    frequency = np.array([0.5, 0.04, 0.01, 0.0])
    np.testing.assert_allclose(repeat_factors(frequency, 0.04, "sqrt"), [1, 1, 2, 1])
    np.testing.assert_allclose(repeat_factors(frequency, 0.04, "uniform"), [1, 1, 4, 1])
    np.testing.assert_allclose(repeat_factors(frequency, 0.04, "natural"), [1, 1, 1, 1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([0.5], 0.1, "cubic"), "'cubic' is unknown; choose one of natural, sqrt, uniform"),
        (([1.5], 0.1, "sqrt"), r"fractions in \[0, 1\]"),
        (([0.5], 0.0, "sqrt"), "THRESHOLD is a fraction"),
    ],
)
def test_repeat_factor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        repeat_factors(np.array(arguments[0]), *arguments[1:])


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_keyed_permutation_is_a_bijection(size, seed, epoch):
    permuted = keyed_permutation(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(permuted), np.arange(size))


def test_keyed_permutation_depends_on_its_key():
    orders = {tuple(keyed_permutation(np.arange(50), 50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(["natural", "sqrt", "uniform"]),
    st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_ranks_together_are_the_plan_whatever_their_number(world_size, share, mode, start):
    index = random_index(90)
    common = {"seed": 5, "mode": mode, "threshold": 0.2, "batch_size": world_size * share}
    single = HashtagSampler(index, **common)
    ranks = [
        HashtagSampler(index, **common, rank=rank, world_size=world_size, start_iteration=start)
        for rank in range(world_size)
    ]
    plan = list(itertools.islice(iter(single), (start + 3) * world_size * share))
    streams = [iter(rank) for rank in ranks]
    union = [next(stream) for _ in range(3) for stream in streams for _ in range(share)]
    assert union == plan[start * world_size * share :]


def test_every_image_comes_once_in_each_natural_epoch():
    sampler = HashtagSampler(random_index(101), seed=1, mode="natural", batch_size=1)
    draws = list(itertools.islice(iter(sampler), 303))
    for epoch in range(3):
        assert sorted(draws[epoch * 101 : (epoch + 1) * 101]) == list(range(101))
    assert draws[:101] != draws[101:202]


def test_images_come_as_often_as_their_repeat_factors_say():
    index = random_index(150)
    factors = image_repeat_factors(index, 0.4, "uniform")
    sampler = HashtagSampler(index, seed=2, mode="uniform", threshold=0.4, batch_size=10)
    epochs = 40
    counts = np.zeros((epochs, 150), int)
    stream = iter(sampler)
    for epoch in range(epochs):
        np.add.at(counts[epoch], list(itertools.islice(stream, sampler.epoch_length)), 1)
    assert np.all(counts >= np.floor(factors) - 1) and np.all(counts <= np.ceil(factors) + 1)
    np.testing.assert_allclose(counts.mean(0), factors * sampler.epoch_length / factors.sum(), atol=0.35)
    assert abs(counts.mean() - factors.mean()) < 0.01


def test_two_seeds_differ():
    index = random_index(60)
    a, b = (list(itertools.islice(iter(HashtagSampler(index, seed=s, batch_size=4)), 60)) for s in (0, 1))
    assert a != b


def test_sampler_errors():
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 10, which 4 processes cannot share"):
        PositionSampler(np.ones(5), seed=0, batch_size=10, world_size=4)
    with pytest.raises(ValueError, match="seed must be non-negative"):
        PositionSampler(np.ones(5), seed=-1, batch_size=1)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        PositionSampler(np.ones(5), seed=0, batch_size=2, rank=2, world_size=2)
