"""Dice and AUC, against hand-worked cases and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from imaging.scores import auc, dice


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
