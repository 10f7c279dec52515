"""API keys at rest: var/keys/access.json says which there are; the keys themselves are kept nowhere."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import AwareDatetime, ValidationError

from imaging.config import Places, explain, read_sites
from imaging.errors import ConfigError, Conflict, Forbidden
from imaging.recipe import Section
from imaging.vocabulary import Entry
from monitoring.logins import Login, write_logins

PREFIX = "fk_"
LIFE_DAYS = 366


class ApiKey(Section):
    """What is kept of a key.

    Attributes:
        id: names it, in lists and in the audit.
        site: whose requests it makes; empty for what asks for no site: Prometheus, a reader of /docs.
        digest: sha256 of the secret, hexadecimal. A salt and a slow hash are for passwords that people
            choose: 256 random bits are not found by trying, and a fast hash keeps a request's path short.
        created: when.
        expires: from then on it is refused.
        made_by: who made it.
        revoked: when it was withdrawn.
        replaced_by: id of the key that it was rotated into.
    """

    id: str
    site: str
    digest: str
    created: AwareDatetime
    expires: AwareDatetime
    made_by: str
    revoked: AwareDatetime | None = None
    replaced_by: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is taken now."""
        return self.revoked is None and datetime.now(UTC) < self.expires


class KeyFile(Section):
    """var/keys/access.json. Keys stay in it after their end: what was once asked for stays asked for."""

    keys: tuple[ApiKey, ...] = ()


def keys_path(var: Path) -> Path:
    """Where the keys' digests lie."""
    return var / "keys" / "access.json"


def hash_secret(secret: bytes) -> bytes:
    """What is kept, and compared."""
    return hashlib.sha256(secret).digest()


def read_keys(var: Path) -> tuple[ApiKey, ...]:
    """Every key that was made, oldest first.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = keys_path(var)
    try:
        return KeyFile.model_validate_json(path.read_bytes()).keys if path.exists() else ()
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, KeyFile)}.", "Restore it, or make new keys.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).", "Let the service own it.") from error


def create_key(places: Places, site: str, days: int, by: str) -> tuple[ApiKey, str]:
    """Make a key for a site; or, where the site is empty, for what asks for none.

    Args:
        places: of the checkout.
        site: one of sites.yaml, or empty.
        days: how long it holds, 1 to 366.
        by: who makes it.

    Returns:
        What is kept, and the key itself: it can be told once, now.

    Raises:
        UnknownSite: sites.yaml does not list the site.
        ConfigError: a life that is not 1 to 366 days.
    """
    if site:
        read_sites(places).site(site)
    if not 1 <= days <= LIFE_DAYS:
        raise ConfigError(f"A key holds for 1 to {LIFE_DAYS} days, not {days}.", "Rotate it in time.")
    made, key = _make(site, timedelta(days=days), by)
    with _changing(places.var) as write:
        write([*read_keys(places.var), made])
    _audit(places.var, made, Entry.KEY_CREATED, by)
    return made, key


def rotate_key(places: Places, key_id: str, grace_hours: int, by: str) -> tuple[ApiKey, str]:
    """Make the key that follows another one, which goes on holding for the grace.

    Returns:
        What is kept of the new one, and the key itself: it can be told once, now.

    Raises:
        Forbidden: there is no such key.
        Conflict: it holds no more, or was rotated before.
    """
    with _changing(places.var) as write:
        keys = read_keys(places.var)
        old = _find(keys, key_id)
        if not old.holds or old.replaced_by:
            why = f"was rotated into {old.replaced_by}" if old.replaced_by else "holds no more"
            raise Conflict(f"The key {old.id} {why}.", "Make a new one: formulary services keys create")
        made, key = _make(old.site, old.expires - old.created, by)
        until = min(old.expires, datetime.now(UTC) + timedelta(hours=grace_hours))
        kept = old.model_copy(update={"expires": until, "replaced_by": made.id})
        write([kept if one is old else one for one in keys] + [made])
    _audit(places.var, old, Entry.KEY_ROTATED, by)
    return made, key


def revoke_key(places: Places, key_id: str, by: str) -> ApiKey:
    """Withdraw a key at once; running gateways follow within a second.

    Raises:
        Forbidden: there is no such key.
    """
    with _changing(places.var) as write:
        keys = read_keys(places.var)
        old = _find(keys, key_id)
        gone = old.model_copy(update={"revoked": old.revoked or datetime.now(UTC)})
        write([gone if one is old else one for one in keys])
    _audit(places.var, gone, Entry.KEY_REVOKED, by)
    return gone


def _make(site: str, life: timedelta, by: str) -> tuple[ApiKey, str]:
    name, secret, now = secrets.token_hex(6), secrets.token_urlsafe(32), datetime.now(UTC)
    digest = hash_secret(secret.encode()).hex()
    made = ApiKey(id=name, site=site, digest=digest, created=now, expires=now + life, made_by=by)
    return made, f"{PREFIX}{name}_{secret}"


def _find(keys: tuple[ApiKey, ...], key_id: str) -> ApiKey:
    name = key_id.removeprefix(PREFIX).partition("_")[0]  # of a leaked key, too, pasted as it is
    for key in keys:
        if key.id == name:
            return key
    raise Forbidden(f"No key {name[:20]!r}.", "See `formulary services keys list`.")


@contextmanager
def _changing(var: Path) -> Iterator[Callable[[list[ApiKey]], None]]:
    """One who changes the file at a time; a reader sees the old one or the new one, whole."""
    path = keys_path(var)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)

    def write(keys: list[ApiKey]) -> None:
        draft = path.with_suffix(".draft")
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(KeyFile(keys=tuple(keys)).model_dump_json(indent=1))
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)

    with os.fdopen(os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield write


def _audit(var: Path, key: ApiKey, outcome: Entry, by: str) -> None:
    write_logins(var, Counter([Login(f"{PREFIX}{key.id} by {by}", key.site, outcome, "here")]))
