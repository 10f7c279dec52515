"""How good an answer is, one image at a time; intervals are elsewhere."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def dice(truth: NDArray[np.integer], answer: NDArray[np.integer], label: int) -> float:
    """Dice overlap of one label.

    Args:
        truth: integer labels, any shape.
        answer: integer labels, same shape.
        label: the label to compare.

    Returns:
        0 to 1; NaN where neither has the label, so that an empty slice counts neither way.
    """
    a, b = truth == label, answer == label
    total = int(a.sum()) + int(b.sum())
    return float(2 * int((a & b).sum()) / total) if total else float("nan")


def auc(truth: NDArray[np.integer], score: NDArray[np.floating]) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative, ties half.

    Args:
        truth: 0 or 1, shape (n,).
        score: any scale, shape (n,).

    Returns:
        0 to 1; NaN where one class is absent.
    """
    from scipy.stats import rankdata

    positives = int(truth.sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(score)[truth == 1].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))
