"""What the ledger records, and how a record is chained and signed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from imaging.errors import TrustError
from imaging.vocabulary import Decision
from registry.signing import check_signature

GENESIS = "0" * 64
NETWORK = "*"
RESTORE = "Restore the ledger from a backup: formulary registry restore FILE."
# They decide nothing in anybody's favour.
UNSIGNED = (Decision.INCIDENT, Decision.TEST_SET_USED, Decision.ALARMED)


@dataclass(frozen=True)
class Event:
    """One decision; `body` holds its facts, `hash` covers everything but the signature.

    Where nobody reads its facts, `body` may still be the JSON that the record holds.
    """

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
    """A public key that the ledger trusts, and whose it is; `attests` signs for whom a token named."""

    identity: str
    key: str
    public: str
    attests: bool = False


def read_event(row: Iterable[Any]) -> Event:
    """An event from its columns, in the order of `Event`'s, its body as JSON.

    Raises:
        TrustError: the body is not what was written, byte by byte.
    """
    seq, at, kind, task, actor, told, *rest = row
    try:
        body = json.loads(told)
        if isinstance(body, dict) and canonical(body) == told:
            return Event(seq, at, kind, task, actor, body, *rest)
    except (TypeError, ValueError):
        pass
    raise TrustError(f"Ledger record {seq} was changed.", RESTORE)


def authenticate(
    events: Iterable[Event],
    trusted: dict[str, TrustedKey] | None = None,
    after: tuple[int, str] = (0, GENESIS),
) -> dict[str, TrustedKey]:
    """Hold every event to the keys that were trusted when it was written.

    Only incidents, alarms and uses of test sets may be unsigned: they decide nothing in anybody's favour,
    and a serving or training process holds no key.

    Args:
        events: all of them, in their order; or some of them, one after the other.
        trusted: key id -> key, of the keys that were trusted before the first of them.
        after: seq and hash of the event before the first of them.

    Returns:
        Key id -> key, of the keys that are trusted after the last event.

    Raises:
        TrustError: names the first event that is missing or that no trusted key of its actor signed.
    """
    trusted = dict(trusted or {})
    seq, previous = after
    for number, event in enumerate(events, start=seq + 1):
        if (event.seq, event.previous) != (number, previous):
            raise TrustError(f"Ledger record {number} was changed or taken out.", RESTORE)
        previous = event.hash
        try:
            sound = holds(event, trusted)
            fold_key(trusted, event)
        except (AttributeError, KeyError, TypeError, ValueError):  # a body that is not of its kind
            sound = False
        if not sound:
            raise TrustError(f"Ledger record {event.seq} has a signature that does not hold.", RESTORE)
    return trusted


def holds(event: Event, trusted: dict[str, TrustedKey]) -> bool:
    """Whether the event is what it was when a trusted key signed it for its actor, or may be unsigned.

    The first key of a ledger vouches for itself.
    """
    if event.hash != digest_event(event):
        return False
    if not event.key:
        return event.kind in UNSIGNED and not event.signature
    if not trusted and event.kind == Decision.KEY_TRUSTED:
        trusted = read_key(event)
    key = trusted.get(event.key)
    return bool(
        key
        and (key.identity == event.actor or key.attests)
        and check_signature(key.public, event.hash.encode(), event.signature)
    )


def is_sound(event: Event) -> bool:
    """Whether an event that may be unsigned has the facts of its kind; readers need not ask again."""
    if event.kind == Decision.TEST_SET_USED:
        return all(isinstance(event.body.get(name), str) for name in ("digest", "set", "set_digest"))
    if event.kind == Decision.ALARMED and not isinstance(event.body.get("alarm"), int):
        return False
    sites = event.body.get("sites", [])
    return event.kind not in (Decision.INCIDENT, Decision.ALARMED) or (
        isinstance(event.body.get("fact"), str)
        and isinstance(sites, list)
        and all(isinstance(site, str) for site in sites)
    )


def count_uses(events: Iterable[Event]) -> dict[str, list[str]]:
    """Digest of a locked set -> digests of the packages that were scored on it, in the order of first use."""
    uses: dict[str, list[str]] = {}
    for event in events:
        if event.kind == Decision.TEST_SET_USED and is_sound(event):
            packages = uses.setdefault(event.body["set_digest"], [])
            if event.body["digest"] not in packages:
                packages.append(event.body["digest"])
    return uses


def read_key(event: Event) -> dict[str, TrustedKey]:
    """The key that a `key-trusted` event speaks of."""
    body = event.body
    return {
        body["key"]: TrustedKey(body["identity"], body["key"], body["public"], body.get("attests", False))
    }


def fold_key(trusted: dict[str, TrustedKey], event: Event) -> None:
    """Carry an event into the keys that are trusted. Who has a key gets another one from nobody else."""
    if event.kind == Decision.KEY_TRUSTED:
        owner = event.body["identity"]
        if event.actor == owner or all(key.identity != owner for key in trusted.values()):
            trusted |= read_key(event)
    elif event.kind == Decision.KEY_REVOKED:
        trusted.pop(event.body["key"], None)


CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical(value: Any) -> str:
    """JSON with one spelling, for hashing."""
    return CANONICAL.encode(value)


def digest_event(event: Event) -> str:
    """sha256 of everything in an event but its hash and signature."""
    body = event.body if isinstance(event.body, str) else canonical(event.body)
    before = canonical([event.seq, event.at, event.kind, event.task, event.actor])
    after = canonical([event.key, event.previous])
    return hashlib.sha256(f"{before[:-1]},{body},{after[1:]}".encode()).hexdigest()
