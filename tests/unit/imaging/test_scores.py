"""Scores of one image or of many, against hand-worked cases, scikit-learn and brute force."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score

from imaging.scores import auc, brier, calibration_error, dice, equivalent_mm, reliability, surface_distances


def test_dice_is_that_of_a_hand_worked_case():
    truth = np.array([[1, 1, 0], [0, 2, 2]])
    answer = np.array([[1, 0, 0], [2, 2, 2]])
    assert dice(truth, answer, 1) == pytest.approx(2 * 1 / (2 + 1))
    assert dice(truth, answer, 2) == pytest.approx(2 * 2 / (2 + 3))


def test_dice_of_a_label_that_neither_has_is_no_number():
    assert np.isnan(dice(np.zeros((2, 2), int), np.zeros((2, 2), int), 1))
    assert dice(np.ones((2, 2), int), np.zeros((2, 2), int), 1) == 0


def test_auc_agrees_with_scikit_learn_also_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = np.array([0, 1, *rng.integers(0, 2, 60)])
        score = rng.integers(0, 8, 62) / 8
        assert auc(truth, score) == pytest.approx(roc_auc_score(truth, score))


def test_auc_of_one_class_is_no_number():
    assert np.isnan(auc(np.ones(4, int), np.arange(4.0)))


def surface_by_definition(mask):
    """Coordinates of the pixels with a neighbour by a side that is outside."""
    padded = np.pad(mask, 1)
    inner = np.ones_like(mask)
    for axis in range(mask.ndim):
        for step in (-1, 1):
            inner &= np.roll(padded, step, axis)[(slice(1, -1),) * mask.ndim]
    return np.argwhere(mask & ~inner)


@pytest.mark.parametrize(("shape", "spacing"), [((24, 30), (2.0, 0.7)), ((8, 14, 12), (3.0, 1.0, 1.5))])
def test_surface_distances_are_those_of_every_pair_of_surface_points(shape, spacing):
    rng = np.random.default_rng(1)
    for _ in range(5):
        truth, answer = (rng.random(shape) < share for share in (0.3, 0.1))
        truth[0], answer[-1] = True, False
        points = [surface_by_definition(mask) * spacing for mask in (truth, answer)]
        apart = cdist(*points)
        there, back = apart.min(axis=1), apart.min(axis=0)
        expected = (
            np.concatenate([there, back]).mean(),
            max(np.percentile(there, 95), np.percentile(back, 95)),
        )
        assert surface_distances(truth, answer, spacing) == pytest.approx(expected)


def test_two_squares_lie_as_far_apart_as_they_were_moved():
    truth, moved = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    truth[4:9, 2:4] = True
    moved[4:9, 12:14] = True
    mean, worst = surface_distances(truth, moved, 0.5)
    assert (mean, worst) == (pytest.approx((9 + 10) / 2 * 0.5), 5.0)
    assert surface_distances(truth, truth, 0.5) == (0.0, 0.0)


def test_nothing_has_no_surface():
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert np.isnan(surface_distances(empty, full, 1.0)).all()
    assert np.isnan(surface_distances(full, empty, 1.0)).all()


def test_the_equivalent_diameter_of_a_disc_and_of_a_ball_is_their_own():
    y, x = np.mgrid[:60, :60] - 30
    assert equivalent_mm(np.hypot(y, x) < 20, 0.5) == pytest.approx(20, rel=0.01)
    z, y, x = np.mgrid[:20, :60, :60] - np.array([10, 30, 30])[:, None, None, None]
    ball = (3 * z) ** 2 + y**2 + x**2 < 20**2  # slices three times as thick as pixels are wide
    assert equivalent_mm(ball, (1.5, 0.5, 0.5)) == pytest.approx(20, rel=0.02)
    assert equivalent_mm(np.zeros((3, 3), bool), 1.0) == 0


def test_the_brier_score_is_that_of_scikit_learn():
    rng = np.random.default_rng(2)
    truth, score = rng.integers(0, 2, 90), rng.random(90)
    assert brier(truth, score) == pytest.approx(brier_score_loss(truth, score))


def test_the_reliability_table_is_that_of_scikit_learn():
    rng = np.random.default_rng(3)
    score = rng.random(500).astype(np.float32)
    truth = (rng.random(500) < score**2).astype(int)
    table = reliability(truth, score)
    share, said = calibration_curve(truth, score, n_bins=10, strategy="uniform")
    assert [row["share"] for row in table] == pytest.approx(share)
    assert [row["said"] for row in table] == pytest.approx(said)
    counts = np.histogram(score, 10, (0, 1))[0]
    assert [row["count"] for row in table] == list(counts)
    assert calibration_error(truth, score) == pytest.approx((np.abs(share - said) * counts).sum() / 500)


def test_certainty_that_is_always_right_has_no_calibration_error():
    truth = np.array([0, 1, 1, 0])
    assert calibration_error(truth, truth.astype(float)) == 0
    assert calibration_error(truth, 1 - truth.astype(float)) == 1
