"""The probe's protocol: splits, choice of the strength, scores."""

import logging

import numpy as np
import pytest

from wsl_d2.transfer import ProbeError, choose_l2, few_shot_rows, linear_probe, split_held_out
from wsl_d2.transfer.linear_probe import top_k_hits


def blobs(num_images, seed=0, num_classes=6, dimension=16, noise=1.0, shift=0.0):
    centres = np.random.default_rng(99).normal(size=(num_classes, dimension))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_images)
    return (centres[labels] + noise * rng.normal(size=(num_images, dimension)) + shift).astype(np.float32), labels


def test_top_k_counts_ties_as_misses():
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    labels = np.array([0, 1, 2])
    assert top_k_hits(scores, labels, 1).tolist() == [True, False, False]
    assert top_k_hits(scores, labels, 2).tolist() == [True, True, False]
    assert top_k_hits(scores, labels, 5).tolist() == [True, True, True]


def test_the_split_is_by_class_and_seeded():
    labels = np.repeat([0, 1, 2, 3], [20, 10, 2, 1])
    fitting, held_out = split_held_out(labels, 0.1, seed=0)
    assert np.array_equal(np.sort(np.concatenate([fitting, held_out])), np.arange(33))
    assert np.bincount(labels[held_out], minlength=4).tolist() == [2, 1, 1, 0]
    assert np.array_equal(held_out, split_held_out(labels, 0.1, seed=0)[1])
    assert not np.array_equal(held_out, split_held_out(labels, 0.1, seed=1)[1])
    with pytest.raises(ProbeError, match="two training images"):
        split_held_out(np.arange(5), 0.1, seed=0)


def test_few_shots_are_balanced_and_nested():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], 8))
    five, two = few_shot_rows(labels, 5, seed=3), few_shot_rows(labels, 2, seed=3)
    assert np.bincount(labels[five]).tolist() == [5, 5, 5]
    assert set(two) < set(five)
    assert set(few_shot_rows(labels, 5, seed=4)) != set(five)
    with pytest.raises(ProbeError, match="8 training images, fewer than the 9"):
        few_shot_rows(labels, 9, seed=0)


def test_the_strength_is_chosen_on_training_images_alone():
    """With the test labels shuffled the choice stays the same, and the score falls to chance."""
    train, train_labels = blobs(400, noise=3.0)
    test, test_labels = blobs(600, seed=1, noise=3.0)
    honest = linear_probe(train, train_labels, test, test_labels, 6)
    shuffled = linear_probe(train, train_labels, test, np.random.default_rng(0).permutation(test_labels), 6)
    assert honest.l2 == shuffled.l2 == choose_l2_of_standardized(train, train_labels)
    assert honest.held_out_top1 == shuffled.held_out_top1 and len(honest.held_out_top1) > 5
    assert honest.top1 > 40 and shuffled.top1 < 30


def choose_l2_of_standardized(features, labels):
    spread = np.sqrt(features.var(axis=0, dtype=np.float64).mean())
    return choose_l2(((features - features.mean(axis=0)) / spread).astype(np.float32), labels, 6)[0]


def test_scores_per_class_add_up():
    result = linear_probe(*blobs(300), *blobs(500, seed=1), 7)
    counts = np.bincount(blobs(500, seed=1)[1], minlength=7)
    assert np.isnan(result.per_class_top1[6])
    assert np.nansum(result.per_class_top1 * counts) / 500 == pytest.approx(result.top1)
    assert result.top1 == pytest.approx(100 * result.correct.mean())
    assert result.top1 <= result.top5 <= 100
    assert (result.num_train, result.num_test) == (300, 500)


def test_scale_and_shift_of_the_features_do_not_matter():
    train, train_labels = blobs(300, noise=2.0)
    test, test_labels = blobs(500, seed=1, noise=2.0)
    plain = linear_probe(train, train_labels, test, test_labels, 6, l2=1e-2)
    moved = linear_probe(40 * train + 7, train_labels, 40 * test + 7, test_labels, 6, l2=1e-2)
    assert moved.top1 == pytest.approx(plain.top1, abs=0.21)  # one image on the edge may turn by rounding


def test_an_optimum_at_the_end_of_the_grid_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        choose_l2(*blobs(200, noise=0.1), 6, grid=(1e-2, 1e-1))
    assert "widen it" in caplog.text


def test_strengths_weaker_than_a_bad_one_are_left_out():
    """A weak penalty fits the noise."""
    grid = tuple(10.0**exponent for exponent in range(3, -4, -1))
    best, accuracy = choose_l2(*blobs(3000, dimension=400, noise=9.0), 6, grid=grid)
    tried = list(accuracy)
    assert 2 < len(tried) < len(grid) and tuple(tried) == grid[: len(tried)]
    assert best != tried[-1] and accuracy[best] == max(accuracy.values()) > accuracy[tried[-1]] + 3


def test_no_images_are_refused():
    features, labels = blobs(10)
    with pytest.raises(ProbeError, match="got 10 and 0"):
        linear_probe(features, labels, features[:0], labels[:0], 6)
