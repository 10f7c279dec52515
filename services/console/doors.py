"""What stands between a browser and a page: the session, forged requests, headers, and errors as pages."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from imaging.errors import Forbidden, FormularyError, NotAuthenticated, WrongType
from monitoring.logins import name_network
from services.console.sessions import Session, Sessions
from services.credentials import address_of
from services.guard import read_body, read_headers, request_id
from services.problems import tell

HOME = "/console"
COOKIE = "formulary-console"
FORM_BYTES = 64 * 2**10
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


Page = Callable[[Visit], Response]


class Doors:
    """Makes routes of pages.

    Args:
        sessions: who may come in.
        show: a problem as a page: the visit, the status.
    """

    def __init__(self, sessions: Sessions, show: Callable[[Visit, int], Response]) -> None:
        self._sessions, self._show = sessions, show

    def page(self, get: Page, post: Page | None = None) -> Any:
        """An endpoint behind the login; `get` shows, `post` changes and is shown by `get` where it fails."""

        async def answer(request: Request) -> Response:
            visit = Visit(request)
            try:
                await asyncio.to_thread(self._admit, visit)
                if request.method == "POST" and post:
                    await read_form(visit)
                    check_form(visit, self._sessions.stamp(visit.whose))
                return finish(await asyncio.to_thread(self._run, visit, get, post))
            except FormularyError as error:
                return finish(await asyncio.to_thread(self._refuse, visit, error))

        return answer

    def open(self, get: Page, post: Page) -> Any:
        """The endpoint of the login: no session, but nothing that another page sends."""

        async def answer(request: Request) -> Response:
            visit = Visit(request)
            try:
                if request.method == "POST":
                    await read_form(visit)
                    check_origin(request)
                page = post if request.method == "POST" else get
                return finish(await asyncio.to_thread(page, visit))
            except FormularyError as error:
                return finish(await asyncio.to_thread(self._refuse, visit, error))

        return answer

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
        visit.problem = error
        return self._show(visit, status_of(error, request))


async def read_form(visit: Visit) -> None:
    """Read a form that was sent, at most 64 KiB.

    Raises:
        WrongType: it is no form.
        TooLarge: or TooSlow, Unreadable, as `read_body`.
    """
    headers = read_headers(visit.request.scope)
    if headers.get(b"content-type", b"").split(b";")[0].strip() != b"application/x-www-form-urlencoded":
        raise WrongType("This is no form.", "Send it from its page.")
    body = await read_body(visit.request.receive, headers, FORM_BYTES)
    told = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=100)
    visit.form = {name: values[-1].strip() for name, values in told.items()}


def check_form(visit: Visit, stamp: str) -> None:
    """Hold a form to the session that it was made for.

    Raises:
        Forbidden: it was sent by another page, or is another session's.
    """
    from hmac import compare_digest

    check_origin(visit.request)
    if not compare_digest(visit.form.get("stamp", "").encode(), stamp.encode()):
        raise Forbidden("This form was not made for this session.", "Open the page again.")


def check_origin(request: Request) -> None:
    """See that a page of ours sends the form. Browsers tell by Sec-Fetch-Site, older ones by Origin.

    Raises:
        Forbidden: another page sends it, or nothing says who does.
    """
    told = request.headers.get("sec-fetch-site")
    origin = urlsplit(request.headers.get("origin", "")).netloc
    if told != "same-origin" and (told or origin != request.headers.get("host")):
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
