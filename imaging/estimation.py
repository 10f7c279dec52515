"""Metrics by name: which way is better, the value over some images, and its interval by subject."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.detection import froc
from imaging.intervals import (
    Estimate,
    bootstrap_mean,
    bootstrap_statistic,
    calibration_line,
    delong,
    wilson,
)
from imaging.scores import auc, brier, calibration_error

Measure = Callable[[NDArray[np.intp]], float]  # row numbers -> a metric, NaN where it has no case
Scores = dict[str, NDArray[Any]]
"""Name of a score -> its value for each image, (n,); see `training.evaluation.score_images`."""

SHARES = ("accuracy", "sensitivity", "specificity", "class_accuracy", "lesion_sensitivity")
LARGER = (*SHARES, "auc", "dice")
SMALLER = ("brier", "calibration_error", "false_positives", "surface_mm", "hausdorff95_mm")
LINE = ("calibration_slope", "calibration_intercept")  # best at 1 and at 0
BY_CLASS = ("dice", "surface_mm", "hausdorff95_mm")  # also of one class: dice_white_matter
_NEEDS = {
    **dict.fromkeys(("accuracy", "sensitivity", "specificity"), ("truth", "right")),
    **dict.fromkeys(("auc", "brier", "calibration_error", *LINE), ("truth", "probability")),
    "class_accuracy": ("class_right",), "lesion_sensitivity": ("found", "lesions"), "froc": ("match",),
}  # fmt: skip


def name_stem(metric: str) -> str:
    """The metric without its class: `dice` of `dice_white_matter`."""
    return next((stem for stem in BY_CLASS if metric.startswith(f"{stem}_")), metric)


def is_told(metric: str, scores: Scores) -> bool:
    """Whether the scores are those that a metric is made of."""
    return set(_NEEDS.get(metric, (metric,))) <= set(scores)


def count(metric: str, scores: Scores) -> tuple[NDArray[Any], NDArray[Any]]:
    """What each image adds to a metric that is a share or a mean: the sum of hits over the sum of cases.

    Returns:
        Hits and cases, each (n,); an image without a case has neither.
    """
    if metric == "lesion_sensitivity":
        return scores["found"], scores["lesions"]
    if metric in ("sensitivity", "specificity"):
        cases = scores["truth"] if metric == "sensitivity" else 1 - scores["truth"]
        return scores["right"] * cases, cases
    if metric in SHARES:
        right = scores["right" if metric == "accuracy" else "class_right"]
        return right, np.ones_like(right)
    values = scores[metric]
    return np.nan_to_num(values), np.isfinite(values).astype(int)


def count_rarer(truth: NDArray[Any], people: NDArray[Any]) -> int:
    """Subjects of the rarer class, which an AUC rests on.

    Args:
        truth: 0 or 1, shape (n,).
        people: subject of each image, shape (n,).
    """
    return min(len(np.unique(people[truth == label])) for label in (0, 1))


def select(metric: str, scores: Scores) -> Measure:
    """The metric over any rows of the scores."""
    if metric == "froc":
        return lambda rows: froc(list(scores["match"][rows])).mean
    if ask := {"auc": auc, "brier": brier, "calibration_error": calibration_error}.get(metric):
        return lambda rows: ask(scores["truth"][rows], scores["probability"][rows])
    hits, cases = count(metric, scores)
    return lambda rows: float(hits[rows].sum() / total) if (total := cases[rows].sum()) else float("nan")


def measure(
    metric: str, scores: Scores, people: NDArray[Any], confidence: float = 0.95, seed: int = 0
) -> Estimate | None:
    """Estimate a metric.

    Args:
        metric: one of those above, or `froc`.
        scores: of each image.
        people: subject of each image, shape (n,).
        confidence: two-sided.
        seed: of resampling, where a metric needs it.

    Returns:
        None where it cannot be estimated: scores that are not there, a calibration line of classes that do
        not overlap, a mean without an upper limit of subjects that do not differ.
    """
    if not is_told(metric, scores):
        return None
    if metric in SHARES:
        rows, right = _list_cases(*count(metric, scores))
        return wilson(right, people[rows], confidence)
    if metric == "auc":
        return delong(scores["truth"], scores["probability"], people, confidence)
    if metric not in _NEEDS:
        values, unlimited = scores[metric].astype(float), name_stem(metric) in SMALLER
        return (
            None
            if unlimited and not _differ(values, people)
            else bootstrap_mean(values, people, confidence, seed)
        )
    if not len(people):
        return None
    if metric in LINE:
        line = calibration_line(scores["truth"], scores["probability"], people, confidence)
        return line[LINE.index(metric)] if line else None
    ask = select(metric, scores)
    return resample(ask, people, confidence, seed) if np.isfinite(ask(np.arange(len(people)))) else None


def resample(
    ask: Measure, people: NDArray[Any], confidence: float, seed: int, strata: NDArray[Any] | None = None
) -> Estimate:
    """Bootstrap of a measure of 0 to 1; where all draws agree resampling is blind, and nothing is claimed."""
    told = bootstrap_statistic(ask, people, confidence, seed, strata)
    if told.low < told.high:
        return told
    return told.model_copy(update={"low": 0.0, "high": 1.0, "method": "no spread to resample"})


def _list_cases(hits: NDArray[Any], cases: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """One row a case: the image that it is of, and whether it was hit (1) or not (0)."""
    rows = np.repeat(np.arange(len(cases)), cases)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(cases) - cases, cases)  # of the case in its image
    return rows, (number < hits[rows]).astype(int)


def _differ(values: NDArray[np.float64], people: NDArray[Any]) -> bool:
    """Whether there are two subjects, and values that differ."""
    kept = np.isfinite(values)
    return len(np.unique(people[kept])) > 1 and bool(np.ptp(values[kept]) > 0)
