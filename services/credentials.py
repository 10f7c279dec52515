"""Who asks. The site comes from the credential, an API key or a token of an issuer, never from the body."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path
from typing import Any, NoReturn

from starlette.types import ASGIApp, Receive, Scope, Send

from imaging.config import Places, Sites
from imaging.errors import ConfigError, Forbidden, FormularyError, NotAuthenticated, NotReady
from imaging.vocabulary import Entry
from monitoring.logins import Login, Logins, name_network
from registry.access import Roles, read_roles, read_token
from services.guard import Headers, read_headers, read_request_id, read_site
from services.keys import PREFIX, ApiKey, hash_secret, keys_path, read_keys
from services.problems import tell

LOG = logging.getLogger(__name__)
OPEN = ("/livez", "/readyz")
CONSOLE = "/console"  # has a login of its own
HERE = ("loopback", "here")
LOOK_S = 0.5  # between two looks at the files: a revocation holds within a second
TOKENS = 4096
REFUSALS: dict[Entry, tuple[type[FormularyError], str, str]] = {
    Entry.NO_CREDENTIAL: (NotAuthenticated, "Nobody says who asks.", "Send Authorization: Bearer KEY."),
    Entry.NOT_BELIEVED: (NotAuthenticated, "The credential is not believed.", "Ask for another one."),
    Entry.EXPIRED: (NotAuthenticated, "The key expired.", "Ask for one that follows it."),
    Entry.REVOKED: (NotAuthenticated, "The key was revoked.", "Ask for another one."),
    Entry.NO_SITE: (Forbidden, "The credential names no site.", "Ask with one that was made for a site."),
    Entry.OTHER_SITE: (Forbidden, "X-Site names another site than the credential.", "Leave it out."),
}  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """A credential that was recognised, or may be.

    Attributes:
        who: fk_<id> of a key, or whom a token names; empty where nobody is asked.
        site: whose images it may send; empty for none.
        until: seconds since 1970.
        digest: of a key's secret.
        revoked: whether a key was withdrawn.
    """

    who: str
    site: str
    until: float
    digest: bytes = b""
    revoked: bool = False


STRANGER = Pass("", "", 0.0, bytes(32))


def is_required() -> bool:
    """Whether FORMULARY_ACCESS asks for a credential though no key was made.

    Raises:
        ConfigError: it is neither `on` nor empty: a word that means nothing must not mean `off`.
    """
    told = os.environ.get("FORMULARY_ACCESS", "")
    if told not in ("", "on"):
        raise ConfigError(f"FORMULARY_ACCESS is {told[:20]!r}.", "Set it to `on`, or to nothing.")
    return bool(told)


class Credentials:
    """What is asked of whoever comes in: nothing, until a key exists or access is required.

    Once on it stays on for the life of the process, whatever happens to the files. They are looked at twice a
    second; while one of them cannot be read nobody comes in.

    Args:
        places: where keys and roles.yaml lie.
        sites: that a request may name.
        required: ask for a credential even though no key was made.

    Raises:
        ConfigError: the file of keys or roles.yaml cannot be read.
    """

    def __init__(self, places: Places, sites: Sites, required: bool = False) -> None:
        self._places, self._sites, self._on = places, sites, required
        self._keys: dict[bytes, Pass] = {}
        self._tokens: dict[bytes, Pass] = {}
        self._roles, self._seen = Roles(), set[tuple[str, str, int]]()
        self._stamps: dict[Path, Any] = {}
        self._next_look = 0.0
        self._broken = False
        self._logins = Logins(places.var)
        self._read({})

    @property
    def on(self) -> bool:
        """Whether a credential is asked for."""
        self._look()
        return self._on

    def suffice(self, scope: Scope) -> bool:
        """Whether enough is asked where a request came in: on an address that others reach, a credential.

        It holds however the server was started; `formulary services serve` would not have started it.
        """
        return self.on or name_network((scope.get("server") or ("",))[0]) in HERE

    def recognise(self, headers: Headers, address: str = "") -> Pass:
        """Who asks.

        Args:
            headers: of the request, names in lower case, as ASGI has them.
            address: of the client, for the audit.

        Raises:
            NotAuthenticated: nobody, or nobody who is believed.
            NotReady: the files that say who is believed cannot be read.
        """
        self._look()
        if self._broken:
            raise NotReady("Who may come in cannot be read.", "The log says why.")
        if not self._on:
            return STRANGER
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        given = given.strip()
        if kind.lower() != b"bearer" or not given:
            self.refuse(Entry.NO_CREDENTIAL, STRANGER, address)
        found = (self._key if given.startswith(PREFIX.encode()) else self._token)(given, address)
        seen = (found.who, found.site, int(time.time() // 86400))
        if seen not in self._seen:
            self._seen = {one for one in self._seen if one[2] == seen[2]} | {seen}
            self._logins.note(Login(found.who, found.site, Entry.ADMITTED, name_network(address)))
        return found

    def site_of(self, headers: Headers, address: str = "") -> str:
        """The site that asks: the credential's; or the X-Site header's where no credential is asked for.

        Args:
            headers: as for `recognise`.
            address: of the client, for the audit.

        Raises:
            NotAuthenticated: nobody asks, or nobody who is believed.
            Forbidden: the credential names no site, or the header another one.
            SiteRequired: no credential is asked for, and there is no header.
            UnknownSite: sites.yaml does not list it.
        """
        found, told = self.recognise(headers, address), headers.get(b"x-site")
        if not self._on:
            return read_site(headers, self._sites)
        if not found.site:
            self.refuse(Entry.NO_SITE, found, address)
        if told is not None and told.decode("latin-1") != found.site:
            self.refuse(Entry.OTHER_SITE, found, address)
        if found.site not in self._sites.sites:
            self._sites.site(found.site)
        return found.site

    def refuse(self, why: Entry, found: Pass, address: str) -> NoReturn:
        """Note who is turned away, and do it.

        Raises:
            NotAuthenticated: or Forbidden, as REFUSALS has it.
        """
        self._logins.note(Login(found.who, found.site, why, name_network(address)))
        kind, fact, fix = REFUSALS[why]
        raise kind(fact, fix)

    def note(self, login: Login) -> None:
        """Write what happened at another door into the same audit."""
        self._logins.note(login)

    def close(self) -> None:
        """Write what the audit still has to write."""
        self._logins.close()

    def _key(self, given: bytes, address: str) -> Pass:
        _, name, secret = (*given.split(b"_", 2), b"", b"")[:3]
        key = self._keys.get(name, STRANGER)
        if not compare_digest(hash_secret(secret), key.digest):
            self.refuse(Entry.NOT_BELIEVED, key, address)
        if key.revoked:
            self.refuse(Entry.REVOKED, key, address)
        if time.time() >= key.until:
            self.refuse(Entry.EXPIRED, key, address)
        return key

    def _token(self, given: bytes, address: str) -> Pass:
        """A token is verified once; until its `exp` its digest is enough."""
        digest = hashlib.sha256(given).digest()
        found = self._tokens.get(digest)
        if found and time.time() < found.until:
            return found
        try:
            token = read_token(self._places, self._roles, given.decode("latin-1"))
        except NotAuthenticated:
            self.refuse(Entry.NOT_BELIEVED, STRANGER, address)
        if len(self._tokens) >= TOKENS:
            self._tokens.clear()
        self._tokens[digest] = Pass(token.identity, token.site, token.expires)
        return self._tokens[digest]

    def _look(self) -> None:
        """Read the files again where one of them is another than it was."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_S
        stamps = {path: _stamp(path) for path in self._watched()}
        if stamps == self._stamps and not self._broken:
            return
        try:
            self._read(stamps)
        except (ConfigError, OSError) as error:
            LOG.error("nobody comes in: %s", error)
            self._broken = True

    def _watched(self) -> list[Path]:
        tokens = [self._places.root / issuer.keys for issuer in self._roles.issuers]
        return [keys_path(self._places.var), self._places.root / "roles.yaml", *tokens]

    def _read(self, stamps: dict[Path, Any]) -> None:
        keys, self._roles = read_keys(self._places.var), read_roles(self._places) or Roles()
        self._keys = {key.id.encode(): _make_pass(key) for key in keys}
        self._on, self._stamps, self._broken = self._on or bool(keys), stamps, False
        self._tokens.clear()


def _make_pass(key: ApiKey) -> Pass:
    who, until = f"{PREFIX}{key.id}", key.expires.timestamp()
    return Pass(who, key.site, until, bytes.fromhex(key.digest), key.revoked is not None)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        told = path.stat()
    except OSError:
        return None  # if it was there, or comes back, that is another stamp
    return told.st_mtime_ns, told.st_ino, told.st_size


class Entrance:
    """Every path but health asks who is there, known ones and unknown ones, so that none can be forgotten.

    Args:
        app: what lies behind.
        credentials: who is let in.
    """

    def __init__(self, app: ASGIApp, credentials: Credentials) -> None:
        self._app, self._credentials = app, credentials

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN or _is_console(scope):
            await self._app(scope, receive, send)
            return
        try:
            address = address_of(scope)
            if not self._credentials.suffice(scope):
                self._credentials.refuse(Entry.NO_CREDENTIAL, STRANGER, address)
            self._credentials.recognise(read_headers(scope), address)
        except FormularyError as error:
            await _turn_away(error, scope, send)
            return
        await self._app(scope, receive, send)


def _is_console(scope: Scope) -> bool:
    return scope["type"] == "http" and f"{scope['path']}/".startswith(f"{CONSOLE}/")


def address_of(scope: Scope) -> str:
    """The client's address, or nothing where it has none: a socket file."""
    return str((scope.get("client") or ("",))[0])


async def _turn_away(error: FormularyError, scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await tell(error, read_request_id(read_headers(scope))).send(send)
