"""The ledger: an append-only, hash-chained, signed record of decisions.

It is the only authority on which version serves where. Versions, slots and trusted keys are no tables that
somebody could edit: they are folded from events whose signatures hold, whenever they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import OperationalError

from imaging.errors import Conflict, Forbidden, TrustError, UnknownVersion
from imaging.vocabulary import Decision, Slot
from registry.database import open_database, writing
from registry.events import (
    GENESIS,
    NETWORK,
    Event,
    Placement,
    TrustedKey,
    authenticate,
    canonical,
    digest_event,
    fold_slots,
    holds,
)
from registry.signing import Signer


def open_ledger(var: Path) -> Ledger:
    """The ledger under a var folder; it is made when there is none."""
    return Ledger(open_database(var / "formulary.db", "registry"))


class Ledger:
    """Reads events and what is folded from them; `writing` opens the one transaction that may add to it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """A transaction that holds the write lock from its start; all of it happens or nothing.

        Raises:
            Conflict: another writer held the ledger for more than two seconds.
        """
        try:
            with writing(self._engine).begin() as connection:
                yield Writer(connection)
        except OperationalError as error:
            raise Conflict(
                f"The ledger cannot be written ({error.orig}).", "Nothing was changed; try again."
            ) from error

    def has_events(self) -> bool:
        """Whether anything was ever decided."""
        return self.generation() > 0

    def generation(self) -> int:
        """A number that grows with every event."""
        with self._engine.connect() as connection:
            return int(connection.execute(text("SELECT COALESCE(MAX(seq), 0) FROM events")).scalar_one())

    def events(self, task: str | None = None, kind: str | None = None, limit: int = -1) -> list[Event]:
        """Events, oldest first; of one task, of one kind, the newest `limit`."""
        query = text(
            "SELECT * FROM (SELECT * FROM events WHERE (:task IS NULL OR task = :task) AND "
            "(:kind IS NULL OR kind = :kind) ORDER BY seq DESC LIMIT :limit) ORDER BY seq"
        )
        with self._engine.connect() as connection:
            rows = connection.execute(query, {"task": task, "kind": kind, "limit": limit}).mappings()
            return [_read(row) for row in rows]

    def slots(self, task: str) -> dict[str, dict[str, Placement]]:
        """What is approved where: site -> slot -> placement. The network's own slots are under `NETWORK`.

        Raises:
            TrustError: a decision has a signature that does not hold.
        """
        return fold_slots(event for event in self._signed() if event.task == task)

    def champions(self, task: str) -> dict[str, Placement]:
        """What serves where: site -> champion. A site without an approved version is absent."""
        slots = self.slots(task)
        return {
            site: held[Slot.CHAMPION]
            for site, held in slots.items()
            if site != NETWORK and Slot.CHAMPION in held
        }

    def versions(self, task: str | None = None) -> list[tuple[str, int, str, Event]]:
        """Registered versions: (task, version, digest, the event that registered it), oldest first.

        Raises:
            TrustError: a decision has a signature that does not hold.
        """
        return [
            (event.task, int(event.body["version"]), str(event.body["digest"]), event)
            for event in self._signed()
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
        return authenticate(self.events())

    def _signed(self) -> list[Event]:
        """Every event, its signature checked."""
        events = self.events()
        authenticate(events)
        return events

    def verify(self) -> int:
        """Read the whole ledger again: chain, hashes and signatures.

        Returns:
            The number of events.

        Raises:
            TrustError: naming the first record that does not hold.
        """
        previous = GENESIS
        events = self.events()
        for number, event in enumerate(events, start=1):
            if event.seq != number or event.previous != previous or event.hash != digest_event(event):
                raise TrustError(
                    f"Ledger record {number} was changed.", "Restore var/formulary.db from a backup."
                )
            previous = event.hash
        authenticate(events)
        return len(events)

    def record_incident(self, fact: str, task: str, body: dict[str, Any], actor: str = "service") -> None:
        """Write that something was wrong with trust. Unsigned: a serving process holds no key."""
        with self.writing() as writer:
            writer.append(Decision.INCIDENT, task, {"fact": fact, **body}, actor)

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

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def append(self, kind: Decision, task: str, body: dict[str, Any], actor: Signer | str) -> Event:
        """Add an event at the end of the chain, signed when the actor can sign.

        Raises:
            Forbidden: the ledger does not trust the signer, so the record would break it.
            TrustError: an earlier decision has a signature that does not hold.
        """
        last = self._connection.execute(
            text("SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1")
        ).first()
        signer = actor if isinstance(actor, Signer) else None
        draft = Event(
            seq=(last[0] if last else 0) + 1, at=_now(), kind=kind, task=task,
            actor=signer.identity if signer else str(actor), body=body, key=signer.key_id if signer else "",
            previous=last[1] if last else GENESIS, hash="", signature="",
        )  # fmt: skip
        digest = digest_event(draft)
        signature = signer.sign(digest.encode()) if signer else ""
        event = Event(**{**draft.__dict__, "hash": digest, "signature": signature})
        if last and not holds(event, authenticate(self._events())):
            raise Forbidden(f"The ledger does not trust the key of {event.actor}.", "Nothing was written.")
        self._connection.execute(
            text(
                "INSERT INTO events VALUES "
                "(:seq, :at, :kind, :task, :actor, :body, :key, :previous, :hash, :signature)"
            ),
            {**event.__dict__, "body": canonical(body)},
        )
        return event

    def latest(self, task: str, *kinds: Decision) -> Event | None:
        """The newest event of these kinds for a task."""
        marks = ", ".join(f"'{kind}'" for kind in kinds)
        row = self._connection.execute(
            text(f"SELECT * FROM events WHERE task = :task AND kind IN ({marks}) ORDER BY seq DESC LIMIT 1"),
            {"task": task},
        ).mappings().first()  # fmt: skip
        return _read(row) if row else None

    def _events(self) -> list[Event]:
        rows = self._connection.execute(text("SELECT * FROM events ORDER BY seq")).mappings()
        return [_read(row) for row in rows]

    def queue(self, event: Event, site: str, version: int) -> None:
        """Queue a champion's move for MLflow."""
        self._connection.execute(
            text("INSERT INTO outbox (event, task, site, version) VALUES (:event, :task, :site, :version)"),
            {"event": event.seq, "task": event.task, "site": site, "version": version},
        )


def _read(row: Any) -> Event:
    return Event(**{**row, "body": json.loads(row["body"])})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
