"""Jobs that outlive a request: a folder each under var/jobs, and the one process that does them.

The gateway makes a job and marks it (`cancel`, `fetched`); afterwards the worker alone writes its state, so
that nothing is written twice. Whatever was promised with a 202 survives both: files are whole or absent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from imaging.config import Places
from imaging.errors import NoResult, UnknownJob
from imaging.recipe import Section
from imaging.vocabulary import JobKind, JobState
from services.job_room import alone, check_room, make_draft, read_stat

LOG = logging.getLogger(__name__)
AGE_S = 24 * 3600.0
FETCHED_S = 600.0  # a result stays so long after it was first fetched: the connection may have broken
DRAFT_S = 1200.0  # longer than any upload may take
WATCH_S = 1.0
STOP_S = 20.0
FINISHED = (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


class Job(Section):
    """One job, as job.json has it.

    Attributes:
        id: a uuid, and that of the journal's row.
        site: who asked; nobody else sees it.
        form: content type of the body.
        method: of an explanation.
        image: sha256 of the body.
        subject: pseudonym, or None.
        created: when it was asked for (ISO 8601, UTC).
        attempts: times that a worker began it and did not come to an end.
        progress: 0 to 1.
        made: version, package and engine that answered.
        outcome: what the status tells of a finished job.
        problem: type, title and detail of a failed one.
    """

    id: str
    kind: JobKind
    task: str
    site: str
    request_id: str
    form: str
    method: str = ""
    image: str
    subject: str | None
    created: str
    state: JobState = JobState.QUEUED
    attempts: int = 0
    progress: float = 0.0
    made: dict[str, Any] = Field(default_factory=dict)
    outcome: dict[str, Any] = Field(default_factory=dict)
    problem: dict[str, str] | None = None


def write_whole(path: Path, body: bytes) -> None:
    """Write a file that is there after a loss of power, whole, or is not."""
    draft = path.with_name(f"{path.name}.draft")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(body)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


class JobStore:
    """The folders of all jobs.

    Args:
        var: they lie under var/jobs.
    """

    def __init__(self, var: Path) -> None:
        self.folder = var / "jobs"
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def place(self, number: str) -> Path:
        """The folder of a job: job.json, body, what became of it, and the gateway's marks."""
        return self.folder / number

    def draft(self, site: str, size_bytes: int) -> Path:
        """A folder for a site's body that still arrives, with room for so many bytes.

        Raises:
            Overloaded: there is no room, see `services.job_room`.
        """
        return make_draft(self.folder, site, size_bytes, self.waiting)

    def admit(self, job: Job, draft: Path) -> None:
        """Take a job whose body lies in a draft, if there is room still; it is durable when this returns."""
        with alone(self.folder):
            check_room(self.folder, job.site, self.waiting())
            write_whole(draft / "job.json", job.model_dump_json().encode())
            draft.rename(self.place(job.id))
            sync_folder(self.folder)

    def write(self, job: Job) -> None:
        """Keep a job's state; of a finished one the body is erased."""
        folder = self.place(job.id)
        if folder.is_dir():  # it may have been erased meanwhile
            write_whole(folder / "job.json", job.model_dump_json().encode())
            if job.state in FINISHED:
                (folder / "body").unlink(missing_ok=True)

    def read(self, number: str) -> Job:
        """A job.

        Raises:
            UnknownJob: there is none, or it was erased.
        """
        try:
            return Job.model_validate_json((self.place(number) / "job.json").read_bytes())
        except (OSError, ValidationError) as error:
            raise miss_job(number) from error

    def waiting(self) -> list[Job]:
        """Jobs that are not finished, oldest first. They alone have a body."""
        found = []
        for path in self.folder.iterdir():
            if path.suffix or not (path / "body").exists():
                continue
            with contextlib.suppress(UnknownJob):  # erased just now
                found.append(self.read(path.name))
        return sorted((job for job in found if job.state not in FINISHED), key=lambda job: job.created)

    def result(self, job: Job, name: str) -> Path:
        """A file of a finished job; from its first fetch on its days are counted.

        Raises:
            NoResult: the job is not done.
        """
        if job.state is not JobState.DONE:
            raise NoResult(f"The job is {job.state}.", f"See /v1/jobs/{job.id} for how it goes.")
        folder = self.place(job.id)
        with contextlib.suppress(OSError):  # it is marked already, or was erased
            (folder / "fetched").touch(exist_ok=False)
        return folder / name

    def cancel(self, job: Job) -> None:
        """Erase a finished job; mark another one, so that the worker leaves it."""
        if job.state in FINISHED:
            shutil.rmtree(self.place(job.id), ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # it is erased
            (self.place(job.id) / "cancel").touch()

    def sweep(self) -> None:
        """Erase what was fetched, what is older than a day, and drafts that nobody writes any more."""
        now = time.time()
        for path in self.folder.iterdir():
            age = now - read_stat(path)
            if path.suffix == ".draft":
                gone = age > DRAFT_S
            else:
                gone = age > AGE_S or now - read_stat(path / "fetched", absent=now) > FETCHED_S
            if gone and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def miss_job(number: str) -> UnknownJob:
    """What is said of a job that is not there, and of another site's."""
    fix = "Results are erased some minutes after they were fetched, and after a day."
    return UnknownJob(f"There is no job {number[:60]!r}.", fix)


def now() -> str:
    """The time as records have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Jobs:
    """The store, and the worker's process: started when there is work, started again when it was killed.

    Of several gateways each may start one; a lock lets a single one work, the others wait.

    Args:
        places: where everything lies.
    """

    def __init__(self, places: Places) -> None:
        self._places, self.store = places, JobStore(places.var)
        self.accepting = True
        self._child: subprocess.Popen[bytes] | None = None
        self._woken, self._stopped = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._failures = 0

    def start(self) -> None:
        """Watch in the background; whatever an earlier gateway left is taken up again."""
        self._thread = threading.Thread(target=self._watch, name="jobs", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is a new job."""
        self._woken.set()

    def stop(self) -> None:
        """Take no more jobs, and let the worker put down what it has begun."""
        self.accepting = False
        self._stopped.set()
        self._woken.set()
        if self._thread:
            self._thread.join()
        if self._child and self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()

    def _watch(self) -> None:
        swept = 0.0
        while not self._stopped.is_set():
            try:
                if time.monotonic() - swept > 60 * WATCH_S:
                    self.store.sweep()
                    swept = time.monotonic()
                self._keep_working()
            except Exception:  # a disk that is full or away must not end the watching
                LOG.exception("jobs cannot be watched")
            self._woken.wait(WATCH_S)
            self._woken.clear()

    def _keep_working(self) -> None:
        """Start the worker where there is work and none; one that fails again and again, ever later."""
        if (self._child and self._child.poll() is None) or not self.store.waiting():
            return
        if self._child and self._child.returncode:
            LOG.error("the worker of jobs ended with code %d", self._child.returncode)
            self._failures += 1
            self._stopped.wait(min(60.0, WATCH_S * 2 ** (self._failures - 1)))
        else:
            self._failures = 0
        if not self._stopped.is_set():
            self._spawn()

    def _spawn(self) -> None:
        home = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH", ""))))
        environment = {
            **os.environ, "PYTHONPATH": path, "FORMULARY_ROOT": str(self._places.root),
            "FORMULARY_VAR": str(self._places.var), "FORMULARY_BUILD": str(self._places.build),
            "OMP_NUM_THREADS": os.environ.get("FORMULARY_JOB_THREADS", "1"),
        }  # fmt: skip
        command = [sys.executable, "-m", "services.job_worker"]
        self._child = subprocess.Popen(command, env=environment, cwd=self._places.root)
