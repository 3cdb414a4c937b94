"""Linear probe: what a frozen backbone's features tell about a dataset's classes.

Features are extracted once. A logistic regression is fitted to convergence with the strength that does best on a
held-out part of the *training* images, then once more on all of them, and judged on the test images.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wsl_d2.transfer.features import Features, ProbeError
from wsl_d2.transfer.logistic_regression import CenteredFeatures, LogisticRegression, fit_logistic_regression

# Strengths tried, of the mean objective; features are scaled to unit variance on average before.
L2_GRID = tuple(10.0**exponent for exponent in range(-8, 2))
HELD_OUT_FRACTION = 0.1  # of the training images of each class, to choose the strength by
_TOLERANCE_OF_PATH = 1e-6  # of the objective, in fits that only choose a strength
_STANDARD_ERRORS = 3.0  # by which a strength is worse than the best before weaker ones are left out


@dataclass
class ProbeResult:
    """Outcome of a linear probe.

    Attributes:
        top1, top5: percent of the test images.
        per_class_top1: (C,) percent; NaN for a class without test images.
        correct: (N,) bool, whether each test image's label got the highest score.
        l2: the strength chosen.
        held_out_top1: strength -> percent on the held-out part of the training images, of the strengths tried.
        classifier: fitted to all training images.
        num_train, num_test: images.
    """

    top1: float
    top5: float
    per_class_top1: np.ndarray
    correct: np.ndarray
    l2: float
    held_out_top1: dict[float, float]
    classifier: LogisticRegression
    num_train: int
    num_test: int


def top_k_hits(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Returns (N,) bool: whether each image's label is among its k highest scores; a tie counts as lower.

    Args:
        scores: (N, C).
        labels: (N,) int64 in [0, C).
    """
    own = scores[np.arange(len(labels)), labels]
    return (scores >= own[:, None]).sum(axis=1) <= k


def split_held_out(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits images into a fitting and a held-out part, class by class, as far as a class has two images.

    Args:
        labels: (N,) integers.
        fraction: of each class to hold out, in (0, 1); at least one image of each class with two or more.
        seed: the same seed gives the same split.

    Returns:
        (fitting rows, held-out rows), each sorted int64.

    Raises:
        ProbeError: no class has two images.
    """
    rng = np.random.default_rng(seed)
    held_out = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        if len(rows) >= 2:
            held_out.append(rows[: min(len(rows) - 1, max(1, round(fraction * len(rows))))])
    if not held_out:
        raise ProbeError("no class has two training images, so none can be held out to choose l2; give l2 yourself.")
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def few_shot_rows(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Draws ``shots`` images of each class without replacement; draws of fewer shots are subsets (same seed).

    Raises:
        ProbeError: a class has fewer images.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        if len(rows) < shots:
            raise ProbeError(f"class {label} has {len(rows)} training images, fewer than the {shots} shots asked for.")
        chosen.append(rows[:shots])
    return np.sort(np.concatenate(chosen))


def choose_l2(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    grid: Sequence[float] = L2_GRID,
    held_out_fraction: float = HELD_OUT_FRACTION,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[float, dict[float, float]]:
    """Chooses the strength with the highest top-1 on held-out training images; of equal ones the strongest.

    Strengths are tried from strong to weak, until one is worse than the best by more than three standard errors of
    their difference: the weak ones beyond an optimum fit the training images ever closer, at ever greater cost.

    Returns:
        (the strength, strength -> held-out top-1 in percent of those tried). A warning is logged when the best is at
        an end of the grid.
    """
    best, accuracy = _fit_path(features, labels, num_classes, grid, held_out_fraction, seed, device)
    return best.l2, accuracy


def _fit_path(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    grid: Sequence[float],
    held_out_fraction: float,
    seed: int,
    device: str | torch.device,
) -> tuple[LogisticRegression, dict[float, float]]:
    """See :func:`choose_l2`; returns the classifier of the strength chosen, fitted to all but the held-out images."""
    fitting, held_out = split_held_out(labels, held_out_fraction, seed)
    centered = CenteredFeatures(features[fitting], device)
    accuracy: dict[float, float] = {}
    best = fitted = None
    best_hits = np.zeros(len(held_out), bool)
    for l2 in sorted(grid, reverse=True):  # each started at the last: a path of solutions
        fitted = fit_logistic_regression(
            centered, labels[fitting], num_classes, l2, init=fitted, tolerance=_TOLERANCE_OF_PATH
        )
        hits = top_k_hits(fitted.scores(features[held_out]), labels[held_out], 1)
        accuracy[l2] = 100.0 * float(hits.mean())
        lost, won = int((best_hits & ~hits).sum()), int((hits & ~best_hits).sum())
        if best is None or won > lost:
            best, best_hits = fitted, hits
        elif lost - won > _STANDARD_ERRORS * math.sqrt(lost + won):
            break
    assert best is not None
    if len(grid) > 1 and best.l2 in (min(grid), max(grid)):
        logging.getLogger(__name__).warning(
            f"the best l2, {best.l2:g}, is at an end of the grid {min(grid):g} to {max(grid):g}; widen it."
        )
    return best, accuracy


def linear_probe(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
    *,
    l2: float | None = None,
    grid: Sequence[float] = L2_GRID,
    held_out_fraction: float = HELD_OUT_FRACTION,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> ProbeResult:
    """Fits on the training features, judges on the test features.

    Features of both parts are centered by the training mean and divided by one number, the root mean square deviation
    over all axes, so that a strength means the same for every backbone; the axes keep their relative sizes.

    Args:
        train_features, test_features: (N, D) and (M, D), finite.
        train_labels, test_labels: (N,) and (M,) integers in [0, num_classes).
        num_classes: C.
        l2: a strength; chosen on held-out training images if None.
        grid, held_out_fraction, seed: see :func:`choose_l2`.
        device: where to fit.

    Raises:
        ProbeError: no training or test images.
        ValueError: shapes or values that :func:`fit_logistic_regression` refuses.
    """
    if not len(train_labels) or not len(test_labels):
        raise ProbeError(f"a probe needs training and test images, got {len(train_labels)} and {len(test_labels)}.")
    mean = train_features.mean(axis=0, dtype=np.float64)
    spread = float(np.sqrt(train_features.var(axis=0, dtype=np.float64).mean())) or 1.0
    train = ((train_features - mean) / spread).astype(np.float32)
    test = ((test_features - mean) / spread).astype(np.float32)
    held_out: dict[float, float] = {}
    start = None
    if l2 is None:
        start, held_out = _fit_path(train, train_labels, num_classes, grid, held_out_fraction, seed, device)
        l2 = start.l2
    classifier = fit_logistic_regression(train, train_labels, num_classes, l2, init=start, device=device)
    scores = classifier.scores(test)
    correct = top_k_hits(scores, test_labels, 1)
    num_images = np.bincount(test_labels, minlength=num_classes)
    with np.errstate(invalid="ignore"):
        per_class = 100.0 * np.bincount(test_labels, weights=correct, minlength=num_classes) / num_images
    return ProbeResult(
        top1=100.0 * float(correct.mean()),
        top5=100.0 * float(top_k_hits(scores, test_labels, 5).mean()),
        per_class_top1=per_class,
        correct=correct,
        l2=l2,
        held_out_top1=held_out,
        classifier=classifier,
        num_train=len(train_labels),
        num_test=len(test_labels),
    )


def probe_features(
    train: Features,
    test: Features,
    num_classes: int,
    *,
    l2: float | None = None,
    grid: Sequence[float] = L2_GRID,
    held_out_fraction: float = HELD_OUT_FRACTION,
    shots: Sequence[int] = (),
    num_seeds: int = 5,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[ProbeResult, dict[int, list[float]]]:
    """The linear probe of extracted features; few shots take the strength of the whole training set.

    Args:
        train, test: of all images.
        shots: numbers of training images a class for further probes, each drawn ``num_seeds`` times.
        l2, grid, held_out_fraction, seed, device: see :func:`linear_probe`.

    Returns:
        (of all training images, shots -> top-1 in percent of each draw).

    Raises:
        ProbeError: too few images, of a class or in all.
    """
    fit, judge = ((part.values[part.kept], part.labels[part.kept]) for part in (train, test))
    options = {"grid": grid, "held_out_fraction": held_out_fraction, "seed": seed, "device": device}
    result = linear_probe(*fit, *judge, num_classes, l2=l2, **options)  # type: ignore[arg-type]
    few_shot: dict[int, list[float]] = {}
    for number in shots:
        draws = [few_shot_rows(fit[1], number, seed + draw) for draw in range(num_seeds)]
        few_shot[number] = [
            linear_probe(fit[0][rows], fit[1][rows], *judge, num_classes, l2=result.l2, device=device).top1
            for rows in draws
        ]
    return result, few_shot
