"""Paired differences, against published examples, brute force and simulation."""

import os

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import bootstrap, norm

from imaging.comparison import compare_auc, compare_means, newcombe, tango

REPEATS = 2000 if os.environ.get("FORMULARY_SOAK") else 200


def pair_of(both, first, second, neither):
    counts = (both, first, second, neither)
    return np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)


# As tested in the R package ratesci, after Newcombe 1998, Fagerland 2014 and Tang 2010.
@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        ((20, 12, 2, 16), 0.0562, 0.3292),
        ((1, 1, 7, 12), -0.507, -0.026),
        ((8, 3, 1, 2), -0.1574, 0.4136),
        ((7, 25, 2, 68), 0.133, 0.318),
    ],
)
def test_newcombes_interval_is_that_of_the_published_examples(cells, low, high):
    told = newcombe(pair_of(*cells), np.arange(sum(cells)))
    assert (told.low, told.high) == pytest.approx((low, high), abs=6e-4 if low in (-0.507, 0.133) else 6e-5)
    assert told.estimate == pytest.approx((cells[1] - cells[2]) / sum(cells))


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        ((1, 1, 7, 12), -0.517, -0.026),
        ((53, 16, 8, 9), -0.020, 0.207),
        ((8, 3, 1, 2), -0.1670, 0.4327),
        ((7, 25, 2, 68), 0.139, 0.321),
    ],
)
def test_tangos_interval_is_that_of_the_published_examples(cells, low, high):
    told = tango(pair_of(*cells), np.arange(sum(cells)))
    assert (told.low, told.high) == pytest.approx((low, high), abs=6e-4)


@pytest.mark.parametrize("cells", [(10, 0, 0, 0), (0, 12, 0, 0), (0, 0, 9, 0), (5, 0, 0, 5)])
def test_differences_at_the_edge_keep_the_estimate_within(cells):
    for method in (newcombe, tango):
        told = method(pair_of(*cells), np.arange(sum(cells)))
        assert -1 <= told.low <= told.estimate <= told.high <= 1
        assert told.high - told.low > 0.1


@pytest.mark.parametrize("method", [newcombe, tango])
def test_images_that_repeat_their_subject_say_nothing_new_of_a_difference(method):
    pair = pair_of(20, 12, 2, 16)
    once = method(pair, np.arange(50))
    twice = method(tuple(np.repeat(right, 2) for right in pair), np.repeat(np.arange(50), 2))
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high), abs=0.005)
    assert twice.subjects == 50


def draw_pair(rng, subjects):
    """Two equally good models on two images a subject, whose images agree."""
    ease = np.repeat(rng.normal(1, 1, subjects), 2)
    own = [np.repeat(rng.normal(0, 0.7, subjects), 2) for _ in range(2)]
    return tuple((ease + part + rng.normal(size=len(ease)) > 0).astype(int) for part in own)


@pytest.mark.parametrize("method", [newcombe, tango])
def test_equal_models_are_called_different_as_often_as_was_asked(method):
    rng, wrong, naive = np.random.default_rng(1), 0, 0
    subjects = np.repeat(np.arange(100), 2)
    for _ in range(REPEATS):
        pair = draw_pair(rng, 100)
        told, plain = method(pair, subjects), method(pair, np.arange(200))
        wrong += not told.low <= 0 <= told.high
        naive += not plain.low <= 0 <= plain.high
    assert wrong / REPEATS <= (0.065 if REPEATS >= 2000 else 0.09)
    assert wrong <= naive


def test_the_interval_is_near_that_of_a_regression_robust_by_subject():
    pair = draw_pair(np.random.default_rng(3), 300)
    subjects = np.repeat(np.arange(300), 2)
    fitted = sm.OLS(pair[0] - pair[1], np.ones(600)).fit(cov_type="cluster", cov_kwds={"groups": subjects})
    for method in (newcombe, tango):
        told = method(pair, subjects)
        assert (told.low, told.high) == pytest.approx(tuple(fitted.conf_int()[0]), abs=0.003)


def test_the_difference_of_two_areas_is_delongs():
    rng = np.random.default_rng(2)
    truth = rng.permutation(np.repeat([0, 1], [70, 50]))
    first, second = rng.normal(truth * 1.5, 1), rng.normal(truth, 1)
    second = second + 0.5 * first
    wins = [(s[truth == 1][:, None] > s[truth == 0]).astype(float) for s in (first, second)]
    ten, one = np.cov([w.mean(axis=1) for w in wins]), np.cov([w.mean(axis=0) for w in wins])
    contrast = np.array([1, -1])
    variance = contrast @ (ten / 50 + one / 70) @ contrast
    told = compare_auc(truth, (first, second), np.arange(120))
    difference = wins[0].mean() - wins[1].mean()
    assert told.estimate == pytest.approx(difference)
    assert told.high == pytest.approx(difference + norm.ppf(0.975) * np.sqrt(variance))


def test_equal_areas_of_clustered_images_are_called_different_as_often_as_was_asked():
    rng, wrong, naive = np.random.default_rng(7), 0, 0
    subjects = np.repeat(np.arange(80), 2)
    for _ in range(REPEATS):
        truth = np.repeat(rng.permutation(np.repeat([0, 1], 40)), 2)
        own = [np.repeat(rng.normal(size=80), 2) for _ in range(2)]
        pair = tuple(truth + part + 0.7 * rng.normal(size=160) for part in own)
        told, plain = compare_auc(truth, pair, subjects), compare_auc(truth, pair, np.arange(160))
        wrong += not told.low <= 0 <= told.high
        naive += not plain.low <= 0 <= plain.high
    assert wrong / REPEATS <= (0.065 if REPEATS >= 2000 else 0.09)
    assert naive / REPEATS > 0.08


def test_the_difference_of_means_is_scipys_on_the_differences_of_subjects():
    rng = np.random.default_rng(4)
    first, second, subjects = rng.random(80), rng.random(80), np.repeat(np.arange(40), 2)
    told = compare_means((first, second), subjects, seed=6)
    means = (first - second).reshape(40, 2).mean(axis=1)
    expected = bootstrap((means,), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(6))
    assert (told.low, told.high) == pytest.approx(tuple(expected.confidence_interval))


def test_models_that_never_differ_are_not_called_equal():
    same = np.linspace(0, 1, 10)
    told = compare_means((same, same), np.arange(10))
    assert (told.estimate, told.low, told.high) == (0.0, -1.0, 1.0)
