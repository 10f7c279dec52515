"""The HTTP routes, and the path of a request: guard, decode, engine, findings, journal, answer."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from imaging.config import Places, read_sites
from imaging.errors import FormularyError, NotReady
from imaging.reading import decode
from imaging.vocabulary import ContentType, Modality
from monitoring import telemetry
from monitoring.journal import Prediction, commit_in_groups, open_journal, pseudonym
from registry.engines import Answers
from services import guard
from services.findings import NOTICE, Taken, draw_heat, encode, find, take
from services.guard import answer_http, answer_problem, answer_unexpected, name_problem, request_id
from services.registry_routes import make_routes
from services.schemas import describe_api
from services.slots import Served, Slots

TEMPLATES = Path(__file__).parent / "templates"


class Stopwatch:
    """Milliseconds of each stage of one request."""

    def __init__(self) -> None:
        self.stages_ms: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, stage: str) -> None:
        """The time since the last stage ended belongs to this one."""
        now = time.perf_counter()
        self.stages_ms[stage] = round(1000 * (now - self._last), 3)
        self._last = now


class Routes:
    """The application: what it holds is opened at start and drained at the end.

    Args:
        places: where everything lies.
        slots: what answers where.
    """

    def __init__(self, places: Places, slots: Slots) -> None:
        self._places, self._slots = places, slots
        self._sites = read_sites(places)
        self._journal = open_journal(places.var)
        self._commits = commit_in_groups(self._journal)
        self._decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")
        self._draining = False

    def build(self) -> Starlette:
        """The ASGI application; every path that is not listed is a 404 problem."""
        routes = [
            Route("/", lambda _: RedirectResponse("/docs")),
            Route("/v1/models/{task}/predict", self.predict, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/livez", lambda _: Response("alive\n", media_type="text/plain"), methods=["GET"]),
            Route("/readyz", self.ready, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
            Route("/docs", self.docs, methods=["GET"]),
            *make_routes(self._places),
        ]
        handlers: Any = {
            FormularyError: answer_problem,
            HTTPException: answer_http,
            Exception: answer_unexpected,
        }
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._live)

    async def predict(self, request: Request) -> Response:
        """Answer one image; its row is in the journal, durably, before the 200 leaves."""
        task, place = request.path_params["task"], "other"
        try:
            site = place = guard.read_site(request, self._sites)
            answer = await self._predict(request, task, site)
        except FormularyError as error:
            known = task if task in self._slots.tasks else "other"
            telemetry.REQUESTS.labels(known, place, name_problem(error)).inc()
            raise
        telemetry.REQUESTS.labels(task, site, "answered").inc()
        return answer

    async def _predict(self, request: Request, task: str, site: str) -> Response:
        if self._draining:
            raise NotReady("The service is stopping.", "Ask again in a few seconds.")
        served = self._slots.find(task, site)
        content_type, wants_heat = guard.read_content_type(request), guard.read_flag(request, "heat")
        watch = Stopwatch()
        body = await guard.read_body(request)
        watch.stop("read")
        loop = asyncio.get_running_loop()
        taken = await loop.run_in_executor(self._decoders, take, body, content_type, served.contract)
        watch.stop("decode")
        answers = await asyncio.wrap_future(served.batches.submit(taken.prepared))
        watch.stop("engine")
        found = await loop.run_in_executor(self._decoders, find, taken, answers, served.contract)
        watch.stop("findings")
        row = self._row(request, (served, site), (body, taken), found.columns)
        row.stages_ms.update(watch.stages_ms)
        await asyncio.wrap_future(self._commits.submit(row))
        watch.stop("journal")
        heat = await self._heat(served, answers) if wants_heat else {}
        return _answer(request, row, {**found.answer, **heat}, watch)

    async def _heat(self, served: Served, answers: Answers) -> dict[str, Any]:
        """The heat map where its audit was passed; else why it is withheld."""
        if served.heat_withheld:
            return {"heat": None, "heat_withheld": served.heat_withheld}
        loop = asyncio.get_running_loop()
        return {"heat": await loop.run_in_executor(self._decoders, draw_heat, answers)}

    def _row(
        self,
        request: Request,
        where: tuple[Served, str],
        asked: tuple[bytes, Taken],
        columns: dict[str, float],
    ) -> Prediction:
        served, site = where
        body, taken = asked
        subject = request.headers.get("x-subject") or taken.image.subject
        return Prediction(
            id=str(uuid.uuid4()), request_id=request_id(request), task=served.contract.task, site=site,
            version=served.version, package=served.digest, engine=served.engine,
            subject=pseudonym(self._places.var, site, subject[:256]) if subject else None,
            image=hashlib.sha256(body).hexdigest(), columns=columns, stages_ms={},
        )  # fmt: skip

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
        if self._draining:
            raise NotReady("The service is stopping.", "Ask another one.")
        if not self._slots.table:
            raise NotReady(
                "No approved version is loaded.", "Promote and approve one: `formulary registry promote`."
            )
        return Response("ready\n", media_type="text/plain")

    async def metrics(self, _: Request) -> Response:
        """Prometheus' scrape."""
        serving = {place: served.version for place, served in self._slots.table.items()}
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
        yield
        self._draining = True
        await asyncio.to_thread(self._slots.stop)
        await asyncio.to_thread(self._commits.close)
        self._decoders.shutdown()


def _answer(request: Request, row: Prediction, answer: dict[str, Any], watch: Stopwatch) -> Response:
    for stage, spent in watch.stages_ms.items():
        telemetry.STAGE.labels(row.task, stage).observe(spent / 1000)
    told = {
        "id": row.id, "request_id": row.request_id, "task": row.task, "model": row.task,
        "version": row.version, "package": row.package, "engine": row.engine, "site": row.site,
        **answer, "notice": NOTICE,
    }  # fmt: skip
    response = _json(told, request)
    response.headers["Server-Timing"] = ", ".join(
        f"{name};dur={spent}" for name, spent in watch.stages_ms.items()
    )
    return response


def _warm_readers() -> None:
    """Read one file of each kind: the first DICOM object would wait for its library otherwise."""
    pixels = np.zeros((8, 8), np.uint16)
    for kind in ContentType:
        decode(encode(pixels, kind, 1.0, Modality.MR), kind)


def _json(value: Any, request: Request) -> Response:
    headers = {"X-Request-ID": request_id(request)}
    return Response(orjson.dumps(value), headers=headers, media_type="application/json")
