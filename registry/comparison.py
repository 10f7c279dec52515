"""Two models on the same images: intervals of their difference, by subject."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.estimation import LARGER, SHARES, SMALLER, Scores, count, count_rarer, is_told, name_stem
from imaging.intervals import Estimate, auc_components, bootstrap_mean, design_effect, spread_auc

Pair = tuple[NDArray[Any], NDArray[Any]]


def compare(
    metric: str, scores: tuple[Scores, Scores], people: NDArray[Any], confidence: float = 0.95
) -> Estimate | None:
    """How much better the first model is; above 0 it is better, also where less is better, as of `brier`.

    Shares by Tango, AUC by DeLong and Obuchowski; the others, and the share of an image's lesions that were
    found, are means of what each image scores, by BCa bootstrap of subject means.

    Args:
        metric: one that `is_paired`.
        scores: of the first and of the second model on the same images, and the same truth.
        people: subject of each image, shape (n,).
        confidence: two-sided.

    Returns:
        None where the scores are not there, or no image has what is compared.
    """
    first, second = scores
    if not (is_told(metric, first) and is_told(metric, second)):
        return None
    if metric == "auc":
        truth, pair = first["truth"], (first["probability"], second["probability"])
        return compare_auc(truth, pair, people, confidence) if 0 < truth.sum() < len(truth) else None
    if metric in SHARES and metric != "lesion_sensitivity":
        (right, cases), (other, _) = count(metric, first), count(metric, second)
        chosen = cases > 0
        return tango((right[chosen], other[chosen]), people[chosen], confidence) if chosen.any() else None
    pair = _score(metric, first), _score(metric, second)
    if not np.isfinite(pair[0] - pair[1]).any():
        return None
    return compare_means(pair[::-1] if name_stem(metric) in SMALLER else pair, people, confidence)


def is_paired(metric: str) -> bool:
    """Whether two models can be compared by it; not where a metric is of all images together, as a line."""
    return name_stem(metric) in (*LARGER, *SMALLER) and metric != "calibration_error"


def _score(metric: str, scores: Scores) -> NDArray[np.float64]:
    """What each image scores; NaN where it has nothing to score."""
    if metric == "brier":
        return np.asarray((scores["probability"] - scores["truth"]) ** 2)
    if metric != "lesion_sensitivity":
        return scores[metric].astype(float)
    return np.where(scores["lesions"] > 0, scores["found"] / np.maximum(scores["lesions"], 1), np.nan)


def newcombe(pair: Pair, subjects: NDArray[Any], confidence: float = 0.95) -> Estimate:
    """First minus second of two paired proportions by Newcombe 1998, method 10.

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
    """First minus second of two paired proportions by Tango's score interval (1998).

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
    """First minus second of two paired AUCs (DeLong 1988; of clustered images Obuchowski 1997).

    Args:
        truth: 0 or 1, shape (images,), both present.
        pair: scores of the first and of the second model, each of shape (images,), on any scale.
        subjects: who each image is of, shape (images,).
        confidence: two-sided.

    Returns:
        It rests on the subjects of the rarer class.
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
        subjects=count_rarer(truth, subjects),
        confidence=confidence,
        method="DeLong, clustered (Obuchowski)",
    )


def compare_means(pair: Pair, subjects: NDArray[Any], confidence: float = 0.95, seed: int = 0) -> Estimate:
    """First minus second mean, such as of Dice: BCa bootstrap of the subjects' mean differences.

    Where all subjects tell the same difference there is nothing to resample: then as many of them as Wilson's
    bound of none may tell another one, by as much as the scores themselves range.

    Args:
        pair: scores of the first and of the second model, each of shape (images,); NaN in either is left out.
        subjects: who each image is of, shape (images,).
        confidence: two-sided.
        seed: of the resampling.
    """
    from scipy.stats import norm

    difference = np.round(pair[0] - pair[1], 9)  # what is equal but for the last bits is equal
    told = bootstrap_mean(difference, subjects, confidence, seed, (-np.inf, np.inf))
    if np.isfinite([told.low, told.high]).all() or told.subjects < 2:
        return told
    square = float(norm.ppf((1 + confidence) / 2)) ** 2
    most = float(np.ptp(np.concatenate(pair)[np.tile(np.isfinite(difference), 2)]))
    away = most * square / (told.subjects + square)
    ends = {"low": told.estimate - away, "high": told.estimate + away}
    return told.model_copy(update={**ends, "method": "Wilson, no subject differs"})


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
