"""The path of a request: guard, decode, engine, findings, journal, answer. Below any framework, for speed.

Three threads work on it: the event loop reads and decodes what is quick to decode, an engine's thread runs
batches, one thread finds and journals whatever the engines answered meanwhile. A batch wakes the loop once.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import orjson
from starlette.types import Receive, Scope, Send

from imaging.config import Places, Sites
from imaging.errors import FormularyError, NotAcceptable, NotReady, Overloaded
from imaging.greedy import GreedyWorker
from imaging.vocabulary import ContentType, Kind
from monitoring import telemetry
from monitoring.journal import Journal, Prediction, pseudonym
from services import guard
from services.findings import NOTICE, Found, Taken, draw_heat, find, take, write_mask
from services.problems import Reply, name_problem, tell
from services.runner import Ran, Waiting
from services.served import Served
from services.slots import Slots

GROUP = 256
HELD_BYTES = 512 * 2**20
QUICK_BYTES = 2**18  # an .npy below this is decoded sooner than another thread would take it up
FORMS = {
    "": "", "*/*": "", "application/*": "", "application/json": "", "application/json;mask=rle": "rle",
    "image/png": "png", "application/x-nifti": "nifti",
}  # fmt: skip
MEDIA_TYPES = {"png": "image/png", "nifti": "application/x-nifti"}


@dataclass(slots=True, eq=False)
class Case:
    """One request on its way; the threads hand it on and fill it in.

    Attributes:
        asked: task, site and number of the request.
        served: the version that answers, from the first look to the last.
        deadline: `time.monotonic` until which an answer is wanted.
        form: of the mask.
        wants_heat: whether the heat map is asked for.
        done: resolves in the event loop when `row` is durable, or `error` is set.
    """

    asked: tuple[str, str, str]
    served: Served
    deadline: float
    form: str
    wants_heat: bool
    done: asyncio.Future[None]
    headers: guard.Headers
    taken: Taken = field(init=False)
    image: str = ""
    ran: Ran = field(init=False)
    found: Found | None = None
    heat: dict[str, Any] = field(default_factory=dict)
    row: Prediction | None = None
    error: Exception | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def stop(self, stage: str) -> None:
        """The time since the last stage ended belongs to this one."""
        now = time.perf_counter()
        self.stages_ms[stage] = round(1000 * (now - self.last), 3)
        self.last = now


class Predictor:
    """`POST /v1/models/{task}/predict` as an ASGI application.

    Args:
        places: for the sites' keys of pseudonyms.
        sites: of the checkout.
        slots: what answers where.
        journal: takes a row of every answer before it leaves.
        site_of: who asks: headers and the client's address -> site.
    """

    def __init__(
        self,
        places: Places,
        sites: Sites,
        slots: Slots,
        journal: Journal,
        site_of: Callable[[guard.Headers, str], str],
    ) -> None:
        self._places, self._slots, self._journal, self._site_of = places, slots, journal, site_of
        self.quotas = guard.Quotas(sites)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="decode")
        self._finisher: GreedyWorker[Case, None] = GreedyWorker("answers", self._finish, GROUP)
        self._held = 0
        self.draining = self.stopping = False
        self.after: Callable[[Case], None] | None = None

    def close(self) -> None:
        """Journal and answer what is on its way, then stop."""
        self._finisher.close()
        self._pool.shutdown()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one image; its row is in the journal, durably, before the 200 leaves."""
        headers, task, place = guard.read_headers(scope), scope["path"].split("/")[3], "other"
        number, case = guard.read_request_id(headers), None
        try:
            place = self._site_of(headers, (scope["client"] or ("",))[0])
            case = self._open((task, place, number), headers, scope["query_string"])
            await self._run(case, receive)
            reply = self._reply(case)
            outcome = "answered"
        except FormularyError as error:
            reply, outcome = tell(error, number), name_problem(error)
        except Exception as error:  # told by its type and place alone
            reply, outcome = tell(error, number), "internal"
        known = task if task in self._slots.tasks else "other"
        telemetry.REQUESTS.labels(known, place, outcome).inc()
        if self.draining:  # whoever keeps the connection would lose what it sends when we end
            reply.headers["connection"] = "close"
        await reply.send(send)
        if self.after and case and reply.status == 200:
            self.after(case)

    def _open(self, asked: tuple[str, str, str], headers: guard.Headers, query: bytes) -> Case:
        """What is asked, checked as far as it can be before the body is read."""
        task, site, _ = asked
        if self.stopping:
            raise NotReady("The service is stopping.", "Ask again in a few seconds.")
        study = headers.get(b"x-study") or headers.get(b"x-subject")
        served = self._slots.find(task, site, study.decode("latin-1") if study else None)
        guard.read_content_type(headers)
        deadline, form, wants_heat = guard.read_deadline(headers), _read_form(headers), guard.read_heat(query)
        if form in MEDIA_TYPES and served.contract.kind is not Kind.SEGMENTATION:
            raise NotAcceptable(f"{task} answers no mask.", "Accept application/json.")
        self.quotas.spend(site)
        _admit(served, deadline)
        done = asyncio.get_running_loop().create_future()
        return Case(asked, served, deadline, form, wants_heat, done, headers)

    async def _run(self, case: Case, receive: Receive) -> None:
        held = 0

        def hold(size: int) -> None:  # of what came: who only announces a body keeps nobody else out
            nonlocal held
            held += size
            self._held += size
            if self._held > HELD_BYTES:
                raise Overloaded("Too many bodies are on their way.", "Ask again in a second.")

        try:
            body = await guard.read_body(receive, case.headers, hold=hold)
        finally:
            self._held -= held
        case.stop("read")
        runner = case.served.runner
        runner.pending += 1
        try:
            await self._take(case, body)
            case.stop("decode")
            runner.put(Waiting(case.taken.prepared, case.deadline), lambda *ran: self._ran(case, *ran))
            await case.done
        finally:
            runner.pending -= 1
        case.stop("journal")
        if case.error:
            raise case.error

    async def _take(self, case: Case, body: bytes) -> None:
        """Decode in the loop what is quick, in a thread what is not."""
        kind = guard.read_content_type(case.headers)
        case.image = hashlib.sha256(body).hexdigest()
        if kind == ContentType.NPY and len(body) < QUICK_BYTES:
            case.taken = take(body, kind, case.served.contract)
            return
        loop = asyncio.get_running_loop()
        case.taken = await loop.run_in_executor(self._pool, take, body, kind, case.served.contract)

    def _ran(self, case: Case, ran: Ran | None, error: Exception | None) -> None:
        """In an engine's thread: hand on; what draws or encodes images goes by way of the pool."""
        case.stop("engine")
        if ran is None:
            case.error = error
            return self._finisher.put(case, _settled)
        case.ran = ran
        if case.wants_heat or case.served.contract.kind is Kind.SEGMENTATION:
            self._pool.submit(self._find, case)
        else:
            self._finisher.put(case, _settled)
        return None

    def _find(self, case: Case) -> None:
        try:
            self._read(case)
            withheld = case.served.heat_withheld
            if case.wants_heat:
                case.heat = {"heat": None, "heat_withheld": withheld} if withheld else {
                    "heat": draw_heat(case.ran.answers)}  # fmt: skip
        except Exception as error:  # belongs to the one who waits
            case.error = error
        self._finisher.put(case, _settled)

    def _read(self, case: Case) -> None:
        case.found = case.found or find(case.taken, case.ran.answers, case.served.contract)
        case.stop("findings")
        case.row = self._row(case, case.found, case.ran)

    def _finish(self, cases: list[Case]) -> list[None]:
        """Findings of what has none yet, one commit for all, and one word to the event loop."""
        for case in cases:
            try:
                if not case.error and not case.row:
                    self._read(case)
            except Exception as error:  # belongs to the one who waits
                case.error = error
        good = [case for case in cases if not case.error]
        try:
            if good:
                self._journal.append([case.row for case in good if case.row])
        except Exception as error:  # nobody is answered without a row
            for case in good:
                case.error = error
        cases[0].done.get_loop().call_soon_threadsafe(_resolve, cases)
        return [None] * len(cases)

    def _row(self, case: Case, found: Found, ran: Ran) -> Prediction:
        (task, site, number), served = case.asked, case.served
        told = case.headers.get(b"x-subject", b"").decode("latin-1")
        subject = told or case.taken.image.subject
        return Prediction(
            id=str(uuid.uuid4()), request_id=number, task=task, site=site,
            version=served.version, package=served.digest, engine=served.engine,
            subject=pseudonym(self._places.var, site, subject[:256]) if subject else None,
            image=case.image, columns=found.columns, stages_ms=dict(case.stages_ms),
            answer=found.digest(), batch=ran.batch,
        )  # fmt: skip

    def _reply(self, case: Case) -> Reply:
        row, found = cast("Prediction", case.row), cast("Found", case.found)
        for stage, spent in case.stages_ms.items():
            telemetry.STAGE.labels(row.task, stage).observe(spent / 1000)
        timing = ", ".join(f"{name};dur={spent}" for name, spent in case.stages_ms.items())
        headers = {"x-request-id": row.request_id, "server-timing": timing}
        told = {
            "id": row.id, "request_id": row.request_id, "task": row.task, "model": row.task,
            "version": row.version, "package": row.package, "engine": row.engine, "site": row.site,
        }  # fmt: skip
        if case.form not in MEDIA_TYPES or found.labels is None:
            answer = {**told, **found.show(case.form), **case.heat, "notice": NOTICE}
            return Reply(200, orjson.dumps(answer), "application/json", headers)
        body = write_mask(found.labels, case.form, case.taken.image.spacing_mm)
        headers["x-answer"] = orjson.dumps({**told, **found.answer, "notice": NOTICE}).decode()
        return Reply(200, body, MEDIA_TYPES[case.form], headers)


def _admit(served: Served, deadline: float) -> None:
    """Refuse at once what could not be answered in time, before its body is read."""
    wait_s, runner = served.runner.wait_s(), served.runner
    if runner.pending >= runner.most_pending or wait_s > deadline - time.monotonic():
        fact = f"{runner.pending} images wait for {served.contract.task}; an answer takes {wait_s:.2f} s now."
        raise Overloaded(fact, "Ask again later, or more slowly.", retry_s=wait_s)


def _read_form(headers: guard.Headers) -> str:
    accept = headers.get(b"accept", b"").decode("latin-1").replace(" ", "").lower()
    for wanted in accept.split(","):
        if (name := wanted.split(";q=")[0]) in FORMS:
            return FORMS[name]
    raise NotAcceptable(f"No answer comes as {accept[:60]!r}.", f"Accept {', '.join(list(FORMS)[3:])}.")


def _settled(*_: object) -> None:
    """`_finish` has told everybody itself."""


def _resolve(cases: list[Case]) -> None:
    for case in cases:
        if not case.done.done():
            case.done.set_result(None)
