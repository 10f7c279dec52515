"""One test whether a window of embeddings is drawn from where the reference was: against a fixed reference.

It stands beside the charts, which take a small shift that was there from the first day for the stream's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.surveillance import Surveillance

FEW, PERMUTATIONS = 99, 1999
"""Of the first look at a window, and of the second; those resolve a p-value at level .0005 and above."""


def level(surveillance: Surveillance, days: float) -> float:
    """The level at which tests of windows that do not overlap spend their share of the budget.

    Args:
        surveillance: the budget and the window test's share of it.
        days: that the window spans, above 0.

    Returns:
        Alpha, a p-value up to which is an alarm; never below 1 / (PERMUTATIONS + 1), the least that there is,
        so windows that span less than task_days / window_share / 2000 spend more than their share; never
        above a half.
    """
    asked = surveillance.window_share * days / surveillance.task_days
    return min(0.5, max(asked, 1 / (PERMUTATIONS + 1)))


def judge_window(
    reference: NDArray[Any], window: NDArray[Any], level: float, seed: int, days: NDArray[Any] | None = None
) -> tuple[float, float]:
    """`compare_windows`; what is far from the level needs no fine p-value (Besag and Clifford 1991)."""
    statistic, p = compare_windows(reference, window, FEW, seed, days)
    if p <= 0.1 + 2 * level:
        statistic, p = compare_windows(reference, window, PERMUTATIONS, seed, days)
    return statistic, p


def compare_windows(
    reference: NDArray[Any],
    window: NDArray[Any],
    permutations: int,
    seed: int,
    days: NDArray[Any] | None = None,
) -> tuple[float, float]:
    """Test whether two samples differ in the place or spread of any coordinate.

    Without days whole rows are permuted between the two samples, which is exact. With days, rows of one day
    may be alike: then days keep their places, centred, and change signs (a wild bootstrap of clusters,
    Cameron, Gelbach and Miller 2008), which needs about ten days in a window; with
    fourteen it alarms about a fifth too often.

    Args:
        reference: (n, d), one row a subject.
        window: (m, d), one row a subject.
        permutations: 1999 tell p-values from .0005 up.
        seed: of the permutations.
        days: the day of each row of the window, (m,), where days may differ from each other; or of each row
            of both, (n + m,), where the reference is of few days too.

    Returns:
        The statistic of `measure_difference`, and its p-value.
    """
    features = find_features(reference, window)
    old, new = features[: len(reference)], features[len(reference) :]
    generator = np.random.default_rng(seed)
    if days is None:
        drawn = _permute(features, len(old), permutations, generator)
    else:
        of_old = days[: len(days) - len(new)] if len(days) > len(new) else np.arange(len(old))
        parts = np.concatenate([_add_days(old, of_old), _add_days(new, days[-len(new) :])])
        signs = generator.integers(0, 2, (permutations, len(parts)), dtype=np.int8) * np.float32(2) - 1
        drawn = signs @ parts
    observed = float(measure_difference((new.mean(axis=0) - old.mean(axis=0))[None])[0])
    reached = measure_difference(drawn) >= observed * (1 - 1e-9)
    return observed, (1 + int(reached.sum())) / (permutations + 1)


def find_features(reference: NDArray[Any], window: NDArray[Any]) -> NDArray[np.float64]:
    """Place and spread of every row: (n + m, 2 d), scaled so that a mean difference has variance 1.

    A row tells its coordinates and their distances from the pooled medians; both are scaled by what all rows
    together show, so permuting rows changes nothing.
    """
    rows = np.concatenate([reference, window]).astype(np.float64)
    told = np.concatenate([rows, np.abs(rows - np.median(rows, axis=0))], axis=1)
    told -= told.mean(axis=0)
    spread = told.std(axis=0) * np.sqrt(1 / len(reference) + 1 / len(window))
    return np.asarray(told / np.where(spread > 0, spread, np.inf))


def measure_difference(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of squares, which sees what is small and everywhere, and twice the largest, which sees one column.

    Args:
        differences: mean of the window less that of the reference, (repeats, features).

    Returns:
        (repeats,), above 0.
    """
    squares = differences**2
    return np.asarray(squares.sum(axis=1) + 2 * squares.max(axis=1))


def _permute(features: NDArray[Any], old: int, repeats: int, generator: Any) -> NDArray[np.float64]:
    """Differences of means when whole rows change places."""
    weights = np.full((repeats, len(features)), -1 / old, np.float32)
    weights[:, old:] = 1 / (len(features) - old)
    return np.asarray(generator.permuted(weights, axis=1) @ features.astype(np.float32), np.float64)


def _add_days(rows: NDArray[Any], days: NDArray[Any]) -> NDArray[np.float64]:
    """What each day adds to the mean of all rows, around that mean: (days, features)."""
    _, number = np.unique(days, return_inverse=True)
    told = np.zeros((number.max() + 1, rows.shape[1]))
    np.add.at(told, number, (rows - rows.mean(axis=0)) / len(rows))
    return np.asarray(told * np.sqrt(len(told) / max(len(told) - 1, 1)))
