"""Control charts that need no reference: two-sided CUSUMs on normal scores of sequential ranks.

A value is ranked among the earlier ones of its stream, and the rank becomes a normal score. While nothing
changes these scores are independent and standard normal, whatever the values' distribution: so one limit
serves every stream, and the alarms that it raises are those that the budget allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from imaging.vocabulary import Unit
from registry.surveillance import Surveillance

HISTORY = 1000
"""A value is ranked among so many rows before it at most."""

DIRECTIONS = ("up", "down")
Values = NDArray[Any]  # float32 or float64


@dataclass(frozen=True)
class Setting:
    """How strictly a chart judges.

    Attributes:
        limit: a sum above it is a crossing.
        allowance: taken from every score before it is added, in standard deviations.
        least: values of a stream before its chart may judge.
        seed: of the draws that stand for the place within a rank, and among equal values.
    """

    limit: float
    allowance: float
    least: int
    seed: int


@dataclass(frozen=True)
class Crossing:
    """A sum that went above its limit; it then starts again at 0.

    Attributes:
        row: index into history and fresh rows, one after the other.
        stream: column.
        direction: `up` or `down`.
        value: of the sum, above the limit.
        since: index of the row where the sum last left 0; 0 where that lies before the history.
    """

    row: int
    stream: int
    direction: str
    value: float
    since: int


@dataclass
class Chart:
    """The state of a chart of several streams; with the history it is all that goes on.

    Attributes:
        up: float64 (streams,), sums of what lies above the median.
        down: float64 (streams,), sums of what lies below.
        begun: int64 (2, streams), the row of the history where each sum last left 0; who forgets the oldest
            rows subtracts their number.
        dropped: how many rows were forgotten; who forgets some adds their number.
    """

    up: Values
    down: Values
    begun: NDArray[np.int64]
    dropped: int = 0

    @classmethod
    def start(cls, streams: int) -> Self:
        """A chart that has seen nothing."""
        return cls(np.zeros(streams), np.zeros(streams), np.zeros((2, streams), np.int64))


def limit(surveillance: Surveillance, streams: int) -> float:
    """The limit at which all charts of a task at a site spend what the window test leaves of its budget.

    Args:
        surveillance: the budget, the unit, the allowance and the share of the window test.
        streams: charts of the task there, at least 1; only those whose values ever differ spend anything.

    Returns:
        h of one two-sided CUSUM, in standard deviations of a score.
    """
    a_day = surveillance.per_day if surveillance.unit is Unit.SUBJECT else 1.0
    days = surveillance.task_days / (1 - surveillance.window_share)
    return find_limit(days * a_day * streams, surveillance.allowance)


@lru_cache(maxsize=1024)
def find_limit(values: float, allowance: float) -> float:
    """The limit at which a two-sided CUSUM alarms once in so many standard normal values.

    Args:
        values: mean number of values between alarms; the rates of the two sides add.
        allowance: taken from every value.

    Returns:
        The limit, to 1e-9; 0 where even that alarms less often than asked.
    """
    low, high = 0.0, 1.0
    while run_length(high, allowance) < 2 * values:
        low, high = high, 2 * high
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if run_length(middle, allowance) < 2 * values else (low, middle)
    return low


def run_length(limit: float, allowance: float) -> float:
    """Mean number of standard normal values until a one-sided CUSUM that starts at 0 crosses its limit.

    Page's integral equation, solved at Gauss-Legendre nodes (Goel and Wu 1971).

    Args:
        limit: above 0, in standard deviations.
        allowance: taken from every value.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64 + 4 * math.ceil(limit))
    places = np.concatenate([[0.0], (nodes + 1) * limit / 2])  # where the sum may stand: at 0 or between
    density = np.exp(-((places + allowance - places[:, None]) ** 2) / 2) / math.sqrt(2 * math.pi)
    steps = density * np.concatenate([[0.0], weights * limit / 2])
    steps[:, 0] = [math.erfc((place - allowance) / math.sqrt(2)) / 2 for place in places]
    return float(np.linalg.solve(np.eye(len(places)) - steps, np.ones(len(places)))[0])


def normal_score(history: Values, value: Values, draw: float | Values) -> Values:
    """Rank a value among the earlier ones of its stream, as a normal score.

    The share of earlier values below it, with itself and its equals spread by the draw, is uniform while
    nothing changes, exactly so at any length and with any ties (a smoothed conformal p-value, Vovk 2005).

    Args:
        history: (rows, streams); NaN is a missing value.
        value: (streams,).
        draw: between 0 and 1, one or (streams,); of earlier draws independent.

    Returns:
        float64 (streams,): NaN where the value is missing; 0 where no value of the stream has differed yet,
        since a constant says nothing.
    """
    from scipy.special import ndtri

    below, above, known = (_count(one) for one in (history < value, history > value, history == history))
    place = (below + draw * (known - below - above + 1)) / (known + 1)
    score = np.where(below + above == 0, 0.0, ndtri(np.clip(place, 1e-12, 1 - 1e-12)))
    return np.where(np.isnan(value), np.nan, score)


def advance(chart: Chart, history: Values, fresh: Values, setting: Setting) -> list[Crossing]:
    """Add fresh rows to a chart; in one go or row by row is the same.

    The sums run from the first value on: the scores are exact from there. A sum that goes above the limit
    before `least` values are there waits, and is a crossing when they are.

    Args:
        chart: its state, changed in place.
        history: (rows, streams), what came before, oldest first.
        fresh: (rows, streams), oldest first; NaN is skipped.
        setting: how strictly it judges.

    Returns:
        Every crossing, in the order of rows.
    """
    found: list[Crossing] = []
    for row, sums, crossed in _sweep(chart, history, fresh, setting):
        for side, stream in np.argwhere(crossed):
            since = max(0, int(chart.begun[side, stream]))
            found.append(Crossing(row, int(stream), DIRECTIONS[side], float(sums[side, stream]), since))
    return found


def path(values: Values, setting: Setting) -> tuple[Values, Values]:
    """The sums of a chart that starts with the first row, at every row, for pictures.

    Args:
        values: (rows, streams), oldest first.
        setting: how strictly it judges.

    Returns:
        Two of float64 (rows, streams): up and down; a sum above the limit is a crossing, and the next row
        starts again at 0.
    """
    told = np.zeros((2, *values.shape))
    for row, sums, _ in _sweep(Chart.start(values.shape[1]), values[:0], values, setting):
        told[:, row] = sums
    return told[0], told[1]


def _sweep(
    chart: Chart, history: Values, fresh: Values, setting: Setting
) -> Iterator[tuple[int, Values, Any]]:
    """Row, sums (2, streams) and which of them cross, before those start again at 0."""
    together = np.asfortranarray(np.concatenate([history, fresh]))  # so that counting a stream is quick
    known = _count(~np.isnan(history))
    for row in range(len(history), len(together)):
        value = together[row]
        draw = np.random.default_rng([setting.seed, chart.dropped + row]).random(len(value))
        score = normal_score(together[max(0, row - HISTORY) : row], value, draw)
        known = known + ~np.isnan(value)
        before = np.stack([chart.up, chart.down])
        sums = np.maximum(0.0, before + np.stack([score, -score]) - setting.allowance)
        sums = np.where(np.isnan(score) | (before > setting.limit), before, sums)
        chart.begun = np.where((before == 0) & (sums > 0), row, chart.begun)
        crossed = (sums > setting.limit) & (known >= setting.least) & ~np.isnan(value)
        yield row, sums, crossed
        chart.up, chart.down = np.where(crossed, 0.0, sums)


def _count(told: NDArray[np.bool_]) -> NDArray[np.int32]:
    """How many of each column are true, several times as fast as count_nonzero."""
    return np.asarray(told.view(np.uint8).sum(axis=0, dtype=np.int32))


def find_change(values: NDArray[Any]) -> int:
    """The case (1, 2, ...) from which a stream's mean differs most from before (least squares)."""
    kept = np.clip(values, *np.quantile(values, (0.025, 0.975)))  # so that one outlier moves nothing
    centred = kept - kept.mean()
    counts = np.arange(1, len(centred))
    before = np.cumsum(centred)[:-1]
    gain = before**2 / counts + before**2 / (len(centred) - counts)
    return int(np.argmax(gain)) + 2
