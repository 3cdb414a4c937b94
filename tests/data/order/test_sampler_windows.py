"""Order in windows of shards: whatever the sizes, modes and processes, an epoch is exactly its plan."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_data import random_index, split_index

from wsl_d2.data import HashtagSampler, image_repeat_factors
from wsl_d2.data.order.resampling import MODES, epoch_distribution, shard_totals

PLANS = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(1, 40), min_size=1, max_size=9),
        "window": st.integers(0, 10),
        "mode": st.sampled_from(MODES),
        "world_size": st.integers(1, 4),
        "streams": st.integers(1, 3),
        "share": st.integers(1, 5),
        "start": st.integers(0, 7),
        "seed": st.integers(0, 2**40),
    }
)


def make(plan, **kwargs):
    index = split_index(random_index(sum(plan["sizes"])), plan["sizes"])
    options = {
        "seed": plan["seed"],
        "mode": plan["mode"],
        "threshold": 0.3,
        "batch_size": plan["world_size"] * plan["streams"] * plan["share"],
        "window_shards": plan["window"],
        "streams": plan["streams"],
    }
    return HashtagSampler(index, **(options | kwargs))


def take(sampler, count):
    return list(itertools.islice(iter(sampler), count))


@given(PLANS)
@settings(max_examples=150, deadline=None)
def test_an_epoch_holds_every_image_as_often_as_its_factor_says(plan):
    sampler = make(plan)
    index = random_index(sum(plan["sizes"]))
    factors = image_repeat_factors(index, 0.3, plan["mode"])
    assert sampler.epoch_length == max(1, round(factors.sum()))
    draws = take(sampler, 3 * sampler.epoch_length)
    scaled = factors * sampler.epoch_length / factors.sum()
    for epoch in range(3):
        counts = np.bincount(
            draws[epoch * sampler.epoch_length : (epoch + 1) * sampler.epoch_length], minlength=len(factors)
        )
        assert (counts >= np.floor(scaled - 1e-4)).all() and (counts <= np.ceil(scaled + 1e-4)).all()


@given(PLANS)
@settings(max_examples=100, deadline=None)
def test_the_ranks_together_are_one_process_and_a_later_start_is_a_skip(plan):
    size = plan["world_size"] * plan["streams"] * plan["share"]
    whole = take(make(plan), (plan["start"] + 6) * size)
    ranks = [
        make(plan, rank=rank, world_size=plan["world_size"], start_iteration=plan["start"]).batches()
        for rank in range(plan["world_size"])
    ]
    batches = [[draw for rank in ranks for draw in next(rank)] for _ in range(6)]
    assert [image for batch in batches for image, _ in batch] == whole[plan["start"] * size :]
    assert [position for batch in batches for _, position in batch] == list(
        range(plan["start"] * size, (plan["start"] + 6) * size)
    )


def test_the_batch_does_not_change_the_order_of_one_stream():
    plan = {"sizes": [30, 1, 25, 40], "window": 2, "mode": "sqrt", "streams": 1, "seed": 3, "world_size": 1, "share": 1}
    assert take(make(plan), 300) == take(make(plan, batch_size=64), 300)


@pytest.mark.parametrize("mode", MODES)
def test_window_zero_and_one_over_all_shards_read_shard_by_shard_or_in_memory_alike(mode):
    plan = {"sizes": [30, 5, 25, 40], "mode": mode, "streams": 1, "seed": 3, "world_size": 1, "share": 1}
    whole = make(plan | {"window": 0})
    assert take(whole, 200) == take(make(plan | {"window": 4}), 200)
    one_shard = HashtagSampler(random_index(100), mode=mode, threshold=0.3, seed=3, batch_size=1)
    assert take(whole, 200) == take(one_shard, 200)


def test_a_window_mixes_its_own_shards_alone():
    plan = {"sizes": [10] * 12, "window": 3, "mode": "natural", "streams": 1, "seed": 1, "world_size": 1, "share": 1}
    draws = np.array(take(make(plan), 240)).reshape(2, 4, 30)
    windows = [[sorted(set(window // 10)) for window in epoch] for epoch in draws]
    assert all(len(window) == 3 for epoch in windows for window in epoch)
    assert sorted(sum(windows[0], [])) == list(range(12)) and windows[0] != windows[1]
    assert (np.diff(draws[0, 0]) != 1).sum() > 20


def test_each_stream_reads_shards_of_its_own():
    plan = {"sizes": [64] * 16, "window": 2, "mode": "natural", "streams": 4, "seed": 1, "world_size": 4, "share": 8}
    seen = []
    for rank in range(4):
        sampler = make(plan, rank=rank, world_size=4)
        seen.append({image // 64 for image in take(sampler, sampler.epoch_length // 4)})
    assert [len(shards) for shards in seen] == [4] * 4 and set.union(*seen) == set(range(16))


def test_two_seeds_and_two_epochs_differ():
    plan = {"sizes": [20] * 4, "window": 2, "mode": "natural", "streams": 1, "seed": 1, "world_size": 1, "share": 1}
    first, other = take(make(plan), 160), take(make(plan | {"seed": 2}), 80)
    assert first[:80] != other and first[:80] != first[80:]


def test_the_shards_to_come_are_announced_in_the_order_of_their_use():
    plan = {"sizes": [50] * 40, "window": 2, "mode": "sqrt", "streams": 1, "seed": 1, "world_size": 1, "share": 4}
    sampler, announced, used = make(plan), [], []
    sampler.on_shards = lambda shards: announced.extend(shards.tolist())
    for image in itertools.islice(iter(sampler), 900):
        assert image // 50 in announced
        used.append(image // 50)
    in_order = list(dict.fromkeys(used))
    assert list(dict.fromkeys(announced))[: len(in_order)] == in_order


@pytest.mark.parametrize("mode", MODES)
def test_totals_and_distribution_are_those_of_the_images(mode):
    index, sizes = random_index(100), [30, 5, 25, 40]
    found = epoch_distribution(split_index(index, sizes), 0.3, mode)
    factors = image_repeat_factors(index, 0.3, mode)
    np.testing.assert_allclose(found.totals / 2**20, np.add.reduceat(factors, [0, 30, 35, 60]), rtol=1e-6)
    scale = found.length / factors.sum()
    per_label = np.bincount(index.labels, weights=np.repeat(factors, np.diff(index.indptr)), minlength=12)
    np.testing.assert_allclose(found.draws, per_label * scale, rtol=1e-6)
    assert shard_totals(split_index(index, sizes), np.full(12, 1 << 20)).tolist() == [s << 20 for s in sizes]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": -1}, "SHUFFLE_WINDOW_SHARDS must not be negative, got -1"),
        ({"streams": 0}, "READ_STREAMS is 0"),
    ],
)
def test_values_out_of_range_are_named(change, message):
    plan = {"sizes": [20] * 4, "window": 2, "mode": "sqrt", "streams": 1, "seed": 1, "world_size": 1, "share": 1}
    with pytest.raises(ValueError, match=message):
        make(plan | change, batch_size=4)
