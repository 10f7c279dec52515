"""Prediction sets keep their promise for each class, whatever the prevalence; too few are refused."""

import numpy as np
import pytest

from imaging.errors import DataError
from monitoring.conformal import calibrate, find_lowest

ALPHA = 0.1


def draw(rng, positives, negatives):
    """Scores that overlap; positives are the harder ones."""
    scores = np.concatenate([rng.beta(3, 2, positives), rng.beta(2, 6, negatives)])
    return scores, np.repeat([1, 0], [positives, negatives])


def test_the_bound_is_the_score_of_the_rank_that_the_textbook_says():
    # n = 59, alpha = .1: ceil(.9 * 60) = 54 of the sorted nonconformities 1 - p, so the 6th p from below.
    scores = np.arange(1, 60) / 100
    assert find_lowest(scores, 0.1) == 0.06
    assert find_lowest(scores[:8], 0.1) == 0.0  # of 8 scores none can promise so much


def cover(p, truth, limits):
    """Shares of the bare sets that hold the truth; an answer at a threshold only makes sets larger."""
    return {"positive": (p >= limits.positive_from)[truth == 1].mean(),
            "negative": (p <= limits.negative_to)[truth == 0].mean()}  # fmt: skip


@pytest.mark.parametrize(("positives", "negatives", "alpha"), [(50, 80, 0.1), (99, 59, 0.05), (60, 200, 0.2)])
def test_mean_coverage_over_a_thousand_splits_is_nominal_for_each_class(positives, negatives, alpha):
    rng, told = np.random.default_rng(1), []
    for _ in range(1000):
        abstention = calibrate(*draw(rng, positives, negatives), alpha)
        told.append(cover(*draw(rng, 200, 200), abstention))
    for name in ("positive", "negative"):
        mean = np.mean([one[name] for one in told])
        assert 1 - alpha - 0.002 <= mean <= 1 - alpha + 0.01  # the last thousandths are the simulation's


@pytest.mark.parametrize("prevalence", [0.05, 0.5, 0.95])
def test_coverage_holds_when_prevalence_shifts_and_that_of_all_classes_together_falls(prevalence):
    rng, ours, together = np.random.default_rng(2), [], []
    positives = int(400 * prevalence)
    for _ in range(1000):
        scores, truth = draw(rng, 60, 540)  # calibrated where one subject in ten is positive
        new, new_truth = draw(rng, positives, 400 - positives)
        held = cover(new, new_truth, calibrate(scores, truth, ALPHA))
        ours.append(held["positive"] * prevalence + held["negative"] * (1 - prevalence))
        bound = find_lowest(np.where(truth == 1, scores, 1 - scores), ALPHA)
        together.append((np.where(new_truth == 1, new, 1 - new) >= bound).mean())
    assert abs(np.mean(ours) - (1 - ALPHA)) < 0.01
    if prevalence > 0.1:
        assert np.mean(together) < 1 - ALPHA - 0.05


def test_recalibration_by_a_rising_curve_changes_no_set():
    rng = np.random.default_rng(3)
    scores, truth = draw(rng, 70, 90)
    new, new_truth = draw(rng, 100, 100)

    def curve(p):
        return 1 / (1 + np.exp(-(0.7 + 1.8 * np.log(p / (1 - p)))))

    plain = cover(new, new_truth, calibrate(scores, truth, ALPHA))
    assert cover(curve(new), new_truth, calibrate(curve(scores), truth, ALPHA)) == plain


def test_fewer_than_fifty_subjects_of_a_class_are_refused_and_the_missing_are_counted():
    rng = np.random.default_rng(4)
    with pytest.raises(DataError, match="3 more positive subjects and 41 more negative subjects are missing"):
        calibrate(*draw(rng, 47, 9), ALPHA)
    assert calibrate(*draw(rng, 50, 50), ALPHA).positives == 50
