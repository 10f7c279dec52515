"""How likely a policy passes a version that deserves it, on the cohort at hand."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import Sites
from imaging.estimation import LINE, SMALLER, Measure, measure, name_stem, select
from imaging.intervals import Estimate, group_by_subject
from imaging.vocabulary import SiteKind, Split, Statement
from registry.bounds import measure_place
from registry.comparison import compare
from registry.evidence import Evidence
from registry.policy import Bounds, Policy
from registry.predictions import Predictions, read_predictions

DRAWS, PAIRS = 400, 3
ALIKE = 0.5  # share of the subjects on which an equally good version answers the same
Draw = tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]


@dataclass(frozen=True)
class _Place:
    """One population: its rows, the rows of each subject, and for each the subjects with the same truth."""

    here: Predictions
    groups: list[NDArray[np.intp]]
    peers: list[list[int]]

    def draw(self, generator: np.random.Generator) -> Draw:
        """Rows of as many subjects drawn again, rows of an equally good version's answers, and whose."""
        chosen = generator.integers(0, len(self.groups), len(self.groups))
        other = [one if generator.random() < ALIKE else generator.choice(self.peers[one]) for one in chosen]
        rows = [self.groups[one] for one in chosen]
        owners = np.repeat(np.arange(len(rows)), [len(group) for group in rows])
        return np.concatenate(rows), np.concatenate([self.groups[one] for one in other]), owners


def estimate_power(policy: Policy, evidence: Evidence, sites: Sites) -> dict[str, Any]:
    """Draw subjects again from a version's predictions, at the first use of the locked sets.

    An equally good version is drawn too: on half of the subjects it answers as this one, on the other half as
    this one does on another subject with the same truth. Intervals keep the width that they have at first.

    Args:
        policy: of the task.
        evidence: of a version.
        sites: all sites.

    Returns:
        `network`, and `sites` by name: `subjects`; `bounds`, the share of draws in which a version as good as
        this one reaches the bounds; `margins`, that in which an equally good one is shown to be within the
        margins of this one, None without margins. `family`: the most that a version that lies on a bound at
        every site may pass at one or more.

    Raises:
        TrustError: there is no evaluation.
        DataError: its predictions are not complete.
    """
    told = read_predictions(evidence.body(Statement.EVALUATION))
    sure = policy.confidence_at(1)
    network = _judge_draws(told.take(told.sets == Split.TEST), policy.network, sure)
    found = {
        name: _judge_draws(told.take(told.sites == name),
                    policy.internal if site.kind is SiteKind.INTERNAL else policy.external, sure)
        for name, site in sites.sites.items()
    }  # fmt: skip
    return {"network": network, "sites": found, "family": 1 - ((1 + sure) / 2) ** len(found)}


def explain_power(told: dict[str, Any]) -> list[str]:
    """What `estimate_power` found, in plain sentences."""
    sentences = []
    for name, found in {"the network": told["network"], **told["sites"]}.items():
        sentence = (f"A version as good as this one reaches the bounds of {name} ({found['subjects']} "
                    f"subjects) in {found['bounds']:.0%} of draws")  # fmt: skip
        if found["margins"] is not None:
            sentence += f"; an equally good one keeps the margins in {found['margins']:.0%}"
        sentences.append(f"{sentence}.")
    return [*sentences, f"A version that lies on a bound at each of the {len(told['sites'])} sites passes "
                        f"somewhere in at most {told['family']:.0%}."]  # fmt: skip


def _judge_draws(here: Predictions, bounds: Bounds, confidence: float) -> dict[str, Any]:
    """Subjects, and the shares of draws that pass, at one place."""
    place, generator = _open(here), np.random.default_rng(0)
    draws = [place.draw(generator) for _ in range(DRAWS)] if place.groups else []
    margins = _pass_margins(here, bounds, confidence, draws) if bounds.margin else None
    return {"subjects": len(place.groups), "bounds": _pass_bounds(here, bounds, confidence, draws),
            "margins": margins}  # fmt: skip


def _open(here: Predictions) -> _Place:
    truth = here.scores.get("truth", np.zeros(len(here.people)))
    order = np.argsort(truth, kind="stable")
    groups = group_by_subject(order, here.people[order])
    kinds = [tuple(truth[group].tolist()) for group in groups]
    alike = defaultdict(list)
    for number, kind in enumerate(kinds):
        alike[kind].append(number)
    return _Place(here, groups, [alike[kind] for kind in kinds])


def _pass_bounds(here: Predictions, bounds: Bounds, confidence: float, draws: list[Draw]) -> float:
    passed = np.ones(len(draws), dtype=bool)
    for limits, sign in ((bounds.low, 1), (bounds.high, -1)):
        for metric, limit in limits.items():
            told = measure_place(metric, here, confidence)
            if told is None or told.subjects < bounds.subjects:
                return 0.0
            away = told.estimate - told.low if sign > 0 else told.high - told.estimate
            ask = _ask(metric, here)
            passed &= [sign * (ask(rows) - limit) >= away for rows, _, _ in draws]
    return float(passed.mean())


def _pass_margins(here: Predictions, bounds: Bounds, confidence: float, draws: list[Draw]) -> float:
    passed = np.ones(len(draws), dtype=bool)
    for metric, margin in bounds.margin.items():
        ask, sign = _ask(metric, here), -1 if name_stem(metric) in SMALLER else 1
        pairs = [_compare(metric, here, drawn, confidence) for drawn in draws[:PAIRS]]
        told = compare(metric, (here.scores, here.scores), here.people, confidence)
        if not told or told.subjects < bounds.subjects or not all(pairs):
            return 0.0
        away = np.mean([one.estimate - one.low for one in pairs if one])
        passed &= [sign * (ask(other) - ask(rows)) + margin >= away for rows, other, _ in draws]
    return float(passed.mean())


def _ask(metric: str, here: Predictions) -> Measure:
    """The metric over any rows; NaN where it cannot be told."""
    if metric not in LINE:
        return select(metric, here.scores)

    def ask(rows: NDArray[np.intp]) -> float:
        told = measure(metric, here.take(rows).scores, here.people[rows])
        return told.estimate if told else float("nan")

    return ask


def _compare(metric: str, here: Predictions, drawn: Draw, confidence: float) -> Estimate | None:
    rows, other, owners = drawn
    return compare(metric, (here.take(other).scores, here.take(rows).scores), owners, confidence)
