"""Who came in and who was turned away: append-only rows beside the predictions, bounded against strangers."""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from imaging.errors import JournalDown
from imaging.vocabulary import Entry
from registry.database import open_database, writing

LOG = logging.getLogger(__name__)
EVERY_S = 60.0  # one row a kind of refusal in this time, with a count
KINDS = 32  # of refusals in that time; what goes beyond is counted by its outcome alone
RETRY_S = 10.0


@dataclass(frozen=True)
class Login:
    """Something that happened at the door.

    Attributes:
        who: id of a key that exists, or whom a token names; empty for a stranger.
        site: the credential's.
        outcome: what became of it.
        address: the network that it came from, as `name_network` has it.
    """

    who: str
    site: str
    outcome: Entry
    address: str


@lru_cache(1024)
def name_network(address: str) -> str:
    """`loopback`, the /24 (IPv6: /48) of an address, or `here` for what is none: a socket file, a test."""
    try:
        told = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "here"
    told = getattr(told, "ipv4_mapped", None) or told
    width = 24 if told.version == 4 else 48
    return "loopback" if told.is_loopback else str(ipaddress.ip_network((told, width), strict=False))


class Logins:
    """Notes in memory, at once; rows by a thread of its own, so that nobody at the door waits for a disk.

    A row is written as soon as its kind was not written for a minute; what comes in between is counted into
    the next row. What cannot be written is kept, and tried again.

    Args:
        var: of the checkout; the rows go into the journal's database.
    """

    def __init__(self, var: Path) -> None:
        self._var = var
        self._lock, self._wake, self._stop = threading.Lock(), threading.Event(), threading.Event()
        self._counts: Counter[Login] = Counter()
        self._next: dict[Login, float] = {}
        self._thread: threading.Thread | None = None

    def note(self, login: Login) -> None:
        """Count one; microseconds."""
        with self._lock:
            if login.outcome != Entry.ADMITTED and self._is_one_too_many(login):
                login = replace(login, who="", site="", address="elsewhere")
            self._counts[login] += 1
            if not self._thread:  # not earlier: a process that only loads this file needs no thread
                self._thread = threading.Thread(target=self._work, name="logins", daemon=True)
                self._thread.start()
        if login not in self._next:
            self._wake.set()

    def close(self) -> None:
        """Write what is counted, and stop."""
        self._stop.set()
        self._wake.set()
        if self._thread:
            self._thread.join(RETRY_S)
        self._try(everything=True)

    def _is_one_too_many(self, login: Login) -> bool:
        kinds = {*self._next, *self._counts}
        return login not in kinds and sum(one.outcome != Entry.ADMITTED for one in kinds) >= KINDS

    def _work(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(RETRY_S)
            self._wake.clear()
            if not self._try():
                self._stop.wait(RETRY_S)

    def _try(self, everything: bool = False) -> bool:
        try:
            self._write(everything)
        except JournalDown as error:
            LOG.error("%s Logins are kept, and tried again.", error.fact)
            return False
        return True

    def _write(self, everything: bool) -> None:
        now = time.monotonic()
        with self._lock:
            self._next = {login: due for login, due in self._next.items() if due > now}
            due = Counter({one: n for one, n in self._counts.items() if everything or one not in self._next})
            self._counts -= due
            self._next |= dict.fromkeys(due, now + EVERY_S)
        try:
            write_logins(self._var, due)
        except BaseException:
            with self._lock:
                self._counts += due
                self._next = {login: until for login, until in self._next.items() if login not in due}
            raise


def write_logins(var: Path, counts: Counter[Login]) -> None:
    """Write a row for each, durable when this returns.

    Raises:
        JournalDown: the database cannot be written.
    """
    if not counts:
        return
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    insert = text(
        "INSERT INTO access (at, who, site, outcome, address, count) "
        "VALUES (:at, :who, :site, :outcome, :address, :count)"
    )
    with _opened(var) as engine, writing(engine).begin() as connection:
        rows = [{**asdict(login), "at": at, "count": count} for login, count in counts.items()]
        connection.execute(insert, rows)


def read_logins(var: Path, limit: int) -> list[dict[str, Any]]:
    """The newest rows, oldest first: at, who, site, outcome, address, count.

    Raises:
        JournalDown: the database cannot be read.
    """
    query = text("SELECT at, who, site, outcome, address, count FROM access ORDER BY seq DESC LIMIT :limit")
    with _opened(var) as engine, engine.connect() as connection:
        return [dict(row) for row in connection.execute(query, {"limit": limit}).mappings()][::-1]


@contextmanager
def _opened(var: Path) -> Iterator[Engine]:
    """The database, anew each time: it is seldom, and a journal may be moved or restored meanwhile."""
    try:
        engine = open_database(var / "journal.db", "monitoring")
        try:
            yield engine
        finally:
            engine.dispose()
    except (SQLAlchemyError, OSError) as error:
        reason = getattr(error, "orig", None) or type(error).__name__
        raise JournalDown(f"The audit of logins cannot be used ({reason}).", "Free disk space.") from error
