"""What surveillance writes beside the predictions: refusals, assessments, alarms, estimates. Append-only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from imaging.errors import JournalDown
from registry.database import open_database, writing


def now() -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A row of any of these tables; `seq` is given by the database, 0 before.

    Attributes:
        at: when it was written, ISO 8601, UTC.
    """

    seq: int = 0
    at: str = field(default_factory=now)
    task: str
    site: str


@dataclass(frozen=True, kw_only=True)
class Refusal(Record):
    """Requests that got no answer: how many, and the name of the problem."""

    reason: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Assessment(Record):
    """What somebody says of an answer.

    Attributes:
        prediction: id of the answer.
        version: that answered.
        source: csv, http or console.
        verdict: a word of `imaging.vocabulary.Judged`.
        truth: 1 positive, 0 negative, None where nobody says.
        reason: in a sentence; may be empty.
        reader: pseudonym of the reader; may be empty.
    """

    prediction: str
    version: int
    source: str
    verdict: str
    truth: int | None = None
    reason: str = ""
    reader: str = ""


@dataclass(frozen=True, kw_only=True)
class Alarm(Record):
    """A promise that was broken, perhaps: a stream left its limits, or a window differs from the reference.

    Attributes:
        version: whose answers.
        kind: chart or window.
        statistic: name of the stream, or embedding.
        part: a word of `imaging.vocabulary.Part`.
        direction: up, down or both.
        value: of the chart, in its units (or p of the window's test).
        bound: that it crossed.
        since: from when on the stream is another: a day, or the number of a subject.
        budget_days: one false alarm in so many days was allowed at this site.
        last_seq: newest row of the journal that it rests on.
        detail: a sentence.
    """

    version: int
    kind: str
    statistic: str
    part: str
    direction: str
    value: float
    bound: float
    since: str
    budget_days: float
    last_seq: int
    detail: str


@dataclass(frozen=True, kw_only=True)
class EstimateRow(Record):
    """Accuracy without labels, and with those that came; `body` is what `monitoring.estimation` tells."""

    version: int
    last_seq: int
    body: dict[str, Any]


Kind = TypeVar("Kind", bound=Record)
TABLES: dict[type[Record], str] = {
    Refusal: "refusals", Assessment: "assessments", Alarm: "alarms", EstimateRow: "estimates",
}  # fmt: skip


def open_records(var: Path) -> Records:
    """The records under a var folder.

    Raises:
        JournalDown: the database cannot be opened.
    """
    try:
        return Records(open_database(var / "journal.db", "monitoring"))
    except (SQLAlchemyError, OSError) as error:
        raise _down(error) from error


def insert(connection: Connection, rows: Sequence[Record]) -> None:
    """Write rows of one kind within a transaction."""
    if not rows:
        return
    names = [one.name for one in fields(rows[0]) if one.name != "seq"]
    places = ", ".join(f":{name}" for name in names)
    table = TABLES[type(rows[0])]
    connection.execute(text(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({places})"),
                       [_flatten(asdict(row)) for row in rows])  # fmt: skip


class Records:
    """Appends and reads; each write is one transaction, durable when it returns."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def append(self, rows: Sequence[Record]) -> None:
        """Write rows of one kind.

        Raises:
            JournalDown: the database cannot be written.
        """
        try:
            with writing(self.engine).begin() as connection:
                insert(connection, rows)
        except SQLAlchemyError as error:
            raise _down(error) from error

    def read(
        self, kind: type[Kind], task: str | None = None, site: str | None = None, after: int = 0,
        limit: int = 100_000,
    ) -> list[Kind]:  # fmt: skip
        """The newest rows of a kind, oldest first; of a task and a site where they are named."""
        query = text(
            f"SELECT * FROM {TABLES[kind]} WHERE (:task IS NULL OR task = :task) AND "
            "(:site IS NULL OR site = :site) AND seq > :after ORDER BY seq DESC LIMIT :limit"
        )
        try:
            with self.engine.connect() as connection:
                found = connection.execute(
                    query, {"task": task, "site": site, "after": after, "limit": limit}
                )
                return [make(kind, dict(row)) for row in found.mappings()][::-1]
        except SQLAlchemyError as error:
            raise _down(error) from error

    def newest_estimates(self) -> list[EstimateRow]:
        """The newest estimate of every version at every site, oldest first."""
        query = text(
            "SELECT * FROM estimates WHERE seq IN "
            "(SELECT MAX(seq) FROM estimates GROUP BY task, site, version) ORDER BY seq"
        )
        with self.engine.connect() as connection:
            return [make(EstimateRow, dict(row)) for row in connection.execute(query).mappings()]


def choose(rows: Iterable[Any], serving: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], Any]:
    """(task, site) -> the row of the version that serves there; where none is known to, the last of the rows.

    A canary answers beside the champion, and what answered before it is not what serves.
    """
    return {(row.task, row.site): row for row in rows
            if serving.get((row.task, row.site), row.version) == row.version}  # fmt: skip


def make(kind: type[Kind], row: dict[str, Any]) -> Kind:
    """A record of a database's row."""
    if kind is EstimateRow:
        row = {**row, "body": json.loads(row["body"])}
    return kind(**{one.name: row[one.name] for one in fields(kind)})


def _flatten(row: dict[str, Any]) -> dict[str, Any]:
    return {name: json.dumps(value, sort_keys=True) if isinstance(value, dict) else value
            for name, value in row.items()}  # fmt: skip


def _down(error: Exception) -> JournalDown:
    reason = getattr(error, "orig", None) or type(error).__name__
    return JournalDown(f"The records of surveillance cannot be used ({reason}).", "Free disk space.")
