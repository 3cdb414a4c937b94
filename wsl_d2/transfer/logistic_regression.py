"""L2-regularized multinomial logistic regression, fitted to convergence: the classifier of a linear probe.

The objective is scikit-learn's, per image: mean cross-entropy in nats + l2 / 2 * |W|^2, the bias not penalized
(scikit-learn's C is 1 / (l2 * N)). It is strictly convex in W, so every solver finds the same one.

The solver is Newton's method with conjugate gradients on changed variables. The Hessian is about A (x) M + l2 I with A
the mean over images of diag(p) - p p' and M the second moments of the features, each image weighted by 1 - |p|^2. In
the eigenvectors of A and M that is diagonal, and divided by its root the variables see about the identity, so that a
step takes few products with the Hessian. A and M are computed again every few steps, since p changes by orders of
magnitude where classes can be separated.

Shapes: N images, D features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

_ROWS_AT_ONCE = 65536
_PRODUCTS_OF_STEP = 250  # with the Hessian, at most, in one step
_PRODUCTS_OF_VARIABLES = 30  # after which the variables are changed
_KEPT_RESIDUALS = 2**26  # of all images and classes: above, each product with the Hessian computes them again
_FLOAT64_BELOW = 2**24  # entries of the feature matrix: small problems are solved in double precision throughout


@dataclass
class LogisticRegression:
    """A fitted classifier.

    Attributes:
        weight: (C, D) float64.
        bias: (C,) float64, of mean 0.
        l2: the strength it was fitted with.
        objective: mean cross-entropy in nats + l2 / 2 * |weight|^2 on the images it was fitted to.
        num_iterations: products with the Hessian.
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


class CenteredFeatures:
    """Features on the device that fits, centered and with a column of ones; shared by fits with several strengths.

    Fewer images than features are turned into as many coordinates as there are images.

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
        self._basis = None
        if features.shape[0] < features.shape[1]:  # the solution is a combination of the images
            self._basis, coordinates = np.linalg.qr((features - self.mean).T)
            features, shift = coordinates.T, np.float64(0)
        else:
            shift = self.mean
        num_images, dimension = features.shape
        self.values = torch.ones(num_images, dimension + 1, dtype=dtype, device=device)
        for start in range(0, num_images, _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            self.values[rows, :-1] = torch.from_numpy(features[rows] - shift).to(device, dtype)
        self.single = self.values.float()

    def to_own(self, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Returns the (C, columns) weight for ``values`` of a classifier's (C, D) weight and (C,) bias."""
        own = weight if self._basis is None else weight @ self._basis
        return np.concatenate([own, (bias + weight @ self.mean)[:, None]], axis=1)

    def from_own(self, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns a classifier's weight and bias, as :meth:`to_own` takes them."""
        weight = own[:, :-1] if self._basis is None else own[:, :-1] @ self._basis.T
        return weight, own[:, -1] - weight @ self.mean

    def parts(self, of: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """The rows of ``of``, values or single, in chunks, with those of further tensors of length N."""
        for start in range(0, len(of), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            yield of[rows], *(other[rows] for other in others)


def _without_mean(gradient: torch.Tensor) -> torch.Tensor:
    """Takes the mean over classes, which is rounding alone, from a gradient of the cross-entropy."""
    return gradient - gradient.mean(dim=0)


def _residuals(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Turns (n, C) log probabilities, in place, into p - e with e the target's unit vector; exact where p is near e."""
    own = targets[:, None]
    residuals = log_probabilities.exp_().scatter_(1, own, 0)
    return residuals.scatter_(1, own, -residuals.sum(dim=1, keepdim=True))


class _Objective:
    """The objective, its gradient and its Hessian in the weight (C, D + 1), the last column of which is the bias."""

    def __init__(self, features: CenteredFeatures, targets: torch.Tensor, num_classes: int, l2: float):
        self.features = features
        self.targets = targets
        self.num_classes = num_classes
        self.l2 = l2
        self.num_products = 0
        self._keeps = len(targets) * num_classes <= _KEPT_RESIDUALS
        self._kept: tuple[torch.Tensor, list[torch.Tensor]] = torch.tensor([]), []

    def _penalty(self, weight: torch.Tensor) -> torch.Tensor:
        """The penalty's gradient at a weight; its Hessian's product with one."""
        penalty = self.l2 * weight
        penalty[:, -1] = 0
        return penalty

    def __call__(self, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
        rounded = weight.to(self.features.values.dtype)
        loss = torch.zeros((), dtype=torch.float64, device=weight.device)
        gradient = torch.zeros_like(rounded)
        kept: list[torch.Tensor] = []
        for part, targets in self.features.parts(self.features.values, self.targets):
            log_probabilities = F.log_softmax(part @ rounded.T, dim=1)
            loss -= log_probabilities.gather(1, targets[:, None]).sum(dtype=torch.float64)
            residuals = _residuals(log_probabilities, targets)
            gradient.addmm_(residuals.T, part)
            if self._keeps:
                kept.append(residuals.float())
        self._kept = weight, kept
        penalty = self._penalty(weight)
        value = float(loss) / len(self.targets) + 0.5 * float((penalty * weight).sum())
        return value, _without_mean(gradient.double() / len(self.targets)) + penalty

    def _kept_residuals(self, weight: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """The rows in chunks, their targets and (n, C) residuals; single precision, which Newton steps can do with."""
        parts = self.features.parts(self.features.single, self.targets)
        if not self._keeps:
            for part, targets in parts:
                yield part, targets, _residuals(F.log_softmax(part @ weight.float().T, dim=1), targets)
            return
        if not torch.equal(self._kept[0], weight):
            self(weight)
        for (part, targets), residuals in zip(parts, self._kept[1], strict=True):
            yield part, targets, residuals

    def times_hessian(self, weight: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """Returns the product, (C, D + 1), of the Hessian at ``weight`` with a direction of that shape."""
        self.num_products += 1
        single = direction.float()
        product = torch.zeros_like(single)
        for part, targets, residuals in self._kept_residuals(weight):
            own = targets[:, None]
            change = part @ single.T  # of the logits; below, against the target's
            change -= change.gather(1, own)
            mean = (residuals * change).sum(dim=1, keepdim=True)
            change = residuals * (change - mean)  # p * (change - mean) but for the target, whose p is 1 + residual
            change.scatter_add_(1, own, -mean)
            product.addmm_(change.T, part)
        return _without_mean(product.double() / len(self.targets)) + self._penalty(direction)

    def change_of_variables(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (P, Q, scale): in the variables P' weight Q / scale the Hessian at ``weight`` is about the identity.

        P is (C, C) and Q (D + 1, D + 1), orthogonal; scale is (C, D + 1).
        """
        dimension = weight.shape[1]
        between = torch.zeros(self.num_classes, self.num_classes, dtype=torch.float64, device=weight.device)
        moments = torch.zeros(dimension, dimension, device=weight.device)
        for part, targets, residuals in self._kept_residuals(weight):
            # With the target's unit vector e and the residual r = p - e, diag(p) - p p' = diag(r) - e r' - r e' - r r'.
            cross = torch.zeros_like(between, dtype=residuals.dtype).index_add_(0, targets, residuals)
            between -= (cross + cross.T + residuals.T @ residuals).double()
            between.diagonal().add_(residuals.sum(dim=0, dtype=torch.float64))
            missing = -residuals.gather(1, targets[:, None])[:, 0]
            spread = 2 * missing - residuals.square().sum(dim=1)  # 1 - |p|^2
            moments.addmm_(part.T, part * spread.clamp(min=0)[:, None])
        total = between.trace().clamp(min=1e-30)
        curvatures, between = torch.linalg.eigh(between / len(self.targets))
        squares, moments = torch.linalg.eigh(moments.double() / total)
        products = torch.outer(curvatures.clamp(min=0), squares.clamp(min=0))
        return between, moments, (products + self.l2).rsqrt()


def fit_logistic_regression(
    features: np.ndarray | CenteredFeatures,
    labels: np.ndarray,
    num_classes: int,
    l2: float,
    *,
    init: LogisticRegression | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 10_000,
    device: str | torch.device = "cpu",
) -> LogisticRegression:
    """Fits to convergence.

    Args:
        features: (N, D), or their :class:`CenteredFeatures` when several strengths are fitted.
        labels: (N,) integers in [0, num_classes).
        num_classes: C, at least 2.
        l2: strength of the regularizer, > 0.
        init: where to start; the solution does not depend on it.
        tolerance: ends when the objective can fall by about this fraction of itself, by its local quadratic model.
        max_iterations: products with the Hessian.
        device: where to compute, unless centered features are given.

    Raises:
        ValueError: shapes, labels, or l2 out of range.
        RuntimeError: not converged after ``max_iterations``.
    """
    centered = features if isinstance(features, CenteredFeatures) else CenteredFeatures(features, device)
    num_images, dimension = centered.values.shape
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

    targets = torch.from_numpy(labels.astype(np.int64)).to(centered.values.device)
    objective = _Objective(centered, targets, num_classes, l2)
    weight = torch.zeros(num_classes, dimension, dtype=torch.float64, device=targets.device)
    if init is not None:
        weight = _without_mean(torch.from_numpy(centered.to_own(init.weight, init.bias)).to(targets.device))

    value, gradient = objective(weight)
    # Rounding ends the descent, too: twice in a row nothing was gained that the arithmetic could tell.
    precision, stalled = (1e-13 if centered.values.dtype == torch.float64 else 1e-8), 0
    variables, computed_at = objective.change_of_variables(weight), objective.num_products
    while True:
        # Half of the squared norm is how far a Newton step would lower the objective.
        fall = 0.5 * float(_change(variables, gradient).square().sum())
        is_done = fall <= tolerance * value
        if is_done and computed_at == objective.num_products or stalled == 2:
            break
        if is_done or objective.num_products - computed_at > _PRODUCTS_OF_VARIABLES:
            variables, computed_at = objective.change_of_variables(weight), objective.num_products
            continue
        if objective.num_products >= max_iterations:
            raise RuntimeError(
                f"logistic regression did not converge in {objective.num_products} iterations (l2 {l2:g}, objective "
                f"{value:.3g}, which could fall by about {fall:.1e}); use a larger l2 or more iterations."
            )
        previous = value
        limit = min(_PRODUCTS_OF_STEP, max_iterations - objective.num_products)
        step = _newton_step(objective, weight, gradient, variables, math.sqrt(min(0.25, fall / value)), limit)
        weight, value, gradient = _line_search(objective, weight, gradient, step)
        stalled = stalled + 1 if previous - value <= precision * previous else 0

    matrix, bias = centered.from_own(weight.cpu().numpy())
    return LogisticRegression(
        weight=matrix,
        bias=bias - bias.mean(),  # the softmax ignores a shift common to all classes
        l2=l2,
        objective=value,
        num_iterations=objective.num_products,
        gradient_norm=float(gradient.abs().max()),
    )


_Variables = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _change(variables: _Variables, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient in the variables."""
    between, moments, scale = variables
    return (between.T @ gradient @ moments) * scale


def _newton_step(
    objective: _Objective,
    weight: torch.Tensor,
    gradient: torch.Tensor,
    variables: _Variables,
    accuracy: float,
    limit: int,
) -> torch.Tensor:
    """Solves Hessian * step = -gradient by conjugate gradients, to a relative accuracy or so many products."""
    between, moments, scale = variables
    residual = -_change(variables, gradient)
    step, direction = torch.zeros_like(residual), residual
    square = first = float(residual.square().sum())
    for _ in range(limit):
        product = _change(variables, objective.times_hessian(weight, between @ (direction * scale) @ moments.T))
        curvature = float((direction * product).sum())
        if curvature <= 1e-9 * float(direction.square().sum()):  # none that rounding leaves
            return between @ ((step if step.any() else direction) * scale) @ moments.T
        length = square / curvature
        step = step + length * direction
        residual = residual - length * product
        previous, square = square, float(residual.square().sum())
        if square <= accuracy**2 * first:
            break
        direction = residual + square / previous * direction
    return between @ (step * scale) @ moments.T


def _line_search(
    objective: _Objective, weight: torch.Tensor, gradient: torch.Tensor, step: torch.Tensor
) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Shortens a step until the slope along it has fallen by half; returns the new weight, value and gradient.

    Of a convex function that is enough, and slopes can be told where values no longer differ by more than rounding.
    """
    slope = float((gradient * step).sum())
    length = 1.0
    for _ in range(30):
        value, new = objective(weight + length * step)
        now = float((new * step).sum())
        if now <= 0.5 * abs(slope):
            break
        length *= abs(slope) / (abs(slope) + now)
    return weight + length * step, value, new
