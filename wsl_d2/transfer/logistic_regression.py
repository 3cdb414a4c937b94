"""L2-regularised multinomial logistic regression, fitted to convergence: the classifier of a linear probe.

The objective is scikit-learn's, per image: mean cross-entropy in nats + l2 / 2 * |W|^2, the bias not penalised
(scikit-learn's C is 1 / (l2 * N)). It is strictly convex in W, so every solver finds the same one.

Speed comes from a change of variables. The Hessian of the cross-entropy is bounded by 1/2 * (I - 11'/C) x S, S the
second moments of the features (Böhning 1992, "Multinomial logistic regression algorithm"). In the eigenbasis of S, each
axis scaled by 1 / sqrt(eigenvalue / 2 + l2), the bound is close to the identity, so that L-BFGS needs fewer steps.

Shapes: N images, D features, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

_ROWS_AT_ONCE = 65536
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
        gradient_norm: largest absolute entry of the objective's gradient in weight and bias at the end.
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


class FeatureBasis:
    """Features centred and turned into the eigenbasis of their covariance; shared by fits with several strengths.

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
        tensor = torch.from_numpy(features).to(device)
        self.mean = tensor.double().mean(dim=0) if len(tensor) < _ROWS_AT_ONCE else self._mean(tensor)
        moments = torch.zeros(tensor.shape[1], tensor.shape[1], dtype=torch.float64, device=tensor.device)
        for start in range(0, len(tensor), _ROWS_AT_ONCE):
            part = tensor[start : start + _ROWS_AT_ONCE].double() - self.mean
            moments.addmm_(part.T, part)
        eigenvalues, self.rotation = torch.linalg.eigh(moments / len(tensor))
        self.eigenvalues = eigenvalues.clamp(min=0)
        dtype = torch.float64 if tensor.numel() < _FLOAT64_BELOW else torch.float32
        rotation, mean = self.rotation.to(dtype), self.mean.to(dtype)
        self.rotated = torch.cat(
            [(tensor[i : i + _ROWS_AT_ONCE].to(dtype) - mean) @ rotation for i in range(0, len(tensor), _ROWS_AT_ONCE)]
        )

    @staticmethod
    def _mean(tensor: torch.Tensor) -> torch.Tensor:
        total = sum(tensor[i : i + _ROWS_AT_ONCE].double().sum(dim=0) for i in range(0, len(tensor), _ROWS_AT_ONCE))
        return total / len(tensor)  # type: ignore[return-value]


def fit_logistic_regression(
    features: np.ndarray | FeatureBasis,
    labels: np.ndarray,
    num_classes: int,
    l2: float,
    *,
    init: LogisticRegression | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 10000,
    device: str | torch.device = "cpu",
) -> LogisticRegression:
    """Fits to convergence by preconditioned L-BFGS.

    Args:
        features: (N, D), or their :class:`FeatureBasis` when several strengths are fitted.
        labels: (N,) integers in [0, num_classes).
        num_classes: C, at least 2.
        l2: strength of the regulariser, > 0.
        init: where to start; the solution does not depend on it.
        tolerance: ends when no entry of the preconditioned gradient is larger than this times the objective.
        max_iterations: of L-BFGS.
        device: where to compute, unless a basis is given.

    Raises:
        ValueError: shapes, labels, or l2 out of range.
        RuntimeError: not converged after ``max_iterations``.
    """
    basis = features if isinstance(features, FeatureBasis) else FeatureBasis(features, device)
    num_images, dimension = basis.rotated.shape
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

    target_device = basis.rotated.device
    targets = torch.from_numpy(labels.astype(np.int64)).to(target_device)
    scale = (basis.eigenvalues / 2 + l2).rsqrt()  # of each axis: weight in the eigenbasis = scale * variable
    dtype = basis.rotated.dtype
    penalty = l2 * scale**2

    last_slopes = np.zeros(0)

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal last_slopes
        variables = torch.from_numpy(x).to(target_device).view(num_classes, dimension + 1)
        weight = (variables[:, :-1] * scale).to(dtype)
        bias = variables[:, -1].to(dtype)
        loss = torch.zeros((), dtype=torch.float64, device=target_device)
        gradient = torch.zeros(num_classes, dimension, dtype=dtype, device=target_device)
        bias_gradient = torch.zeros(num_classes, dtype=torch.float64, device=target_device)
        for start in range(0, num_images, _ROWS_AT_ONCE):
            part = basis.rotated[start : start + _ROWS_AT_ONCE]
            wanted = targets[start : start + _ROWS_AT_ONCE]
            log_probabilities = F.log_softmax(torch.addmm(bias, part, weight.T), dim=1)
            loss -= log_probabilities.gather(1, wanted[:, None]).sum(dtype=torch.float64)
            residual = log_probabilities.exp_()
            residual[torch.arange(len(wanted), device=target_device), wanted] -= 1
            gradient.addmm_(residual.T, part)
            bias_gradient += residual.sum(dim=0, dtype=torch.float64)
        slopes = torch.empty_like(variables)
        slopes[:, :-1] = gradient.double() / num_images * scale + penalty * variables[:, :-1]
        slopes[:, -1] = bias_gradient / num_images
        value = float(loss) / num_images + 0.5 * float((penalty * variables[:, :-1] ** 2).sum())
        last_slopes = slopes.cpu().numpy().ravel()
        return value, last_slopes

    start = np.zeros((num_classes, dimension + 1))
    if init is not None:
        rotation, mean = basis.rotation.cpu().numpy(), basis.mean.cpu().numpy()
        start[:, :-1] = init.weight @ rotation / scale.cpu().numpy()
        start[:, -1] = init.bias + init.weight @ mean

    def stop_when_converged(intermediate_result) -> None:
        if np.abs(last_slopes).max() <= tolerance * intermediate_result.fun:
            raise StopIteration

    result = minimize(
        evaluate,
        start.ravel(),
        jac=True,
        method="L-BFGS-B",
        callback=stop_when_converged,
        options={"maxiter": max_iterations, "maxfun": 4 * max_iterations, "gtol": 0, "ftol": 0, "maxcor": 20},
    )
    variables = torch.from_numpy(result.x).view(num_classes, dimension + 1).to(target_device)
    slopes = torch.from_numpy(result.jac).view(num_classes, dimension + 1).to(target_device)
    # float32 gradients have a floor, where the line search gives up: that is convergence, anywhere else it is not.
    wanted = tolerance * float(result.fun)
    if float(slopes.abs().max()) > (wanted if dtype == torch.float64 else max(100 * wanted, 2e-5)):
        raise RuntimeError(
            f"logistic regression did not converge in {result.nit} iterations (l2 {l2:g}, largest gradient "
            f"{float(slopes.abs().max()):.1e}, {result.message}); use a larger l2 or more iterations."
        )
    rotated_weight = variables[:, :-1] * scale
    weight = rotated_weight @ basis.rotation.T
    bias = variables[:, -1] - weight @ basis.mean
    bias -= bias.mean()  # the softmax ignores a shift common to all classes
    return LogisticRegression(
        weight=weight.cpu().numpy(),
        bias=bias.cpu().numpy(),
        l2=l2,
        objective=float(result.fun),
        num_iterations=int(result.nit),
        gradient_norm=float(max((slopes[:, :-1] / scale).abs().max(), slopes[:, -1].abs().max())),
    )
