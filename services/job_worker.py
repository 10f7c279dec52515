"""The process that does the jobs: `python -m services.job_worker`, started by the gateway, at low priority.

It works on several jobs by turns: each is a generator that yields images and is sent their logits, and what
jobs of one package yield goes to the engine as one batch. A job whose worker died is tried once more, alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import Places, read_places
from imaging.errors import FormularyError, JournalDown, NotApproved, Suspended
from imaging.terminal import configure_logs
from imaging.vocabulary import JobState, Statement
from monitoring.journal import Prediction, open_journal
from registry.engines import check_answers, check_parity, open_engine
from registry.evidence import verify_package
from registry.ledger import open_ledger
from registry.package import read_contract, shelf
from registry.qualified import choose_engine
from services.jobs import Job, JobStore, write_whole
from services.problems import locate, name_problem
from services.products import Made, Opened, make
from services.served import read_profile, read_withheld
from services.volumes import Step

LOG = logging.getLogger(__name__)
ATTEMPTS = 2
ACTIVE = 4
SHARED_BYTES = 8 * 2**20  # of a job's body; what is larger has the worker for itself
TOLD_S = 1.0
LOOK_S = 0.25
IDLE_S = 300.0  # without work the process ends, and its memory with it
PACKAGES = 2
NICE = 10


@dataclass
class Active:
    """A job on its way: `waits` is what it wants to have answered."""

    job: Job
    opened: Opened
    work: Generator[Step, NDArray[np.float32], Made]
    waits: Step
    began: float = field(default_factory=time.monotonic)
    told: float = 0.0


class JobWorker:
    """Takes jobs, oldest first, until it is told to stop or there was nothing to do for a while.

    Args:
        places: where everything lies.
        stopping: set from outside.
    """

    def __init__(self, places: Places, stopping: threading.Event) -> None:
        self._places, self._store, self._stopping = places, JobStore(places.var), stopping
        self._journal, self._ledger = open_journal(places.var), open_ledger(places.var)
        self._open = functools.lru_cache(PACKAGES)(self._open_package)
        self._active: list[Active] = []
        self._writer = ThreadPoolExecutor(1)  # started before `NICE`: see docs/services.md
        self._writer.submit(int).result()

    def run(self, parent: int) -> None:
        """Work while the parent lives."""
        idle = time.monotonic()
        while not self._stopping.is_set() and os.getppid() == parent and time.monotonic() - idle < IDLE_S:
            self._admit()
            if self._active:
                self._turn()
                idle = time.monotonic()
            else:
                self._stopping.wait(LOOK_S)
        for active in self._active:  # what stopped us was not this job: the attempt does not count
            self._end(active.job, JobState.QUEUED, attempts=active.job.attempts - 1)

    def _admit(self) -> None:
        """Begin what waits, as much as may be done at the same time."""
        mine = {active.job.id for active in self._active}
        for job in self._store.waiting():
            if job.id in mine or self._give_up(job):
                continue
            if not self._fits(job):
                break  # nobody overtakes
            self._begin(job)

    def _give_up(self, job: Job) -> bool:
        """End a job that nobody wants any more, or that ended its worker too often."""
        if self._cancelled(job):
            self._end(job, JobState.CANCELLED)
        elif job.attempts >= ATTEMPTS:
            problem = {"type": "/problems/internal", "title": "A fault of the service",
                       "detail": f"The worker ended {ATTEMPTS} times while it did this job."}  # fmt: skip
            self._end(job, JobState.FAILED, problem=problem)
        return self._cancelled(job) or job.attempts >= ATTEMPTS

    def _fits(self, job: Job) -> bool:
        """Whether this job and those that are active may share the worker; what ended one before may not."""
        jobs = [active.job for active in self._active]
        if not jobs:
            return True
        sizes = [(self._store.place(one.id) / "body").stat().st_size for one in [job, *jobs]]
        untried = job.attempts == 0 and all(one.attempts == 1 for one in jobs)
        return untried and len(jobs) < ACTIVE and max(sizes) <= SHARED_BYTES

    def _begin(self, job: Job) -> None:
        job = job.model_copy(update={"state": JobState.RUNNING, "attempts": job.attempts + 1})
        if not self._insist(job, lambda: self._store.write(job)):
            return
        try:
            opened = self._find(job)
            work = make(job, self._store.place(job.id) / "body", opened)
            active = Active(job, opened, work, next(work))
        except StopIteration as done:
            self._finish(job, opened, done.value)
        except Exception as error:
            self._fail(job, error)
        else:
            self._active.append(active)

    def _find(self, job: Job) -> Opened:
        """The package that serves the job's site now."""
        state = self._ledger.state(job.task)
        if stop := state.stopped(job.site):
            raise Suspended(f"{job.task} is suspended at {job.site}: {stop.body['because']}.", "Ask there.")
        placement = state.champions().get(job.site)
        if placement is None:
            raise NotApproved(f"No version of {job.task} is approved for {job.site} any more.", "Ask again.")
        return self._open(placement.version, placement.digest)

    def _open_package(self, version: int, digest: str) -> Opened:
        folder = shelf(self._places.var, digest)
        told = verify_package(folder, self._ledger).statements
        contract = read_contract(folder)
        asked = os.environ.get("FORMULARY_ENGINE", "") if read_profile() == "cpu" else ""
        asked = os.environ.get("FORMULARY_JOB_ENGINE", asked)
        name = choose_engine(self._places.var, contract, told.get(Statement.QUALIFICATION, {}), asked)
        kind, _, precision = name.partition("/")
        engine = open_engine(folder, kind, precision, int(os.environ.get("OMP_NUM_THREADS", "1")))
        check_parity(engine, folder, contract)
        return Opened(
            version, digest, folder, contract, engine, read_withheld(told.get(Statement.EVALUATION, {}))
        )

    def _turn(self) -> None:
        """One batch: of the job that waits longest, and of others with the same package."""
        first = self._active[0]
        batch, count = [first], len(first.waits.images)
        for other in self._active[1:]:
            fits = count + len(other.waits.images) <= first.opened.contract.max_batch
            if fits and other.opened.digest == first.opened.digest:
                batch.append(other)
                count += len(other.waits.images)
        for active, logits in zip(batch, self._answer(batch), strict=True):
            self._active.remove(active)
            self._advance(active, logits)

    def _answer(self, batch: Sequence[Active]) -> list[NDArray[np.float32] | Exception]:
        """Logits of each job's images; where the whole batch fails, each job stands for itself."""
        images = np.concatenate([active.waits.images for active in batch])
        if not len(images):
            return [np.zeros(0, np.float32)] * len(batch)
        contract = batch[0].opened.contract
        try:
            answers = batch[0].opened.engine.run(images)
            check_answers(answers, contract, len(images))
        except Exception as error:
            if len(batch) > 1:
                return [self._answer([active])[0] for active in batch]
            return [error]
        edges = np.cumsum([len(active.waits.images) for active in batch])[:-1]
        return list(np.split(answers.logits, edges))

    def _advance(self, active: Active, logits: NDArray[np.float32] | Exception) -> None:
        """Let a job go on to its next images, to its end, or to its failure."""
        job = active.job
        if self._cancelled(job):
            self._end(job, JobState.CANCELLED)
            return
        try:
            if isinstance(logits, Exception):
                raise logits
            active.waits = active.work.send(logits)
        except StopIteration as done:
            self._finish(job, active.opened, done.value, time.monotonic() - active.began)
        except Exception as error:
            self._fail(job, error)
        else:
            self._active.append(active)
            if time.monotonic() - active.told > TOLD_S:
                active.told = time.monotonic()
                active.job = job.model_copy(update={"progress": round(active.waits.progress, 3)})
                with contextlib.suppress(OSError):
                    self._store.write(active.job)

    def _finish(self, job: Job, opened: Opened, made: Made, spent_s: float = 0.0) -> None:
        """Files, then the journal's row, then `done`: after a crash in between, the row is not repeated."""
        row = Prediction(
            id=job.id, request_id=job.request_id, task=f"{job.task}/{job.kind}s", site=job.site,
            version=opened.version, package=opened.digest, engine=opened.engine.name, subject=job.subject,
            image=job.image, columns=made.columns, stages_ms={"job": round(1000 * spent_s, 1)},
            answer=made.digest(),
        )  # fmt: skip

        def keep() -> None:
            for name, body in made.files.items():
                write_whole(self._store.place(job.id) / name, body)
            if self._journal.find(job.id) is None:
                self._writer.submit(self._journal.append, [row]).result()

        if not self._insist(job, keep):
            self._end(job, JobState.QUEUED, attempts=job.attempts - 1)
            return
        told = {"version": opened.version, "package": opened.digest, "engine": opened.engine.name}
        self._end(job, JobState.DONE, made=told, outcome=made.outcome, progress=1.0)

    def _fail(self, job: Job, error: Exception) -> None:
        if isinstance(error, FormularyError):
            problem = {"type": f"/problems/{name_problem(error)}", "title": error.title, "detail": str(error)}
        else:  # its own words may quote what was sent
            LOG.error("job %s failed: %s", job.id, locate(error))
            detail = "It was logged. Try again, or report the job's id."
            problem = {"type": "/problems/internal", "title": "A fault of the service", "detail": detail}
        self._end(job, JobState.FAILED, problem=problem)

    def _end(self, job: Job, state: JobState, **told: Any) -> None:
        ended = job.model_copy(update={"state": state, **told})
        self._insist(job, lambda: self._store.write(ended))

    def _insist(self, job: Job, work: Callable[[], None]) -> bool:
        """Write until there is room, or nobody waits for it any more: then False."""
        while True:
            try:
                work()
                return True
            except (JournalDown, OSError) as error:
                LOG.warning("job %s cannot be kept yet: %s", job.id, type(error).__name__)
            if self._stopping.wait(1) or self._cancelled(job):
                return False

    def _cancelled(self, job: Job) -> bool:
        return (self._store.place(job.id) / "cancel").exists() or not self._store.place(job.id).is_dir()


def main() -> None:
    """Work until the gateway that started this process ends."""
    parent = os.getppid()
    configure_logs(("imaging", "registry", "monitoring", "services"))
    places = read_places()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    lock = os.open(JobStore(places.var).folder / "worker.lock", os.O_RDWR | os.O_CREAT, 0o600)
    while not stopping.is_set() and os.getppid() == parent:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another gateway's worker works
            stopping.wait(LOOK_S)
        else:
            worker = JobWorker(places, stopping)
            os.nice(NICE)
            worker.run(parent)
            return


if __name__ == "__main__":
    main()
