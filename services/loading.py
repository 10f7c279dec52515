"""Packages are opened aside, in a thread of their own: whatever one of them takes, nobody waits for it."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imaging.config import Places
from imaging.errors import Conflict, FormularyError, ServingError, TrustError
from imaging.vocabulary import Statement
from monitoring import telemetry
from registry.evidence import verify_package
from registry.ledger import Ledger
from registry.package import read_contract, shelf
from registry.qualified import choose_engine
from services.placement import read_devices, stop_devices
from services.served import Served, load_package, read_profile
from services.workers import Workers

LOG = logging.getLogger(__name__)
GRACE_S = 120.0
RETRY_S = 10.0


@dataclass(frozen=True)
class Wanted:
    """A version that should be open, by the evidence that was renewed last (number of that record, or 0)."""

    task: str
    version: int
    digest: str
    renewed: int


class Loader:
    """What is open, what was refused, and what is opened next.

    Args:
        places: where the packages lie.
        ledger: whose keys and records are believed.
        engine: FORMULARY_ENGINE; "" is the host's best.

    Attributes:
        changes: grows whenever something was opened or refused.
        refusal: why the last one was refused.
    """

    def __init__(self, places: Places, ledger: Ledger, engine: str) -> None:
        self._places, self._ledger, self._engine = places, ledger, engine
        self._workers = Workers(places.var, telemetry.WORKERS)
        self._wanted: tuple[Wanted, ...] = ()
        self._serving: set[int] = set()
        self._open: dict[Wanted, Served] = {}
        self._refused: dict[Wanted, float] = {}
        self._unused: dict[Wanted, float] = {}
        self._asked, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self.changes, self.refusal = 0, ""

    def want(self, wanted: list[Wanted], serving: list[Served]) -> None:
        """Say what should be open, the most urgent first.

        What nothing wants, and what is not `serving` for lack of what should, is closed after two minutes.
        """
        self._wanted, self._serving = tuple(dict.fromkeys(wanted)), {id(served.runner) for served in serving}
        self._asked.set()

    def find(self, wanted: Wanted) -> Served | None:
        """What is open in every worker; None where it is not, yet or at all."""
        served = self._open.get(wanted)
        return served if served and self._workers.all_have(_name(wanted)) else None

    def ready(self) -> frozenset[Wanted]:
        """What `find` finds now."""
        return frozenset(one for one in [*self._open] if self._workers.all_have(_name(one)))

    def is_refused(self, wanted: Wanted) -> bool:
        """Whether it was looked at and does not hold."""
        return wanted in self._refused

    def start(self) -> None:
        """Open all that is wanted, then go on in the background."""
        self.open_all()
        self._thread.start()

    def stop(self) -> None:
        """Finish what the engines have queued."""
        self._stopped.set()
        self._asked.set()
        if self._thread.is_alive():
            self._thread.join(5)
        for served in [*self._open.values()]:
            served.runner.close()
        stop_devices()

    def open_all(self) -> None:
        """Open what is wanted and not open; what was refused is looked at again after ten seconds."""
        for wanted in self._wanted:
            tried = self._refused.get(wanted)
            due = tried is None or tried < time.monotonic() - RETRY_S
            if wanted not in self._open and due and not self._stopped.is_set():
                self._load(wanted)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._asked.wait(1.0)
            self._asked.clear()
            try:
                self.open_all()
                self._close_unused()
            except Exception:  # e.g. the ledger takes no incident; the next look is a second away
                LOG.exception("packages could not be opened")

    def _close_unused(self) -> None:
        """End what was swapped out so long ago that no request can still hold it; forget old refusals."""
        wanted, now = set(self._wanted), time.monotonic()
        idle = [one for one, served in self._open.items() if id(served.runner) not in self._serving]
        self._unused = {one: self._unused.get(one, now) for one in idle if one not in wanted}
        for one in [one for one, since in self._unused.items() if since < now - GRACE_S]:
            self._open.pop(one).runner.close()
        for one in [one for one in self._refused if one not in wanted]:
            del self._refused[one]

    def _load(self, wanted: Wanted) -> None:
        folder = shelf(self._places.var, wanted.digest)
        try:
            evidence = verify_package(folder, self._ledger)
            told = evidence.statements.get(Statement.EVALUATION, {})
            engine = self._choose(folder, evidence.statements.get(Statement.QUALIFICATION, {}))
            served = load_package(folder, (wanted.version, wanted.digest), engine, told)
        except FormularyError as error:
            self._refuse(wanted, error)
        except Exception as error:  # whatever an engine raises is this package's matter, and no other's
            LOG.exception("%s v%d cannot be opened", wanted.task, wanted.version)
            self._refuse(
                wanted, ServingError(f"It cannot be opened ({type(error).__name__}).", "See the log.")
            )
        else:
            self._refused.pop(wanted, None)
            self._workers.announce(_name(one) for one in [*self._open, wanted])
            self._open[wanted] = served
            LOG.info("%s v%d is loaded with %s", wanted.task, wanted.version, served.engine)
        self.changes += 1

    def _choose(self, folder: Path, qualification: dict[str, Any]) -> str:
        kind = read_devices()[0].partition(":")[0] if read_profile() == "gpu" else "cpu"
        contract = read_contract(folder)
        return choose_engine(self._places.var, contract, qualification, self._engine, kind)

    def _refuse(self, wanted: Wanted, error: FormularyError) -> None:
        known = wanted in self._refused
        self._refused[wanted] = time.monotonic()
        self.refusal = str(error)
        if known:  # told already; one refusal is one incident
            return
        telemetry.LOAD_FAILURES.labels(wanted.task).inc()
        LOG.error("%s v%d is refused: %s", wanted.task, wanted.version, error)
        if not isinstance(error, TrustError):  # a device that is missing is no question of trust
            return
        try:
            body = {"version": wanted.version, "digest": wanted.digest}
            self._ledger.record_incident(error.fact, wanted.task, body)
        except Conflict:
            LOG.exception("the incident could not be written into the ledger")


def _name(wanted: Wanted) -> str:
    return f"{wanted.digest}#{wanted.renewed}"
