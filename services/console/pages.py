"""The pages of the console and where they lie.

One is drawn at a time, in a thread of its own: predictions go on beside it, more slowly for so long, since it
holds the interpreter's lock; what waits holds no thread that anybody else needs.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from markupsafe import Markup
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from imaging.config import Places, explain
from imaging.errors import Forbidden, FormularyError, NotAuthenticated, NotReady, Unreadable, WrongLabel
from imaging.vocabulary import Entry, Judged
from monitoring.journal import Journal
from monitoring.labels import Judgement
from monitoring.logins import Login
from monitoring.records import open_records
from registry.access import Acting
from registry.actions import ACTIONS, perform
from registry.ledger import open_ledger
from registry.trials.conduct import TRUTH_SCOPE
from services.console import doors
from services.console.cells import WRONG
from services.console.doors import COOKIE, DRAWN, HOME, Visit
from services.console.dossier import Cards, find_examples, read_dossier
from services.console.sessions import Session, Sessions, Tries
from services.console.templating import open_templates, render
from services.console.viewer import Viewer
from services.console.views import Books, Neighbours
from services.credentials import Credentials
from services.slots import Slots

HERE = Path(__file__).parent
MOST = 12  # places in the list above the matrix
LOOK_S = "2"  # until a page looks again for what is being drawn
Spend = Callable[[str], None]
AT_SITE = ("suspend", "resume", "rollback", "acknowledge")


class Console:
    """The console of a gateway.

    Args:
        places: where everything lies.
        journal: predictions and verdicts.
        credentials: of the gateway; its audit has these logins, too.
        slots: what serves, for heat maps and masks of a case.
        spend: takes an assessment off its site's quota.
    """

    def __init__(
        self, places: Places, journal: Journal, credentials: Credentials, slots: Slots, spend: Spend
    ) -> None:
        self._spend, self._cards = spend, Cards(places)
        self._places, self._journal, self._credentials = places, journal, credentials
        self._ledger, self._tries = open_ledger(places.var), Tries()
        self.sessions = Sessions(places, self._ledger)
        self._doors = doors.Doors(self.sessions, self._show_problem)
        self._near = Neighbours()
        self._viewer = Viewer(places, journal, slots)

    @cached_property
    def _books(self) -> Books:
        return Books(self._places, self._ledger, self._journal, open_records(self._places.var))

    def routes(self) -> list[Route]:
        """Every path of the console; all but the login and the static files need a session."""
        page, both = self._doors.page, ["GET", "POST"]
        version = f"{HOME}/tasks/{{task}}/versions/{{version}}"
        return [
            Route(HOME, page(self.formulary), methods=["GET"]),
            Route(f"{HOME}/", lambda _: RedirectResponse(HOME), methods=["GET"]),
            Route(f"{HOME}/login", page(self.login, self.enter, login=True), methods=both),
            Route(f"{HOME}/logout", page(self.formulary, self.leave), methods=["POST"]),
            Route(f"{HOME}/static/{{name}}", static, methods=["GET"]),
            Route(version, page(self.version), methods=["GET"]),
            Route(f"{version}/card", page(self.card), methods=["GET"]),
            Route(f"{version}/examples", page(self.place_examples), methods=["GET"]),
            Route(f"{version}/examples.svg", page(self.examples), methods=["GET"]),
            Route(f"{HOME}/tasks/{{task}}/sites/{{site}}", page(self.site, self.decide), methods=both),
            Route(f"{HOME}/cases/{{number}}", page(self.case, self.assess), methods=both),
            Route(f"{HOME}/queue", page(self.queue, self.answer), methods=both),
            *self._viewer.routes(f"{HOME}/cases", partial(page, image=True), self._hold),
        ]

    def formulary(self, visit: Visit) -> Response:
        """The matrix of tasks and sites."""
        asked = visit.request.query_params
        find, wrong = asked.get("find", "")[:60], asked.get("wrong") == "1"
        board = self._books.board(visit.site, find, wrong)
        told = {"board": board, "find": find, "wrong": wrong, "most": MOST, "worth": WRONG}
        parts = {name: Markup(render(name, **told)) for name in ("said", "wrong", "rows")}
        seen = "-".join(hashlib.sha256(part.encode()).hexdigest()[:12] for part in parts.values())
        had = asked.get("seen", "")
        if had == seen:
            return Response(status_code=204)  # the page has it: nothing is swapped, read out or lost
        same = had.split("-")[0] == seen.split("-")[0]
        return self._show("formulary", visit, parts=parts, seen=seen, same=same, **told)

    def version(self, visit: Visit) -> Response:
        """What a version is trusted with, and why."""
        task, number = visit.given("task"), visit.version
        told = read_dossier(self._books, task, number, visit.site)
        return self._show("version", visit, task=task, version=number, drawn=False, **told)

    def card(self, visit: Visit) -> Response:
        """The model card as it is; 202 while it is drawn, by a page that looks again."""
        if card := self._draw(visit):
            return HTMLResponse(card, headers={"Content-Security-Policy": DRAWN})
        shown = self._show("drawing", visit, task=visit.given("task"), version=visit.version)
        shown.status_code, shown.headers["Retry-After"] = 202, LOOK_S
        return shown

    def place_examples(self, visit: Visit) -> Response:
        """What stands on the version's page in the place of its examples: the picture, once it is drawn."""
        told = {"task": visit.given("task"), "version": visit.version, "drawn": bool(self._draw(visit))}
        return HTMLResponse(render("examples", **told))

    def examples(self, visit: Visit) -> Response:
        """The card's examples with heat maps; 503 while they are drawn."""
        card = self._draw(visit)
        if card is None:
            raise NotReady("The examples are being drawn.", "Ask again in a few seconds.")
        headers = {"Content-Security-Policy": DRAWN}
        return Response(find_examples(card), media_type="image/svg+xml", headers=headers)

    def site(self, visit: Visit) -> Response:
        """A task at a site: what is watched, what changed, what can be done."""
        task, site = visit.given("task"), visit.given("site")
        self._hold(visit, site)
        told = self._books.site(task, site)
        return self._show("site", visit, task=task, site=site, **told)

    def case(self, visit: Visit) -> Response:
        """One answer."""
        told = self._books.case(visit.given("number"))
        self._hold(visit, told["row"]["site"])
        viewer = self._viewer.describe(told["row"], told["contract"], visit.site)
        return self._show("case", visit, **told, viewer=viewer)

    def queue(self, visit: Visit) -> Response:
        """Requests that wait."""
        self._hold(visit, "")
        return self._show("queue", visit, asked=self._books.queue())

    def decide(self, visit: Visit) -> Response:
        """Suspend, resume, roll back or acknowledge at a site."""
        site, name = visit.given("site"), visit.form.get("action", "")
        self._hold(visit, site)
        if name not in AT_SITE:
            raise Unreadable(f"{name[:40]!r} cannot be done here.", f"One of {', '.join(AT_SITE)}.")
        return self._act(visit, name, task=visit.given("task"), sites=(site,))

    def answer(self, visit: Visit) -> Response:
        """Approve or reject what somebody else asked for."""
        self._hold(visit, "")
        name = visit.form.get("action", "")
        if name not in ("approve", "reject"):
            raise Unreadable(f"{name[:40]!r} is no answer.", "approve, or reject.")
        return self._act(visit, name, task=visit.form.get("task"), version=visit.version)

    def assess(self, visit: Visit) -> Response:
        """Write what a reader says of an answer."""
        row = self._books.find(visit.given("number"))
        self._hold(visit, row["site"])
        self.sessions.admit(visit.whose, TRUTH_SCOPE)
        verdict, truth = visit.form.get("verdict", ""), visit.form.get("truth", "")
        if verdict not in (Judged.ACCEPTED, Judged.REJECTED, Judged.CORRECTED):
            raise Unreadable(f"{verdict[:40]!r} is no assessment.", "accepted, rejected or corrected.")
        if verdict == Judged.CORRECTED and truth not in ("0", "1") and self._books.has_truth(row):
            raise WrongLabel("What is right instead?", "Choose the truth, then correct.")
        self._spend(row["site"])
        told = Judgement(row["id"], Judged(verdict), int(truth) if truth in ("0", "1") else None,
                         visit.form.get("reason", ""), visit.whose.who, "console")  # fmt: skip
        self._books.door.keep(row["site"], [told])
        return self._done(visit, f"Your assessment was written: {verdict}.")

    def login(self, visit: Visit) -> Response:
        """Ask who is there; a link is not spent by being looked at."""
        warm()
        asked, who = visit.request.query_params, ""
        code = asked.get("code", "")
        try:
            who = self.sessions.read_link(code)["who"] if code else ""
        except NotAuthenticated as error:
            visit.problem, code = error, ""
        then = visit.form.get("next") or asked.get("next", "")
        shown = self._show("login", visit, code=code, who=who, next=doors.next_page(then))
        shown.status_code = 401 if visit.problem else 200
        return shown

    def enter(self, visit: Visit) -> Response:
        """Begin a session, by a link or a token."""
        code, token = visit.form.get("code", ""), visit.form.get("token", "")
        guesses = not (code and self.sessions.made_here(code))
        if guesses:
            self._tries.check(visit.network)
        try:
            found = self.sessions.begin_by_link(code) if code else self.sessions.begin_by_token(token)
            self.sessions.admit(found)
        except FormularyError:
            if guesses:
                self._tries.note(visit.network)
            self._credentials.note(Login("", "", Entry.NOT_BELIEVED, visit.network))
            raise
        self._credentials.note(Login(found.who, found.site, Entry.ADMITTED, visit.network))
        response = RedirectResponse(doors.next_page(visit.form.get("next", "")), 303)
        response.set_cookie(COOKIE, self.sessions.cookie(found), path=HOME, httponly=True, samesite="strict",
                            secure=visit.request.url.scheme == "https")  # fmt: skip
        return response

    def leave(self, visit: Visit) -> Response:
        """End the session."""
        self.sessions.close(visit.whose)
        response = RedirectResponse(f"{HOME}/login", 303)
        response.delete_cookie(COOKIE, path=HOME)
        return response

    def _act(self, visit: Visit, name: str, **given: Any) -> Response:
        """Do one of the registry's actions as the person of the session, as the command line would."""
        action = ACTIONS[name]
        if visit.form.get("sure") != "yes":
            raise Unreadable("Nobody confirmed it.", "Tick the box beside the button.")
        try:
            asked = action.arguments.model_validate(given | {"because": visit.form.get("because", "")})
        except ValidationError as error:
            raise Unreadable(
                f"{name}: {explain(error, action.arguments)}.", "Say why, in a sentence."
            ) from error
        signer = self.sessions.signer(visit.whose, action.scope)
        acting = Acting(self._places, self._ledger, signer, visit.form.get("because", ""))
        return self._done(visit, str(perform(action, acting, asked)["told"]))

    def _done(self, visit: Visit, told: str) -> Response:
        self.sessions.leave(visit.whose, told)
        return RedirectResponse(visit.request.url.path, 303)

    def _draw(self, visit: Visit) -> str | None:
        self._hold(visit, "")
        return self._cards.find(self._books.ledger, visit.given("task"), visit.version)

    def _hold(self, visit: Visit, site: str) -> None:
        """Hold a person whose token names a site to that site.

        Raises:
            Forbidden: it is another one, or a page of the whole network.
        """
        if visit.site and visit.site != site:
            raise Forbidden(f"You see {visit.site} alone.", "Ask with a token that names no site.")

    def _show_problem(self, visit: Visit, status: int) -> Response:
        shown = self._show("problem", visit)
        shown.status_code = status
        return shown

    def _show(self, name: str, visit: Visit, **told: Any) -> Response:
        session: Session | None = visit.session
        refreshes = "hx-request" in visit.request.headers
        general = {
            "me": session, "stamp": self.sessions.stamp(session) if session else "",
            "note": self.sessions.take(session) if session and not refreshes else "",
            "theme": visit.request.cookies.get("formulary-theme", ""), "neighbours": self._near.find(),
            "path": visit.request.url.path, "guarded": self._credentials.on,
            "form": visit.form, "problem": visit.problem,
            "watched": self._books.watched() if session else "",
        }  # fmt: skip
        return HTMLResponse(render(name, **general | told))


@cache
def warm() -> None:
    """Import what the first pages need, while somebody reads the login: once, beside it."""

    def load() -> None:
        import pyarrow.dataset  # noqa: F401
        import scipy.special  # noqa: F401

        open_templates().get_template("site.html")

    threading.Thread(target=load, daemon=True).start()


async def static(request: Request) -> Response:
    """A style, a script or a licence."""
    path = doors.read_static(HERE / "static", request.path_params["name"])
    if path is None:
        return doors.finish(Response("no such file\n", 404))
    return doors.finish(FileResponse(path, headers={"Cache-Control": "no-cache"}))
