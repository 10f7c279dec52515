"""Class-conditional (Mondrian) split conformal thresholds: which answers of a site decide nothing.

Calibrated on positive and on negative subjects apart, so the promise holds for each class by itself and does
not move with prevalence (Vovk 2012; Angelopoulos and Bates 2023). It is about the sets, not about the cases
that are answered.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import DataError
from registry.profiles import NEGATIVE, POSITIVE, Abstention

LEAST = 50  # calibration subjects a class


def calibrate(probability: NDArray[Any], truth: NDArray[Any], alpha: float) -> Abstention:
    """Thresholds whose sets lack the truth of a new case of either class with probability alpha at most.

    Args:
        probability: of a positive, one a subject, (n,).
        truth: 1 or 0, (n,).
        alpha: of each class, above 0 and below a half.

    Raises:
        DataError: a class has fewer than 50 subjects; how many are missing is said.
    """
    counts = {POSITIVE: int((truth == 1).sum()), NEGATIVE: int((truth == 0).sum())}
    if missing := {name: LEAST - count for name, count in counts.items() if count < LEAST}:
        told = " and ".join(f"{count} more {name} subjects" for name, count in missing.items())
        raise DataError(
            f"Abstention rests on at least {LEAST} labelled subjects a class; {told} are missing.",
            "Label more, or accept the site without abstention.",
        )
    return Abstention(
        alpha=alpha,
        positive_from=find_lowest(probability[truth == 1], alpha),
        negative_to=1 - find_lowest(1 - probability[truth == 0], alpha),
        positives=counts[POSITIVE],
        negatives=counts[NEGATIVE],
    )


def find_lowest(scores: NDArray[Any], alpha: float) -> float:
    """The highest bound that a new score of the same kind falls below with probability alpha at most.

    Args:
        scores: of a class, how much each case looks like it, (n,).
        alpha: allowed share.

    Returns:
        The score of rank floor(alpha (n + 1)) from below; 0 where there is no such rank.
    """
    rank = math.floor(alpha * (len(scores) + 1) + 1e-9)
    return float(np.sort(scores)[rank - 1]) if rank else 0.0
