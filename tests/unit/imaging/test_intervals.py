"""Intervals by subject, against published examples, scipy and simulation."""

import os

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from imaging.intervals import (
    auc_components,
    bootstrap_mean,
    bootstrap_statistic,
    calibration_line,
    delong,
    design_effect,
    spread_auc,
    wilson,
)
from imaging.scores import calibration_error

REPEATS = 2000 if os.environ.get("FORMULARY_SOAK") else 200


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


def test_so_many_subjects_that_a_jackknife_would_not_end_are_bootstrapped_all_the_same():
    values = np.random.default_rng(1).gamma(1.0, 1.0, 20_000)
    told = bootstrap_mean(values, np.arange(20_000))
    half = 1.959964 * values.std() / np.sqrt(20_000)
    assert (told.low, told.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.1 * half
    )
    assert "percentile" in told.method


def test_images_without_a_score_are_left_out_of_the_mean():
    values = np.array([0.5, np.nan, 0.7, 0.9, np.nan, np.nan])
    told = bootstrap_mean(values, np.array(["a", "a", "b", "b", "c", "c"]))
    assert told.subjects == 2
    assert told.estimate == pytest.approx((0.5 + 0.8) / 2)


def obuchowski(truth, score, subjects):
    """AUC and variance by the sums of the paper, pair by pair and subject by subject."""
    x, y = score[truth == 1], score[truth == 0]
    owner_x, owner_y = subjects[truth == 1], subjects[truth == 0]
    wins = [[1.0 if a > b else 0.5 if a == b else 0.0 for b in y] for a in x]
    m, n = len(x), len(y)
    area = sum(map(sum, wins)) / (m * n)
    s10 = s01 = s11 = 0.0
    for name in set(subjects):
        ten = sum(sum(wins[i]) / n - area for i in range(m) if owner_x[i] == name)
        one = sum(sum(row[j] for row in wins) / m - area for j in range(n) if owner_y[j] == name)
        s10, s01, s11 = s10 + ten**2, s01 + one**2, s11 + ten * one
    i10, i01, total = len(set(owner_x)), len(set(owner_y)), len(set(subjects))
    s10, s01, s11 = s10 * i10 / ((i10 - 1) * m), s01 * i01 / ((i01 - 1) * n), s11 * total / (total - 1)
    return area, s10 / m + s01 / n + 2 * s11 / (m * n)


def draw_clustered(rng, subjects, effect=1.0, spread=1.0):
    """Two images a subject that share a part of their score; some subjects have one positive of the two."""
    people = np.repeat(np.arange(subjects), 2)
    truth = np.where(rng.random(2 * subjects) < 0.8, np.repeat(rng.integers(0, 2, subjects), 2), 0)
    truth[:2] = 0, 1
    return (
        truth,
        truth * effect + np.repeat(rng.normal(0, spread, subjects), 2) + rng.normal(size=len(people)),
        people,
    )


@pytest.mark.parametrize("rounding", [1, 9])
def test_the_clustered_auc_is_that_of_obuchowskis_sums(rounding):
    for seed in range(5):
        truth, score, subjects = draw_clustered(np.random.default_rng(seed), 25)
        score = score.round(rounding)  # ties too
        told = spread_auc(*auc_components(truth, score), truth == 1, subjects)
        assert told == pytest.approx(obuchowski(truth, score, subjects))
        assert told[0] == pytest.approx(roc_auc_score(truth, score))


def test_with_one_image_a_subject_it_is_delongs():
    rng = np.random.default_rng(3)
    truth = rng.permutation(np.repeat([0, 1], [60, 40]))
    score = rng.normal(truth * 1.2, 1)
    wins = (score[truth == 1][:, None] > score[truth == 0]).astype(float)
    expected = wins.mean(axis=1).var(ddof=1) / 40 + wins.mean(axis=0).var(ddof=1) / 60
    assert spread_auc(*auc_components(truth, score), truth == 1, np.arange(100))[1] == pytest.approx(expected)
    told, middle = delong(truth, score, np.arange(100)), wins.mean()
    half = 1.959964 * np.sqrt(expected) / (middle * (1 - middle))  # the delta method on the logit scale
    odds = middle / (1 - middle) * np.exp([-half, half])
    assert (told.low, told.high) == pytest.approx(tuple(odds / (1 + odds)))


def test_the_auc_interval_covers_although_images_are_clustered():
    rng, covered, naive = np.random.default_rng(11), 0, 0
    truth, score, _ = draw_clustered(rng, 200_000)
    area = roc_auc_score(truth, score)
    for _ in range(REPEATS):
        truth, score, subjects = draw_clustered(rng, 60)
        told, plain = delong(truth, score, subjects), delong(truth, score, np.arange(120))
        covered += told.low <= area <= told.high
        naive += plain.low <= area <= plain.high
    assert 0.92 <= covered / REPEATS <= 0.98
    assert naive < covered - 0.015 * REPEATS


def test_a_perfect_ranking_is_no_certainty():
    truth = np.repeat([1, 0], [20, 50])
    told = delong(truth, truth.astype(float), np.arange(70))
    assert (told.low, told.high) == (pytest.approx(1 - 0.1611, abs=5e-5), 1.0)  # Wilson of 20 in 20
    nothing = delong(np.ones(5, int), np.arange(5.0), np.arange(5))
    assert (nothing.low, nothing.high) == (0.0, 1.0)


def test_the_bootstrap_of_a_statistic_is_near_scipys_bca_on_independent_images():
    rng = np.random.default_rng(8)
    values = rng.gamma(2.0, 1.0, 150)
    told = bootstrap_statistic(lambda rows: float(np.median(values[rows])), np.arange(150), seed=1)
    expected = bootstrap(
        (values,), np.median, n_resamples=4000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert (told.low, told.high) == pytest.approx(tuple(expected), abs=0.06)
    assert told.estimate == np.median(values)


def test_the_bootstrap_draws_subjects_and_keeps_the_size_of_each_stratum():
    subjects = np.array(["a", "a", "b", "c", "c", "d"])
    site = np.array([1, 1, 1, 2, 2, 2])

    def check(rows):
        counts = np.bincount(rows, minlength=6)
        assert counts[0] == counts[1]
        assert counts[3] == counts[4]
        assert counts[0] + counts[2] == 2 == counts[3] + counts[5]
        return float(counts[0])

    told = bootstrap_statistic(check, subjects, strata=site)
    assert told.subjects == 4
    assert (told.low, told.high) == (0.0, 2.0)


def test_the_interval_of_a_clustered_mean_covers_by_bootstrap():
    rng, covered = np.random.default_rng(5), 0
    repeats = REPEATS // 4
    subjects = np.repeat(np.arange(50), 2)
    for _ in range(repeats):
        values = np.repeat(rng.normal(0, 1, 50), 2) + rng.normal(0, 0.5, 100)
        told = bootstrap_statistic(lambda rows, values=values: float(values[rows].mean()), subjects)
        covered += told.low <= 0 <= told.high
    assert covered / repeats >= 0.88


def test_the_bootstrap_undoes_what_the_calibration_error_gains_by_resampling():
    rng = np.random.default_rng(6)
    score = rng.random(200)
    truth = (rng.random(200) < score).astype(int)
    told = bootstrap_statistic(lambda rows: calibration_error(truth[rows], score[rows]), np.arange(200))
    draws = [calibration_error(truth[rows], score[rows]) for rows in rng.integers(0, 200, (300, 200))]
    assert np.percentile(draws, 2.5) > told.low  # plain percentiles would lie too high


def test_the_calibration_line_undoes_a_known_overconfidence():
    rng = np.random.default_rng(9)
    honest = rng.normal(0, 1.5, 20_000)
    truth = (rng.random(20_000) < 1 / (1 + np.exp(-honest))).astype(int)
    said = 1 / (1 + np.exp(-(2 * honest + 1)))  # twice too sure, and too high: slope 1/2, intercept -1/2
    slope, intercept = calibration_line(truth, said, np.arange(20_000))
    assert (slope.estimate, intercept.estimate) == pytest.approx((0.5, -0.5), abs=0.04)
    assert slope.low < 0.5 < slope.high
    fitted = LogisticRegression(C=1e9, tol=1e-9).fit((2 * honest + 1)[:, None], truth)
    assert slope.estimate == pytest.approx(fitted.coef_[0, 0], rel=1e-3)
    assert intercept.estimate == pytest.approx(fitted.intercept_[0], rel=1e-3)


def test_the_calibration_line_is_robust_by_subject():
    truth, score, subjects = draw_clustered(np.random.default_rng(4), 80)
    said = 1 / (1 + np.exp(-score))
    slope, _ = calibration_line(truth, said, subjects)
    x = np.stack([np.ones(160), np.log(said / (1 - said))], axis=1)
    beta = np.zeros(2)
    for _ in range(30):  # Newton by hand, then the sandwich over subjects
        p = 1 / (1 + np.exp(-x @ beta))
        bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x)
        beta = beta + bread @ x.T @ (truth - p)
    sums = (x * (truth - p)[:, None]).reshape(80, 2, 2).sum(axis=1)
    variance = 80 / 79 * 159 / 158 * bread @ sums.T @ sums @ bread
    assert slope.estimate == pytest.approx(beta[1])
    assert slope.high - slope.estimate == pytest.approx(1.959964 * np.sqrt(variance[1, 1]), rel=1e-4)


def test_there_is_no_calibration_line_where_the_classes_do_not_overlap():
    score = np.linspace(0.1, 0.9, 20)
    assert calibration_line((score > 0.5).astype(int), score, np.arange(20)) is None
    assert calibration_line((score < 0.5).astype(int), score, np.arange(20)) is None
    assert calibration_line(np.ones(20, int), score, np.arange(20)) is None


def test_an_interval_is_the_same_in_every_run():
    rng = np.random.default_rng(2)
    score, subjects = rng.random(80), np.repeat(np.arange(40), 2)
    for _ in range(2):
        told = bootstrap_statistic(lambda rows: float(score[rows].mean()), subjects, seed=9)
        assert told == bootstrap_statistic(lambda rows: float(score[rows].mean()), subjects, seed=9)
    assert bootstrap_mean(score, subjects, seed=9) == bootstrap_mean(score, subjects, seed=9)


def test_where_resampling_says_nothing_the_bounds_are_told():
    told = bootstrap_mean(np.zeros(6), np.arange(6), bounds=(0.0, 40.0))
    assert (told.estimate, told.low, told.high) == (0.0, 0.0, 40.0)


def test_nothing_is_claimed_without_cases():
    told = wilson(np.array([], dtype=int), np.array([]))
    assert (told.low, told.high, told.subjects) == (0.0, 1.0, 0)


def test_the_difference_of_means_is_scipys_on_the_differences_of_subjects():
    rng = np.random.default_rng(4)
    apart, subjects = rng.random(80) - rng.random(80), np.repeat(np.arange(40), 2)
    told = bootstrap_mean(apart, subjects, seed=6, bounds=(-1.0, 1.0))
    means = apart.reshape(40, 2).mean(axis=1)
    expected = bootstrap((means,), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(6))
    assert (told.low, told.high) == pytest.approx(tuple(expected.confidence_interval))


def test_models_that_never_differ_are_not_called_equal():
    told = bootstrap_mean(np.zeros(10), np.arange(10), bounds=(-1.0, 1.0))
    assert (told.estimate, told.low, told.high) == (0.0, -1.0, 1.0)
