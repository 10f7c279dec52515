"""Intervals by subject: two images of one subject are not independent."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict


class Estimate(BaseModel):
    """A number with its uncertainty.

    Attributes:
        estimate: the number.
        low: lower end of the two-sided interval.
        high: upper end.
        subjects: how many subjects it rests on.
        confidence: of the interval, 0 to 1.
        method: how the interval was made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    estimate: float
    low: float
    high: float
    subjects: int
    confidence: float
    method: str

    def __str__(self) -> str:
        return f"{self.estimate:.2f} [{self.low:.2f} {self.high:.2f}]"


def group_by_subject(values: NDArray[Any], subjects: NDArray[Any]) -> list[NDArray[Any]]:
    """Values of each subject, subjects in sorted order.

    Args:
        values: shape (images,).
        subjects: who each image is of, shape (images,).
    """
    order = np.argsort(subjects, kind="stable")
    _, starts = np.unique(subjects[order], return_index=True)
    return np.split(values[order], starts[1:])


def design_effect(right: NDArray[np.integer], subjects: NDArray[Any]) -> float:
    """How much less a clustered sample says than an independent one (Rao and Scott 1992).

    Args:
        right: 0 or 1, shape (images,).
        subjects: who each image is of, shape (images,).

    Returns:
        At least 1; exactly 1 with one image a subject.
    """
    groups = group_by_subject(right.astype(float), subjects)
    share, images, count = float(right.mean()), len(right), len(groups)
    if count < 2 or share in (0.0, 1.0):
        return float(max(1.0, images / max(count, 1)))
    residuals = np.array([(group - share).sum() for group in groups])
    variance = count / (count - 1) * float((residuals**2).sum()) / images**2
    return max(1.0, variance / (share * (1 - share) / (images - 1)))


def wilson(right: NDArray[np.integer], subjects: NDArray[Any], confidence: float = 0.95) -> Estimate:
    """Wilson interval of a proportion, its counts divided by the design effect.

    Args:
        right: 0 or 1, shape (images,).
        subjects: who each image is of, shape (images,).
        confidence: two-sided.
    """
    from statsmodels.stats.proportion import proportion_confint

    if not len(right):
        return Estimate(estimate=0.0, low=0.0, high=1.0, subjects=0, confidence=confidence, method="no cases")
    effect = design_effect(right, subjects)
    low, high = proportion_confint(
        float(right.sum()) / effect, len(right) / effect, alpha=1 - confidence, method="wilson"
    )
    share = float(right.mean())
    return Estimate(
        estimate=share,
        low=min(float(low), share),  # the last bit of a 0 or a 1 must not put the estimate outside
        high=max(float(high), share),
        confidence=confidence,
        subjects=len(np.unique(subjects)),
        method="Wilson, design effect by subject",
    )


def bootstrap_mean(
    values: NDArray[np.floating], subjects: NDArray[Any], confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """BCa bootstrap interval of the mean of subject means.

    Args:
        values: shape (images,); NaN is left out.
        subjects: who each image is of, shape (images,).
        confidence: two-sided.
        seed: of the resampling.
    """
    from scipy.stats import bootstrap

    kept = np.isfinite(values)
    means = np.array([group.mean() for group in group_by_subject(values[kept], subjects[kept])])
    facts: dict[str, Any] = {"subjects": len(means), "confidence": confidence}
    if len(means) < 2 or np.ptp(means) == 0:
        middle = float(means.mean()) if len(means) else 0.0
        return Estimate(estimate=middle, low=0.0, high=1.0, method="too few subjects", **facts)
    found = bootstrap(
        (means,),
        np.mean,
        confidence_level=confidence,
        n_resamples=2000,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(
        estimate=float(means.mean()),
        low=float(found.low),
        high=float(found.high),
        method="BCa bootstrap of subject means",
        **facts,
    )


def bootstrap_auc(
    truth: NDArray[np.integer],
    score: NDArray[np.floating],
    subjects: NDArray[Any],
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap interval of the AUC, whole subjects drawn.

    Args:
        truth: 0 or 1, shape (images,).
        score: any scale, shape (images,).
        subjects: who each image is of, shape (images,).
        confidence: two-sided.
        seed: of the resampling.
    """
    from imaging.scores import auc

    groups = group_by_subject(np.arange(len(truth)), subjects)
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(1000):
        rows = np.concatenate([groups[i] for i in generator.integers(0, len(groups), len(groups))])
        draws.append(auc(truth[rows], score[rows]))
    tail = 50 * (1 - confidence)
    low, high = np.nanpercentile(draws, [tail, 100 - tail]) if np.isfinite(draws).any() else (0.0, 1.0)
    middle = auc(truth, score)
    return Estimate(
        estimate=middle if np.isfinite(middle) else 0.5,
        low=float(low),
        high=float(high),
        subjects=len(groups),
        confidence=confidence,
        method="percentile bootstrap by subject",
    )
