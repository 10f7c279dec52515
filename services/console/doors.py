"""What stands between a browser and a page: the session, forged requests, headers, and errors as pages."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from hmac import compare_digest
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from imaging.errors import (
    Forbidden,
    FormularyError,
    NotAuthenticated,
    Overloaded,
    UnknownVersion,
    Unreadable,
    WrongType,
)
from monitoring.logins import name_network
from services.console.sessions import Session, Sessions
from services.credentials import address_of
from services.guard import read_body, read_headers, request_id
from services.problems import tell

HOME = "/console"
COOKIE = "formulary-console"
FORM_BYTES, FIELDS = 64 * 2**10, 100
WAITING = 48  # pages that wait to be drawn
IMAGES = 4  # threads of what a case's page fetches; two of them draw
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
DRAWN = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"  # runs nothing
HEADERS = {
    "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store", "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}  # fmt: skip


@dataclass
class Visit:
    """A request on its way to a page.

    Attributes:
        request: as it came.
        session: whose; None on the pages that need none.
        form: fields of a form that was sent; of one that is sent twice, the last.
        problem: what went wrong with it, where its page is shown again.
    """

    request: Request
    session: Session | None = None
    form: dict[str, str] = field(default_factory=dict)
    problem: FormularyError | None = None

    @property
    def whose(self) -> Session:
        """The session.

        Raises:
            NotAuthenticated: there is none.
        """
        if self.session is None:
            raise NotAuthenticated("Nobody is logged in.", "Log in first.")
        return self.session

    @property
    def site(self) -> str:
        """The only site that this person may see; empty for every one."""
        return self.session.site if self.session else ""

    @cached_property
    def network(self) -> str:
        """Where it comes from, as the audit names it."""
        return name_network(address_of(self.request.scope))

    def given(self, name: str) -> str:
        """A part of the path."""
        return str(self.request.path_params[name])

    @property
    def version(self) -> int:
        """The version that the path names, else the form.

        Raises:
            UnknownVersion: it is no number of one.
        """
        told = self.request.path_params.get("version") or self.form.get("version", "")
        if not re.fullmatch(r"[1-9][0-9]{0,8}", told):
            raise UnknownVersion(f"There is no version {told[:20]!r}.", "Open one from its site's page.")
        return int(told)


Page = Callable[[Visit], Response]


class Doors:
    """Makes routes of pages. One page is drawn at a time, and waits for that in no thread that others need.

    Args:
        sessions: who may come in.
        show: a problem as a page: the visit, the status.
    """

    def __init__(self, sessions: Sessions, show: Callable[[Visit, int], Response]) -> None:
        self._sessions, self._show, self._waiting = sessions, show, 0
        self._pages = ThreadPoolExecutor(1, thread_name_prefix="console")
        self._images = ThreadPoolExecutor(IMAGES, thread_name_prefix="console-images")

    def page(self, get: Page, post: Page | None = None, image: bool = False, login: bool = False) -> Any:
        """An endpoint behind the login; `get` shows, `post` changes and is shown by `get` where it fails.

        Args:
            get: makes the answer.
            post: does what a form asks for.
            image: the answer waits for other threads, an engine's say: pages do not wait for it.
            login: it is the login itself: nobody has a session, but no other page may send its form.
        """
        pool = self._images if image else self._pages

        async def answer(request: Request) -> Response:
            visit = Visit(request)
            try:
                if not login:
                    await self._wait(self._pages, self._admit, visit)
                if request.method == "POST" and post:
                    await read_form(visit)
                    check_origin(request)
                    if not login:
                        check_stamp(visit, self._sessions.stamp(visit.whose))
                return finish(await self._wait(pool, self._run, visit, get, post))
            except FormularyError as error:
                return finish(await self._tell(visit, error))

        return answer

    async def _wait(self, pool: ThreadPoolExecutor, do: Callable[..., Any], *given: Any) -> Any:
        """Do something in a pool; only so many wait for one.

        Raises:
            Overloaded: more would.
        """
        if self._waiting >= WAITING:
            raise Overloaded("Too many pages are asked for at once.", "Ask again in a few seconds.")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, do, *given)
        finally:
            self._waiting -= 1

    async def _tell(self, visit: Visit, error: FormularyError) -> Response:
        """Show an error; to whoever is one too many without a page."""
        if isinstance(error, Overloaded) and self._waiting >= WAITING:
            return tell(error, request_id(visit.request)).respond()
        return await asyncio.get_running_loop().run_in_executor(self._pages, self._refuse, visit, error)

    def _admit(self, visit: Visit) -> None:
        refreshes = "hx-request" in visit.request.headers
        cookie = visit.request.cookies.get(COOKIE, "")
        visit.session = self._sessions.find(cookie, touch=not refreshes)
        self._sessions.admit(visit.whose)

    def _run(self, visit: Visit, get: Page, post: Page | None) -> Response:
        if visit.request.method != "POST" or post is None:
            return get(visit)
        try:
            return post(visit)
        except FormularyError as error:
            visit.problem = error
            shown = get(visit)
            shown.status_code = status_of(error, visit.request)
            return shown

    def _refuse(self, visit: Visit, error: FormularyError) -> Response:
        request, lost = visit.request, visit.session is None and isinstance(error, NotAuthenticated)
        if lost and "hx-request" in request.headers:
            return Response(status_code=401, headers={"HX-Redirect": f"{HOME}/login"})
        if lost and request.method == "GET" and request.url.path != f"{HOME}/login":
            return RedirectResponse(f"{HOME}/login?next={quote(request.url.path)}", 303)
        visit.problem, reply = error, tell(error, request_id(request))
        shown = self._show(visit, reply.status)
        shown.headers.update({name: told for name, told in reply.headers.items() if name == "retry-after"})
        return shown


async def read_form(visit: Visit) -> None:
    """Read a form that was sent, at most 64 KiB.

    Raises:
        WrongType: it is no form.
        Unreadable: over 100 fields; and TooLarge, TooSlow or Unreadable, as `read_body`.
    """
    headers = read_headers(visit.request.scope)
    if headers.get(b"content-type", b"").split(b";")[0].strip() != b"application/x-www-form-urlencoded":
        raise WrongType("This is no form.", "Send it from its page.")
    body = await read_body(visit.request.receive, headers, FORM_BYTES)
    try:
        told = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=FIELDS)
    except ValueError as error:
        raise Unreadable(f"The form has over {FIELDS} fields.", "Send it from its page.") from error
    visit.form = {name: values[-1].strip() for name, values in told.items()}


def check_stamp(visit: Visit, stamp: str) -> None:
    """Hold a form to the session that it was made for.

    Raises:
        Forbidden: it is another session's.
    """
    if not compare_digest(visit.form.get("stamp", "").encode(), stamp.encode()):
        raise Forbidden("This form was not made for this session.", "Open the page again.")


def check_origin(request: Request) -> None:
    """See that a page of ours sends the form. Browsers tell by Sec-Fetch-Site, older ones by Origin.

    Raises:
        Forbidden: another page sends it, or nothing says who does.
    """
    told, host = request.headers.get("sec-fetch-site"), request.headers.get("host", "")
    ours = [f"{scheme}://{host}" for scheme in ("http", "https")]
    if told != "same-origin" and (told or request.headers.get("origin") not in ours):
        raise Forbidden("Another page sent this form.", "Open the console itself.")


def status_of(error: FormularyError, request: Request) -> int:
    """The status of an error; it is counted."""
    return tell(error, request_id(request)).status


def next_page(told: str) -> str:
    """Where to go after the login: a page of the console, whatever was asked for."""
    return told if re.fullmatch(rf"{HOME}(/[A-Za-z0-9._@/-]*)?", told) else HOME


def finish(response: Response) -> Response:
    """Add what every answer of the console carries."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def read_static(folder: Path, name: str) -> Path | None:
    """A file of a folder by its plain name; None where there is none."""
    path = folder / name
    return path if re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,60}", name) and path.is_file() else None
