"""Who came in and who was turned away: append-only rows beside the predictions, bounded against strangers."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from imaging.errors import JournalDown
from imaging.vocabulary import Entry
from monitoring.tally import Tally
from registry.database import open_database, writing


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


class Logins(Tally[Login]):
    """Counts who comes in, each of them, and who is turned away, of these at most 32 kinds a minute.

    Args:
        var: of the checkout; the rows go into the journal's database.
    """

    def __init__(self, var: Path) -> None:
        super().__init__("logins", lambda counts: write_logins(var, counts), _outline)


def _outline(login: Login) -> Login:
    """Whoever came in is never one too many; of strangers the outcome alone stays."""
    return login if login.outcome == Entry.ADMITTED else Login("", "", login.outcome, "elsewhere")


def write_logins(var: Path, counts: Counter[Login]) -> None:
    """Write a row for each, durable when this returns.

    Raises:
        JournalDown: the database cannot be written.
    """
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
