"""What the pages show, read from ledger, journal and records: the matrix, a site, a case, the queue."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import text

from imaging.config import Places, read_params, read_sites
from imaging.errors import UnknownPrediction
from imaging.vocabulary import Kind, Statement
from monitoring.labels import Door
from monitoring.overview import read_overviews, read_streams
from monitoring.records import Records
from registry.events import Event
from registry.evidence import verify_package
from registry.ledger import Ledger
from registry.package import read_contract, shelf
from registry.policy import read_policy
from registry.state import State, fold
from services.console.cells import WRONG, Board, Cell, began, concerns, judge_place, order
from services.console.charts import control_chart

CASES = 12


class Books:
    """What pages read: opened once, used from any thread.

    Args:
        places: of the checkout.
        ledger: decisions.
        journal: predictions and verdicts.
        records: assessments, alarms and estimates.
    """

    def __init__(self, places: Places, ledger: Ledger, journal: Any, records: Records) -> None:
        self.places, self.ledger, self.journal, self.records = places, ledger, journal, records
        self.sites, self.params = read_sites(places), read_params(places)
        self.door = Door(places, journal, records)

    def states(self) -> dict[str, State]:
        """Task -> what follows from its records; every task of params.yaml, and those the ledger knows."""
        events: dict[str, list[Event]] = {name: [] for name in self.params.tasks}
        for event in self.ledger.signed():
            if event.task:
                events.setdefault(event.task, []).append(event)
        return {task: fold(told) for task, told in events.items()}

    def board(self, only: str = "", find: str = "", wrong: bool = False) -> Board:
        """The matrix.

        Args:
            only: a site, of a person who may see no other.
            find: part of the name of a site or task.
            wrong: leave out rows and columns where nothing is wrong.
        """
        overviews, states = read_overviews(self.places.var), self.states()
        sites = [site for site in self.sites.sites if only in ("", site)]
        cells = {(task, site): judge_place(state, (task, site), overviews.get((task, site)))
                 for task, state in states.items() for site in sites}  # fmt: skip
        if find:
            cells = {key: one for key, one in cells.items() if any(find.lower() in name for name in key)}
        bad = sorted((one for one in cells.values() if one.rank >= WRONG),
                     key=lambda one: (-one.rank, one.task, one.site))  # fmt: skip
        shown = bad if wrong else list(cells.values())
        return Board(order(shown, "task"), order(shown, "site"), cells, bad)

    def place(self, task: str, site: str) -> Cell:
        """One cell.

        Raises:
            UnknownTask: or UnknownSite.
        """
        self.sites.site(site)
        states = self.states()
        if task not in states:
            self.params.task(task)
        seen = read_overviews(self.places.var).get((task, site))
        return judge_place(states[task], (task, site), seen)

    def site(self, task: str, site: str) -> dict[str, Any]:
        """What the page of a site shows."""
        cell = self.place(task, site)
        streams = read_streams(self.places, task, site, cell.version) if cell.version else []
        alarms = sorted(cell.seen.alarms if cell.seen else [], key=lambda one: one.at)
        asked = read_policy(task, self.places.policies).surveillance
        place = {alarm.statistic: n for n, alarm in reversed(list(enumerate(alarms)))}
        streams.sort(key=lambda one: (place.get(one.name, len(alarms)), one.part, one.name))
        drawn = [(stream, control_chart(stream)) for stream in streams]
        events = [event for event in self.ledger.signed() if event.task == task and concerns(event, site)]
        first = min(alarms, key=lambda one: began(one.since), default=None)
        last = alarms[-1].last_seq if alarms else 0
        return {
            "cell": cell, "title": self.sites.site(site).title, "asked": asked,
            "alarms": alarms, "first": first, "cases": self.cases(task, site, last),
            "left": [(stream, chart) for stream, chart in drawn if chart and stream.name in place],
            "drawn": [(stream, chart) for stream, chart in drawn if chart and stream.name not in place],
            "silent": [stream.name for stream, chart in drawn if not chart],
            "mix": [_mix(stream) for stream in streams if stream.reference],
            "events": events[-20:][::-1], "simulated": self.simulated(task, cell.version),
        }  # fmt: skip

    def simulated(self, task: str, version: int) -> str:
        """What of a version's data is not real; empty where there is no version, or all is."""
        if not version:
            return ""
        digest, _ = self.ledger.version(task, version)
        return read_contract(shelf(self.places.var, digest)).simulated

    def cases(self, task: str, site: str, last: int = 0) -> list[dict[str, Any]]:
        """The newest predictions up to a row of the journal, the newest first; 0 for all rows."""
        query = text(
            "SELECT seq, id, at, version FROM predictions WHERE task = :task AND site = :site "
            "AND (:last = 0 OR seq <= :last) ORDER BY seq DESC LIMIT :limit"
        )
        asked = {"task": task, "site": site, "last": last, "limit": CASES}
        with self.records.engine.connect() as connection:
            return [dict(row) for row in connection.execute(query, asked).mappings()]

    def find(self, number: str) -> dict[str, Any]:
        """A prediction as the journal has it.

        Raises:
            UnknownPrediction: there is none.
        """
        row: dict[str, Any] | None = self.journal.find(number)
        if row is None:
            raise UnknownPrediction(
                f"There is no prediction {number[:40]}.", "Open one from its site's page."
            )
        return row

    def case(self, number: str) -> dict[str, Any]:
        """What the page of a case shows.

        Raises:
            UnknownPrediction: there is none.
            TrustError: its package does not hold any more.
        """
        row = self.find(number)
        row |= {name: json.loads(row[name]) for name in ("columns", "stages_ms", "acquisition")}
        folder = shelf(self.places.var, row["package"])
        contract, evidence = read_contract(folder), verify_package(folder, self.ledger)
        audit = evidence.statements.get(Statement.EVALUATION, {}).get("explanation", {})
        said = self.door.list_judgements(row["site"], number)
        return {"row": row, "contract": contract, "findings": list(tell_findings(row, contract)),
                "explanation": audit, "said": said[::-1]}  # fmt: skip

    def watched(self) -> str:
        """How far the monitor has come, in a sentence."""
        query = text(
            "SELECT (SELECT seq FROM cursors WHERE name = 'looked') AS looked, "
            "COALESCE((SELECT seq FROM cursors WHERE name = 'watching'), 0) AS counted, "
            "COALESCE((SELECT MAX(seq) FROM predictions), 0) AS newest"
        )
        with self.records.engine.connect() as connection:
            looked, counted, newest = connection.execute(query).one()
        if looked is None:
            return "The monitor has not looked yet."
        left = (
            f"{newest - counted} answers are still to count"
            if newest > counted
            else "it counted every answer"
        )
        return f"The monitor looked last at {datetime.fromtimestamp(looked, UTC):%Y-%m-%d %H:%M} UTC; {left}."

    def queue(self) -> list[Event]:
        """Requests that wait for a second person, oldest first."""
        asked = [event for state in self.states().values() for event in state.open.values()]
        return sorted(asked, key=lambda event: event.seq)


def _mix(stream: Any) -> dict[str, Any]:
    """A stream's newest values against its reference."""
    values = [float(one) for one in stream.values if one == one][-100:]
    low, median, high = stream.reference
    inside = sum(low <= one <= high for one in values) / len(values) if values else None
    now = statistics.median(values) if values else None
    return {"name": stream.name, "part": stream.part, "low": low, "median": median, "high": high, "now": now,
            "count": len(values), "inside": inside}  # fmt: skip


def tell_findings(row: dict[str, Any], contract: Any) -> Iterable[dict[str, Any]]:
    """What was answered, as the journal has it: a probability beside its threshold, or shares of classes."""
    columns = row["columns"]
    if contract.kind is Kind.SEGMENTATION:
        for name in contract.classes:
            share = columns.get(f"share_{name.replace(' ', '_')}")
            if share is not None:
                yield {"name": name, "share": share}
        return
    score, threshold = columns.get("probability"), columns.get("threshold", contract.threshold)
    if score is not None:
        yield {"name": " or ".join(contract.positive), "probability": score, "threshold": threshold,
               "positive": score >= threshold}  # fmt: skip
