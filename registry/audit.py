"""The whole ledger read again, on every core; and its head kept elsewhere, so that a cut tail is missed."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imaging.errors import TrustError
from imaging.vocabulary import Decision
from registry.events import GENESIS, RESTORE, Event, TrustedKey, authenticate, fold_key, read_event

if TYPE_CHECKING:  # the processes that check need no database
    from sqlalchemy import Engine

Row = tuple[Any, ...]
ROWS = 1000  # of a part: about .08 s of work
KIND, HASH = 2, 8  # columns
KEYS = (Decision.KEY_TRUSTED, Decision.KEY_REVOKED)


@dataclass(frozen=True)
class Part:
    """Records one after the other, and what was true before the first of them.

    Attributes:
        seq: of the record before.
        previous: its hash.
        trusted: key id -> key, as the records before say.
        rows: columns, in the order of `Event`'s.
    """

    seq: int
    previous: str
    trusted: dict[str, TrustedKey]
    rows: Sequence[Row]


def verify_ledger(engine: Engine) -> int:
    """Hold every record to `authenticate`: chain, hashes, signatures, keys trusted when it was written.

    Parts are checked at the same time. Each is given the keys of the records before it unchecked: where one
    of those does not hold, its own part, an earlier one, says so.

    Args:
        engine: of the ledger; it is read in one transaction.

    Returns:
        The number of records.

    Raises:
        TrustError: names the first record that does not hold.
    """
    from sqlalchemy import text

    with engine.connect() as connection:
        count = connection.execute(text("SELECT COUNT(*) FROM events")).scalar_one()
        cursor = connection.exec_driver_sql("SELECT * FROM events ORDER BY seq").cursor
        parts = _cut(iter(lambda: cursor.fetchmany(ROWS), []))
        if count <= ROWS:
            return sum(map(_check, parts))
        # A fork starts at once; but where there are threads, one of them may hold a lock.
        context = get_context("fork" if threading.active_count() == 1 else "spawn")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=gc.disable) as pool:
            return sum(pool.map(_check, parts))


def _cut(parts: Iterable[Sequence[Row]]) -> Iterator[Part]:
    seq, previous = 0, GENESIS
    trusted: dict[str, TrustedKey] = {}
    for rows in parts:
        yield Part(seq, previous, dict(trusted), rows)
        for row in (one for one in rows if one[KIND] in KEYS):
            with contextlib.suppress(TrustError, AttributeError, KeyError, TypeError):
                fold_key(trusted, read_event(row))
        seq, previous = seq + len(rows), rows[-1][HASH]


def _check(part: Part) -> int:
    """Facts are parsed of keys alone: the hash covers the text as it stands."""
    events = (read_event(row) if row[KIND] in KEYS else Event(*row) for row in part.rows)
    authenticate(events, part.trusted, (part.seq, part.previous))
    return len(part.rows)


def write_head(path: Path, event: Event, engine: Engine) -> None:
    """Export the ledger's head, unless a later one is there: seq and hash of its last record, as JSON.

    Args:
        path: of the file.
        event: the last record.
        engine: of the ledger, which must hold the record that was exported before.

    Raises:
        OSError: the disk is full; the head that was there stays.
        TrustError: that record was cut off or written anew; its head stays, and `check_head` goes on to tell.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if event.seq <= check_head(path, engine):
            return
        draft = path.with_suffix(".draft")
        with draft.open("w") as stream:
            stream.write(json.dumps({"seq": event.seq, "hash": event.hash}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)


def check_head(path: Path, engine: Engine) -> int:
    """Hold the ledger to the head that was exported: it has that record, or more.

    Returns:
        Seq of the exported head; 0 where none was exported, and nothing is known of a cut tail.

    Raises:
        TrustError: records were cut off, or written anew from another past.
    """
    from sqlalchemy import text

    seq, digest = read_head(path)
    with engine.connect() as connection:
        found = connection.execute(text("SELECT hash FROM events WHERE seq = :seq"), {"seq": seq}).scalar()
        last = connection.execute(text("SELECT COALESCE(MAX(seq), 0) FROM events")).scalar_one()
    if seq and found is None:
        raise TrustError(f"The ledger ends at record {last}; {path.name} knows record {seq}.", RESTORE)
    if seq and found != digest:
        raise TrustError(f"Ledger record {seq} is not the one that {path.name} knows.", RESTORE)
    return seq


def read_head(path: Path) -> tuple[int, str]:
    """Seq and hash of the exported head; 0 and `GENESIS` where none was exported.

    Raises:
        TrustError: the file is damaged.
    """
    if not path.exists():
        return 0, GENESIS
    try:
        told = json.loads(path.read_bytes())
        return int(told["seq"]), str(told["hash"])
    except (ValueError, KeyError, TypeError) as error:
        raise TrustError(
            f"{path} is not a head of the ledger.", "Move it away; find out who wrote it."
        ) from error
