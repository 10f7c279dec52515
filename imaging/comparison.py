"""Two models on the same images: intervals of their difference, by subject. First minus second throughout."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.intervals import Estimate, auc_components, bootstrap_mean, design_effect, spread_auc

Pair = tuple[NDArray[Any], NDArray[Any]]


def newcombe(pair: Pair, subjects: NDArray[Any], confidence: float = 0.95) -> Estimate:
    """Difference of two paired proportions by Newcombe 1998, method 10.

    Args:
        pair: right (1) or wrong (0) of the first and of the second model, each of shape (images,).
        subjects: who each image is of, shape (images,).
        confidence: two-sided.
    """
    from statsmodels.stats.proportion import proportion_confint

    both, first, second, neither = _count(pair, subjects)
    total = both + first + second + neither
    shares = (both + first) / total, (both + second) / total
    (low1, high1), (low2, high2) = (
        proportion_confint(share * total, total, alpha=1 - confidence, method="wilson") for share in shares
    )
    excess = both * neither - first * second
    excess = max(excess - total / 2, 0) if excess > 0 else excess  # method 10's continuity correction
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = excess / np.sqrt(margins) if margins > 0 else 0.0
    down, up = shares[0] - low1, high2 - shares[1]
    low = shares[0] - shares[1] - np.sqrt(down**2 - 2 * phi * down * up + up**2)
    up, down = high1 - shares[0], shares[1] - low2
    high = shares[0] - shares[1] + np.sqrt(up**2 - 2 * phi * up * down + down**2)
    return _tell(pair, subjects, (low, high), confidence, "Newcombe, design effect by subject")


def tango(pair: Pair, subjects: NDArray[Any], confidence: float = 0.95) -> Estimate:
    """Difference of two paired proportions by Tango's score interval (1998).

    Args:
        pair: right (1) or wrong (0) of the first and of the second model, each of shape (images,).
        subjects: who each image is of, shape (images,).
        confidence: two-sided.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    _, first, second, _ = cells = _count(pair, subjects)
    total, bound = sum(cells), norm.ppf((1 + confidence) / 2)

    def score(difference: float) -> float:
        linear = (2 * total - first + second) * difference - first - second
        constant = -second * difference * (1 - difference)
        share = (np.sqrt(max(linear**2 - 8 * total * constant, 0)) - linear) / (4 * total)
        variance = total * max(2 * share + difference * (1 - difference), 1e-12)
        return float((first - second - total * difference) / np.sqrt(variance))

    middle, edge = (first - second) / total, 1 - 1e-9
    low = brentq(lambda d: score(d) - bound, -edge, middle) if score(-edge) > bound else -1.0
    high = brentq(lambda d: score(d) + bound, middle, edge) if score(edge) < -bound else 1.0
    return _tell(pair, subjects, (low, high), confidence, "Tango, design effect by subject")


def compare_auc(
    truth: NDArray[np.integer], pair: Pair, subjects: NDArray[Any], confidence: float = 0.95
) -> Estimate:
    """Difference of two paired AUCs (DeLong 1988; Obuchowski 1997 where a subject has several images).

    Args:
        truth: 0 or 1, shape (images,), both present.
        pair: scores of the first and of the second model, each of shape (images,), on any scale.
        subjects: who each image is of, shape (images,).
        confidence: two-sided.
    """
    from scipy.stats import norm

    first, second = (auc_components(truth, score) for score in pair)
    beats, beaten = first[0] - second[0], first[1] - second[1]
    difference, variance = spread_auc(beats, beaten, truth == 1, subjects)
    half = float(norm.ppf((1 + confidence) / 2) * np.sqrt(variance))
    return Estimate(
        estimate=difference,
        low=difference - half,
        high=difference + half,
        subjects=len(np.unique(subjects)),
        confidence=confidence,
        method="DeLong, clustered (Obuchowski)",
    )


def compare_means(pair: Pair, subjects: NDArray[Any], confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Difference of two paired means, Dice or accuracy: BCa bootstrap of the subjects' mean differences.

    Args:
        pair: scores of the first and of the second model, each of shape (images,); NaN in either is left out.
        subjects: who each image is of, shape (images,).
        confidence: two-sided.
        seed: of the resampling.
    """
    return bootstrap_mean(pair[0] - pair[1], subjects, confidence, seed, (-1.0, 1.0))


def _count(pair: Pair, subjects: NDArray[Any]) -> tuple[float, float, float, float]:
    """Both right, only the first, only the second, neither: over the design effect of the difference."""
    first, second = (np.asarray(right).astype(int) for right in pair)
    effect = design_effect(first - second, subjects)
    masks = (first & second, first & (1 - second), (1 - first) & second, (1 - first) & (1 - second))
    return tuple(float(mask.sum()) / effect for mask in masks)  # type: ignore[return-value]


def _tell(
    pair: Pair, subjects: NDArray[Any], ends: tuple[float, float], confidence: float, method: str
) -> Estimate:
    difference = float(np.mean(pair[0])) - float(np.mean(pair[1]))
    return Estimate(
        estimate=difference,
        low=min(float(ends[0]), difference),
        high=max(float(ends[1]), difference),
        subjects=len(np.unique(subjects)),
        confidence=confidence,
        method=method,
    )
