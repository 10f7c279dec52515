"""Paired differences, against published examples, brute force and simulation."""

import os

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import bootstrap, norm
from sklearn.metrics import brier_score_loss, roc_auc_score

from registry.comparison import compare, compare_auc, compare_means, newcombe, tango

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
    assert told.subjects == 50  # of the rarer class


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


def test_models_that_never_differ_may_yet_differ_as_wilson_allows():
    same, square = np.linspace(0, 1, 10), norm.ppf(0.975) ** 2
    told = compare_means((same, same), np.arange(10))
    assert (told.estimate, told.high) == pytest.approx((0, square / (10 + square)))
    better = compare_means((same + 0.1, same), np.arange(10))  # the same for everybody, but for the last bits
    assert better.low == pytest.approx(0.1 - 1.1 * square / (10 + square))


def draw_scores(seed, images=200):
    """What a classifier and a detector say of the same images, two of each subject."""
    rng = np.random.default_rng(seed)
    truth = np.resize([0, 1], images)
    probability = np.clip(0.5 + (truth - 0.5) * 0.5 + rng.normal(0, 0.25, images), 0, 1)
    lesions = truth * 2
    return {"truth": truth, "probability": probability, "right": ((probability >= 0.5) == truth).astype(int),
            "lesions": lesions, "found": np.minimum(lesions, rng.integers(1, 3, images)),
            "false_positives": rng.poisson(0.5, images), "dice": rng.beta(9, 1, images),
            "surface_mm_liver": rng.gamma(2, 1, images)}  # fmt: skip


@pytest.mark.parametrize("metric", ["accuracy", "sensitivity", "specificity", "auc", "brier", "dice",
                                    "lesion_sensitivity", "false_positives", "surface_mm_liver"])  # fmt: skip
def test_a_difference_above_nought_is_for_the_better_whatever_the_metric(metric):
    first, second, people = draw_scores(1), draw_scores(2), np.repeat(np.arange(100), 2)
    told = compare(metric, (first, second), people)
    positive = first["truth"] == 1
    means = {
        "accuracy": lambda s: s["right"].mean(), "sensitivity": lambda s: s["right"][positive].mean(),
        "specificity": lambda s: s["right"][~positive].mean(), "dice": lambda s: s["dice"].mean(),
        "auc": lambda s: roc_auc_score(s["truth"], s["probability"]),
        "brier": lambda s: -brier_score_loss(s["truth"], s["probability"]),
        "lesion_sensitivity": lambda s: (s["found"] / np.maximum(s["lesions"], 1))[positive].mean(),
        "false_positives": lambda s: -s["false_positives"].mean(),
        "surface_mm_liver": lambda s: -s["surface_mm_liver"].mean(),
    }  # fmt: skip
    assert told.estimate == pytest.approx(means[metric](first) - means[metric](second))
    assert told.low < told.estimate < told.high
    assert told.subjects == 100


def test_what_one_of_two_models_was_not_scored_on_is_not_compared():
    first, second, people = draw_scores(1), draw_scores(2), np.repeat(np.arange(100), 2)
    del second["dice"]
    assert compare("dice", (first, second), people) is None
    negative = {name: values[first["truth"] == 0] for name, values in first.items()}
    for metric in ("auc", "sensitivity", "lesion_sensitivity"):
        assert compare(metric, (negative, negative), np.arange(100)) is None
