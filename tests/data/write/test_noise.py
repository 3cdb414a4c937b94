import numpy as np
import pytest
from toy_data import TOY_HASHTAGS, random_index

from wsl_d2.data import HashtagDataset, make_view
from wsl_d2.data.write.noise import LabelNoise

INDEX = random_index(num_images=20_000, num_labels=40)
COUNTS = INDEX.hashtag_counts()
ROW = np.repeat(np.arange(INDEX.num_images), np.diff(INDEX.indptr))


def noisy(fraction, seed=0):
    return LabelNoise(fraction, seed, COUNTS).replace(INDEX.indptr, INDEX.labels)


def sets(labels):
    return [set(labels[a:b].tolist()) for a, b in zip(INDEX.indptr[:-1], INDEX.indptr[1:], strict=True)]


def test_no_noise_changes_nothing():
    assert np.array_equal(noisy(0.0), INDEX.labels)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 1.0])
def test_that_fraction_is_replaced_and_never_by_a_label_of_the_image(fraction):
    labels = noisy(fraction)
    assert labels.dtype == INDEX.labels.dtype
    kept = 0
    for clean, changed in zip(sets(INDEX.labels), sets(labels), strict=True):
        assert len(changed) == len(clean)  # the same number of labels, all different
        kept += len(clean & changed)
    entries = len(INDEX.labels)
    sd = (fraction * (1 - fraction) * entries) ** 0.5
    assert abs(entries - kept - fraction * entries) <= 4 * sd
    assert all(np.all(np.diff(labels[a:b]) > 0) for a, b in zip(INDEX.indptr[:500], INDEX.indptr[1:501], strict=True))


def test_draws_follow_the_marginal_distribution():
    """Of images with one label, all replaced: the expected counts are those of the distribution without that label."""
    single = np.flatnonzero(np.diff(INDEX.indptr) == 1)
    clean, drawn = INDEX.labels[INDEX.indptr[single]], noisy(1.0)[INDEX.indptr[single]]
    p = COUNTS / COUNTS.sum()
    expected = np.zeros(len(p))
    for label, number in zip(*np.unique(clean, return_counts=True), strict=True):
        others = np.where(np.arange(len(p)) == label, 0, p)
        expected += number * others / others.sum()
    observed = np.bincount(drawn, minlength=len(p))
    large = expected >= 5
    chi_square = ((observed - expected)[large] ** 2 / expected[large]).sum()
    degrees = large.sum() - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_noise_is_a_function_of_seed_and_image_alone():
    whole = noisy(0.5, seed=3)
    assert np.array_equal(whole, noisy(0.5, seed=3)) and not np.array_equal(whole, noisy(0.5, seed=4))
    noise = LabelNoise(0.5, 3, COUNTS)
    for first, last in ((0, 1), (17, 18), (100, 350), (19_999, 20_000)):
        a, b = INDEX.indptr[first], INDEX.indptr[last]
        part = noise.replace(INDEX.indptr[first : last + 1] - a, INDEX.labels[a:b], first)
        assert np.array_equal(part, whole[a:b])


def test_more_noise_keeps_what_less_noise_replaced():
    """Studies over fractions are nested: whoever is replaced at 10% is replaced at 25%."""
    changed = [[c - n for c, n in zip(sets(INDEX.labels), sets(noisy(p)), strict=True)] for p in (0.1, 0.25)]
    assert all(less <= more for less, more in zip(*changed, strict=True))


def test_images_with_nearly_all_labels():
    indptr, labels = np.array([0, 3, 7]), np.array([0, 1, 2, 0, 1, 2, 3], np.int32)
    changed = LabelNoise(1.0, 0, np.array([9, 5, 5, 1])).replace(indptr, labels)
    assert 3 in changed[:3] and len(set(changed[:3].tolist())) == 3  # one other label exists, so one is replaced
    assert changed[3:].tolist() == [0, 1, 2, 3]
    rare = LabelNoise(1.0, 0, np.array([10**15, 1])).replace(np.array([0, 1]), np.array([0]))
    assert rare.tolist() == [1]


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_fractions(fraction):
    with pytest.raises(ValueError, match=r"label noise is a fraction in \[0, 1\]"):
        LabelNoise(fraction, 0, COUNTS)


def test_a_view_has_the_noise_and_its_source_has_not(hashtag_folder, tmp_path, toy_vocabulary):
    def read(folder):
        dataset = HashtagDataset(folder)
        return [dataset[i]["labels"].tolist() for i in range(len(dataset))]

    clean = read(hashtag_folder)
    assert clean[0] == toy_vocabulary.labels(TOY_HASHTAGS[:2]).tolist()
    manifest = make_view(hashtag_folder, tmp_path / "view", label_noise=0.5)
    noisy = read(tmp_path / "view")
    assert sum(a != b for a, b in zip(clean, noisy, strict=True)) > 10 and read(hashtag_folder) == clean
    index = HashtagDataset(tmp_path / "view").index  # what resampling sees
    assert [index.labels[a:b].tolist() for a, b in zip(index.indptr[:-1], index.indptr[1:], strict=True)] == noisy
    assert manifest["hashtag_counts"] == index.hashtag_counts().tolist()
