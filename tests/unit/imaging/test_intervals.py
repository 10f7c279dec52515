"""Intervals by subject, against published examples, scipy and simulation."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from imaging.intervals import bootstrap_auc, bootstrap_mean, design_effect, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)],
)
def test_wilson_agrees_with_newcombes_examples(right, count, low, high):
    values = (np.arange(count) < right).astype(int)
    told = wilson(values, np.arange(count))
    assert design_effect(values, np.arange(count)) == pytest.approx(1)
    assert (told.low, told.high) == pytest.approx((low, high), abs=5e-5)
    assert told.estimate == right / count
    assert told.subjects == count


def test_images_that_repeat_their_subject_say_nothing_new():
    once = np.random.default_rng(0).integers(0, 2, 200)
    twice, subjects = np.repeat(once, 2), np.repeat(np.arange(200), 2)
    assert design_effect(twice, subjects) == pytest.approx(2, rel=0.01)
    assert wilson(twice, subjects).low == pytest.approx(wilson(once, np.arange(200)).low, abs=1e-3)


def test_the_design_effect_is_that_of_a_hand_worked_case():
    # residuals of the four subjects from 5/8: .75, -.25, -1.25, .75; squares sum to 2.75
    right = np.array([1, 1, 1, 0, 0, 0, 1, 1])
    variance = 4 / 3 * 2.75 / 64
    expected = variance / (0.625 * 0.375 / 7)
    assert design_effect(right, np.repeat(np.arange(4), 2)) == pytest.approx(expected)


def test_a_perfect_score_counts_subjects_and_not_images():
    told = wilson(np.ones(40, dtype=int), np.repeat(np.arange(20), 2))
    assert told.low == pytest.approx(1 - 0.1611, abs=5e-5)  # 20 of 20


def test_wilson_covers_at_its_confidence_although_images_are_clustered():
    rng, covered, naive = np.random.default_rng(7), 0, 0
    subjects = np.repeat(np.arange(100), 2)
    for _ in range(300):
        share = np.repeat(rng.beta(4, 1, 100), 2)  # mean .8, and images of one subject agree
        right = (rng.random(200) < share).astype(int)
        told, plain = wilson(right, subjects), wilson(right, np.arange(200))
        covered += told.low <= 0.8 <= told.high
        naive += plain.low <= 0.8 <= plain.high
    assert covered / 300 >= 0.92
    assert covered >= naive


def test_the_bootstrap_of_means_is_scipys_on_subject_means():
    rng = np.random.default_rng(1)
    values, subjects = rng.beta(8, 2, 120), np.repeat(np.arange(60), 2)
    told = bootstrap_mean(values, subjects, seed=5)
    means = values.reshape(60, 2).mean(axis=1)
    expected = bootstrap((means,), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(5))
    assert (told.low, told.high) == pytest.approx(tuple(expected.confidence_interval))
    assert told.estimate == pytest.approx(means.mean())


def test_images_without_a_score_are_left_out_of_the_mean():
    values = np.array([0.5, np.nan, 0.7, 0.9, np.nan, np.nan])
    told = bootstrap_mean(values, np.array(["a", "a", "b", "b", "c", "c"]))
    assert told.subjects == 2
    assert told.estimate == pytest.approx((0.5 + 0.8) / 2)


def test_the_auc_interval_is_near_the_one_of_delong_for_independent_images():
    rng = np.random.default_rng(3)
    truth = np.repeat([0, 1], 150)
    score = rng.normal(truth * 1.2, 1)
    told = bootstrap_auc(truth, score, np.arange(300))
    positives, negatives = score[truth == 1], score[truth == 0]
    above = (positives[:, None] > negatives[None]).mean(axis=1), (positives[:, None] > negatives).mean(axis=0)
    error = 1.96 * np.sqrt(above[0].var(ddof=1) / 150 + above[1].var(ddof=1) / 150)
    assert (told.low, told.high) == pytest.approx((told.estimate - error, told.estimate + error), abs=0.012)


def test_an_interval_is_the_same_in_every_run():
    rng = np.random.default_rng(2)
    truth, score, subjects = rng.integers(0, 2, 80), rng.random(80), np.repeat(np.arange(40), 2)
    assert bootstrap_auc(truth, score, subjects, seed=9) == bootstrap_auc(truth, score, subjects, seed=9)
    assert bootstrap_mean(score, subjects, seed=9) == bootstrap_mean(score, subjects, seed=9)


def test_nothing_is_claimed_without_cases():
    told = wilson(np.array([], dtype=int), np.array([]))
    assert (told.low, told.high, told.subjects) == (0.0, 1.0, 0)
