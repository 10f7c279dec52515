"""The HTTP routes. Of a prediction's path see services/prediction.py."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from imaging.config import Places, read_sites
from imaging.errors import FormularyError, NotReady
from imaging.reading import decode
from imaging.vocabulary import ContentType, Modality
from monitoring import telemetry
from monitoring.gauges import Serving
from monitoring.journal import open_journal
from services.assessments import make_assessment_routes
from services.console.pages import Console
from services.credentials import Credentials, Entrance
from services.findings import NOTICE, encode
from services.guard import request_id
from services.job_routes import make_job_routes
from services.jobs import Jobs
from services.prediction import Predictor
from services.problems import answer_error, answer_http, locate
from services.registry_routes import make_routes
from services.schemas import describe_api
from services.slots import Slots
from services.trial import Shadow

LOG = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"
DRAIN_S = 2.0


class Application(Starlette):
    """Sends predictions straight to the predictor, and everything else through the entrance to the routes."""

    predictor: Predictor
    credentials: Credentials

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and scope["method"] == "POST" and self.credentials.suffice(scope):
            parts = scope["path"].split("/")
            if len(parts) == 5 and parts[:3] == ["", "v1", "models"] and parts[4] == "predict":
                return await self.predictor(scope, receive, send)
        try:
            await super().__call__(scope, receive, send)
        except Exception as error:  # it was answered; Starlette has it raised again and quoted
            if scope["type"] != "http":
                raise
            LOG.error("a request ended: %s", locate(error))


class Routes:
    """The application: what it holds is opened at start and drained at the end.

    Args:
        places: where everything lies.
        slots: what answers where.
        required: ask for a credential though no key was made.
    """

    def __init__(self, places: Places, slots: Slots, required: bool = False) -> None:
        self._places, self._slots = places, slots
        self._sites = read_sites(places)
        self._journal = open_journal(places.var)
        self.credentials = Credentials(places, self._sites, required)
        self.predictor = Predictor(places, self._sites, slots, self._journal, self.credentials.site_of)
        self._shadow = Shadow(places, lambda: slots.tables.trials)
        self.predictor.after = self._shadow.offer
        self._jobs = Jobs(places)

    def build(self) -> Application:
        """The ASGI application; every path that is not listed is a 404 problem."""
        routes = [
            Route("/", lambda _: RedirectResponse("/docs")),
            Route("/v1/models/{task}/predict", self.predictor, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/livez", lambda _: Response("alive\n", media_type="text/plain"), methods=["GET"]),
            Route("/readyz", self.ready, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
            Route("/docs", self.docs, methods=["GET"]),
            *make_routes(self._places),
            *Console(self._places, self._journal, self.credentials, self._slots, self._spend).routes(),
            *make_job_routes(self._places, self._jobs, self._slots.find, self.credentials.site_of),
            *make_assessment_routes(self._places, self._journal, self.credentials.site_of, self._spend),
        ]
        handlers: Any = {
            FormularyError: answer_error,
            HTTPException: answer_http,
            Exception: answer_error,
        }
        entrance = Middleware(Entrance, credentials=self.credentials)
        application = Application(
            routes=routes, middleware=[entrance], exception_handlers=handlers, lifespan=self._live
        )
        application.predictor, application.credentials = self.predictor, self.credentials
        return application

    def _spend(self, site: str) -> None:
        self.predictor.quotas.spend(site)

    async def models(self, request: Request) -> Response:
        """What serves where."""
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        for (task, site), served in sorted(self._slots.table.items()):
            contract = served.contract
            row = rows.setdefault((task, served.version), {
                "task": task, "title": contract.title, "version": served.version, "package": served.digest,
                "engine": served.engine, "modality": contract.modality, "kind": contract.kind,
                "shape": contract.stored_shape, "classes": contract.classes,
                "intended_use": contract.intended_use, "simulated": contract.simulated,
                "limits": contract.limits, "sites": [],
            })  # fmt: skip
            row["sites"].append(site)
        return _json({"models": list(rows.values()), "notice": NOTICE}, request)

    async def ready(self, _: Request) -> Response:
        """Whether something can be answered."""
        if self.predictor.draining:
            raise NotReady("The service is stopping.", "Ask another one.")
        if not self._slots.table:
            why = "" if self.credentials.on else self._slots.loader.refusal  # strangers come here, too
            fix = why or "See the log, or approve a version: `formulary registry promote`."
            raise NotReady("No approved version is loaded.", fix)
        return Response("ready\n", media_type="text/plain")

    async def metrics(self, _: Request) -> Response:
        """Prometheus' scrape."""
        versions = {place: served.version for place, served in self._slots.table.items()}
        tables = self._slots.tables
        alarms = Counter((*place, str(event.body.get("part")))
                         for place, events in tables.alarms.items() for event in events)  # fmt: skip
        serving = Serving(
            versions, max(0, tables.generation), self._slots.head, frozenset(tables.stopped), alarms
        )
        text, kind = await asyncio.to_thread(telemetry.exposition, self._journal, serving)
        return Response(text, headers={"Content-Type": kind})

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI document."""
        return _json(describe_api(self._slots.tasks, tuple(self._sites.sites)), request)

    async def docs(self, _: Request) -> Response:
        """The OpenAPI document for people; needs no network."""
        from jinja2 import Environment

        document = describe_api(self._slots.tasks, tuple(self._sites.sites))
        template = Environment(autoescape=True).from_string((TEMPLATES / "docs.html").read_text())
        return HTMLResponse(template.render(api=document))

    @asynccontextmanager
    async def _live(self, _: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(self._slots.start)
        await asyncio.to_thread(_warm_readers)
        self._jobs.start()
        self.predictor.pixels.start()
        self._drain_on_stop()
        yield
        self.predictor.draining = self.predictor.stopping = True
        await asyncio.to_thread(self._jobs.stop)
        await asyncio.to_thread(self._shadow.close)
        await asyncio.to_thread(self._slots.stop)
        await asyncio.to_thread(self.predictor.close)
        self.credentials.close()

    def _drain_on_stop(self) -> None:
        """On SIGTERM tell everybody to go, for a while, and only then stop taking what comes."""
        stop = signal.getsignal(signal.SIGTERM)
        loop = asyncio.get_running_loop()
        if not callable(stop):  # nobody stops us by signal: a test, or the qualify stage
            return

        def drain(number: int, frame: FrameType | None) -> None:
            self.predictor.draining = True
            loop.call_soon_threadsafe(loop.call_later, DRAIN_S, stop, number, frame)

        signal.signal(signal.SIGTERM, drain)


def _warm_readers() -> None:
    """Read one file of each kind: the first DICOM object would wait for its library otherwise."""
    pixels = np.zeros((8, 8), np.uint16)
    for kind in ContentType:
        decode(encode(pixels, kind, 1.0, Modality.MR), kind)


def _json(value: Any, request: Request) -> Response:
    headers = {"X-Request-ID": request_id(request)}
    return Response(orjson.dumps(value), headers=headers, media_type="application/json")
