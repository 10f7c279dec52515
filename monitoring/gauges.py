"""What is true now, read from rows at each scrape: the newest of small tables, never the journal itself."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, text
from sqlalchemy.exc import SQLAlchemyError

from imaging.errors import JournalDown
from imaging.vocabulary import Accuracy, Drift, Part
from monitoring.records import Records, choose

if TYPE_CHECKING:
    from monitoring.journal import Journal

DRIFT = {Drift.DRIFT: 1, Drift.IN_BOUNDS: 0, Drift.TOO_FEW: -1}
ACCURACY = {Accuracy.VERIFIED: 1, Accuracy.NOT_VERIFIED: 0, Accuracy.NOT_VALID: -1, Accuracy.TOO_FEW: -2}
MEASURES = ("accuracy", "sensitivity", "specificity")
BOUNDS = ("low", "estimate", "high")
PLACE = ("task", "site")
NEWEST = text(
    "SELECT s.task, s.site, s.last_seq, p.at, json_extract(s.state, '$.combined.enough') AS enough, "
    "json_extract(s.state, '$.combined.score') AS score "
    "FROM streams s LEFT JOIN predictions p ON p.seq = s.last_seq WHERE s.last_seq IN :chosen"
).bindparams(bindparam("chosen", expanding=True))
STREAMS = text("SELECT task, site, version, last_seq FROM streams ORDER BY last_seq")
Rows = Mapping[Any, float]


@dataclass(frozen=True)
class Gauge:
    """A metric as it stands now.

    Attributes:
        name: as docs/metrics.md has it.
        told: what it is.
        labels: names.
        rows: values of the labels -> value.
    """

    name: str
    told: str
    labels: tuple[str, ...]
    rows: Rows

    def write(self) -> Iterator[str]:
        """Prometheus' text, a line at a time: the client's own writer takes eight times as long."""
        yield f"# HELP {self.name} {self.told}\n# TYPE {self.name} gauge\n"
        names = [f'{label}="' for label in self.labels]
        for place, value in self.rows.items():
            told = ",".join([f'{name}{_escape(label)}"' for name, label in zip(names, place, strict=True)])
            yield f"{self.name}{{{told}}} {value}\n" if told else f"{self.name} {value}\n"


@dataclass(frozen=True)
class Serving:
    """What a gateway serves now, by the ledger as it last read it.

    Attributes:
        versions: (task, site) -> version that answers.
        generation: events in the ledger as last read.
        head: hash of the last of them.
        suspended: (task, site) that somebody stopped.
        alarms: (task, site, part) -> alarms that nobody has acknowledged.
    """

    versions: Mapping[tuple[str, str], int]
    generation: int = 0
    head: str = ""
    suspended: frozenset[tuple[str, str]] = frozenset()
    alarms: Mapping[tuple[str, str, str], int] = field(default_factory=dict)


class Now:
    """What is true now, as gauges.

    Args:
        journal: whose database the monitor writes into.
        serving: what the gateway serves.
    """

    def __init__(self, journal: Journal, serving: Serving) -> None:
        self._journal, self._serving = journal, serving

    def collect(self) -> Iterator[Gauge]:
        """What the ledger says; what the monitor wrote, or that it cannot be read."""
        yield from self._tell_serving()
        up = 1
        try:
            yield from [*self._tell_verdicts(), *self._tell_estimates(), *self._tell_streams()]
            yield from self._tell_journal()
        except (JournalDown, SQLAlchemyError):
            up = 0
        yield _one("formulary_journal_up", "1 when the journal's database can be read", up)

    def _tell_serving(self) -> Iterator[Gauge]:
        told = self._serving
        yield _one("formulary_ledger_generation", "Events in the ledger as last read", told.generation)
        head = {(told.head,): float(told.generation)}
        yield _many("formulary_ledger_head", "Number of the last event in the ledger", head, ("hash",))
        yield _many("formulary_serving_version", "Version that answers", told.versions)
        yield _many("formulary_suspended", "1 where somebody stopped it", dict.fromkeys(told.suspended, 1.0))
        parts = set(Part)
        known = {(*place, part if part in parts else "other"): float(n)
                 for (*place, part), n in told.alarms.items()}  # fmt: skip
        yield _many("formulary_open_alarms", "Alarms that nobody has acknowledged", known, (*PLACE, "part"))

    def _tell_verdicts(self) -> Iterator[Gauge]:
        rows = choose(self._journal.newest_verdicts(), self._serving.versions)
        drift = {place: DRIFT[Drift(row.verdict)] for place, row in rows.items()}
        yield _many("formulary_drift", "1 drift, 0 in bounds, -1 not enough cases", drift)
        ages = {place: _age(row.at) for place, row in rows.items()}
        yield _many("formulary_drift_age_seconds", "Age of the newest verdict", ages)

    def _tell_estimates(self) -> Iterator[Gauge]:
        found = choose(Records(self._journal.engine).newest_estimates(), self._serving.versions)
        verdicts = {place: ACCURACY[Accuracy(row.body["verdict"])] for place, row in found.items()}
        told = "1 verified, 0 not verified, -1 not valid, -2 not enough cases"
        yield _many("formulary_accuracy_verdict", told, verdicts)
        for name, source in (("estimated", "estimated without labels"), ("realised", "by late labels")):
            values: dict[tuple[str, ...], float] = {}
            for place, row in found.items():
                values |= _measures(place, row.body.get(name) or {})
            yield _many(f"formulary_accuracy_{name}", f"Accuracy, {source}", values,
                        (*PLACE, "measure", "bound"))  # fmt: skip

    def _tell_streams(self) -> Iterator[Gauge]:
        with self._journal.engine.connect() as connection:
            known = connection.execute(STREAMS).all()
            serving, newest = (choose(known, one).values() for one in (self._serving.versions, {}))
            asked = {"chosen": [*{one.last_seq for one in (*serving, *newest)}]}
            rows = {row.last_seq: row for row in connection.execute(NEWEST, asked)}
            told = connection.execute(text("SELECT name, seq FROM cursors"))
            cursors: dict[str, int] = {row.name: row.seq for row in told}
            last = connection.execute(text("SELECT COALESCE(MAX(seq), 0) FROM predictions")).scalar_one()
        judged, last_rows = ([rows[one.last_seq] for one in some if one.last_seq in rows]
                             for some in (serving, newest))  # fmt: skip
        scores = {(row.task, row.site): float(row.score) for row in judged if row.enough}
        yield _many("formulary_combined_score", "Combined distance from the reference", scores)
        idle = {(row.task, row.site): _age(row.at) for row in last_rows if row.at}
        yield _many("formulary_site_idle_seconds", "Age of the newest row that the monitor counted", idle)
        lag = last - cursors.get("watching", 0)
        yield _one("formulary_monitor_lag_rows", "Rows that the monitor has not counted yet", lag)
        looked = [time.time() - cursors["looked"]] if "looked" in cursors else []
        yield _one("formulary_monitor_pass_age_seconds", "Time since the monitor's last pass", *looked)

    def _tell_journal(self) -> Iterator[Gauge]:
        path, size = str(self._journal.engine.url.database), 0
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):  # there is no log while nobody writes
                size += os.path.getsize(path + suffix)
        yield _one("formulary_journal_bytes", "Size of the journal's file and its log", size)


def _one(name: str, told: str, *values: float) -> Gauge:
    return Gauge(name, told, (), {(): values[0]} if values else {})


def _many(name: str, told: str, rows: Rows, labels: tuple[str, ...] = PLACE) -> Gauge:
    return Gauge(name, told, labels, rows)


def _measures(place: tuple[str, str], told: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
    """What of an estimate is a number: (task, site, measure, bound) -> share."""
    return {
        (*place, measure, bound): float(told[measure][bound])
        for measure in MEASURES if isinstance(told.get(measure), Mapping)
        for bound in BOUNDS if told[measure].get(bound) is not None
    }  # fmt: skip


def _escape(label: str) -> str:
    """As the text format asks."""
    if '"' in label or "\\" in label or "\n" in label:
        return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return label


def _age(at: str) -> float:
    return time.time() - datetime.fromisoformat(at).timestamp()
