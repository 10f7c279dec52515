"""Who acts. An identity is a name with a key that the ledger trusts; without the key nobody is it."""

from __future__ import annotations

import getpass
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from imaging.config import Places, read_yaml
from imaging.errors import ConfigError, Forbidden, NotAuthenticated
from imaging.recipe import Section
from imaging.vocabulary import Decision, Scope
from registry.events import TrustedKey
from registry.ledger import Ledger
from registry.signing import Signer, create_signer, key_path, load_signer


@dataclass(frozen=True)
class Desk:
    """Where records lie: enough to look at them.

    Attributes:
        places: of the checkout.
        ledger: where decisions go.
    """

    places: Places
    ledger: Ledger


@dataclass(frozen=True)
class Acting(Desk):
    """A person at work.

    Attributes:
        signer: who acts.
        because: why, in a sentence.
    """

    signer: Signer
    because: str = ""


def name_identity(given: str | None) -> str:
    """The acting identity: as given, else FORMULARY_IDENTITY, else the name of the OS user; in lower case.

    Raises:
        ConfigError: not a name of letters, digits and . _ - @.
    """
    name = given or os.environ.get("FORMULARY_IDENTITY") or getpass.getuser()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", name):
        raise ConfigError(f"{name[:64]!r} is not an identity.", "Use letters, digits and . _ - @.")
    return name.lower()


class Issuer(Section):
    """Whose tokens are believed. Keys are a file: nothing is fetched.

    Attributes:
        issuer: the token's `iss`.
        audience: the token's `aud`.
        keys: a JWKS file with EC P-256 public keys, relative to the checkout.
        identity: the claim that names the person.
        site: the claim that names the site whose images the person may send; a token may lack it.
        sites: those that it may name; empty means every one.
    """

    issuer: str
    audience: str
    keys: Path
    identity: str = "sub"
    site: str = "site"
    sites: tuple[str, ...] = ()


class Roles(Section):
    """roles.yaml: who may do what. Without the file everybody with a trusted key may do everything.

    Attributes:
        identities: name -> scopes; who is not named may do nothing.
        issuers: whose tokens (JWT, ES256) name a person. Their `scope` claim grants, to a person who is named
            here no more than stands here.
    """

    identities: dict[str, tuple[Scope, ...]] = Field(default_factory=dict)
    issuers: tuple[Issuer, ...] = ()


def read_roles(places: Places) -> Roles | None:
    """roles.yaml of the checkout; None where there is none."""
    path = places.root / "roles.yaml"
    return read_yaml(path, Roles) if path.exists() else None


def act(places: Places, ledger: Ledger, given: str | None, scope: Scope | None = None) -> Signer:
    """The signer of the acting identity: of FORMULARY_TOKEN where it is set, else of the name.

    Args:
        places: of the checkout.
        ledger: which keys are trusted.
        given: a name, or None for FORMULARY_IDENTITY or the OS user.
        scope: what is about to be done; None asks for no scope.

    Raises:
        TrustError: the identity has no key here.
        Forbidden: the ledger does not trust the key, or no longer, or knows it as another person's; or the
            identity may not do it.
    """
    if token := os.environ.get("FORMULARY_TOKEN"):
        return act_by_token(places, ledger, token, scope)
    signer = load_signer(places.var, name_identity(given))
    known = ledger.trusted_keys()
    if signer.key_id not in known:
        raise Forbidden(
            f"The key of {signer.identity} is not trusted by the ledger.",
            f"Somebody trusted runs: formulary registry keys create --identity {signer.identity}",
        )
    _allow(read_roles(places), signer.identity, scope)
    return _same_person(signer, known[signer.key_id].identity)


def act_by_token(places: Places, ledger: Ledger, token: str, scope: Scope | None) -> Signer:
    """The signer for the person that a token names: their own key where it lies here, else an attesting one.

    Raises:
        NotAuthenticated: no issuer is configured; the token is forged, expired or another audience's.
        Forbidden: its person may not do it, or no trusted key is here that could sign.
    """
    roles = read_roles(places) or Roles()
    identity, scopes, _, _ = read_token(places, roles, token)
    if scopes is not None and scope is not None and scope not in scopes:
        raise Forbidden(f"The token of {identity} has no scope {scope}.", "Ask for a token that has it.")
    if scopes is None or identity in map(str.lower, roles.identities):
        _allow(roles, identity, scope)
    known = ledger.trusted_keys()
    for key in sorted(known.values(), key=lambda one: one.identity != identity):
        if (key.identity == identity or key.attests) and key_path(places.var, key.identity).exists():
            signer = load_signer(places.var, key.identity)
            if signer.key_id == key.key:
                return signer if key.identity == identity else replace(signer, speaks_for=identity)
    raise Forbidden(
        f"No trusted key here signs for {identity}.",
        "Make one: formulary registry keys create --identity registry --attests",
    )


class Token(NamedTuple):
    """What a token says.

    Attributes:
        identity: whom it names.
        scopes: what it grants; None where it has no `scope`.
        site: whose images its person may send; empty where it names none.
        expires: seconds since 1970.
    """

    identity: str
    scopes: set[str] | None
    site: str
    expires: float


def read_token(places: Places, roles: Roles, token: str) -> Token:
    """Read a token (JWT, ES256) of an issuer in roles.yaml.

    Raises:
        NotAuthenticated: no issuer is configured; the token is forged, expired, another audience's, or names
            a site that it may not: then it names nobody, rather than somebody who may see every site.
    """
    import jwt

    if not roles.issuers:
        raise NotAuthenticated("Tokens are not configured.", "Name an issuer in roles.yaml.")
    for issuer in roles.issuers:
        asked: Any = {"require": ["exp", "iat", "aud", "iss", issuer.identity]}
        try:
            name = jwt.get_unverified_header(token)["kid"]
            key = jwt.PyJWKSet.from_json((places.root / issuer.keys).read_text())[name]
            claims = jwt.decode(token, key.key, ["ES256"], audience=issuer.audience, issuer=issuer.issuer,
                                options=asked)  # fmt: skip
            told, site = claims.get("scope"), claims.get(issuer.site, "")
            scopes = None if told is None else set(told.split() if isinstance(told, str) else told)
            person = name_identity(str(claims[issuer.identity]))
            if issuer.site not in claims or (site and site in (issuer.sites or (str(site),))):
                return Token(person, scopes, site, float(claims["exp"]))
        except (jwt.PyJWTError, ConfigError, KeyError, OSError, TypeError, ValueError):
            continue  # whatever is wrong with it: this issuer does not vouch for it
    raise NotAuthenticated("No issuer signed this token for us and its site, or it expired.", "Get another.")


def _allow(roles: Roles | None, identity: str, scope: Scope | None) -> None:
    held = {name.lower(): scopes for name, scopes in roles.identities.items()} if roles else {}
    if roles and scope and scope not in held.get(identity, ()):
        raise Forbidden(f"{identity} may not {scope}.", "roles.yaml says who may.")


def admit(var: Path, ledger: Ledger, identity: str, by: str | None = None, attests: bool = False) -> Signer:
    """Make (or keep) an identity's key and write the trust into the ledger.

    The first key of a ledger vouches for itself; every later one needs a trusted key, `by` or the first
    trusted one that lies in var/keys. A key that `attests` signs for the persons that tokens name.

    Raises:
        Forbidden: no trusted key is at hand to vouch; the key was revoked, or is another person's; the
            identity has a trusted key elsewhere.
    """
    known, identity = ledger.trusted_keys(), name_identity(identity)
    owned = {key.key for key in known.values() if key.identity == identity}
    here = key_path(var, identity).exists()
    if owned and not (here and load_signer(var, identity).key_id in {*owned, *known}):
        raise Forbidden(
            f"{identity} has the trusted key {min(owned)} elsewhere.",
            "Act where it lies; or have it revoked first, or rotated by its owner.",
        )
    signer = create_signer(var, identity)
    if signer.key_id in known:
        return _same_person(signer, known[signer.key_id].identity)
    if signer.key_id in {event.body["key"] for event in ledger.events(kind=Decision.KEY_REVOKED)}:
        raise Forbidden(
            f"The key of {signer.identity} was revoked.",
            f"Move {key_path(var, signer.identity)} away and run this again: it makes a new one.",
        )
    voucher = _voucher(var, known, by) if known else signer
    with ledger.writing() as writer:
        writer.append(Decision.KEY_TRUSTED, "", _describe_key(signer, attests), voucher)
    return signer


def rotate(var: Path, ledger: Ledger, identity: str, because: str) -> Signer:
    """Give an identity a new key, which the old one vouches for, and revoke the old one.

    What the old key signed before holds on: the ledger cites it.

    Raises:
        TrustError: the identity has no key here.
        Forbidden: the ledger does not trust it.
    """
    old = load_signer(var, identity)
    known = ledger.trusted_keys()
    if old.key_id not in known:
        raise Forbidden(f"The key of {identity} is not trusted.", "See `formulary registry keys list`.")
    path = key_path(var, identity)
    path.rename(kept := path.with_suffix(f".{old.key_id}"))
    try:
        new = create_signer(var, identity)
        with ledger.writing() as writer:
            writer.append(Decision.KEY_TRUSTED, "", _describe_key(new, known[old.key_id].attests), old)
            writer.append(Decision.KEY_REVOKED, "", {"key": old.key_id, "because": because}, new)
    except BaseException:
        kept.rename(path)  # the ledger knows nothing of a new key
        raise
    kept.unlink()
    return new


def revoke(ledger: Ledger, key: str, signer: Signer, because: str) -> None:
    """Withdraw trust from a key, from now on.

    Raises:
        Forbidden: the key is not trusted, or it is the last one.
    """
    with ledger.writing() as writer:
        known = writer.trusted_keys()
        if key not in known:
            raise Forbidden(f"No trusted key {key[:20]!r}.", "See `formulary registry keys list`.")
        if len(known) == 1:
            raise Forbidden("This is the last trusted key.", "Create another one first.")
        writer.append(Decision.KEY_REVOKED, "", {"key": key, "because": because}, signer)


def _describe_key(signer: Signer, attests: bool) -> dict[str, Any]:
    told = {"identity": signer.identity, "key": signer.key_id, "public": signer.public_pem}
    return told | ({"attests": True} if attests else {})


def _same_person(signer: Signer, owner: str) -> Signer:
    """A key is one person's: a copy of its file under another name makes nobody somebody else."""
    if signer.identity != owner:
        raise Forbidden(
            f"The key kept for {signer.identity} is {owner}'s.",
            f"Act as {owner}, or remove the file and make a key: formulary registry keys create",
        )
    return signer


def _voucher(var: Path, known: dict[str, TrustedKey], by: str | None) -> Signer:
    for trusted in known.values():
        if by in (None, trusted.identity) and key_path(var, trusted.identity).exists():
            candidate = load_signer(var, trusted.identity)
            if candidate.key_id == trusted.key:
                return candidate
    raise Forbidden(
        f"No trusted key {'of ' + by if by else ''} lies in var/keys to vouch for a new one.",
        "Ask a trusted person to run this.",
    )
