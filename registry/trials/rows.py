"""What a trial is judged by: a row a case, in a database of its own.

Not in the journal's: a challenger's process has the lowest priority, and while it held the lock of a shared
database, preempted, no answer could leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.exc import DatabaseError

from imaging.errors import RegistryError
from registry.database import open_database, writing


@dataclass(frozen=True)
class Row:
    """One case that both versions saw.

    Attributes:
        trial: number of the ledger's record that started it.
        prediction: id of the champion's answer, in the journal.
        site: who asked.
        subject: pseudonym, or None where the request named nobody; then it decides nothing.
        champion: version that answered.
        difference: 0 the same finding, 1 another one or none; of masks 1 - the mean Dice of the classes.
        champion_positive: the champion's finding; None of a mask.
        positive: the challenger's; None of a mask, or where it failed.
        champion_ms: what the caller waited for the engine: the queue and the batch.
        wall_ms: of the challenger's engine, at the lowest priority.
        cpu_ms: of the challenger's process meanwhile: what the work costs.
        failure: why there is no answer; empty where there is.
    """

    trial: int
    prediction: str
    site: str
    subject: str | None
    champion: int
    difference: float
    champion_positive: bool | None
    positive: bool | None
    champion_ms: float
    wall_ms: float = 0.0
    cpu_ms: float = 0.0
    failure: str = ""


@dataclass(frozen=True)
class Shown(Row):
    """A row with its place, and the truth of it where that came.

    Attributes:
        seq: grows with each case.
        truth_seq: grows with each truth.
        truth: whether it was positive.
    """

    seq: int = 0
    truth_seq: int | None = None
    truth: bool | None = None


NAMES = [field.name for field in fields(Row)]
BOOLS = ("champion_positive", "positive", "truth")


def open_rows(var: Path) -> TrialRows:
    """The rows under a var folder; the database is made when there is none."""
    return TrialRows(open_database(var / "trials.db", "registry/trials", _explain))


class TrialRows:
    """Appends cases and truths, reads them in their order."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def append(self, rows: Sequence[Row], trial: int, dropped: int = 0) -> None:
        """Write cases, and how many were not shown, in one transaction; durable when this returns.

        Raises:
            RegistryError: the database cannot be written.
        """
        insert = text(
            f"INSERT OR IGNORE INTO cases (at, {', '.join(NAMES)}) "
            f"VALUES (:at, {', '.join(':' + name for name in NAMES)})"
        )
        drop = text("INSERT INTO drops (at, trial, cases) VALUES (:at, :trial, :cases)")
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        with writing(self._engine).begin() as connection:
            if rows:
                connection.execute(insert, [{"at": at, **asdict(row)} for row in rows])
            if dropped:
                connection.execute(drop, {"at": at, "trial": trial, "cases": dropped})

    def tell_truth(self, truths: dict[str, bool]) -> tuple[int, list[str]]:
        """Keep what cases really were: prediction id -> positive. What was told before stands.

        A truth of a case that no trial has seen is not kept: the case would later come into the past of a
        trial, at the truth's place.

        Returns:
            How many are new, and the ids that no trial knows.
        """
        insert = text("INSERT INTO truths (at, prediction, positive) VALUES (:at, :id, :positive)")
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        with writing(self._engine).begin() as connection:
            seen, known = (set(connection.execute(text(f"SELECT prediction FROM {table}")).scalars())
                           for table in ("cases", "truths"))  # fmt: skip
            fresh = (one for one in truths if one in seen and one not in known)
            new = [{"at": at, "id": one, "positive": truths[one]} for one in fresh]
            if new:
                connection.execute(insert, new)
        return len(new), [one for one in truths if one not in seen]

    def read(self, trial: int) -> list[Shown]:
        """Every case of a trial, oldest first."""
        query = text(
            f"SELECT {', '.join('cases.' + name for name in NAMES)}, cases.seq AS seq, "
            "truths.seq AS truth_seq, truths.positive AS truth FROM cases LEFT JOIN truths "
            "ON truths.prediction = cases.prediction WHERE trial = :trial ORDER BY cases.seq"
        )
        with self._engine.connect() as connection:
            return [
                Shown(**_read(dict(row))) for row in connection.execute(query, {"trial": trial}).mappings()
            ]

    def dropped(self, trial: int) -> int:
        """Cases that were not shown to the challenger, for want of time."""
        query = text("SELECT COALESCE(SUM(cases), 0) FROM drops WHERE trial = :trial")
        with self._engine.connect() as connection:
            return int(connection.execute(query, {"trial": trial}).scalar_one())


def _read(row: dict[str, Any]) -> dict[str, Any]:
    return row | {name: None if row[name] is None else bool(row[name]) for name in BOOLS}


def _explain(error: DatabaseError) -> RegistryError:
    told = str(error.orig).strip().splitlines()[0]
    return RegistryError(f"The rows of trials cannot be used: {told}.", "Free disk space, or try again.")
