"""What the ledger records, how a record is chained and signed, and what follows from the records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from imaging.errors import TrustError
from imaging.vocabulary import Decision, Slot
from registry.signing import check_signature

GENESIS = "0" * 64
NETWORK = "*"


@dataclass(frozen=True)
class Event:
    """One decision; `body` holds its facts, `hash` covers everything but the signature."""

    seq: int
    at: str
    kind: str
    task: str
    actor: str
    body: dict[str, Any]
    key: str
    previous: str
    hash: str
    signature: str


@dataclass(frozen=True)
class TrustedKey:
    """A public key that the ledger trusts, and whose it is."""

    identity: str
    key: str
    public: str


@dataclass(frozen=True)
class Placement:
    """A version in a slot: its number, its package digest (sha256:...) and since when (ISO 8601, UTC)."""

    version: int
    digest: str
    since: str


def authenticate(events: Iterable[Event]) -> dict[str, TrustedKey]:
    """Hold every event to the keys that were trusted when it was written; the first key vouches for itself.

    Only an incident may be unsigned: it decides nothing, and a serving process holds no key.

    Args:
        events: all of them, in their order.

    Returns:
        Key id -> key, of the keys that are trusted after the last event.

    Raises:
        TrustError: names the first event that is missing or that no trusted key of its actor signed.
    """
    trusted: dict[str, TrustedKey] = {}
    previous = GENESIS
    for number, event in enumerate(events, start=1):
        if (event.seq, event.previous) != (number, previous):
            raise TrustError(
                f"Ledger record {number} was changed or taken out.", "Restore var/formulary.db from a backup."
            )
        previous = event.hash
        if number == 1:
            _fold_key(trusted, event)
        if not holds(event, trusted):
            raise TrustError(
                f"Ledger record {event.seq} has a signature that does not hold.",
                "Restore var/formulary.db from a backup.",
            )
        _fold_key(trusted, event)
    return trusted


def holds(event: Event, trusted: dict[str, TrustedKey]) -> bool:
    """Whether the event is what it was when a trusted key of its actor signed it, or an unsigned incident."""
    if not event.key:
        return event.kind == Decision.INCIDENT
    key = trusted.get(event.key)
    return bool(
        key
        and key.identity == event.actor
        and event.hash == digest_event(event)
        and check_signature(key.public, event.hash.encode(), event.signature)
    )


def fold_slots(events: Iterable[Event]) -> dict[str, dict[str, Placement]]:
    """What serves where after a task's events: site -> slot -> placement; the network is a site of its own.

    An approval moves what served to `previous`; a rollback takes it back and leaves no previous one, so that
    the version that was rolled back returns by an approval alone.
    """
    slots: dict[str, dict[str, Placement]] = {}
    for event in events:
        if event.kind in (Decision.APPROVED, Decision.ROLLED_BACK):
            network = [NETWORK] if event.kind == Decision.APPROVED else []
            for site in [*network, *event.body["sites"]]:
                _move(slots.setdefault(site, {}), event)
    return slots


def _move(held: dict[str, Placement], event: Event) -> None:
    """Carry an approval or a rollback into the slots of one site."""
    if event.kind == Decision.ROLLED_BACK:
        back = held.pop(Slot.PREVIOUS)
        held[Slot.CHAMPION] = Placement(back.version, back.digest, event.at)
        return
    new, old = Placement(event.body["version"], event.body["digest"], event.at), held.get(Slot.CHAMPION)
    if old and old.digest == new.digest:
        return
    if old:
        held[Slot.PREVIOUS] = old
    held[Slot.CHAMPION] = new


def _fold_key(trusted: dict[str, TrustedKey], event: Event) -> None:
    if event.kind == Decision.KEY_TRUSTED:
        body = event.body
        trusted[body["key"]] = TrustedKey(body["identity"], body["key"], body["public"])
    elif event.kind == Decision.KEY_REVOKED:
        trusted.pop(event.body["key"], None)


def canonical(value: Any) -> str:
    """JSON with one spelling, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_event(event: Event) -> str:
    """sha256 of everything in an event but its hash and signature."""
    facts = [event.seq, event.at, event.kind, event.task, event.actor, event.body, event.key, event.previous]
    return hashlib.sha256(canonical(facts).encode()).hexdigest()
