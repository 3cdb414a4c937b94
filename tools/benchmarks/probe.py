"""The linear probe's logistic regression against scikit-learn's on the same features: seconds, objective, accuracy.

Features are synthetic, non-negative and correlated, as a pooled backbone gives them. Both minimise the mean
cross-entropy plus l2 / 2 times the squared weights; scikit-learn is given lower tolerances until its objective is
within 1e-5 of ours. At the end, a whole probe: the choice of the strength, and the last fit.
"""

import argparse
import time
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from wsl_d2.transfer import fit_logistic_regression, linear_probe


def network_like_features(rng, num_images: int, dimension: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated, non-negative features (N, D) with a decaying spectrum, and their (N,) labels."""
    basis = np.linalg.qr(rng.normal(size=(dimension, dimension)))[0]
    centres = rng.normal(size=(num_classes, dimension)) * 0.7
    labels = rng.integers(0, num_classes, num_images)
    spread = np.sqrt(np.arange(1, dimension + 1) ** -1.5) * 3
    values = (rng.normal(size=(num_images, dimension)) + centres[labels]) * spread
    return np.maximum(values @ basis.T + 0.2, 0).astype(np.float32), labels


def objective(weight: np.ndarray, bias: np.ndarray, features: np.ndarray, labels: np.ndarray, l2: float) -> float:
    logits = features.astype(np.float64) @ weight.T + bias
    top = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return float((log_sum - logits[np.arange(len(labels)), labels]).mean() + l2 / 2 * (weight**2).sum())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmark.py probe", description=__doc__)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--l2", type=float, nargs="+", default=[1e-2, 1e-4])
    args = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    features, labels = network_like_features(rng, 2 * args.images, args.dimension, args.classes)
    train, test = slice(0, args.images), slice(args.images, None)
    print(f"{args.images:,} images, {args.dimension} features, {args.classes} classes")
    for l2 in args.l2:
        start = time.perf_counter()
        ours = fit_logistic_regression(features[train], labels[train], args.classes, l2)
        seconds = time.perf_counter() - start
        lowest = objective(ours.weight, ours.bias, features[train], labels[train], l2)
        accuracy = float((ours.scores(features[test]).argmax(axis=1) == labels[test]).mean())
        print(f"l2 {l2:g}: wsl_d2 {seconds:.2f} s, objective {lowest:.8f}, top-1 {100 * accuracy:.3f}")
        for tolerance in (1e-4, 1e-5, 1e-6, 1e-7):
            peer = LogisticRegression(C=1 / (l2 * args.images), tol=tolerance, max_iter=20_000)
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                peer.fit(features[train].astype(np.float64), labels[train])
            theirs = time.perf_counter() - start
            gap = objective(peer.coef_, peer.intercept_, features[train], labels[train], l2) / lowest - 1
            same = float((peer.predict(features[test]) == labels[test]).mean())
            print(
                f"  scikit-learn, tol {tolerance:g}: {theirs:.2f} s ({theirs / seconds:.1f} times as long), objective "
                f"{gap:+.1e} relative to ours, top-1 {100 * same:.3f}"
            )
            if gap <= 1e-5:
                break
    start, cpu_start = time.perf_counter(), time.process_time()
    probe = linear_probe(features[train], labels[train], features[test], labels[test], args.classes)
    print(
        f"whole probe, {len(probe.held_out_top1)} strengths tried: {time.perf_counter() - start:.2f} s, "
        f"{time.process_time() - cpu_start:.2f} s of CPU, l2 {probe.l2:g}, top-1 {probe.top1:.3f}"
    )


if __name__ == "__main__":
    main()
