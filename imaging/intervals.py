"""Intervals by subject: two images of one subject are not independent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
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


def design_effect(values: NDArray[np.integer], subjects: NDArray[Any]) -> float:
    """How much less a clustered sample says than an independent one (Rao and Scott 1992).

    Args:
        values: 0 or 1, or differences of such (-1, 0, 1), shape (images,).
        subjects: who each image is of, shape (images,).

    Returns:
        At least 1; exactly 1 with one image a subject.
    """
    names, people = np.unique(subjects, return_inverse=True)
    middle, images, count = float(values.mean()), len(values), len(names)
    if count < 2 or np.ptp(values) == 0:
        return float(max(1.0, images / max(count, 1)))
    residuals = np.bincount(people, values - middle)
    variance = count / (count - 1) * float((residuals**2).sum()) / images**2
    return max(1.0, variance / (float(values.var()) / (images - 1)))


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
    values: NDArray[np.floating],
    subjects: NDArray[Any],
    confidence: float = 0.95,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """BCa bootstrap interval of the mean of subject means.

    Args:
        values: shape (images,); NaN is left out.
        subjects: who each image is of, shape (images,).
        confidence: two-sided.
        seed: of the resampling.
        bounds: the interval where subjects are too few, or all the same, to resample.
    """
    from scipy.stats import bootstrap

    kept = np.isfinite(values)
    means = np.array([group.mean() for group in group_by_subject(values[kept], subjects[kept])])
    facts: dict[str, Any] = {"subjects": len(means), "confidence": confidence}
    if len(means) < 2 or np.ptp(means) == 0:
        middle = float(means.mean()) if len(means) else 0.0
        return Estimate(estimate=middle, low=bounds[0], high=bounds[1], method="too few subjects", **facts)
    # BCa's jackknife takes the square of the subjects, and of so many it changes nothing.
    method = "BCa" if len(means) <= 5000 else "percentile"
    draws = max(2000, round(40 / (1 - confidence)))  # 20 of them beyond each end
    how: dict[str, Any] = {"n_resamples": draws, "batch": max(1, 4_000_000 // len(means)), "method": method}
    rng = np.random.default_rng(seed)
    told = bootstrap((means,), np.mean, confidence_level=confidence, rng=rng, **how)
    low, high = (float(end) for end in told.confidence_interval)
    facts["method"] = f"{method} bootstrap of subject means"
    return Estimate(estimate=float(means.mean()), low=low, high=high, **facts)


def bootstrap_statistic(
    statistic: Callable[[NDArray[np.intp]], float],
    subjects: NDArray[Any],
    confidence: float = 0.95,
    seed: int = 0,
    strata: NDArray[Any] | None = None,
) -> Estimate:
    """Bias-corrected percentile bootstrap (Efron 1981) of any statistic, whole subjects drawn.

    Args:
        statistic: of row numbers, which may repeat; NaN where they do not define it, and such draws are left
            out. It must be finite for all rows.
        subjects: who each image is of, shape (images,).
        confidence: two-sided.
        seed: of the resampling.
        strata: such as the site of each image, shape (images,): each keeps its number of subjects.
    """
    from scipy.stats import norm

    rows, generator = np.arange(len(subjects)), np.random.default_rng(seed)
    layers = group_by_subject(rows, np.zeros(len(rows)) if strata is None else strata)
    parts = [group_by_subject(layer, subjects[layer]) for layer in layers]
    groups = [group for part in parts for group in part]
    ends = np.cumsum([0, *map(len, parts)])
    table = np.full((len(groups), max(map(len, groups))), -1)  # rows of each subject, filled up with -1
    for place, group in enumerate(groups):
        table[place, : len(group)] = group
    found = []
    for _ in range(max(1000, round(40 / (1 - confidence)))):
        drawn = [generator.integers(low, high, high - low) for low, high in pairwise(ends)]
        kept = table[np.concatenate(drawn)].ravel()
        found.append(statistic(kept[kept >= 0]))
    middle, draws = float(statistic(rows)), np.array(found)[np.isfinite(found)]
    below = ((draws < middle).mean() + (draws <= middle).mean()) / 2  # half, were the draws not biased
    bias = norm.ppf(np.clip(below, 1e-3, 1 - 1e-3))
    tail = norm.ppf((1 + confidence) / 2)
    low, high = np.percentile(draws, 100 * norm.cdf([2 * bias - tail, 2 * bias + tail]))
    return Estimate(
        estimate=middle,
        low=min(float(low), middle),
        high=max(float(high), middle),
        subjects=len(groups),
        confidence=confidence,
        method="bias-corrected percentile bootstrap by subject",
    )


def delong(
    truth: NDArray[np.integer], score: NDArray[np.floating], subjects: NDArray[Any], confidence: float = 0.95
) -> Estimate:
    """Interval of the AUC by Obuchowski 1997 on the logit scale; DeLong's where a subject has one image.

    Args:
        truth: 0 or 1, shape (images,).
        score: any scale, shape (images,).
        subjects: who each image is of, shape (images,).
        confidence: two-sided.

    Returns:
        0 to 1; where the ranking has no spread (an AUC of 1), Wilson's interval of as many subjects as the
        rarer class has.
    """
    from scipy.special import expit, logit
    from scipy.stats import norm
    from statsmodels.stats.proportion import proportion_confint

    facts: dict[str, Any] = {"subjects": len(np.unique(subjects)), "confidence": confidence}
    positive = truth == 1
    rarer = min(len(np.unique(subjects[positive])), len(np.unique(subjects[~positive])))
    if not rarer:
        return Estimate(estimate=0.5, low=0.0, high=1.0, method="one class is missing", **facts)
    area, variance = spread_auc(*auc_components(truth, score), positive, subjects)
    if variance < 1e-12:
        low, high = proportion_confint(area * rarer, rarer, alpha=1 - confidence, method="wilson")
        ends, method = (min(low, area), max(high, area)), "Wilson, subjects of the rarer class"
    else:
        half = norm.ppf((1 + confidence) / 2) * np.sqrt(variance) / (area * (1 - area))
        ends, method = expit(logit(area) + np.array([-half, half])), "DeLong, clustered (Obuchowski)"
    return Estimate(estimate=area, low=float(ends[0]), high=float(ends[1]), method=method, **facts)


def auc_components(
    truth: NDArray[np.integer], score: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share of the other class that each positive beats, and that each negative is beaten by; ties half.

    Returns:
        (positives,) and (negatives,): the structural components of DeLong 1988, whose means are the AUC.
    """
    from scipy.stats import rankdata

    positive, ranks = truth == 1, rankdata(score)
    beats = (ranks[positive] - rankdata(score[positive])) / (~positive).sum()
    beaten = 1 - (ranks[~positive] - rankdata(score[~positive])) / positive.sum()
    return beats, beaten


def spread_auc(
    beats: NDArray[np.float64],
    beaten: NDArray[np.float64],
    positive: NDArray[np.bool_],
    subjects: NDArray[Any],
) -> tuple[float, float]:
    """AUC and its variance from components, or the difference of two AUCs from differences of components.

    Args:
        beats: of the positives, in order.
        beaten: of the negatives, in order.
        positive: which images are positive, shape (images,).
        subjects: who each image is of, shape (images,).
    """
    area = float(beats.mean())
    names, people = np.unique(subjects, return_inverse=True)
    sums = [np.bincount(people[chosen], part - area, len(names))
            for chosen, part in ((positive, beats), (~positive, beaten))]  # fmt: skip
    counts = [len(np.unique(people[chosen])) for chosen in (positive, ~positive)]
    # Obuchowski's S10 / M + S01 / N + 2 S11 / (M N): each with its own correction for few subjects
    total = sum(
        count / max(count - 1, 1) * float((part**2).sum()) / size**2
        for part, count, size in zip(sums, counts, (len(beats), len(beaten)), strict=True)
    )
    shared = len(names) / max(len(names) - 1, 1) * float((sums[0] * sums[1]).sum())
    return area, max(0.0, total + 2 * shared / (len(beats) * len(beaten)))


def calibration_line(
    truth: NDArray[np.integer], score: NDArray[np.floating], subjects: NDArray[Any], confidence: float = 0.95
) -> tuple[Estimate, Estimate] | None:
    """Slope and intercept of the truth on the logit of the probability: 1 and 0 where it is honest.

    Args:
        truth: 0 or 1, shape (images,).
        score: probability of a positive, shape (images,).
        subjects: who each image is of, shape (images,).
        confidence: two-sided.

    Returns:
        Slope (under 1: too sure) and intercept (under 0: too high), with cluster-robust Wald intervals; None
        where the classes do not overlap, so that no line exists.
    """
    from scipy.special import logit
    from statsmodels.discrete.discrete_model import Logit

    x = logit(np.clip(score.astype(float), 1e-6, 1 - 1e-6))
    positive = x[truth == 1], x[truth == 0]
    if not all(map(len, positive)) or _apart(*positive) or _apart(*positive[::-1]):
        return None
    names, people = np.unique(subjects, return_inverse=True)
    if len(names) < 3:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is asked below whether the fit converged
        line = Logit(truth, np.column_stack([np.ones(len(x)), x]))
        fitted = line.fit(disp=0, cov_type="cluster", cov_kwds={"groups": people})
    ends = fitted.conf_int(alpha=1 - confidence)
    if not fitted.mle_retvals["converged"] or not np.isfinite(ends).all():
        return None
    facts: dict[str, Any] = {"subjects": len(names), "confidence": confidence,
                             "method": "logistic regression, robust by subject"}  # fmt: skip
    slope, intercept = (
        Estimate(estimate=float(fitted.params[i]), low=float(ends[i, 0]), high=float(ends[i, 1]), **facts)
        for i in (1, 0)
    )
    return slope, intercept


def _apart(upper: NDArray[np.float64], lower: NDArray[np.float64]) -> bool:
    return bool(upper.min() >= lower.max())
