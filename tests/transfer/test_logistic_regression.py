"""The fitted optimum against scikit-learn's and against the conditions that define it."""

import numpy as np
import pytest
from benchmarks import probe
from benchmarks.probe import objective
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression as SklearnLogisticRegression

from wsl_d2.transfer import CenteredFeatures, fit_logistic_regression
from wsl_d2.transfer import logistic_regression as module


def network_like_features(num_images=1500, dimension=64, num_classes=10, seed=0):
    return probe.network_like_features(np.random.default_rng(seed), num_images, dimension, num_classes)


def digits():
    data = load_digits()
    return (data.data / 16).astype(np.float32), data.target


@pytest.mark.parametrize("single_precision", [False, True])
@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("make", [network_like_features, digits])
def test_equals_scikit_learn(make, l2, single_precision, monkeypatch):
    if single_precision:
        monkeypatch.setattr(module, "_FLOAT64_BELOW", 0)
    features, labels = make()
    fit = slice(0, 1000)
    ours = fit_logistic_regression(features[fit], labels[fit], 10, l2)
    theirs = SklearnLogisticRegression(C=1 / (l2 * 1000), tol=1e-9, max_iter=20000)
    theirs.fit(features[fit].astype(np.float64), labels[fit])
    expected = objective(theirs.coef_, theirs.intercept_, features[fit], labels[fit], l2)
    found = objective(ours.weight, ours.bias, features[fit], labels[fit], l2)
    assert found == pytest.approx(expected, rel=1e-5)
    assert ours.objective == pytest.approx(found, rel=1e-5)
    accuracy = (ours.scores(features[1000:]).argmax(axis=1) == labels[1000:]).mean()
    assert accuracy == pytest.approx(theirs.score(features[1000:].astype(np.float64), labels[1000:]), abs=1e-4)


def test_the_gradient_vanishes_at_the_solution():
    features, labels = network_like_features()
    fitted = fit_logistic_regression(features, labels, 10, 1e-3)
    logits = features.astype(np.float64) @ fitted.weight.T + fitted.bias
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    residual = probabilities - np.eye(10)[labels]
    gradient = residual.T @ features / len(labels) + 1e-3 * fitted.weight
    assert np.abs(gradient).max() < 1e-5
    assert np.abs(residual.mean(axis=0)).max() < 1e-5


def test_neither_the_start_nor_the_chunks_matter(monkeypatch):
    features, labels = network_like_features()
    centered = CenteredFeatures(features)
    alone = fit_logistic_regression(centered, labels, 10, 1e-3)
    strong = fit_logistic_regression(centered, labels, 10, 1.0)
    warm = fit_logistic_regression(centered, labels, 10, 1e-3, init=strong)
    restarted = fit_logistic_regression(centered, labels, 10, 1e-3, init=alone)
    assert restarted.num_iterations <= 1
    np.testing.assert_allclose(warm.weight, alone.weight, atol=1e-3)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 97)
    chunked = fit_logistic_regression(features, labels, 10, 1e-3)
    np.testing.assert_allclose(chunked.weight, alone.weight, atol=1e-3)
    monkeypatch.setattr(module, "_KEPT_RESIDUALS", 0)
    np.testing.assert_allclose(fit_logistic_regression(features, labels, 10, 1e-3).weight, chunked.weight, atol=1e-3)


def test_images_of_a_weak_penalty_that_cannot_be_separated():
    """Directions in which the features hardly vary are the hard ones."""
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(1500, 64)) * np.logspace(0, -3, 64)).astype(np.float32)
    labels = (features[:, :4] * [1, 1, 2, 2] + rng.normal(size=(1500, 4))).argmax(axis=1)
    fitted = fit_logistic_regression(features, labels, 4, 1e-8)
    theirs = SklearnLogisticRegression(C=1 / (1e-8 * 1500), tol=1e-10, max_iter=100, solver="newton-cholesky")
    theirs.fit(features.astype(np.float64), labels)
    expected = objective(theirs.coef_, theirs.intercept_, features, labels, 1e-8)
    assert objective(fitted.weight, fitted.bias, features, labels, 1e-8) == pytest.approx(expected, rel=1e-6)


def test_fewer_images_than_features():
    features, labels = network_like_features(num_images=40)
    fitted = fit_logistic_regression(features, labels, 10, 1e-3)
    theirs = SklearnLogisticRegression(C=1 / (1e-3 * 40), tol=1e-9, max_iter=20000)
    theirs.fit(features.astype(np.float64), labels)
    expected = objective(theirs.coef_, theirs.intercept_, features, labels, 1e-3)
    assert objective(fitted.weight, fitted.bias, features, labels, 1e-3) == pytest.approx(expected, rel=1e-6)
    restarted = fit_logistic_regression(features, labels, 10, 1e-3, init=fitted)
    assert restarted.num_iterations <= 1


def test_a_class_without_images_and_constant_features_are_no_obstacle():
    features, labels = network_like_features(num_images=200, dimension=8, num_classes=3)
    features = np.concatenate([features, np.ones((200, 1), np.float32)], axis=1)
    fitted = fit_logistic_regression(features, labels, 4, 1e-2)
    assert np.isfinite(fitted.weight).all()
    assert (fitted.scores(features).argmax(axis=1) != 3).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(features=np.zeros((3, 2, 1))), "must be"),
        (dict(features=np.full((4, 2), np.nan)), "image 0 are not finite"),
        (dict(labels=np.zeros(3, int)), "labels must be"),
        (dict(labels=np.array([0, 1, 2, 3])), "must lie in"),
        (dict(labels=np.zeros(4)), "integers"),
        (dict(num_classes=1, labels=np.zeros(4, int)), "num_classes"),
        (dict(l2=0.0), "positive"),
        (dict(l2=float("nan")), "positive"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = dict(features=np.eye(4, 2), labels=np.array([0, 1, 0, 1]), num_classes=3, l2=1.0) | change
    with pytest.raises(ValueError, match=message):
        fit_logistic_regression(**arguments)


def test_too_few_iterations_are_an_error():
    features, labels = network_like_features()
    with pytest.raises(RuntimeError, match="did not converge in 2 iterations"):
        fit_logistic_regression(features, labels, 10, 1e-4, max_iterations=2)
