"""What labels that came late say of the answers: realised accuracy, over all and per week."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.intervals import Estimate, wilson
from imaging.vocabulary import Judged

Floats = NDArray[np.float64]
NEWEST = 200  # labelled subjects that are tested, so that old agreement hides no new disagreement
WEEKS = 26
FACES = ("accuracy", "sensitivity", "specificity")
FAR = 2.58  # standard errors between the scores of labelled cases and of all: 1 % by chance


@dataclass(frozen=True)
class Labelled:
    """Answers whose truth came late, oldest first.

    Attributes:
        scores: the network's probability of a positive, 0 to 1, shape (n,).
        positive: what was answered, shape (n,).
        truth: 0 or 1, shape (n,).
        people: subject of each, shape (n,).
        days: when each was answered, ISO 8601, shape (n,).
        chosen: whether a reader chose the case, shape (n,).
    """

    scores: Floats
    positive: NDArray[np.bool_]
    truth: NDArray[np.int64]
    people: NDArray[Any]
    days: NDArray[Any]
    chosen: NDArray[np.bool_]

    def newest(self) -> NDArray[np.intp]:
        """Rows of the newest answer of each of the newest subjects, oldest first."""
        _, last = np.unique(self.people[::-1], return_index=True)
        return np.sort(len(self.people) - 1 - last)[-NEWEST:]


def read_scores(rows: list[dict[str, Any]], threshold: float) -> tuple[Floats, NDArray[np.bool_]]:
    """The network's own probability of each row, before a site's recalibration, and whether it was positive.

    Args:
        rows: probability; and of a site with a profile raw_probability and threshold.
        threshold: of the contract, where a row has none.

    Returns:
        Each (n,).
    """
    scores = np.array([row.get("raw_probability", row["probability"]) for row in rows], dtype=float)
    bounds = [threshold if row.get("threshold") is None else row["threshold"] for row in rows]
    return scores, np.array([row["probability"] for row in rows], dtype=float) >= np.array(
        bounds, dtype=float
    )


def make_labelled(labels: list[dict[str, Any]], threshold: float) -> Labelled:
    """Rows of `monitoring.labels.read_labels` as columns; an answer that was withheld counts neither way.

    Args:
        labels: the rows.
        threshold: of the contract.
    """
    kept = [row for row in labels if not row.get("abstained")]
    return Labelled(
        *read_scores(kept, threshold),
        np.array([row["truth"] for row in kept], dtype=int),
        np.array([row["subject"] or row["prediction"] for row in kept], dtype=str),
        np.array([row["at"] for row in kept], dtype=str),
        np.array([row["verdict"] != Judged.LABELLED for row in kept], dtype=bool),
    )


def measure_realised(labelled: Labelled) -> dict[str, Any]:
    """Accuracy, sensitivity and specificity of the labelled answers by subject; None without cases."""
    right = (labelled.positive == labelled.truth).astype(int)
    every = np.ones(len(right), dtype=bool)
    kept = zip(FACES, (every, labelled.truth == 1, labelled.truth == 0), strict=True)
    return {name: _show(wilson(right[rows], labelled.people[rows])) if rows.any() else None
            for name, rows in kept}  # fmt: skip


def list_weeks(labelled: Labelled) -> list[dict[str, Any]]:
    """The newest ISO weeks with labels, oldest first, by the day of the answer."""
    names = np.array([_name_week(day) for day in labelled.days])
    found = []
    for week in np.unique(names)[-WEEKS:]:
        rows = names == week
        some = Labelled(*(getattr(labelled, name)[rows] for name in Labelled.__dataclass_fields__))
        realised = measure_realised(some)
        labels = int(rows.sum())
        found.append({"week": str(week), **realised, "labels": labels})
    return found


def note_choice(labelled: Labelled, scores: Floats) -> tuple[str, ...]:
    """Labels are seldom a random sample, and what is realised holds for them alone."""
    rows = labelled.newest()
    if not len(rows):
        return ()
    chosen = int(labelled.chosen[rows].sum())
    by = f"Readers chose {chosen} of the labelled cases, so realised figures hold for these cases alone."
    other = "Labelled cases have other scores than the rest, so realised figures do not hold for the site."
    away = abs(_shift(labelled.scores[rows], scores)) > FAR
    return tuple(note for note, holds in ((by, chosen), (other, away)) if holds)


def _shift(some: Floats, every: Floats) -> float:
    """How far the ranks of some scores lie from those of all, in standard errors (Mann and Whitney)."""
    ordered = np.sort(every)
    ranks = (np.searchsorted(ordered, some) + np.searchsorted(ordered, some, "right")) / (2 * len(every))
    spread = ((len(some) + len(every) + 1) / (12 * len(some) * len(every))) ** 0.5
    return float((ranks.mean() - 0.5) / spread)


def _show(told: Estimate) -> dict[str, Any]:
    return {"estimate": told.estimate, "low": told.low, "high": told.high, "subjects": told.subjects}


def _name_week(day: str) -> str:
    year, week, _ = date.fromisoformat(day[:10]).isocalendar()
    return f"{year}-W{week:02d}"
