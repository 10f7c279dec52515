"""Who acts. An identity is a name with a key that the ledger trusts; without the key nobody is it."""

from __future__ import annotations

import getpass
import os
import re
from pathlib import Path

from imaging.errors import ConfigError, Forbidden
from imaging.vocabulary import Decision
from registry.ledger import Ledger
from registry.signing import Signer, create_signer, key_path, load_signer


def name_identity(given: str | None) -> str:
    """The acting identity: as given, else FORMULARY_IDENTITY, else the name of the OS user.

    Raises:
        ConfigError: not a name of letters, digits and . _ - @.
    """
    name = given or os.environ.get("FORMULARY_IDENTITY") or getpass.getuser()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", name):
        raise ConfigError(f"{name[:64]!r} is not an identity.", "Use letters, digits and . _ - @.")
    return name


def act(var: Path, ledger: Ledger, given: str | None) -> Signer:
    """The signer of the acting identity.

    Raises:
        TrustError: the identity has no key here.
        Forbidden: the ledger does not trust the key, or no longer, or knows it as another person's.
    """
    signer = load_signer(var, name_identity(given))
    known = ledger.trusted_keys()
    if signer.key_id in known:
        return _same_person(signer, known[signer.key_id].identity)
    raise Forbidden(
        f"The key of {signer.identity} is not trusted by the ledger.",
        f"Somebody trusted runs: formulary registry keys create --identity {signer.identity}",
    )


def admit(var: Path, ledger: Ledger, identity: str, by: str | None = None) -> Signer:
    """Make (or keep) an identity's key and write the trust into the ledger.

    The first key of a ledger vouches for itself; every later one needs a trusted key, `by` or the first
    trusted one that lies in var/keys.

    Raises:
        Forbidden: no trusted key is at hand to vouch; the key was revoked, or is another person's.
    """
    known = ledger.trusted_keys()
    signer = create_signer(var, name_identity(identity))
    if signer.key_id in known:
        return _same_person(signer, known[signer.key_id].identity)
    if signer.key_id in {event.body["key"] for event in ledger.events(kind=Decision.KEY_REVOKED)}:
        raise Forbidden(
            f"The key of {signer.identity} was revoked.",
            f"Move {key_path(var, signer.identity)} away and run this again: it makes a new one.",
        )
    voucher = signer if not ledger.has_events() else _voucher(var, ledger, by)
    body = {"identity": signer.identity, "key": signer.key_id, "public": signer.public_pem}
    with ledger.writing() as writer:
        writer.append(Decision.KEY_TRUSTED, "", body, voucher)
    return signer


def revoke(ledger: Ledger, key: str, signer: Signer, because: str) -> None:
    """Withdraw trust from a key, from now on.

    Raises:
        Forbidden: the key is not trusted, or it is the last one.
    """
    known = ledger.trusted_keys()
    if key not in known:
        raise Forbidden(f"No trusted key {key[:20]!r}.", "See `formulary registry keys list`.")
    if len(known) == 1:
        raise Forbidden("This is the last trusted key.", "Create another one first.")
    with ledger.writing() as writer:
        writer.append(Decision.KEY_REVOKED, "", {"key": key, "because": because}, signer)


def _same_person(signer: Signer, owner: str) -> Signer:
    """A key is one person's: a copy of its file under another name makes nobody somebody else."""
    if signer.identity != owner:
        raise Forbidden(
            f"The key kept for {signer.identity} is {owner}'s.",
            f"Act as {owner}, or remove the file and make a key: formulary registry keys create",
        )
    return signer


def _voucher(var: Path, ledger: Ledger, by: str | None) -> Signer:
    if by:
        return act(var, ledger, by)
    for trusted in ledger.trusted_keys().values():
        if key_path(var, trusted.identity).exists():
            candidate = load_signer(var, trusted.identity)
            if candidate.key_id == trusted.key:
                return candidate
    raise Forbidden(
        "No trusted key lies in var/keys to vouch for a new one.", "Ask a trusted person to run this."
    )
