"""One pass over what is new in the journal: streams, charts, windows; alarms with the cursor of their place.

Of each version at each site the newest row that was counted stands with its streams, in the same transaction
as the alarms: after kill -9 nothing is counted twice and nothing is left out. What takes time happens before
the write lock is taken, so that answers do not wait for it.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, text

from imaging.config import Places, read_params
from imaging.errors import ConfigError, Conflict
from monitoring.daily import Days, read_days
from monitoring.estimating import Estimator
from monitoring.judging import Judge
from monitoring.records import Alarm, EstimateRow, insert
from monitoring.reference import read_axes
from monitoring.streams import MOST, Streams, pack, unpack
from registry.database import writing
from registry.package import shelf
from registry.policy import read_policy
from registry.surveillance import Surveillance

LOG = logging.getLogger(__name__)
BATCH = 50  # places in one transaction
CURSOR, LABELS, LOOKED = "watching", "assessments", "looked"
NEW = text(
    "SELECT DISTINCT task, site, version FROM predictions WHERE seq > :after AND seq <= :end UNION "
    "SELECT task, site, version FROM streams WHERE json_extract(state, '$.closed') BETWEEN 1 AND :day - 2 "
    "UNION "
    "SELECT task, site, version FROM assessments WHERE seq > :labelled"
)
LEFT = text(  # what failed before this process began
    "SELECT p.task, p.site, p.version FROM (SELECT task, site, version, MAX(seq) AS seq FROM predictions "
    "GROUP BY task, site, version) p LEFT JOIN streams s ON s.task = p.task AND s.site = p.site "
    "AND s.version = p.version WHERE p.seq > COALESCE(s.last_seq, 0) UNION "
    "SELECT s.task, s.site, s.version FROM streams s WHERE json_extract(s.state, '$.estimated[1]') != "
    "(SELECT COUNT(*) FROM assessments a WHERE a.task = s.task AND a.site = s.site AND a.version = s.version)"
)
COUNT = text("SELECT task, site, version, COUNT(*) FROM assessments GROUP BY task, site, version")
ROWS = text(
    "SELECT seq, at, subject, image, package, columns, stages_ms, acquisition FROM predictions "
    "WHERE task = :task AND site = :site AND version = :version AND seq > :after AND seq <= :end "
    "ORDER BY seq LIMIT :most"
)
LOAD = text("SELECT * FROM streams WHERE task = :task AND site = :site AND version = :version")
KEEP = text(
    "INSERT INTO streams VALUES (:task, :site, :version, :rows, :last_seq, :state, :history) ON CONFLICT "
    "(task, site, version) DO UPDATE SET rows = :rows, last_seq = :last_seq, state = :state, "
    "history = :history WHERE state = :had"
)
MOVE = text("INSERT INTO cursors VALUES (:name, :seq) ON CONFLICT (name) DO UPDATE SET seq = :seq")
Place = tuple[str, str, int]


@dataclass
class Outcome:
    """What a pass did: rows that were counted, places that were judged, and what came of it."""

    rows: int = 0
    places: int = 0
    alarms: list[Alarm] = field(default_factory=list)
    estimates: list[EstimateRow] = field(default_factory=list)


class Watch:
    """Looks at what is new, as often as it is asked.

    Args:
        places: where policies and packages lie.
        engine: of the journal's database.
    """

    def __init__(self, places: Places, engine: Engine) -> None:
        self._places, self._engine = places, engine
        self._policies: dict[str, Surveillance] = {}
        self._unread: set[str] = set()  # tasks whose policy this process never could read
        self._axes: dict[tuple[str, str], NDArray[Any] | None] = {}
        self._estimator = Estimator(places, engine)
        self._labels: dict[Place, int] = {}
        self._again: set[Place] = set()
        self._begun, self._promised = False, ""

    def look(self, today: date | None = None) -> Outcome:
        """One pass, to the newest row there is when it begins.

        What fails at one place is logged, and tried again by the next pass; the others go on.

        Args:
            today: days before it are over. Unless told, today in UTC, but never after the newest day that the
                journal knows: a day is over when something of a later one is seen.

        Returns:
            What was found; it is written.
        """
        done = Outcome()
        with self._engine.connect() as connection:
            day = today.toordinal() if today else _find_today(connection)
            (end, labelled), found = _find(connection, day)
            if not self._begun:
                found += [(row[0], row[1], row[2]) for row in connection.execute(LEFT)]
            self._labels = {(row[0], row[1], row[2]): row[3] for row in connection.execute(COUNT)}
        self._again |= set(found)
        self._begun = True
        touched = sorted(self._again)
        if touched:  # policies may have changed; to read them takes longer than to find that nothing is new
            self._read_policies()
        while touched:
            batch, touched = touched[:BATCH], touched[BATCH:]
            touched += self._take(batch, (end, day), done)
        with writing(self._engine).begin() as connection:
            moved = {CURSOR: end, LABELS: labelled}
            if not any(place[0] in self._unread for place in self._again):  # else the pass's age says it
                moved[LOOKED] = int(datetime.now(UTC).timestamp())
            for name, seq in moved.items():
                connection.execute(MOVE, {"name": name, "seq": seq})
        return done

    def _read_policies(self) -> None:
        """The policies as they are now; of one that cannot be read, what it was."""
        for task in read_params(self._places).tasks:
            try:
                self._policies[task] = read_policy(task, self._places.policies).surveillance
            except ConfigError as error:
                LOG.error("%s The last one that could be read holds.", error.fact)
                self._unread |= {task} - set(self._policies)
        self._unread -= set(self._policies)
        told = check_budgets(self._policies)
        if told and told != self._promised:
            LOG.warning(told)
        self._promised = told

    def _take(self, touched: list[Place], to: tuple[int, int], done: Outcome) -> list[Place]:
        """Read and judge some places, then write everything at once.

        Returns:
            Those that have more rows than are read at a time.
        """
        kept, alarms, estimates, more, again = [], list[Alarm](), list[EstimateRow](), [], set[Place]()
        with self._engine.connect() as connection:
            told = [(place, _load(connection, place, to[0])) for place in touched]
            since = {place: find_open(*found) for place, found in told}
            days = read_days(connection, since, self._places.var)
        for place, (had, rows) in told:
            try:
                streams, found = self._judge(place, (had, rows), days, to[1])
                estimated, owed = self._estimate(streams)
            except Exception:  # whatever is wrong with one place must not silence the others
                LOG.exception("%s v%d at %s could not be judged", place[0], place[2], place[1])
                again.add(place)
                continue
            again |= {place} if owed else set()
            kept.append({**pack(streams), "had": had["state"] if had else ""})
            alarms += found
            estimates += estimated
            done.rows += len(rows)
            more += [place] if len(rows) == MOST else []
        self._write(kept, alarms, estimates)
        self._again = self._again.difference(touched) | again
        done.places += len(kept)
        done.alarms += alarms
        done.estimates += estimates
        return more

    def _judge(
        self, place: Place, told: tuple[dict[str, Any] | None, list[dict[str, Any]]], days: Days, today: int
    ) -> tuple[Streams, list[Alarm]]:
        had, rows = told
        streams = unpack(had) if had else Streams(*place)
        before, alarms = len(streams.cases.days), list[Alarm]()
        streams.take(rows)
        if asked := self._policies.get(streams.task):
            if len(rows) == MOST:  # there are more: the last day that was read is not over
                today = int(streams.cases.days[-1])
            alarms = Judge(asked, today, days, self._find_axes(streams)).judge(streams, before)
        elif streams.task in self._unread:
            raise ConfigError(f"No policy of {streams.task} could be read.", "Mend it; its rows wait.")
        streams.trim()
        return streams, alarms

    def _estimate(self, streams: Streams) -> tuple[list[EstimateRow], bool]:
        """An estimate where one is due, and whether labels came too soon after the last one and wait."""
        labels = self._labels.get((streams.task, streams.site, streams.version), 0)
        if streams.task not in self._policies:
            return [], False
        made = self._estimator.estimate(streams, labels)
        waits = not made and streams.package and self._estimator.owes(streams, labels, soon=True)
        return made, bool(waits)

    def _write(self, kept: list[dict[str, Any]], alarms: list[Alarm], estimates: list[EstimateRow]) -> None:
        with writing(self._engine).begin() as connection:
            for row in kept:
                if connection.execute(KEEP, row).rowcount != 1:
                    raise Conflict("Another monitor watches this journal.", "Stop one of the two.")
            insert(connection, alarms)
            insert(connection, estimates)

    def _find_axes(self, streams: Streams) -> NDArray[Any] | None:
        """Embeddings of the site's reference, in the package that answered last."""
        key = (streams.package, streams.site)
        if streams.package and key not in self._axes:
            self._axes[key] = read_axes(shelf(self._places.var, streams.package), streams.site)
        return self._axes.get(key)


def check_budgets(policies: dict[str, Surveillance]) -> str:
    """What is wrong where a site with all tasks may alarm more often than each policy says; else nothing."""
    count, fewest = len(policies), min((one.budget_days for one in policies.values()), default=0.0)
    together = 1 / sum(1 / one.task_days for one in policies.values()) if policies else math.inf
    if together > 0.99 * fewest:
        return ""
    return (f"A site with all {count} tasks may alarm falsely once in {together:.0f} days where policies say "
            f"{fewest:g}: write `tasks: {count}` into the surveillance of each.")  # fmt: skip


def _find(connection: Connection, day: int) -> tuple[tuple[int, int], list[Place]]:
    """The newest rows, and the places that have new ones, or a day that is over since."""
    seen = {row[0]: int(row[1]) for row in connection.execute(text("SELECT name, seq FROM cursors"))}
    end, labelled = (
        int(connection.execute(text(f"SELECT COALESCE(MAX(seq), 0) FROM {table}")).scalar_one())
        for table in ("predictions", "assessments")
    )
    asked = {"after": seen.get(CURSOR, 0), "labelled": seen.get(LABELS, 0), "end": end, "day": day}
    found = connection.execute(NEW, asked)
    return (end, labelled), sorted((row[0], row[1], row[2]) for row in found)


def _find_today(connection: Connection) -> int:
    """Ordinal of today by the clock, or of the newest day of which there is anything."""
    tables = ("predictions", "refusals", "assessments")
    newest = [connection.execute(text(f"SELECT at FROM {table} ORDER BY seq DESC LIMIT 1")).scalar()
              for table in tables]  # fmt: skip
    seen = [date.fromisoformat(at[:10]).toordinal() for at in newest if at]
    return min([datetime.now(UTC).date().toordinal(), *([max(seen)] if seen else [])])


def find_open(row: dict[str, Any] | None, rows: list[dict[str, Any]]) -> str:
    """The day (ISO 8601) from which days of a place may be open, by its row, else by its first answers."""
    if row and (closed := int(json.loads(row["state"])["closed"])):
        return date.fromordinal(closed).isoformat()
    return min((str(one["at"])[:10] for one in rows), default="")


def _load(
    connection: Connection, place: Place, end: int
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The row of a place's streams as it stands, and the rows of the journal that are not counted yet."""
    named: dict[str, Any] = dict(zip(("task", "site", "version"), place, strict=True))
    found = connection.execute(LOAD, named).mappings().first()
    asked = {**named, "after": found["last_seq"] if found else 0, "end": end, "most": MOST}
    rows = [dict(row) for row in connection.execute(ROWS, asked).mappings()]
    return dict(found) if found else None, rows
