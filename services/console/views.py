"""What the pages show, read from ledger, journal and records: the matrix, a site, a case, the queue."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import text

from imaging.config import Places, read_params, read_sites
from imaging.errors import FormularyError, UnknownPrediction
from imaging.vocabulary import Kind, Statement
from monitoring.labels import REASON, Door, read_promise
from monitoring.overview import read_overviews, read_streams
from monitoring.records import Alarm, Records
from registry.events import Event
from registry.evidence import verify_package
from registry.ledger import Ledger
from registry.package import read_contract, shelf
from registry.policy import read_policy
from registry.state import State, fold
from services.console.cells import WRONG, Board, Cell, began, concerns, find_first, judge_place, order
from services.console.charts import control_chart

CASES = 12
EVER = (0, 2**62)  # rows of the journal
NEIGHBOURS = {"MLflow": "MLFLOW_PORT", "Evidently": "EVIDENTLY_PORT"}
PLACE = "FROM predictions WHERE task = :task AND site = :site AND version = :version"
ROWS = f"SELECT seq, id, at, version, package, columns {PLACE} AND seq BETWEEN :low AND :high ORDER BY seq"
NUMBERED = text(f"SELECT seq {PLACE} ORDER BY seq LIMIT 1 OFFSET :before")


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
        states = self.states()
        overviews = read_overviews(self.places.var, find_serving(states))
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
        seen = read_overviews(self.places.var, find_serving(states)).get((task, site))
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
        first = find_first(alarms, lambda one: (one.kind, one.since))
        plain = cell.seen is not None and cell.seen.rows == cell.seen.subjects
        last = next(reversed([one for one in alarms if one.kind != "window"] or alarms), None)
        behind = self.cases_behind(last, plain) if last else {}
        return {
            "cell": cell, "title": self.sites.site(site).title, "asked": asked, "alarms": alarms,
            "first": first, "last": last, "cases": behind or {"newest": self.cases(task, site)},
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

    def cases(self, task: str, site: str) -> list[dict[str, Any]]:
        """The newest predictions, the newest first."""
        found = [row for _, version, _, _ in self.ledger.versions(task)  # the index is by version, too
                 for row in self._rows((task, site, version), EVER, CASES)]  # fmt: skip
        return sorted(found, key=lambda row: -int(row["seq"]))[:CASES]

    def cases_behind(self, alarm: Alarm, plain: bool) -> dict[str, list[dict[str, Any]]]:
        """The predictions where an alarm says that a change began, and the last that it rests on.

        Args:
            alarm: the alarm.
            plain: whether every row is of another subject: then a case's number is a row's.
        """
        place, half = (alarm.task, alarm.site, alarm.version), CASES // 2
        start = self._find_start(place, alarm.since, plain)
        before = self._rows(place, (0, start - 1), half // 2)[::-1]
        after = self._rows(place, (start, EVER[1]), half - len(before), "ASC")
        around = before + after
        last = [row for row in self._rows(place, (0, alarm.last_seq), half) if row not in around]
        return {f"around {alarm.since}": around, "the last before the alarm": last}

    def _find_start(self, place: tuple[str, str, int], since: str, plain: bool) -> int:
        """The row of a `since`: of its case, else the first of its day."""
        day, number = began(since)
        if number and plain:
            with self.records.engine.connect() as connection:
                return connection.execute(NUMBERED, _name(place) | {"before": number - 1}).scalar() or 0
        edges = [*self._rows(place, EVER, 1, "ASC"), *self._rows(place, EVER, 1)]
        start, end = (row["seq"] for row in edges) if edges else (0, 0)
        while start < end:  # rows come in the order of time; their days have no index
            middle = (start + end) // 2
            found = self._rows(place, (middle, EVER[1]), 1, "ASC")[0]
            start, end = (start, middle) if found["at"] >= day else (found["seq"] + 1, end)
        return int(start)

    def _rows(
        self, place: tuple[str, str, int], span: tuple[int, int], most: int, order: str = "DESC"
    ) -> list[Any]:
        """Predictions of a place between two rows of the journal, the newest first unless told."""
        asked = _name(place) | {"low": span[0], "high": span[1], "most": most}
        with self.records.engine.connect() as connection:
            found = connection.execute(text(f"{ROWS} {order} LIMIT :most"), asked).mappings()
            return [{**row, "finding": self._tell(row)} for row in found]

    def _tell(self, row: Any) -> str:
        """A prediction's finding in few words; empty where its package is not here any more."""
        with contextlib.suppress(FormularyError):
            contract = read_promise(self.places.var, row["package"])
            for one in tell_findings({"columns": json.loads(row["columns"])}, contract):
                if "share" not in one:
                    return f"{'positive' if one['positive'] else 'negative'} ({one['probability']:.2f})"
                if one["name"] != contract.classes[0]:
                    return f"{one['name']} {100 * one['share']:.1f} %"
        return ""

    def has_truth(self, row: dict[str, Any]) -> bool:
        """Whether an answer is positive or negative, so that a truth contradicts it."""
        contract = read_promise(self.places.var, row["package"])
        return contract.kind is not Kind.SEGMENTATION and "probability" in json.loads(row["columns"])

    def find(self, number: str) -> dict[str, Any]:
        """A prediction as the journal has it.

        Raises:
            UnknownPrediction: there is none.
        """
        row: dict[str, Any] | None = self.journal.find(number)
        if row is None:
            raise UnknownPrediction(f"There is no prediction {number[:40]}.", "Open one on its site's page.")
        return row

    def case(self, number: str) -> dict[str, Any]:
        """What the page of a case shows.

        Raises:
            UnknownPrediction: there is none.
            TrustError: its package does not hold any more.
        """
        row = self.find(number)
        has_truth = self.has_truth(row)
        row |= {name: json.loads(row[name]) for name in ("columns", "stages_ms", "acquisition")}
        folder = shelf(self.places.var, row["package"])
        contract, evidence = read_contract(folder), verify_package(folder, self.ledger)
        audit = evidence.statements.get(Statement.EVALUATION, {}).get("explanation", {})
        said = self.door.list_judgements(row["site"], number)
        return {"row": row, "contract": contract, "findings": list(tell_findings(row, contract)),
                "said": said[::-1], "explanation": audit, "longest": REASON,
                "has_truth": has_truth}  # fmt: skip

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
        waiting = newest - counted
        left = f"{waiting} answers are still to count" if waiting > 0 else "it counted every answer"
        return f"The monitor looked last at {datetime.fromtimestamp(looked, UTC):%Y-%m-%d %H:%M} UTC; {left}."

    def queue(self) -> list[Event]:
        """Requests that wait for a second person, oldest first."""
        asked = [event for state in self.states().values() for event in state.open.values()]
        return sorted(asked, key=lambda event: event.seq)


class Neighbours:
    """MLflow's and Evidently's pages, where they run; looked for every ten seconds."""

    def __init__(self) -> None:
        self._next, self._found = 0.0, dict[str, str]()

    def find(self) -> dict[str, str]:
        """Name -> address."""
        if self._next < time.monotonic():
            ports = {name: int(os.environ.get(variable, 0)) for name, variable in NEIGHBOURS.items()}
            self._found = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()
                           if port and listens(port)}  # fmt: skip
            self._next = time.monotonic() + 10
        return self._found


def find_serving(states: dict[str, State]) -> dict[tuple[str, str], int]:
    """(task, site) -> the champion's version, also where it is suspended."""
    return {(task, site): trail[-1].version for task, state in states.items()
            for site, trail in state.trail.items() if trail}  # fmt: skip


def listens(port: int) -> bool:
    """Whether something on loopback does."""
    try:
        socket.create_connection(("127.0.0.1", port), 0.05).close()
    except OSError:
        return False
    return True


def _name(place: tuple[str, str, int]) -> dict[str, Any]:
    return dict(zip(("task", "site", "version"), place, strict=True))


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
