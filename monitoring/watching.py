"""One pass over what is new in the journal: streams, charts, windows; alarms with the cursor of their place.

Of each version at each site the newest row that was counted stands with its streams, in the same transaction
as the alarms: after kill -9 nothing is counted twice and nothing is left out. What takes time happens before
the write lock is taken, so that answers do not wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, text

from imaging.config import Places, read_params
from imaging.errors import Conflict
from monitoring.daily import read_days
from monitoring.estimating import Estimator
from monitoring.judging import Judge
from monitoring.records import Alarm, EstimateRow, insert
from monitoring.reference import read_axes
from monitoring.streams import MOST, Streams, pack, unpack
from registry.database import writing
from registry.package import shelf
from registry.policy import read_policy
from registry.surveillance import Surveillance

BATCH = 50  # places in one transaction
CURSOR, LABELS, LOOKED = "watching", "assessments", "looked"
NEW = text(
    "SELECT DISTINCT task, site, version FROM predictions WHERE seq > :after AND seq <= :end UNION "
    "SELECT task, site, version FROM streams WHERE json_extract(state, '$.closed') < :day - 1 UNION "
    "SELECT task, site, version FROM assessments WHERE seq > :labelled"
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
    "history = :history WHERE last_seq = :before"
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
        self._axes: dict[tuple[str, str], NDArray[Any] | None] = {}
        self._estimator = Estimator(places, engine)
        self._labels: dict[Place, int] = {}

    def look(self, today: date | None = None) -> Outcome:
        """One pass, to the newest row there is when it begins.

        Args:
            today: days before it are over; today's date in UTC unless told.

        Returns:
            What was found; it is written.
        """
        day, done = (today or datetime.now(UTC).date()).toordinal(), Outcome()
        with self._engine.connect() as connection:
            (end, labelled), touched = _find(connection, day)
            self._labels = {(row[0], row[1], row[2]): row[3] for row in connection.execute(COUNT)}
        if touched:  # policies may have changed; to read them takes longer than to find that nothing is new
            tasks = read_params(self._places).tasks
            self._policies = {task: read_policy(task, self._places.policies).surveillance for task in tasks}
        while touched:
            batch, touched = touched[:BATCH], touched[BATCH:]
            touched += self._take(batch, (end, day), done)
        with writing(self._engine).begin() as connection:
            now = int(datetime.now(UTC).timestamp())
            for name, seq in ((CURSOR, end), (LABELS, labelled), (LOOKED, now)):
                connection.execute(MOVE, {"name": name, "seq": seq})
        return done

    def _take(self, touched: list[Place], to: tuple[int, int], done: Outcome) -> list[Place]:
        """Read and judge some places, then write everything at once.

        Returns:
            Those that have more rows than are read at a time.
        """
        with self._engine.connect() as connection:
            told = [_load(connection, place, to[0]) for place in touched]
            closed = {(one.task, one.site): one.closed for one, _ in told}
            days = read_days(connection, closed, self._places.var)
        kept, alarms, estimates = [], list[Alarm](), list[EstimateRow]()
        for streams, rows in told:
            before, had = streams.last_seq, len(streams.cases.days)
            streams.take(rows)
            if asked := self._policies.get(streams.task):
                more = len(rows) == MOST  # then the last day that was read is not over
                today = int(streams.cases.days[-1]) if more else to[1]
                judge = Judge(asked, today, days, self._find_axes(streams))
                alarms += judge.judge(streams, had)
                place = (streams.task, streams.site, streams.version)
                estimates += self._estimator.estimate(streams, self._labels.get(place, 0))
            streams.trim()
            kept.append({**pack(streams), "before": before})
        self._write(kept, alarms, estimates)
        done.rows += sum(len(rows) for _, rows in told)
        done.places += len(told)
        done.alarms += alarms
        done.estimates += estimates
        return [place for place, (_, rows) in zip(touched, told, strict=True) if len(rows) == MOST]

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


def _load(connection: Connection, place: Place, end: int) -> tuple[Streams, list[dict[str, Any]]]:
    """The streams of a place as they stand, and its rows that are not counted yet."""
    named: dict[str, Any] = dict(zip(("task", "site", "version"), place, strict=True))
    found = connection.execute(LOAD, named).mappings().first()
    streams = unpack(dict(found)) if found else Streams(**named)
    asked = {**named, "after": streams.last_seq, "end": end, "most": MOST}
    return streams, [dict(row) for row in connection.execute(ROWS, asked).mappings()]
