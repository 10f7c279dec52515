"""What is known of every version at every site, for whoever shows it. Nothing is judged here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import text

from imaging.config import Places
from imaging.vocabulary import Part, Unit
from monitoring import charts
from monitoring.daily import Days
from monitoring.journal import VerdictRow, open_journal
from monitoring.judging import Judge
from monitoring.records import Alarm, EstimateRow, Records, choose, open_records
from monitoring.reference import read_table
from monitoring.streams import DAILY, part_of, unpack
from registry.package import shelf
from registry.policy import read_policy

PLACES = text(
    "SELECT s.task, s.site, s.version, s.rows, s.last_seq, s.state ->> '$.subjects' AS subjects, "
    "s.state -> '$.combined' AS combined, s.state -> '$.recent' AS recent, s.state -> '$.window' AS window, "
    "p.at AS last_at FROM streams s LEFT JOIN predictions p ON p.seq = s.last_seq ORDER BY s.last_seq"
)
NEWEST_ALARMS = 50


@dataclass(frozen=True)
class Overview:
    """What is known of the version that serves at a site; where it never answered, of what answered last.

    Attributes:
        task, site, version: the place.
        rows: of the journal.
        subjects: that they were of.
        last_at: time of the newest, ISO 8601, UTC; empty where none is left.
        verdict: of Evidently's window tests; None before the first.
        alarms: of this version, oldest first, the newest 50.
        estimate: of its accuracy; None before the first.
        combined: score, parts (value, weight, share), nearest (part and value; 1 is at a limit), enough.
        recent: (day, combined score, value nearest to a limit) of the newest 30 days with cases.
        window: the last comparison with the reference: p, level, subjects, day.
    """

    task: str
    site: str
    version: int
    rows: int
    subjects: int
    last_at: str
    verdict: VerdictRow | None = None
    alarms: list[Alarm] = field(default_factory=list)
    estimate: EstimateRow | None = None
    combined: dict[str, Any] = field(default_factory=dict)
    recent: list[list[Any]] = field(default_factory=list)
    window: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stream:
    """A stream as a control chart.

    Attributes:
        name: of the stream.
        part: that it belongs to.
        unit: whether a value is a subject or a day.
        days: ISO 8601, one a value.
        values: float64 (n,), oldest first; NaN is missing.
        up, down: sums of the chart, as it stands after each value that is kept, (n,).
        limit: of the sums.
        enough: whether there are values enough to judge by.
        first: number of the first value, from 1.
        reference: 5th, 50th and 95th percentile in the package's reference of the site; None without one.
    """

    name: str
    part: Part
    unit: Unit
    days: list[str]
    values: NDArray[np.float64]
    up: NDArray[np.float64]
    down: NDArray[np.float64]
    limit: float
    enough: bool
    first: int
    reference: tuple[float, float, float] | None


NOTHING: Mapping[tuple[str, str], int] = MappingProxyType({})


def read_overviews(
    var: Path, serving: Mapping[tuple[str, str], int] = NOTHING
) -> dict[tuple[str, str], Overview]:
    """(task, site) -> what is known of the version that serves there.

    Args:
        var: holds the journal.
        serving: (task, site) -> the champion's version.

    Raises:
        JournalDown: the database cannot be read.
    """
    records = open_records(var)
    verdicts = choose(open_journal(var).newest_verdicts(), serving)
    estimates, alarms = choose(records.newest_estimates(), serving), _gather(records)
    with records.engine.connect() as connection:
        rows = [dict(row) for row in connection.execute(PLACES).mappings()]
    found: dict[tuple[str, str], Overview] = {}
    for row in sorted(rows, key=lambda row: row["version"] == serving.get((row["task"], row["site"]))):
        key = (row["task"], row["site"])  # what serves comes last, else the newest, so that it stays
        verdict, estimate = verdicts.get(key), estimates.get(key)
        told = {name: json.loads(row[name] or "{}") for name in ("combined", "recent", "window")}
        found[key] = Overview(
            *key, row["version"], row["rows"], row["subjects"], row["last_at"] or "",
            verdict=verdict if verdict and verdict.version == row["version"] else None,
            alarms=alarms.get((*key, row["version"]), []),
            estimate=estimate if estimate and estimate.version == row["version"] else None, **told,
        )  # fmt: skip
    return found


def read_streams(places: Places, task: str, site: str, version: int) -> list[Stream]:
    """The streams of a version at a site, each as a control chart; [] where it never answered.

    Raises:
        JournalDown: the database cannot be read.
    """
    asked = text("SELECT * FROM streams WHERE task = :task AND site = :site AND version = :version")
    with open_records(places.var).engine.connect() as connection:
        row = connection.execute(asked, {"task": task, "site": site, "version": version}).mappings().first()
    if row is None:
        return []
    streams, surveillance = unpack(dict(row)), read_policy(task, places.policies).surveillance
    reference = read_table(shelf(places.var, streams.package), site) if streams.package else {}
    settings = Judge(surveillance, 0, Days(), None).settings(streams)
    told = []
    for table, setting, unit in (
        (streams.cases, settings[0], Unit.SUBJECT), (streams.daily, settings[1], Unit.DAY)
    ):  # fmt: skip
        values = table.select(table.charted).astype(float)
        up, down = charts.path(values, setting)
        days = [date.fromordinal(int(day)).isoformat() for day in table.days]
        for number, name in enumerate(table.charted):
            column, known = values[:, number], reference.get(name)
            told.append(Stream(
                name, part_of(name), unit, days, column, up[:, number], down[:, number], setting.limit,
                int(np.isfinite(column).sum()) >= setting.least, table.dropped + 1,
                _percentiles(known) if known is not None and len(known) and name not in DAILY else None,
            ))  # fmt: skip
    return told


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float, float]:
    low, middle, high = (float(one) for one in np.percentile(values, (5, 50, 95)))
    return low, middle, high


def _gather(records: Records) -> dict[tuple[str, str, int], list[Alarm]]:
    found: dict[tuple[str, str, int], list[Alarm]] = {}
    for alarm in records.read(Alarm, limit=20_000):
        found.setdefault((alarm.task, alarm.site, alarm.version), []).append(alarm)
    return {place: told[-NEWEST_ALARMS:] for place, told in found.items()}
