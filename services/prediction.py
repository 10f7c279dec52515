"""The path of a request: guard, decode, engine, findings, journal, answer. Below any framework, for speed.

Three threads work on it: the event loop reads and decodes what is quick to decode, an engine's thread runs
batches, one thread finds and journals whatever the engines answered meanwhile. A batch wakes the loop once.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import cast

import orjson
from starlette.types import Receive, Scope, Send

from imaging.config import Places, Sites
from imaging.errors import FormularyError, NotFinite, NotReady, Overloaded
from imaging.greedy import GreedyWorker
from imaging.vocabulary import ContentType, Kind
from monitoring import telemetry
from monitoring.journal import Journal, Prediction, pseudonym
from monitoring.refusals import Refusals
from services import guard
from services.case import Case
from services.findings import NOTICE, Found, draw_heat, find, take, write_mask
from services.pixels import KeptPixels
from services.problems import Reply, name_problem, tell
from services.runner import Ran, Waiting
from services.served import Served
from services.slots import Slots

GROUP = 256
HELD_BYTES = 512 * 2**20
QUICK_BYTES = 2**18  # an .npy below this is decoded sooner than another thread would take it up


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
        self.quotas, self.refusals = guard.Quotas(sites), Refusals(places.var)
        self.pixels = KeptPixels(places)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="decode")
        self._drawers = ThreadPoolExecutor(2, thread_name_prefix="draw")
        self._finisher: GreedyWorker[Case, None] = GreedyWorker("answers", self._finish, GROUP)
        self._held = 0
        self.draining = self.stopping = False
        self.after: Callable[[Case], None] | None = None

    def close(self) -> None:
        """Journal and answer what is on its way, then stop."""
        self._drawers.shutdown()
        self._finisher.close()
        self._pool.shutdown()
        self.refusals.close()
        self.pixels.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one image; its row is in the journal, durably, before the 200 leaves."""
        headers, task, place = guard.read_headers(scope), scope["path"].split("/")[3], "other"
        number, case = guard.read_request_id(headers), None
        try:
            place = self._site_of(headers, (scope["client"] or ("",))[0])
            case = self._open((task, place, number), headers, scope["query_string"])
            await self._run(case, receive)
            self.pixels.keep(case)
            reply = self._reply(case)
            outcome = "answered"
        except FormularyError as error:
            reply, outcome = tell(error, number), name_problem(error)
        except Exception as error:  # told by its type and place alone
            reply, outcome = tell(error, number), "internal"
        finally:
            self.pixels.release(case)
        known = task if task in self._slots.tasks else "other"
        telemetry.REQUESTS.labels(known, place, outcome).inc()
        if outcome != "answered":
            self.refusals.count(known, place, outcome)
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
        deadline, wants_heat = guard.read_deadline(headers), guard.read_heat(query)
        form = guard.read_form(headers, served.contract)
        self.quotas.spend(site)
        _admit(served, deadline)
        done = asyncio.get_running_loop().create_future()
        return Case(asked, served, deadline, form, wants_heat, done, headers)

    async def _run(self, case: Case, receive: Receive) -> None:
        runner = case.served.runner
        with self._holding() as hold:
            body = await guard.read_body(receive, case.headers, hold=hold)
            case.stop("read")
            _admit(case.served, case.deadline)  # others came while the body did
            runner.pending += 1
            try:
                await self._take(case, body)
            except BaseException:
                runner.pending -= 1
                raise
        case.stop("decode")
        try:
            runner.put(Waiting(case.taken.prepared, case.deadline), lambda *ran: self._ran(case, *ran))
            await case.done
        finally:
            runner.pending -= 1
        case.stop("journal")
        if case.error:
            raise case.error

    @contextmanager
    def _holding(self) -> Iterator[Callable[[int], None]]:
        """Counts the bytes of a body until it is decoded; a body that is only announced keeps nobody out."""
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            held += size
            self._held += size
            if self._held > HELD_BYTES:
                raise Overloaded("Too many bodies are on their way.", "Ask again in a second.")

        try:
            yield hold
        finally:
            self._held -= held

    async def _take(self, case: Case, body: bytes) -> None:
        """Decode in the loop what is quick, in a thread what is not."""
        kind = guard.read_content_type(case.headers)
        case.image = hashlib.sha256(body).hexdigest()
        self.pixels.hold(case, kind, body)
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
            self._drawers.submit(self._find, case)
        else:
            self._finisher.put(case, _settled)
        return None

    def _find(self, case: Case) -> None:
        try:
            found, withheld = self._read(case), case.served.heat_withheld
            if case.form in guard.MEDIA_TYPES and found.labels is not None:
                case.mask = write_mask(found.labels, case.form, case.taken.image.spacing_mm)
            else:
                case.shown = found.show(case.form)
            if case.wants_heat:
                case.heat = {"heat": None, "heat_withheld": withheld} if withheld else {
                    "heat": draw_heat(case.ran.answers)}  # fmt: skip
        except Exception as error:  # belongs to the one who waits
            case.error = error
        self._finisher.put(case, _settled)

    def _read(self, case: Case) -> Found:
        served = case.served
        found = find(case.taken, case.ran.answers, served.contract, served.projection, served.profile)
        case.found = found
        if not all(map(math.isfinite, found.columns.values())):
            raise NotFinite("The image's statistics are not finite.", "Send pixels of a usual size.")
        case.stop("findings")
        case.shown, case.row = found.answer, self._row(case, found, case.ran)
        return found

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
            answer=found.digest(), batch=ran.batch, acquisition=case.taken.image.acquisition,
        )  # fmt: skip

    def _reply(self, case: Case) -> Reply:
        row, found = cast("Prediction", case.row), cast("Found", case.found)
        for stage, spent in case.stages_ms.items():
            telemetry.STAGE.labels(row.task, stage).observe(spent / 1000)
        telemetry.ANSWER.labels(row.task).observe(sum(case.stages_ms.values()) / 1000)
        if row.columns.get("abstained"):
            telemetry.ABSTENTIONS.labels(row.task, row.site).inc()
        timing = ", ".join(f"{name};dur={spent}" for name, spent in case.stages_ms.items())
        headers = {"x-request-id": row.request_id, "server-timing": timing}
        told = {
            "id": row.id, "request_id": row.request_id, "task": row.task, "model": row.task,
            "version": row.version, "package": row.package, "engine": row.engine, "site": row.site,
        }  # fmt: skip
        if case.mask is None:
            answer = {**told, **case.shown, **case.heat, "notice": NOTICE}
            return Reply(200, orjson.dumps(answer), "application/json", headers)
        headers["x-answer"] = orjson.dumps({**told, **found.answer, "notice": NOTICE}).decode()
        return Reply(200, case.mask, guard.MEDIA_TYPES[case.form], headers)


def _admit(served: Served, deadline: float) -> None:
    """Refuse at once what could not be answered in time, before its body is read."""
    wait_s, runner = served.runner.wait_s(), served.runner
    late = runner.pending > 0 and wait_s > deadline - time.monotonic()  # idle, the pace is a memory
    if late or runner.pending >= runner.most_pending:
        fact = f"{runner.pending} images wait for {served.contract.task}; an answer takes {wait_s:.2f} s now."
        raise Overloaded(fact, "Ask again later, or more slowly.", retry_s=wait_s)


def _settled(*_: object) -> None:
    """`_finish` has told everybody itself."""


def _resolve(cases: list[Case]) -> None:
    for case in cases:
        if not case.done.done():
            case.done.set_result(None)
