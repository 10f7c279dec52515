"""Temperature and operating point, against scikit-learn and a miscalibration that is known."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, recall_score

from imaging.detection import encode_lesions
from imaging.errors import DataError
from imaging.vocabulary import Kind
from tests.tiny import make_section
from training.calibration import choose_point, choose_threshold, fit_temperature, measure_brier


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


def make(kind, classes):
    return make_section(kind).model_copy(update={"kind": kind, "classes": classes})


def test_the_threshold_of_several_classes_is_on_the_sum_of_the_positive_ones():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, 600)
    logits = rng.normal(size=(600, 3)) + 1.5 * np.eye(3)[truth]
    section = make(Kind.CLASSIFICATION, ("healthy", "mild", "severe"))
    asked = section.calibrate.model_copy(update={"positive": ("severe",)})
    section = section.model_copy(update={"calibrate": asked})
    told = choose_point(section, truth, logits)
    powers = np.exp(logits / told["temperature"])
    score = (powers / powers.sum(axis=1, keepdims=True))[:, 2]
    assert recall_score(truth == 2, score >= told["threshold"]) >= section.calibrate.sensitivity
    assert recall_score(truth == 2, score >= told["threshold"] + 0.02) < section.calibrate.sensitivity
    assert told["validation"]["sensitivity"] == pytest.approx(
        recall_score(truth == 2, score >= told["threshold"])
    )


def test_the_threshold_of_a_detector_keeps_the_asked_sensitivity_by_lesion():
    masks = np.zeros((20, 32, 32), dtype=np.int64)
    masks[:, 8:16, 8:16] = 1
    targets = encode_lesions(masks, 4)
    score = np.linspace(0.05, 0.95, 20)
    height = np.log(score / (1 - score))[:, None, None]
    logits = np.full((20, 3, 8, 8), -9.0, dtype=np.float32)
    logits[:, 0] = np.where(targets[:, 3] > 0, height, -9)
    logits[:, 1:] = targets[:, 1:3]
    section = make(Kind.DETECTION, ("background", "disc"))
    told = choose_point(section, masks, logits)  # nine tenths of twenty lesions: two may be missed
    assert told["temperature"] == 1
    assert told["threshold"] == pytest.approx(score[2], abs=2e-4)
    assert told["validation"]["lesion_sensitivity"] == 0.9
    assert told["validation"]["false_positives"] == 0
    logits[:4, 0] = np.where(targets[:4, 3] > 0, -9, logits[:4, 0])
    logits[:4, 0, 7, 7] = 0  # four lesions that nothing marks
    logits[:4, 1:] = 0
    with pytest.raises(DataError, match="finds 80% of validation's lesions"):
        choose_point(section, masks, logits)
