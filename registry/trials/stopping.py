"""The stop rule of a silent trial: bets by subject, whose capital may be looked at whenever one likes.

One player bets on every subject that the challenger is within the margin, another that it is not. Who is
wrong cannot expect his capital to grow: that it ever reaches 2 / alpha times what it was has a probability
of at most alpha / 2 (Ville); for both together alpha. So a verdict is wrong that often at most, however many
looks there are (Waudby-Smith and Ramdas 2024; the capital of fixed bets, averaged).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.intervals import Estimate
from imaging.vocabulary import Endpoint, TrialVerdict
from registry.trials.plan import Plan

STAKES = np.linspace(0.1, 1, 10)  # shares of what one may lose; who does not know the best bet places all
Values = NDArray[np.float64]


def grow_capital(values: Values, bound: float) -> Values:
    """Logarithm of the capital after each subject, of who bets that the mean is above a bound.

    Args:
        values: 0 to 1, shape (..., subjects), in the order of betting.
        bound: above 0, below 1. While the mean is at most this no capital grows, on average.
    """
    capital = np.full(values.shape, -np.inf)
    with np.errstate(divide="ignore"):  # who staked all of it and lost has nothing
        for stake in STAKES:
            steps = np.log(1 - stake + stake * values / bound)
            capital = np.logaddexp(capital, np.cumsum(steps, axis=-1))
    return np.asarray(capital - np.log(len(STAKES)))


def value_subjects(people: list[str], scores: list[float], look: int) -> tuple[Values, list[int]]:
    """One value a subject, fixed at the look after its first image: what comes later bets no second time.

    Args:
        people: subject of each case, in the order of the cases.
        scores: of each case, 0 to 1.
        look: cases between two looks.

    Returns:
        Values, shape (subjects,); and how many subjects there were at each look.
    """
    known: set[str] = set()
    values: list[float] = []
    ends: list[int] = []
    for start in range(0, len(people), look):
        block: dict[str, list[float]] = {}
        for person, score in zip(people[start : start + look], scores[start : start + look], strict=True):
            if person not in known:
                block.setdefault(person, []).append(score)
        known |= block.keys()
        values += [float(np.mean(one)) for one in block.values()]
        if start + look <= len(people):
            ends.append(len(values))
    return np.array(values, float), ends


def find_bound(plan: Plan) -> float:
    """The mean of the values, 0 to 1, above which a challenger is within the margin."""
    return 1 - plan.margin if plan.endpoint is Endpoint.AGREEMENT else (1 - plan.margin) / 2


def judge_values(plan: Plan, values: Values, ends: list[int]) -> tuple[TrialVerdict, int]:
    """The verdict at the first look that gives one.

    Args:
        plan: as it was registered.
        values: of `value_subjects`, 1 where the challenger does best.
        ends: subjects at each look.

    Returns:
        The verdict, and after how many subjects it stood; RUNNING, and how many there are.
    """
    counted, bound = values[: plan.size], find_bound(plan)
    bets = {TrialVerdict.PASSED: grow_capital(counted, bound),
            TrialVerdict.FAILED: grow_capital(1 - counted, 1 - bound)}  # fmt: skip
    for end in (min(end, plan.size) for end in ends):
        for verdict, capital in bets.items():
            if capital[end - 1] >= np.log(2 / plan.alpha):
                return verdict, end
        if end == plan.size:
            return TrialVerdict.UNDECIDED, end
    return TrialVerdict.RUNNING, len(counted)


def count_needed(plan: Plan) -> int | None:
    """After how many subjects a challenger passes that never differs; None where the size is too small."""
    best = 1.0 if plan.endpoint is Endpoint.AGREEMENT else 0.5
    capital = grow_capital(np.full(plan.size, best), find_bound(plan))
    enough = np.flatnonzero(capital >= np.log(2 / plan.alpha))
    return int(enough[0]) + 1 if len(enough) else None


def estimate_mean(values: Values, alpha: float, reach: tuple[float, float] = (0.0, 1.0)) -> Estimate | None:
    """Mean and an interval that holds at all looks together: the bounds that nobody's capital has refuted.

    Args:
        values: 0 to 1, shape (subjects,).
        alpha: 1 - confidence.
        reach: what 0 and 1 stand for, as (-1, 1) of a difference.

    Returns:
        None without a subject.
    """
    if not len(values):
        return None
    ends = _refute_below(values, alpha), float(values.mean()), 1 - _refute_below(1 - values, alpha)
    low, mean, high = (reach[0] + (reach[1] - reach[0]) * end for end in ends)
    return Estimate(estimate=mean, low=min(low, mean), high=max(high, mean), subjects=len(values),
                    confidence=1 - alpha, method="betting, valid at every look")  # fmt: skip


def _refute_below(values: Values, alpha: float) -> float:
    """The largest bound that the capital has refuted: it falls as the bound grows, so halving finds it."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        refuted: Any = grow_capital(values, middle).max() >= np.log(2 / alpha)
        low, high = (middle, high) if refuted else (low, middle)
    return low
