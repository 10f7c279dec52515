"""Requests that got no answer, as rows: what a scrape counts is gone when the process ends."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from monitoring.records import Refusal, open_records
from monitoring.tally import Tally

EVERY_S = 5.0  # at most one row of each kind in this time
KINDS = 64  # in this time; what goes beyond is counted by its place alone
OTHER = "other"


@dataclass(frozen=True)
class Refused:
    """Why a request got no answer.

    Attributes:
        task: of params.yaml.
        site: of sites.yaml.
        reason: the problem's name, e.g. wrong-shape.
    """

    task: str
    site: str
    reason: str


class Refusals(Tally[Refused]):
    """Counts refusals of known tasks and sites; strangers, whose place is `other`, leave no row.

    Args:
        var: of the checkout; the rows go into the journal's database.
    """

    def __init__(self, var: Path) -> None:
        super().__init__("refusals", lambda counts: write_refusals(var, counts), _outline, EVERY_S, KINDS)

    def count(self, task: str, site: str, reason: str) -> None:
        """Count a request that got no answer; microseconds."""
        if OTHER not in (task, site):
            self.note(Refused(task, site, reason))


def write_refusals(var: Path, counts: Counter[Refused]) -> None:
    """Write a row for each, durable when this returns.

    Raises:
        JournalDown: the database cannot be written.
    """
    records = open_records(var)  # anew each time: a journal may be moved or restored meanwhile
    try:
        records.append([Refusal(task=one.task, site=one.site, reason=one.reason, count=count)
                        for one, count in counts.items()])  # fmt: skip
    finally:
        records.engine.dispose()


def _outline(refused: Refused) -> Refused:
    return replace(refused, reason=OTHER)
