"""The records of a ledger that were held to their signatures, kept in memory: none is checked twice."""

from __future__ import annotations

from threading import Lock

from sqlalchemy import Connection, text

from registry.events import GENESIS, Event, TrustedKey, authenticate, read_event


class Chain:
    """What one process knows of a ledger. Decisions rest on this; `verify` reads the database whole again."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._events: list[Event] = []
        self._trusted: dict[str, TrustedKey] = {}

    def follow(self, connection: Connection) -> tuple[list[Event], dict[str, TrustedKey]]:
        """Read and authenticate what was written since; everything, where the last known record is another.

        Args:
            connection: of a transaction that has written nothing yet.

        Returns:
            Every event, oldest first; and key id -> key, of the keys that are trusted now.

        Raises:
            TrustError: names the first record that does not hold.
        """
        with self._lock:
            known = len(self._events)
            if known:
                query = text("SELECT hash FROM events WHERE seq = :seq")
                if connection.execute(query, {"seq": known}).scalar() != self._events[-1].hash:
                    self._events, self._trusted, known = [], {}, 0
            query = text("SELECT * FROM events WHERE seq > :seq ORDER BY seq")
            new = [read_event(row) for row in connection.execute(query, {"seq": known})]
            last = self._events[-1].hash if known else GENESIS
            self._trusted = authenticate(new, self._trusted, (known, last))
            self._events = self._events + new  # a new list: what was handed out stays as it was
            return self._events, dict(self._trusted)
