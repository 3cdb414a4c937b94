"""L2-regularised multinomial logistic regression, fitted to convergence: the classifier of a linear probe.

The objective is scikit-learn's, per image: mean cross-entropy in nats + l2 / 2 * |W|^2, the bias not penalised
(scikit-learn's C is 1 / (l2 * N)). It is strictly convex in W, so every solver finds the same one.

The solver is L-BFGS on changed variables. Averaged over classes, the objective's Hessian is
M = X' diag(w) X / N + l2 * I with w the mean over classes of p * (1 - p). With M = L L', the variables W L see about
the identity. M is computed again every few dozen iterations, since w shrinks by orders of magnitude where classes can
be separated.

Shapes: N images, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

_ROWS_AT_ONCE = 65536
_ITERATIONS = 30  # of L-BFGS between two computations of the Hessian
_FLOAT64_BELOW = 2**24  # entries of the feature matrix: small problems are solved in double precision throughout


@dataclass
class LogisticRegression:
    """A fitted classifier.

    Attributes:
        weight: (C, D) float64.
        bias: (C,) float64, of mean 0.
        l2: the strength it was fitted with.
        objective: mean cross-entropy in nats + l2 / 2 * |weight|^2 on the images it was fitted to.
        num_iterations: of L-BFGS.
        gradient_norm: largest absolute entry of the objective's gradient at the end.
    """

    weight: np.ndarray
    bias: np.ndarray
    l2: float
    objective: float
    num_iterations: int
    gradient_norm: float

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Returns the (N, C) float32 logits of (N, D) features."""
        weight = torch.from_numpy(self.weight.astype(np.float32))
        bias = torch.from_numpy(self.bias.astype(np.float32))
        return torch.addmm(bias, torch.from_numpy(np.asarray(features, np.float32)), weight.T).numpy()


class CentredFeatures:
    """Features on the device that fits, centred and with a column of ones; shared by fits with several strengths.

    Args:
        features: (N, D), finite.
        device: where the fit computes.

    Raises:
        ValueError: not (N, D) with N, D >= 1, or a value is not finite.
    """

    def __init__(self, features: np.ndarray, device: str | torch.device = "cpu"):
        features = np.asarray(features, np.float32)
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(f"features must be (N, D) with N, D >= 1, got shape {features.shape}.")
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise ValueError(f"the features of image {row} are not finite; the backbone's weights or input are broken.")
        self.mean = features.mean(axis=0, dtype=np.float64)
        dtype = torch.float64 if features.size < _FLOAT64_BELOW else torch.float32
        num_images, dimension = features.shape
        self.values = torch.ones(num_images, dimension + 1, dtype=dtype, device=device)
        for start in range(0, num_images, _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            self.values[rows, :-1] = torch.from_numpy(features[rows] - self.mean).to(device, dtype)

    def parts(self, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """The rows in chunks, with those of further tensors of length N."""
        for start in range(0, len(self.values), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            yield self.values[rows], *(other[rows] for other in others)


class _Objective:
    """Value and gradient of the objective in the weight (C, D + 1), the last column of which is the bias."""

    def __init__(self, features: CentredFeatures, targets: torch.Tensor, num_classes: int, l2: float):
        self.features = features
        self.targets = targets
        self.num_classes = num_classes
        dimension = features.values.shape[1]
        self.penalty = torch.full((dimension,), l2, dtype=torch.float64, device=targets.device)
        self.penalty[-1] = 0

    def __call__(self, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
        single = weight.to(self.features.values.dtype)
        loss = torch.zeros((), dtype=torch.float64, device=weight.device)
        gradient = torch.zeros_like(single)
        for part, targets in self.features.parts(self.targets):
            log_probabilities = F.log_softmax(part @ single.T, dim=1)
            loss -= log_probabilities.gather(1, targets[:, None]).sum(dtype=torch.float64)
            residual = log_probabilities.exp_()
            residual[torch.arange(len(targets), device=weight.device), targets] -= 1
            gradient.addmm_(residual.T, part)
        value = float(loss) / len(self.targets) + 0.5 * float((self.penalty * weight**2).sum())
        return value, gradient.double() / len(self.targets) + self.penalty * weight

    def factor(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns L, (D + 1, D + 1) lower triangular, of the Hessian's mean over classes at ``weight``."""
        dimension = weight.shape[1]
        moments = torch.zeros(dimension, dimension, dtype=self.features.values.dtype, device=weight.device)
        single = weight.to(moments.dtype)
        for (part,) in self.features.parts():
            curvature = (1 - F.softmax(part @ single.T, dim=1).square().sum(dim=1)).clamp(min=0) / self.num_classes
            moments.addmm_(part.T, part * curvature[:, None])
        hessian = moments.double() / len(self.targets)
        hessian.diagonal().add_(self.penalty + 1e-9 * hessian.diagonal().max() + 1e-30)
        return torch.linalg.cholesky(hessian)


def fit_logistic_regression(
    features: np.ndarray | CentredFeatures,
    labels: np.ndarray,
    num_classes: int,
    l2: float,
    *,
    init: LogisticRegression | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 3000,
    device: str | torch.device = "cpu",
) -> LogisticRegression:
    """Fits to convergence by preconditioned L-BFGS.

    Args:
        features: (N, D), or their :class:`CentredFeatures` when several strengths are fitted.
        labels: (N,) integers in [0, num_classes).
        num_classes: C, at least 2.
        l2: strength of the regulariser, > 0.
        init: where to start; the solution does not depend on it.
        tolerance: ends when the objective can fall by about this fraction of itself, by its local quadratic model.
        max_iterations: of L-BFGS.
        device: where to compute, unless centred features are given.

    Raises:
        ValueError: shapes, labels, or l2 out of range.
        RuntimeError: not converged after ``max_iterations``.
    """
    centred = features if isinstance(features, CentredFeatures) else CentredFeatures(features, device)
    num_images, dimension = centred.values.shape
    labels = np.asarray(labels)
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be ({num_images},) integers, got {labels.dtype} {labels.shape}.")
    if num_classes < 2 or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must lie in [0, num_classes) with num_classes >= 2; got {labels.min()} to {labels.max()} "
            f"and num_classes {num_classes}."
        )
    if not (math.isfinite(l2) and l2 > 0):
        raise ValueError(f"l2 is a positive number, got {l2}.")

    targets = torch.from_numpy(labels.astype(np.int64)).to(centred.values.device)
    objective = _Objective(centred, targets, num_classes, l2)
    weight = torch.zeros(num_classes, dimension, dtype=torch.float64, device=targets.device)
    if init is not None:
        start = np.concatenate([init.weight, (init.bias + init.weight @ centred.mean)[:, None]], axis=1)
        weight = torch.from_numpy(start).to(targets.device)

    num_iterations, stalled = 0, 0
    value, gradient = objective(weight)
    while True:
        factor = objective.factor(weight)
        # Half of the squared norm is how far a Newton step on the mean Hessian would lower the objective.
        slopes = torch.linalg.solve_triangular(factor.T, gradient, upper=True, left=False)
        if 0.5 * float(slopes.square().sum()) <= tolerance * value or stalled == 2:
            break
        if num_iterations >= max_iterations:
            raise RuntimeError(
                f"logistic regression did not converge in {num_iterations} iterations (l2 {l2:g}, objective "
                f"{value:.3g}, which could fall by about {0.5 * float(slopes.square().sum()):.1e}); use a larger l2 "
                "or more iterations."
            )
        previous = value
        weight, iterations = _minimise(objective, weight, factor, min(_ITERATIONS, max_iterations - num_iterations))
        num_iterations += max(1, iterations)
        value, gradient = objective(weight)
        # Rounding ends the descent, too: twice in a row nothing was gained that the arithmetic could tell.
        precision = 1e-13 if centred.values.dtype == torch.float64 else 1e-7
        stalled = stalled + 1 if previous - value <= precision * previous else 0

    matrix = weight.cpu().numpy()
    bias = matrix[:, -1] - matrix[:, :-1] @ centred.mean
    return LogisticRegression(
        weight=matrix[:, :-1],
        bias=bias - bias.mean(),  # the softmax ignores a shift common to all classes
        l2=l2,
        objective=value,
        num_iterations=num_iterations,
        gradient_norm=float(gradient.abs().max()),
    )


def _minimise(
    objective: _Objective, weight: torch.Tensor, factor: torch.Tensor, max_iterations: int
) -> tuple[torch.Tensor, int]:
    """L-BFGS from ``weight`` in the variables weight @ factor; returns the new weight and the iterations taken."""

    def to_weight(x: np.ndarray) -> torch.Tensor:
        variables = torch.from_numpy(x).to(weight.device).view_as(weight)
        return torch.linalg.solve_triangular(factor, variables, upper=False, left=False)

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(to_weight(x))
        slopes = torch.linalg.solve_triangular(factor.T, gradient, upper=True, left=False)
        return value, slopes.cpu().numpy().ravel()

    result = minimize(
        evaluate,
        (weight @ factor).cpu().numpy().ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "maxfun": 10 * max_iterations, "gtol": 0, "ftol": 0, "maxcor": 20},
    )
    return to_weight(result.x), int(result.nit)
