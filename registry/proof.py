"""What an exported version proves to somebody who has public keys alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from imaging.errors import TrustError
from imaging.vocabulary import Decision, Statement
from registry.audit import KEYS
from registry.events import GENESIS, Event, TrustedKey, digest_event, fold_key
from registry.evidence import Evidence, find_cited, read_evidence
from registry.signing import check_signature

AGAIN = "Ask for another export."


def concerns(event: Event, one: tuple[str, int, str]) -> bool:
    """Whether an event speaks of this version, (task, number, digest), and of no other."""
    body = event.body
    told = (event.task, body.get("version", one[1]), body.get("digest", one[2]))
    return bool({"version", "digest"} & body.keys()) and told == one


def judge(package: Path, events: list[Event], keys: dict[str, str]) -> dict[str, Any]:
    """Hold a package and its statements to the records about it that some keys signed.

    Args:
        package: its folder; the statements lie beside it.
        events: about keys, and about this version.
        keys: key id -> PEM, of those whose word is taken.

    Returns:
        As `registry.custody.verify_export`.

    Raises:
        TrustError: something was changed, added or left out, or is signed by no such key.
        AttributeError, KeyError, TypeError, ValueError: a record is not of its kind.
    """
    revoked = {event.body["key"]: event.seq for event in events if event.kind == Decision.KEY_REVOKED}
    signed = _hold(events, keys, revoked)
    owners = _read_owners(signed, keys)
    evidence = read_evidence(package, owners)
    record = _find_record(signed, evidence)
    if any(revoked.get(key, record.seq) < record.seq for key in evidence.keys.values()):
        raise TrustError("A statement was signed by a key that had been revoked.", AGAIN)
    one = (record.task, record.body["version"], evidence.digest)
    for event in events:
        if event.kind not in KEYS and not concerns(event, one):
            raise TrustError(f"Ledger record {event.seq} speaks of another version.", AGAIN)
    told = [(event.kind, _name(event, owners), event.at) for event in signed]
    decisions = [decision for decision in told if decision[0] not in KEYS]
    return {"digest": evidence.digest, "statements": evidence.signed_by, "decisions": decisions}


def _hold(events: list[Event], keys: dict[str, str], revoked: dict[str, int]) -> list[Event]:
    """The events that the keys signed, by their number; a changed one is refused, whoever signed it."""
    for event in events:
        known = event.key in keys
        sound = event.hash == digest_event(event)
        if not sound or (
            known and not check_signature(keys[event.key], event.hash.encode(), event.signature)
        ):
            raise TrustError(f"Ledger record {event.seq} was changed.", AGAIN)
        if known and revoked.get(event.key, event.seq) < event.seq:
            raise TrustError(f"Ledger record {event.seq} is by a key that had been revoked.", AGAIN)
    return sorted((event for event in events if event.key in keys), key=lambda event: event.seq)


def _read_owners(signed: list[Event], keys: dict[str, str]) -> dict[str, TrustedKey]:
    """Whose the keys are, as records say that they signed; nobody but the ledger's first vouches for himself.

    A key of which they say nothing goes by its id.
    """
    now: dict[str, TrustedKey] = {}
    ever: dict[str, TrustedKey] = {}
    for event in signed:
        if event.previous == GENESIS or event.key != event.body.get("key"):
            fold_key(now, event)
        ever |= now
    unknown = {key: TrustedKey(key, key, pem) for key, pem in keys.items()}
    return {key: replace(ever.get(key, one), public=one.public) for key, one in unknown.items()}


def _find_record(signed: list[Event], evidence: Evidence) -> Event:
    """The newest record about the package; it cites the statements that are here, all and no other."""
    record = find_cited(signed, evidence.digest)
    if record is None:
        raise TrustError(f"None of these keys signed a record of {evidence.digest[:19]}.", AGAIN)
    if record.body["evidence"] != evidence.cited:
        raise TrustError(f"The statements are not those that ledger record {record.seq} cites.", AGAIN)
    evidence.body(Statement.PACKAGE)
    evidence.body(Statement.EVALUATION)
    return record


def _name(event: Event, owners: dict[str, TrustedKey]) -> str:
    owner = owners[event.key]
    if owner.identity not in (event.actor, owner.key) and not owner.attests:
        raise TrustError(f"Ledger record {event.seq} names another person than its key's.", AGAIN)
    return event.actor if owner.attests else owner.identity
