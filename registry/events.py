"""What the ledger records, and how a record is chained and signed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from imaging.vocabulary import Decision
from registry.signing import check_signature

GENESIS = "0" * 64


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


def fold_key(trusted: dict[str, TrustedKey], event: Event) -> None:
    """Carry a decision about keys into the set that is trusted."""
    if event.kind == Decision.KEY_TRUSTED:
        body = event.body
        trusted[body["key"]] = TrustedKey(body["identity"], body["key"], body["public"])
    elif event.kind == Decision.KEY_REVOKED:
        trusted.pop(event.body["key"], None)


def is_signed(event: Event, trusted: dict[str, TrustedKey]) -> bool:
    """Whether a trusted key of the actor signed the event."""
    key = trusted.get(event.key)
    return bool(
        key
        and key.identity == event.actor
        and check_signature(key.public, event.hash.encode(), event.signature)
    )


def canonical(value: Any) -> str:
    """JSON with one spelling, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_event(event: Event) -> str:
    """sha256 of everything in an event but its hash and signature."""
    facts = [event.seq, event.at, event.kind, event.task, event.actor, event.body, event.key, event.previous]
    return hashlib.sha256(canonical(facts).encode()).hexdigest()
