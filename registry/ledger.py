"""The ledger: an append-only, hash-chained, signed record of decisions.

It is the only authority on which version serves where. Versions, slots and trusted keys are no tables that
somebody could edit: they are folded from events whose signatures hold, whenever they are asked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, text

from imaging.errors import Forbidden, TrustError, UnknownVersion
from imaging.vocabulary import Decision
from registry.audit import check_head, verify_ledger, write_head
from registry.chain import Chain
from registry.database import explain_ledger, open_database, writing
from registry.events import (
    GENESIS,
    Event,
    TrustedKey,
    canonical,
    count_uses,
    digest_event,
    fold_key,
    holds,
    is_sound,
    read_event,
)
from registry.signing import Signer
from registry.state import Placement, State, fold

LOG = logging.getLogger(__name__)
MOST = 2**62  # events: all there are
HEAD = (
    "ledger-head.json"  # beside the ledger; a copy elsewhere shows a cut tail even to whoever owns this disk
)


def open_ledger(var: Path) -> Ledger:
    """The ledger under a var folder; it is made when there is none."""
    place = os.environ.get("FORMULARY_DATABASE") or var / "formulary.db"
    return Ledger(open_database(place, "registry", explain_ledger), var / HEAD)


class Ledger:
    """Reads events and what is folded from them; `writing` opens the one transaction that may add to it."""

    def __init__(self, engine: Engine, head: Path) -> None:
        self._engine, self._head, self._chain = engine, head, Chain()

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """A transaction that holds the write lock from its start; all of it happens or nothing.

        Raises:
            Conflict: another writer held the ledger for more than two seconds.
        """
        with writing(self._engine).begin() as connection:
            yield (writer := Writer(connection, *self._chain.follow(connection)))
        if writer.last:
            try:
                write_head(self._head, writer.last, self._engine)
            except (OSError, TrustError):  # the record stands; `verify` tells of a head that lags
                LOG.exception("the head of the ledger could not be exported")

    def generation(self) -> int:
        """A number that grows with every event."""
        return self.head()[0]

    def head(self) -> tuple[int, str]:
        """Number and hash of the last event."""
        with self._engine.connect() as connection:
            row = connection.execute(text("SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1")).first()
        return (int(row[0]), str(row[1])) if row else (0, GENESIS)

    def events(self, task: str | None = None, kind: str | None = None, limit: int = MOST) -> list[Event]:
        """Events, oldest first; of one task, of one kind, the newest `limit`."""
        query = text(
            "SELECT * FROM (SELECT * FROM events WHERE task = COALESCE(:task, task) AND "
            "kind = COALESCE(:kind, kind) ORDER BY seq DESC LIMIT :limit) AS newest ORDER BY seq"
        )
        with self._engine.connect() as connection:
            rows = connection.execute(query, {"task": task, "kind": kind, "limit": limit})
            return [read_event(row) for row in rows]

    def state(self, task: str) -> State:
        """What follows from a task's decisions: champions, challengers, suspensions, open requests.

        Raises:
            TrustError: a decision has a signature that does not hold.
        """
        return fold(event for event in self.signed() if event.task == task)

    def slots(self, task: str) -> dict[str, dict[str, Placement]]:
        """What is approved where: site -> slot -> placement. The network's own slots are under `NETWORK`."""
        return self.state(task).slots()

    def champions(self, task: str) -> dict[str, Placement]:
        """What serves where: site -> champion; a site without one, or where it is suspended, is absent."""
        return self.state(task).champions()

    def versions(self, task: str | None = None) -> list[tuple[str, int, str, Event]]:
        """Registered versions: (task, version, digest, the event that registered it), oldest first.

        Raises:
            TrustError: a decision has a signature that does not hold.
        """
        return [
            (event.task, int(event.body["version"]), str(event.body["digest"]), event)
            for event in self.signed()
            if event.kind == Decision.REGISTERED and task in (None, event.task)
        ]

    def version(self, task: str, version: int) -> tuple[str, Event]:
        """Digest of a version and the event that registered it.

        Raises:
            UnknownVersion: there is none.
        """
        known = self.versions(task)
        for _, number, digest, event in known:
            if number == version:
                return digest, event
        names = (
            ", ".join(str(number) for _, number, _, _ in known) or "none; run `formulary registry register`"
        )
        raise UnknownVersion(f"{task} has no version {version}.", f"Versions: {names}.")

    def trusted_keys(self) -> dict[str, TrustedKey]:
        """Key id -> key, of every key that is trusted now.

        Raises:
            TrustError: a decision has a signature that does not hold.
        """
        with self._engine.connect() as connection:
            return self._chain.follow(connection)[1]

    def signed(self) -> list[Event]:
        """Every event, its signature checked."""
        with self._engine.connect() as connection:
            return self._chain.follow(connection)[0]

    def verify(self) -> int:
        """Read the whole ledger again: chain, hashes, signatures, and the head that was exported.

        Returns:
            The number of events.

        Raises:
            TrustError: naming the first record that does not hold, or that the end was cut off.
        """
        count = verify_ledger(self._engine)
        check_head(self._head, self._engine)
        return count

    def record_incident(self, fact: str, task: str, body: dict[str, Any], actor: str = "service") -> None:
        """Write that something was wrong with trust. Unsigned: a serving process holds no key."""
        with self.writing() as writer:
            writer.append(Decision.INCIDENT, task, {"fact": fact, **body}, actor)

    def record_uses(
        self, task: str, digest: str, sets: dict[str, str], actor: Signer | str
    ) -> dict[str, int]:
        """Write that a package was scored on locked sets, once for each pair of digests.

        Args:
            task: the task.
            digest: of the package.
            sets: name of a locked set -> its digest.
            actor: who scored; a training process that holds no key gives its name.

        Returns:
            Digest of a set -> the number of this package's use of it, from 1.
        """
        with self.writing() as writer:
            return writer.use(task, digest, sets, actor)

    def pending(self) -> list[tuple[int, str, str, int]]:
        """Outbox rows that MLflow has not seen: (row, task, site, version), oldest first."""
        query = text("SELECT seq, task, site, version FROM outbox WHERE done IS NULL ORDER BY seq")
        with self._engine.connect() as connection:
            return [(int(row[0]), str(row[1]), str(row[2]), int(row[3])) for row in connection.execute(query)]

    def settle(self, row: int) -> None:
        """Mark an outbox row as mirrored."""
        with writing(self._engine).begin() as connection:
            connection.execute(
                text("UPDATE outbox SET done = :at WHERE seq = :seq"), {"at": _now(), "seq": row}
            )


class Writer:
    """What may be done inside the ledger's transaction."""

    def __init__(self, connection: Connection, events: list[Event], trusted: dict[str, TrustedKey]) -> None:
        self._connection, self._events, self._trusted = connection, list(events), trusted
        self.last: Event | None = None

    def append(self, kind: Decision, task: str, body: dict[str, Any], actor: Signer | str) -> Event:
        """Add an event at the end of the chain, signed when the actor can sign.

        Raises:
            Forbidden: the ledger does not trust the signer, or the facts are not those of the kind.
        """
        last = self._events[-1] if self._events else None
        signer = actor if isinstance(actor, Signer) else None
        draft = Event(
            seq=len(self._events) + 1, at=_now(), kind=kind, task=task,
            actor=signer.actor if signer else str(actor), body=body, key=signer.key_id if signer else "",
            previous=last.hash if last else GENESIS, hash="", signature="",
        )  # fmt: skip
        digest = digest_event(draft)
        signature = signer.sign(digest.encode()) if signer else ""
        event = Event(**{**draft.__dict__, "hash": digest, "signature": signature})
        if not (holds(event, self._trusted) and is_sound(event)):
            raise Forbidden(f"The ledger does not trust the key of {event.actor}.", "Nothing was written.")
        self.insert(event)
        return event

    def insert(self, event: Event) -> None:
        """Write an event as it is; the caller has checked that it holds."""
        self._connection.execute(
            text(
                "INSERT INTO events VALUES "
                "(:seq, :at, :kind, :task, :actor, :body, :key, :previous, :hash, :signature)"
            ),
            {**event.__dict__, "body": canonical(event.body)},
        )
        self.last = event
        self._events.append(event)
        fold_key(self._trusted, event)

    def use(self, task: str, digest: str, sets: dict[str, str], actor: Signer | str) -> dict[str, int]:
        """As `Ledger.record_uses`, within this transaction."""
        uses = count_uses(self.events())
        for name, set_digest in sets.items():
            if digest not in uses.get(set_digest, []):
                packages = uses.setdefault(set_digest, [])
                packages.append(digest)
                body = {"digest": digest, "set": name, "set_digest": set_digest, "use": len(packages)}
                self.append(Decision.TEST_SET_USED, task, body, actor)
        return {one: uses[one].index(digest) + 1 for one in sets.values()}

    def state(self, task: str) -> State:
        """As `Ledger.state`, within this transaction: nobody can decide between a look and a record."""
        return fold(event for event in self._events if event.task == task)

    def trusted_keys(self) -> dict[str, TrustedKey]:
        """Key id -> key, of every key that is trusted now."""
        return dict(self._trusted)

    def events(self) -> list[Event]:
        """Every event, oldest first."""
        return list(self._events)

    def queue(self, event: Event, site: str, version: int) -> None:
        """Queue a champion's move for MLflow."""
        self._connection.execute(
            text("INSERT INTO outbox (event, task, site, version) VALUES (:event, :task, :site, :version)"),
            {"event": event.seq, "task": event.task, "site": site, "version": version},
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
