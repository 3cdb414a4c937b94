import math

import numpy as np
import pytest

from wsl_d2.analysis.scaling import compare_growth, compare_slopes, fit_log_linear, fit_saturating

IMAGES = np.array([2e6, 2e7, 9e7, 9.4e8, 3.5e9])


def test_a_noise_free_law_is_recovered():
    fit = fit_log_linear(IMAGES, 12.5 + 3.25 * np.log10(IMAGES))
    assert fit.intercept == pytest.approx(12.5) and fit.slope_per_decade == pytest.approx(3.25)
    assert fit.slope_interval == pytest.approx((3.25, 3.25), abs=1e-6)
    assert np.abs(fit.residuals).max() < 1e-10
    value, (low, high) = fit.predict(1e10)
    assert value == pytest.approx(45.0) and high - low < 1e-6


def test_intervals_hold_what_they_promise():
    """95% of the slopes, and of new measurements ten times further out, over simulated studies of 3 and 5 points."""
    rng = np.random.default_rng(0)
    for images in (IMAGES[:3], IMAGES):
        decades, studies = np.log10(images), 4000
        slopes = predictions = 0
        for _ in range(studies):
            fit = fit_log_linear(images, 10 + 2 * decades + rng.normal(0, 0.5, len(images)))
            slopes += fit.slope_interval[0] <= 2 <= fit.slope_interval[1]
            low, high = fit.predict(3.5e10)[1]
            predictions += low <= 10 + 2 * np.log10(3.5e10) + rng.normal(0, 0.5) <= high
        assert 0.93 < slopes / studies < 0.97 and 0.93 < predictions / studies < 0.97


def test_four_in_five_studies_find_the_difference_that_they_name():
    rng, images, studies = np.random.default_rng(0), np.repeat([10, 100, 1000], 5), 1000
    detectable = 2.0  # settles at the mean of what the studies name

    def study(true_difference: float) -> dict:
        lines = [slope * np.log10(images) + rng.normal(0, 0.5, 15) for slope in (1, 1 + true_difference)]
        return compare_slopes(*(fit_log_linear(images, line) for line in lines))

    for _ in range(3):
        detectable = float(np.mean([study(detectable)["detectable"] for _ in range(100)]))
    found = np.mean([study(detectable)["p_value"] < 0.05 for _ in range(studies)])
    assert 0.76 < found < 0.84


@pytest.mark.parametrize(
    "images, metric, message",
    [
        ([1e6, 1e7], [1, 2], r"at least 3 points, got 2 \(a, b\)"),
        ([1e6, 1e7, 1e8], [1, float("nan"), 2], "b: the result is nan; finish the run or leave it out"),
        ([1e6, 0, 1e8], [1, 2, 3], "b: the number of images must be above 0, got 0"),
        ([1e6, 1e6, 1e6], [1, 2, 3], r"all runs have 1e\+06 images"),
        ([1e6, 1e7, 1e8], [1, 2], "3 numbers of images for 2 results"),
    ],
)
def test_what_cannot_be_fitted(images, metric, message):
    with pytest.raises(ValueError, match=message):
        fit_log_linear(images, metric, names=list("abc")[: len(metric)])


def test_a_noise_free_curve_is_recovered_exactly():
    images = [10**k for k in (3, 3.5, 4, 5, 6)]
    fit = fit_saturating(images, [80 - 300 * n**-0.4 for n in images])
    assert (fit.ceiling, fit.loss_at_one, fit.exponent) == pytest.approx((80, 300, 0.4), rel=1e-5)
    assert fit.predict(1e7) == pytest.approx(80 - 300 * 1e7**-0.4)


def test_line_and_curve_are_told_apart():
    rng = np.random.default_rng(0)
    images = np.repeat([10**k for k in (3, 3.5, 4, 4.5, 5, 5.5)], 3)
    line = compare_growth(images.tolist(), (10 + 8 * np.log10(images) + rng.normal(0, 0.2, len(images))).tolist())
    curve = compare_growth(images.tolist(), (70 - 900 * images**-0.5 + rng.normal(0, 0.2, len(images))).tolist())
    assert line["aicc_difference"] > 0 and line["error_of_line"] < 0.5
    assert curve["aicc_difference"] < -10 and curve["error_of_curve"] < curve["error_of_line"]


def test_a_comparison_of_too_few_points_is_refused():
    with pytest.raises(ValueError, match="6 points at 4 different"):
        compare_growth([1, 10, 100], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="3 different numbers"):
        fit_saturating([1, 10, 10], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="run b: the result is nan"):
        fit_saturating([1, 10, 100], [1.0, math.nan, 3.0], ["run a", "run b", "run c"])
