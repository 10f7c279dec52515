"""A task at a site as one cell of the matrix: a word, a rank, a sentence; and the order of them all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from markupsafe import Markup

from imaging.vocabulary import Accuracy, Drift
from monitoring.overview import Overview
from registry.events import Event
from registry.state import State
from services.console.charts import sparkline

RANKS = ("not approved", "approved", "drift", "accuracy not valid", "suspended", "alarm")
WRONG = RANKS.index("drift")
T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """A task at a site.

    Attributes:
        state: a word of RANKS; the later, the sooner somebody should look.
        why: a sentence.
        since: when what serves began to, ISO 8601, UTC.
        seen: what the monitor knows; None where nothing was asked yet.
        alarms: records that nobody has acknowledged.
        stopped: the record that suspended it.
    """

    task: str
    site: str
    state: str
    why: str
    version: int = 0
    since: str = ""
    seen: Overview | None = None
    alarms: list[Event] = field(default_factory=list)
    stopped: Event | None = None

    @property
    def rank(self) -> int:
        """How soon somebody should look."""
        return RANKS.index(self.state)

    @property
    def drift(self) -> str:
        """The monitor's verdict in its words."""
        return self.seen.verdict.verdict if self.seen and self.seen.verdict else "not compared yet"

    @property
    def spark(self) -> Markup:
        """What was nearest to a limit on each of the last 30 days; not of days from before that was kept."""
        return sparkline([(one[0], one[2]) for one in self.seen.recent if len(one) > 2] if self.seen else [])

    @property
    def nearest(self) -> dict[str, Any]:
        """The part that is nearest to a limit now, and its value, 1 at the limit; empty where unknown."""
        told: dict[str, Any] = self.seen.combined.get("nearest", {}) if self.seen else {}
        return told

    @property
    def told(self) -> dict[str, Any]:
        """The newest estimate of accuracy."""
        return self.seen.estimate.body if self.seen and self.seen.estimate else {}


@dataclass(frozen=True)
class Board:
    """The matrix: rows and columns with what is wrong first."""

    tasks: list[str]
    sites: list[str]
    cells: dict[tuple[str, str], Cell]
    wrong: list[Cell]

    @property
    def unwatched(self) -> int:
        """Places where a version serves of which the monitor knows nothing."""
        return sum(bool(one.version) and one.seen is None for one in self.cells.values())


def judge_place(state: State, key: tuple[str, str], seen: Overview | None) -> Cell:
    """What is to be said first of a task at a site."""
    task, site = key
    trail, alarms, stopped = state.trail.get(site), state.alarms.get(site, []), state.stopped(site)
    if not trail:
        return Cell(task, site, "not approved", "No version is approved here.", seen=seen, alarms=alarms)
    if seen and seen.version != trail[-1].version:  # what serves has not answered yet
        seen = None
    word, why = _find_worst(alarms, stopped, seen)
    return Cell(task, site, word, why, trail[-1].version, trail[-1].since, seen, alarms, stopped)


def _find_worst(alarms: list[Event], stopped: Event | None, seen: Overview | None) -> tuple[str, str]:
    if stopped:
        return "suspended", f"{stopped.actor}: {stopped.body.get('because', '')}"
    if alarms:
        return "alarm", _tell_alarms(alarms)
    if seen and seen.estimate and seen.estimate.body.get("verdict") == Accuracy.NOT_VALID:
        return "accuracy not valid", str(seen.estimate.body.get("told", ""))
    if seen and seen.verdict and seen.verdict.verdict == Drift.DRIFT:
        return "drift", seen.verdict.detail
    if seen is None or not seen.combined.get("enough", True):
        return "approved", "Not enough cases yet to judge by."
    return "approved", "Nothing is wrong that anybody knows of."


def order(cells: Iterable[Cell], axis: str) -> list[str]:
    """Names along an axis, those with what is wrong first, else in the order of the files."""
    worst: dict[str, int] = {}
    for cell in cells:
        name = getattr(cell, axis)
        worst[name] = max(worst.get(name, 0), cell.rank if cell.rank >= WRONG else 0)
    return sorted(worst, key=lambda name: -worst[name])


def concerns(event: Event, site: str) -> bool:
    """Whether a record is about a site, or about all of them."""
    sites = event.body.get("sites", ())
    return site in sites or "*" in sites


def began(since: str) -> tuple[str, int]:
    """The day and the case that an alarm names as the start of a change: `case 101, 2026-11-25`, or a day."""
    day, case = (re.search(form, since) for form in (r"\d{4}-\d\d-\d\d", r"case (\d+)"))
    return day.group() if day else "", int(case.group(1)) if case else 0


def find_first(alarms: Sequence[T], read: Callable[[T], tuple[str, str]]) -> T | None:
    """The alarm whose change began first; None of none.

    A window's test says only where its window begins, so it is named where no chart alarmed.

    Args:
        alarms: of a place.
        read: an alarm's kind and since.
    """
    charted = [one for one in alarms if read(one)[0] != "window"]
    return min(charted or alarms, key=lambda one: began(read(one)[1]), default=None)


def _tell_alarms(alarms: list[Event]) -> str:
    """Open alarms in a sentence: what changed first is most often the cause of the others."""
    told = [event.body for event in alarms]
    first = find_first(told, lambda body: (str(body.get("kind", "")), str(body.get("since", "")))) or {}
    count = f"{len(alarms)} open alarms" if len(alarms) > 1 else "An open alarm"
    return f"{count}; first changed: {first.get('detail') or first.get('fact')}."
