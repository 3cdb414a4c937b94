"""The two intervals of a gain, and what would settle an open question."""

import math

import numpy as np
import pytest
from benchmarks.coverage import TRUE_GAIN, World, measure
from scipy import stats

from wsl_d2.analysis import BootstrapEstimate, gain_of, verdict, what_would_settle
from wsl_d2.analysis.ap_gain import draw_counts


def runs(*points, noise=None, own=None):
    """Runs on the same images: ``noise`` (B,) is common to them, ``own`` (runs, B) is not."""
    noise = np.zeros(500) if noise is None else noise
    own = np.zeros((len(points), len(noise))) if own is None else own
    return [BootstrapEstimate(point, point + noise + o) for point, o in zip(points, own, strict=True)]


def noise(sd, seed=0, shape=(500,)):
    """Of exactly this standard deviation and of mean 0 along the last axis."""
    values = np.random.default_rng(seed).normal(size=shape)
    values -= values.mean(axis=-1, keepdims=True)
    return sd * values / values.std(axis=-1, ddof=1, keepdims=True)


def test_one_run_on_a_side_says_nothing_of_the_method():
    for before, after in ((runs(10), runs(14)), (runs(10, 11), runs(14)), (runs(10), runs(14, 15))):
        gain = gain_of(before, after)
        assert gain["method_interval"] is None and gain["method_p_value"] is None and gain["seed_sds"] is None
        assert verdict(gain) == "these detectors only: gain"


def test_the_interval_of_these_models_is_of_the_mean_over_runs():
    shared = noise(0.5)
    gain = gain_of(runs(10, 12), runs(15, 19, noise=shared))
    assert (gain["baseline"], gain["candidate"], gain["gain"], gain["num_runs"]) == (11, 17, 6, [2, 2])
    np.testing.assert_allclose(gain["interval"], 6 + np.percentile(shared, [2.5, 97.5]))


def test_without_image_noise_it_is_welchs():
    before, after = [10.0, 11.0, 12.5], [14.0, 14.5, 17.0, 15.0]
    gain = gain_of(runs(*before), runs(*after))
    welch = stats.ttest_ind(after, before, equal_var=False)
    assert gain["method_p_value"] == pytest.approx(welch.pvalue)
    assert gain["degrees_of_freedom"] == pytest.approx(welch.df)
    np.testing.assert_allclose(gain["method_interval"], welch.confidence_interval(0.95))
    assert gain["seed_sds"] == pytest.approx([np.std(before, ddof=1), np.std(after, ddof=1)])


def test_paired_without_image_noise_it_is_the_t_test_of_pairs():
    before, after = [10.0, 11.0, 12.5], [14.0, 14.5, 17.0]
    gain = gain_of(runs(*before), runs(*after), paired=True)
    pairs = stats.ttest_rel(after, before)
    np.testing.assert_allclose(gain["method_interval"], pairs.confidence_interval(0.95))
    assert gain["method_p_value"] == pytest.approx(pairs.pvalue)
    with pytest.raises(ValueError, match="pairs need 3 runs or more, as many on each side; got 2 and 3"):
        gain_of(runs(*before[:2]), runs(*after), paired=True)


def test_without_seed_noise_it_is_normal_over_images():
    gain = gain_of(runs(10, 10), runs(12, 12, noise=noise(0.5)))
    half = stats.norm.ppf(0.975) * 0.5
    np.testing.assert_allclose(gain["method_interval"], [2 - half, 2 + half])
    assert gain["image_sd"] == pytest.approx(0.5) and gain["degrees_of_freedom"] is None


def test_both_variances_add_up_with_satterthwaites_degrees_of_freedom():
    gain = gain_of(runs(10, 11, 12), runs(14, 16, 18, noise=noise(0.5)))
    parts = [1 / 3, 4 / 3]
    total = 0.25 + sum(parts)
    freedom = total**2 / sum(part**2 / 2 for part in parts)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(total)
    np.testing.assert_allclose(gain["method_interval"], [5 - half, 5 + half])


def uncorrelated(sd, seed=0):
    """What images do to each of two runs alone, of exactly this standard deviation."""
    own = noise(sd, seed, shape=(2, 500))
    own[1] -= own[0] * (own[0] @ own[1]) / (own[0] @ own[0])
    own[1] *= sd / own[1].std(ddof=1)
    return own


def test_what_images_do_to_one_run_alone_is_not_counted_twice():
    """The points' spread of 2 is a variance of 1 by images, so of 1 by seeds."""
    gain = gain_of(runs(10, 10), runs(13, 15, own=uncorrelated(1.0)))
    assert gain["run_image_sds"] == pytest.approx([0, 1]) and gain["seed_sds"] == pytest.approx([0, 1])
    half = (gain["method_interval"][1] - gain["method_interval"][0]) / 2
    freedom = 1**2 / (2 / 2 * 1 / 2)  # the spread of 2 counts by half
    assert gain["degrees_of_freedom"] == pytest.approx(freedom)
    assert half == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(2 / 2))


def test_runs_that_agree_by_chance_do_not_make_it_narrower_than_over_images():
    before, after = runs(10, 10, own=uncorrelated(1.0)), runs(11, 11.1, own=uncorrelated(1.0, seed=5))
    gain = gain_of(before, after)
    gains = np.mean([run.replicates for run in after], axis=0) - np.mean([run.replicates for run in before], axis=0)
    low, high = gain["method_interval"]
    assert gain["seed_sds"] == [0, 0] and gains.std(ddof=1) > 0.8
    assert (high - low) / 2 >= stats.norm.ppf(0.975) * gains.std(ddof=1) * (1 - 1e-9)


def test_a_spread_to_assume_stands_in_for_single_runs():
    gain = gain_of(runs(10), runs(11, noise=noise(0.4)), seed_sd=0.3)
    half = stats.norm.ppf(0.975) * math.sqrt(0.4**2 + 2 * 0.3**2)
    np.testing.assert_allclose(gain["method_interval"], [1 - half, 1 + half])
    assert verdict(gain) == "no gain shown"
    known = gain_of(runs(10, 12), runs(11, 13), seed_sd=0.3)
    assert known["seed_sds"] == pytest.approx([math.sqrt(2)] * 2)  # what was measured counts
    mixed = gain_of(runs(10, 12), runs(14), seed_sd=0.3)
    assert mixed["seed_sds"] == pytest.approx([math.sqrt(2), 0.3])


def test_verdicts_follow_the_method_alone():
    """Three seeds that scatter: over images the gain is certain, over trainings it is not."""
    gain = gain_of(runs(10, 12, 14), runs(11, 13, 15.5, noise=noise(0.1)))
    assert gain["interval"][0] > 0 and verdict(gain) == "no gain shown"
    assert verdict(gain_of(runs(10, 10.1), runs(15, 15.1))) == "gain"
    assert verdict(gain_of(runs(15, 15.1), runs(10, 10.1))) == "loss"


def test_what_is_not_defined_has_no_interval():
    nothing = [BootstrapEstimate(float("nan"), np.full(20, np.nan))] * 2
    gain = gain_of(nothing, nothing)
    assert math.isnan(gain["gain"]) and all(map(math.isnan, gain["interval"])) and gain["method_interval"] is None
    assert what_would_settle(gain, 100)["exclude_0"] == {"runs": None, "images": None}


def test_resamples_without_an_object_are_left_out():
    replicates = np.where(np.arange(500) % 5, 12 + noise(0.5), np.nan)
    gain = gain_of(runs(10, 11), [BootstrapEstimate(12, replicates), BootstrapEstimate(13, replicates + 1)])
    assert all(math.isfinite(v) for v in [*gain["interval"], *gain["method_interval"]])


def test_identical_runs():
    gain = gain_of(runs(10, 10), runs(10, 10))
    assert gain["method_interval"] == [0, 0] and gain["method_p_value"] == 1 and verdict(gain) == "no gain shown"


def test_more_runs_or_images_that_would_settle_it():
    gain = gain_of(runs(10, 12), runs(12, 15, noise=noise(0.5)))
    low, high = gain["method_interval"]
    assert low < 0 < high
    answer = what_would_settle(gain, num_images=400)

    def half_width(number, image_sd=0.5):
        parts = [v / number for v in (2, 4.5)]
        total = image_sd**2 + sum(parts)
        return stats.t.ppf(0.975, total**2 / sum(p**2 / (number - 1) for p in parts)) * math.sqrt(total)

    number = answer["exclude_0"]["runs"]
    assert half_width(number) < 2.5 <= half_width(number - 1)
    number = answer["half_as_wide"]["runs"]
    assert half_width(number) < (high - low) / 4 <= half_width(number - 1)
    assert answer["exclude_0"]["images"] is None  # two runs that scatter so are the limit
    few = gain_of(runs(10), runs(10.5, noise=noise(0.5)))
    answer = what_would_settle(few, num_images=400)["exclude_0"]
    assert answer["runs"] is None and 1600 == pytest.approx(answer["images"], rel=0.2)  # (1.96 * 0.5 / 0.5)^2 as many


@pytest.mark.parametrize(
    "seeds, ratio, unequal", [(2, 1, False), (2, 5, True), (3, 0, False), (3, 5, False), (5, 1, True)]
)
@pytest.mark.parametrize("interaction", [0.0, 0.5])
def test_the_interval_of_the_method_covers(seeds, ratio, unequal, interaction):
    """The whole table: tools/benchmark.py coverage."""
    assert TRUE_GAIN != 0
    counts = draw_counts(100, 200, 0).astype(float)
    row = measure(World(seeds, ratio, unequal, interaction), 600, counts, seed=3)
    assert (0.88 if unequal else 0.92) <= row["method"] <= 0.99


def test_pairs_of_seeds_cover_and_pay_where_seeds_explain_much():
    counts = draw_counts(100, 200, 0).astype(float)
    alike = World(5, 5.0, correlation=0.8)
    paired, apart = (measure(alike, 500, counts, seed=4, paired=flag) for flag in (True, False))
    assert 0.92 <= paired["method"] <= 0.98 < apart["method"]
    assert paired["width"] < apart["width"]
