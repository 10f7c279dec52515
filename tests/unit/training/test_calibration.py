"""Temperature and operating point, against scikit-learn and a miscalibration that is known."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, recall_score

from imaging.errors import DataError
from training.calibration import choose_threshold, fit_temperature, measure_brier


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_the_temperature_undoes_a_known_overconfidence(factor):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (40_000, 3))
    powers = np.exp(logits)
    shares = (powers / powers.sum(axis=1, keepdims=True)).cumsum(axis=1)
    truth = (rng.random((40_000, 1)) > shares).sum(axis=1)  # labels that the logits tell honestly
    assert fit_temperature(logits * factor, truth) == pytest.approx(factor, rel=0.03)


@pytest.mark.parametrize("asked", [0.6, 0.85, 0.9, 0.99])
def test_the_threshold_keeps_the_asked_sensitivity_and_a_higher_one_would_not(asked):
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 400)
    positive = 1 / (1 + np.exp(-rng.normal(2 * truth - 1, 1)))
    threshold = choose_threshold(positive, truth, asked)
    assert recall_score(truth, positive >= threshold) >= asked
    assert recall_score(truth, positive >= threshold + 0.02) < asked


def test_rounding_never_costs_a_positive():
    positive = np.array([0.12345678, 0.3, 0.9])
    assert choose_threshold(positive, np.array([1, 1, 1]), 0.99) == 0.1234


def test_without_positives_there_is_no_threshold():
    with pytest.raises(DataError, match="no positive"):
        choose_threshold(np.array([0.1, 0.2]), np.array([0, 0]), 0.9)


def test_the_brier_score_of_two_classes_is_twice_that_of_scikit_learn():
    rng = np.random.default_rng(2)
    positive, truth = rng.random(100), rng.integers(0, 2, 100)
    told = measure_brier(np.stack([1 - positive, positive], axis=1), truth)
    assert told == pytest.approx(2 * brier_score_loss(truth, positive))
