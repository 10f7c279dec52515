"""The journal: one durable row for each answer, before the answer leaves. No pixels, no identities."""

from __future__ import annotations

import hmac
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from imaging.errors import JournalDown
from monitoring import telemetry
from monitoring.records import now
from registry.database import open_database, writing
from registry.signing import read_secret

INSERT = (
    "INSERT INTO predictions (id, at, request_id, task, site, version, package, engine, subject, image, "
    "columns, stages_ms, answer, batch, acquisition) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        id: of the prediction, a uuid.
        request_id: the caller's, or ours.
        task: what was asked.
        site: who asked.
        version: that answered.
        package: digest of the version, sha256:...
        engine: e.g. openvino/f32.
        subject: pseudonym, or None when the request named nobody.
        image: sha256 of the request's body.
        columns: what is compared with the reference: statistics of the image and scores of the answer.
        stages_ms: how long each stage took.
        answer: sha256 of what was answered, for a replay.
        batch: which place of a batch of which size the image had, e.g. 3:32.
        acquisition: how the image was made, by its header.
    """

    id: str
    request_id: str
    task: str
    site: str
    version: int
    package: str
    engine: str
    subject: str | None
    image: str
    columns: dict[str, float]
    stages_ms: dict[str, float]
    answer: str = ""
    batch: str = ""
    acquisition: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class VerdictRow:
    """What the monitor said of a site, up to the journal's row `last_seq`."""

    at: str
    task: str
    site: str
    version: int
    last_seq: int
    subjects: int
    verdict: str
    detail: str
    level: float
    columns: dict[str, float]
    report: str


def open_journal(var: Path) -> Journal:
    """The journal under a var folder; it is made when there is none.

    Raises:
        JournalDown: it cannot be opened.
    """
    try:
        return Journal(open_database(var / "journal.db", "monitoring"))
    except (SQLAlchemyError, OSError) as error:
        raise _down(error) from error


class Journal:
    """Appends predictions, reads windows of them, keeps verdicts."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._file = self._identify()

    @property
    def engine(self) -> Engine:
        """The database, for whoever reads other tables of it."""
        return self._engine

    def append(self, rows: Sequence[Prediction]) -> None:
        """Write rows in one transaction, durable when this returns.

        Raises:
            JournalDown: the database cannot be written: disk full, locked for over two seconds, gone.
        """
        at, start = now(), time.perf_counter()
        self._write(INSERT, [
            (row.id, at, row.request_id, row.task, row.site, row.version, row.package, row.engine,
             row.subject, row.image, _dump(row.columns), _dump(row.stages_ms), row.answer, row.batch,
             orjson.dumps(row.acquisition).decode())
            for row in rows
        ])  # fmt: skip
        telemetry.JOURNAL_COMMIT.observe(time.perf_counter() - start)
        telemetry.JOURNAL_ROWS.inc(len(rows))

    def last_seq(self, task: str | None = None, site: str | None = None) -> int:
        """The newest row's number, of everything or of one task and site; 0 when there is none."""
        query = text(
            "SELECT COALESCE(MAX(seq), 0) AS last FROM predictions WHERE (:task IS NULL OR task = :task) "
            "AND (:site IS NULL OR site = :site)"
        )
        return int(self._read(query, task=task, site=site)[0]["last"])

    def cursor(self, name: str) -> int:
        """How far a reader of the journal has come: number of the newest row that it counted; 0 at first."""
        rows = self._read(text("SELECT seq FROM cursors WHERE name = :name"), name=name)
        return int(rows[0]["seq"]) if rows else 0

    def read_window(self, task: str, site: str, version: int, subjects: int) -> list[dict[str, Any]]:
        """The newest image of each of the newest subjects, oldest first: one row a subject.

        Args:
            task: the task.
            site: the site.
            version: answers of other versions are left out.
            subjects: at most this many.

        Returns:
            Rows with seq, at, image, subject and the drift columns; a probability is the network's own, as in
            the reference, whatever the site's profile made of it.
        """
        query = text(
            "SELECT MAX(seq) AS seq, at, image, subject, columns FROM predictions WHERE task = :task AND "
            "site = :site AND version = :version AND seq > :floor GROUP BY COALESCE(subject, id) "
            "ORDER BY seq DESC LIMIT :limit"
        )
        rows, back, floor = list[dict[str, Any]](), 4 * subjects, 1
        while len(rows) < subjects and floor:  # further back where subjects have many images
            back *= 2
            floor = self._floor(task, site, version, back)
            rows = self._read(query, task=task, site=site, version=version, limit=subjects, floor=floor)
        told = ({**row, **json.loads(row["columns"])} for row in reversed(rows))
        raw = (
            {**row, "probability": row["raw_probability"]} if "raw_probability" in row else row
            for row in told
        )
        return [{name: value for name, value in row.items() if name != "columns"} for row in raw]

    def newest(
        self, task: str | None, site: str | None, limit: int, version: int | None = None
    ) -> list[dict[str, Any]]:
        """The newest predictions as they stand, oldest first; of all unless told."""
        named = {"task": task, "site": site, "version": version}
        given = {name: value for name, value in named.items() if value is not None}
        where = " AND ".join(f"{name} = :{name}" for name in given) or "TRUE"
        query = text(f"SELECT * FROM predictions WHERE {where} ORDER BY seq DESC LIMIT :limit")
        rows = self._read(query, **given, limit=limit)
        parsed = ("columns", "stages_ms", "acquisition")
        return [{**row, **{name: json.loads(row[name]) for name in parsed}} for row in reversed(rows)]

    def find(self, number: str) -> dict[str, Any] | None:
        """The prediction of this id as it stands; None when there is none."""
        rows = self._read(text("SELECT * FROM predictions WHERE id = :id"), id=number)
        return rows[0] if rows else None

    def write_verdict(self, row: VerdictRow) -> None:
        """Keep what the monitor said.

        Raises:
            JournalDown: the database cannot be written.
        """
        names = list(VerdictRow.__dataclass_fields__)
        insert = f"INSERT INTO verdicts ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
        told = {**asdict(row), "columns": _dump(row.columns)}
        self._write(insert, [tuple(told[name] for name in names)])

    def newest_verdicts(self) -> list[VerdictRow]:
        """The newest verdict of every task and site."""
        query = text(
            "SELECT * FROM verdicts WHERE seq IN (SELECT MAX(seq) FROM verdicts GROUP BY task, site)"
        )
        rows = [{**row, "columns": json.loads(row["columns"])} for row in self._read(query)]
        return [VerdictRow(**{name: row[name] for name in VerdictRow.__dataclass_fields__}) for row in rows]

    def _floor(self, task: str, site: str, version: int, back: int) -> int:
        """The row so many rows of a place before the newest; 0 where it has no more."""
        query = text(
            "SELECT seq FROM predictions WHERE task = :task AND site = :site AND version = :version "
            "ORDER BY seq DESC LIMIT 1 OFFSET :back"
        )
        rows = self._read(query, task=task, site=site, version=version, back=back)
        return int(rows[0]["seq"]) if rows else 0

    def _write(self, insert: str, values: list[tuple[Any, ...]]) -> None:
        """Commit, and see that what was written to is still the journal: SQLite does not notice a removal."""
        try:
            with writing(self._engine).begin() as connection:
                connection.exec_driver_sql(insert, values)
            opened, self._file = self._file, self._identify()
        except (SQLAlchemyError, OSError) as error:
            raise _down(error) from error
        if opened != self._file:
            self._engine.dispose()  # the next write opens the file that lies there now
            raise JournalDown("The journal's file was replaced.", "Ask again.")

    def _identify(self) -> tuple[int, int]:
        told = os.stat(str(self._engine.url.database))
        return told.st_dev, told.st_ino

    def _read(self, query: Any, **values: Any) -> list[dict[str, Any]]:
        try:
            with self._engine.connect() as connection:
                return [dict(row) for row in connection.execute(query, values).mappings()]
        except SQLAlchemyError as error:
            raise _down(error) from error


def pseudonym(var: Path, site: str, subject: str) -> str:
    """HMAC-SHA256 of a subject under the site's own key, so that a short patient number cannot be guessed.

    Args:
        var: holds keys/subjects-<site>.key, made once, mode 0600.
        site: the site.
        subject: the site's number of the person.
    """
    return hmac.digest(read_secret(var / "keys" / f"subjects-{site}.key"), subject.encode(), "sha256").hex()


def _down(error: Exception) -> JournalDown:
    reason = getattr(error, "orig", None) or type(error).__name__
    return JournalDown(
        f"The journal cannot be used ({reason}).", "Free disk space or restore it; nothing is lost."
    )


def _dump(values: dict[str, float]) -> str:
    """JSON; what is not finite is refused, since orjson would write null."""
    if not all(map(math.isfinite, values.values())):
        raise ValueError("a journal keeps finite numbers only")
    return orjson.dumps(values, option=orjson.OPT_SORT_KEYS).decode()
