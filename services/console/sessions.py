"""Who sits at the console: sessions, the one-time links that begin them, and what each may do.

A session is a file that only this user can read, named by the digest of its number; the cookie holds the
number and a signature. Closing it removes the file, so that it ends in every worker at once.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imaging.config import Places
from imaging.errors import Forbidden, NotAuthenticated, Overloaded, TrustError
from imaging.vocabulary import Scope
from registry import signing
from registry.access import Roles, act, act_by_token, read_roles, read_token
from registry.ledger import Ledger
from registry.signing import Signer

SESSION_S = 12 * 3600.0
IDLE_S = 30 * 60.0
LINK_S = 5 * 60.0
SECRET_BYTES = 32
TOUCH_S = 30.0  # between two notes that a session is in use
TRIES, TRIES_S = 10, 300.0  # failed logins of one network
MOST_TRIES = 200  # failed logins of everybody in that time
NEW = "Ask for another one: formulary services login IDENTITY"


@dataclass(frozen=True)
class Session:
    """Somebody at the console.

    Attributes:
        number: random; known to the cookie alone.
        who: the identity, e.g. author@demo.
        site: the only site that is shown, of a token that names one; empty for every site.
        token: the token that it began with; empty where a link did.
        until: seconds since 1970.
    """

    number: str
    who: str
    site: str = ""
    token: str = ""
    until: float = 0.0


class Sessions:
    """Begins, finds and ends sessions.

    Args:
        places: where keys, roles.yaml and var/console lie.
        ledger: whose keys are trusted.
    """

    def __init__(self, places: Places, ledger: Ledger) -> None:
        self._places, self._ledger = places, ledger
        self._folder = places.var / "console"

    def make_link(self, identity: str) -> str:
        """A code that begins one session of an identity, within five minutes.

        Raises:
            TrustError: the identity has no key here.
            Forbidden: the ledger does not trust it.
        """
        who = self._signer(Session("", identity), None).actor
        told = {"who": who, "until": time.time() + LINK_S, "nonce": secrets.token_hex(16)}
        body = base64.urlsafe_b64encode(json.dumps(told).encode()).decode().rstrip("=")
        return f"{body}.{self._seal('link', body)}"

    def made_here(self, code: str) -> bool:
        """Whether a code has the right seal: who has one guesses nothing."""
        body, _, seal = code.partition(".")
        return hmac.compare_digest(seal.encode(), self._seal("link", body).encode())

    def read_link(self, code: str) -> dict[str, Any]:
        """What a code says: who, until, nonce; it is not spent by being read.

        Raises:
            NotAuthenticated: it was not made here, is over, or was used.
        """
        if not self.made_here(code):
            raise NotAuthenticated("This link was not made here.", NEW)
        body = code.partition(".")[0]
        told: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        if told["until"] < time.time():
            raise NotAuthenticated("This link held for five minutes, which are over.", NEW)
        if self._spent(told["nonce"]).exists():
            raise NotAuthenticated("This link was used.", NEW)
        return told

    def begin_by_link(self, code: str) -> Session:
        """Spend a code; of two who try at once, one succeeds.

        Raises:
            NotAuthenticated: as `read_link`.
            TrustError: the identity has no key here any more; or Forbidden, it is not trusted.
        """
        told = self.read_link(code)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            os.close(os.open(self._spent(told["nonce"]), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            raise NotAuthenticated("This link was used.", NEW) from None
        self._signer(found := Session("", told["who"]), None)
        return self._begin(found.who)

    def begin_by_token(self, token: str) -> Session:
        """A session of whom a token names, not longer than the token holds.

        Raises:
            NotAuthenticated: no issuer of roles.yaml vouches for it.
        """
        found = read_token(self._places, read_roles(self._places) or Roles(), token)
        return self._begin(found.identity, found.site, token, found.expires)

    def find(self, cookie: str, touch: bool = True) -> Session | None:
        """The session of a cookie; None where it never was, is over, was idle for 30 minutes, or was closed.

        Args:
            cookie: its value.
            touch: whether somebody is at work, rather than a page that refreshes itself.
        """
        number, _, seal = cookie.partition(".")
        if not hmac.compare_digest(seal.encode(), self._seal("session", number).encode()):
            return None
        path = self._path(number)
        try:
            used, found = path.stat().st_mtime, Session(number=number, **json.loads(path.read_bytes()))
        except (OSError, ValueError):
            return None
        now = time.time()
        if found.until < now or used + IDLE_S < now:
            path.unlink(missing_ok=True)
            return None
        if touch and used + TOUCH_S < now:
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                os.utime(path)
        return found

    def close(self, session: Session) -> None:
        """End it, everywhere."""
        self._path(session.number).unlink(missing_ok=True)

    def leave(self, session: Session, told: str) -> None:
        """Leave a sentence for the session's next page."""
        with contextlib.suppress(FileNotFoundError):  # the folder was cleaned: the deed is in the ledger
            self._path(session.number).with_suffix(".told").write_text(told)

    def take(self, session: Session) -> str:
        """The sentence that was left; it is told once."""
        path = self._path(session.number).with_suffix(".told")
        try:
            told = path.read_text()
            path.unlink()
        except FileNotFoundError:
            return ""
        return told

    def cookie(self, session: Session) -> str:
        """What the browser keeps."""
        return f"{session.number}.{self._seal('session', session.number)}"

    def stamp(self, session: Session) -> str:
        """What every form of this session carries, against requests that another page forges."""
        return self._seal("form", session.number)

    def admit(self, session: Session, scope: Scope = Scope.READ_AUDIT) -> None:
        """Hold a session to what its person may do now: keys and roles may have changed since it began.

        Args:
            session: whose.
            scope: what is asked of who may see every site; one whose token names a site has that site.

        Raises:
            NotAuthenticated: the token is not believed any more, or names another site now.
            Forbidden: the person may not do it.
            TrustError: the person's key is gone.
        """
        if not session.token:
            self._signer(session, scope)
            return
        roles = read_roles(self._places) or Roles()
        token = read_token(self._places, roles, session.token)
        if token.site != session.site:
            raise NotAuthenticated("The token names another site than it did.", "Log in again.")
        held = {name.lower(): set[str](scopes) for name, scopes in roles.identities.items()}
        named = held.get(token.identity, set() if token.scopes is None else token.scopes)
        if not token.site and scope not in (named if token.scopes is None else named & token.scopes):
            raise Forbidden(f"{token.identity} may not {scope}.", "roles.yaml and the token say who may.")

    def signer(self, session: Session, scope: Scope) -> Signer:
        """The signer of a session's person, for something that asks for a scope.

        Raises:
            Forbidden: the person may not do it, or nobody here signs for them; and as `act`.
        """
        return self._signer(session, scope)

    def _signer(self, session: Session, scope: Scope | None) -> Signer:
        if session.token:
            return act_by_token(self._places, self._ledger, session.token, scope)
        signer = act(self._places, self._ledger, session.who, scope)
        if signer.actor != session.who:  # FORMULARY_TOKEN of this process names another person
            raise Forbidden(f"This process acts as {signer.actor}.", "Start it without FORMULARY_TOKEN.")
        return signer

    def _begin(self, who: str, site: str = "", token: str = "", until: float = float("inf")) -> Session:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sweep()
        until = min(until, time.time() + SESSION_S)
        made = Session(secrets.token_urlsafe(32), who, site, token, until)
        told = {name: value for name, value in asdict(made).items() if name != "number"}
        opened = os.open(self._path(made.number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(opened, "w") as stream:
            json.dump(told, stream)
        return made

    def _sweep(self) -> None:
        """Remove what holds no more: a session after its idle time, a spent link after twice its own."""
        ages = {".json": IDLE_S, ".told": IDLE_S, ".spent": 2 * LINK_S}
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another worker sweeps, too
                if path.suffix in ages and path.stat().st_mtime + ages[path.suffix] < time.time():
                    path.unlink()

    def _path(self, number: str) -> Path:
        return self._folder / f"{hashlib.sha256(number.encode()).hexdigest()[:40]}.json"

    def _spent(self, nonce: str) -> Path:
        return self._folder / f"{nonce}.spent"

    def _seal(self, use: str, told: str) -> str:
        return hmac.digest(read_secret(self._places.var), f"{use} {told}".encode(), "sha256").hex()


def read_secret(var: Path) -> bytes:
    """The secret that seals links, cookies and forms: var/keys/console.key, made once, mode 0600.

    Raises:
        TrustError: it is not what was made.
    """
    path = var / "keys" / "console.key"
    secret = signing.read_secret(path)
    if len(secret) != SECRET_BYTES:  # a shorter one could be guessed
        raise TrustError(f"{path} is damaged.", "Remove it; everybody logs in again.")
    return secret


class Tries:
    """Failed logins of the last five minutes, by network; bounded, whoever tries."""

    def __init__(self) -> None:
        self._failed: deque[tuple[float, str]] = deque(maxlen=MOST_TRIES)
        self._lock = threading.Lock()

    def check(self, network: str) -> None:
        """Let one more try happen.

        Raises:
            Overloaded: this network, or everybody together, has failed too often.
        """
        start = time.monotonic() - TRIES_S
        with self._lock:
            while self._failed and self._failed[0][0] < start:
                self._failed.popleft()
            own, every = sum(network == one for _, one in self._failed), len(self._failed)
        if own >= TRIES or every == MOST_TRIES:
            raise Overloaded("Too many logins failed.", "Wait five minutes.", retry_s=TRIES_S)

    def note(self, network: str) -> None:
        """One failed."""
        with self._lock:
            self._failed.append((time.monotonic(), network))
