"""Which package answers which site: the ledger's champions, verified, loaded aside, swapped at once."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imaging.config import Places, read_params
from imaging.errors import (
    Conflict,
    DeviceMissing,
    FormularyError,
    NotApproved,
    NotReady,
    Suspended,
    TrustError,
    UnknownTask,
)
from imaging.vocabulary import Slot, Statement
from monitoring import telemetry
from registry.events import Event
from registry.evidence import verify_package
from registry.ledger import Ledger, open_ledger
from registry.package import read_contract, shelf
from registry.qualified import choose_engine
from registry.state import Placement, State, Trial
from registry.trials.plan import takes_canary
from services.placement import read_devices, stop_devices
from services.served import Served, load_package, read_profile
from services.workers import Workers

LOG = logging.getLogger(__name__)
POLL_S = 0.25
GRACE_S = 120.0
RETRY_S = 10.0
Key = tuple[str, str]
Table = dict[Key, "Served"]


@dataclass
class Tables:
    """What the ledger's generation says of every task and site; a request reads one such value.

    Attributes:
        generation: of the ledger; -1 before it was read.
        champions: what answers.
        canaries: what answers a share of the studies instead.
        withheld: versions that are approved, but whose package does not hold.
        stopped: the events that suspended a task.
        trials: silent trials that go on.
    """

    generation: int = -1
    champions: Table = field(default_factory=dict)
    canaries: dict[Key, tuple[Served, float]] = field(default_factory=dict)
    withheld: dict[Key, int] = field(default_factory=dict)
    stopped: dict[Key, Event] = field(default_factory=dict)
    trials: dict[Key, Trial] = field(default_factory=dict)


class Slots:
    """The tables of what answers where; one reference is swapped, so an answer never mixes versions.

    What answered before stays loaded, so that a rollback is a swap as well.

    Args:
        places: where the ledger and the packages lie.
        engine: that opens every package, e.g. openvino/f32 (FORMULARY_ENGINE); "" is the host's best.
    """

    def __init__(self, places: Places, engine: str = "") -> None:
        self._places, self._engine = places, engine
        self._ledger: Ledger = open_ledger(places.var)
        self.tasks = tuple(read_params(places).tasks)
        self.tables = Tables()
        self._loaded: dict[str, Served] = {}
        self._unused: dict[str, float] = {}
        self._refused: dict[str, float] = {}
        self.refusal = self.head = ""
        self._workers = Workers(places.var, telemetry.WORKERS)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def table(self) -> Table:
        """(task, site) -> what answers."""
        return self.tables.champions

    def start(self) -> None:
        """Load what the ledger says, then follow it in the background."""
        self.refresh()
        self._thread = threading.Thread(target=self._follow, name="slots", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop following, and finish what the engines have queued."""
        self._stopped.set()
        if self._thread:
            self._thread.join()
        for served in self._loaded.values():
            served.runner.close()
        stop_devices()

    def find(self, task: str, site: str, study: str | None = None) -> Served:
        """What answers a task at a site; of a study that a canary takes, the challenger.

        Raises:
            UnknownTask: no such task.
            NotApproved: nothing is approved there.
            Suspended: somebody stopped it there.
            TrustError: what is approved there was changed, and nothing served before it.
            NotReady: the service has not read the ledger yet.
        """
        tables, place = self.tables, (task, site)
        served = tables.champions.get(place)
        if served is None or place in tables.stopped:
            raise self._explain(tables, task, site)
        canary = tables.canaries.get(place)
        if canary and study and takes_canary(study, task, canary[0].digest, canary[1]):
            return canary[0]
        return served

    def _explain(self, tables: Tables, task: str, site: str) -> FormularyError:
        """Why nothing answers there."""
        if task not in self.tasks:
            return UnknownTask(f"No task {task[:60]!r}.", f"Tasks: {', '.join(self.tasks)}.")
        if tables.generation < 0:
            return NotReady("Models are loading.", "Try again in a few seconds.")
        history = f"`formulary registry history {task}`"
        if stop := tables.stopped.get((task, site)):
            fact = f"{task} is suspended at {site}, {stop.at[:16]}, by {stop.actor}: {stop.body['because']}."
            return Suspended(fact, f"See {history}.")
        if version := tables.withheld.get((task, site)):
            return TrustError(
                f"{task} v{version} is approved for {site}, but its package does not hold.",
                "See `formulary registry verify`; roll back, or restore the package from a copy.",
            )
        fact = f"No version of {task} is approved for {site}."
        return NotApproved(fact, f"See {history} for the reasons, or ask the committee.")

    def refresh(self) -> None:
        """Follow the ledger once: load what is new aside, swap the tables, close what nobody uses."""
        generation, digest = self._ledger.head()
        self.head = digest
        self._close_unused()
        if generation == self.tables.generation and not self._due():
            return
        states = {task: self._ledger.state(task) for task in self.tasks}
        tables = Tables(generation)
        for task, state in states.items():
            self._fill(tables, task, state)
        self._workers.wait_for_all(generation)
        self.tables = tables
        self._warm_previous(states)

    def _fill(self, tables: Tables, task: str, state: State) -> None:
        """One task's champions and canaries; of a package that is refused, the one before stays."""
        for site, placement in state.champions().items():
            place = (task, site)
            served = self._load(task, placement) or self.tables.champions.get(place)
            if served:
                tables.champions[place] = served
            else:
                tables.withheld[place] = placement.version
        for site in {site for site, held in state.trail.items() if held and state.stopped(site)}:
            if stop := state.stopped(site):
                tables.stopped[(task, site)] = stop
        tables.trials |= {(task, site): trial for site, trial in state.trials.items()}
        for site, canary in state.canaries.items():
            if (task, site) in tables.champions and (served := self._load(task, canary.placed)):
                tables.canaries[(task, site)] = served, canary.weight

    def _warm_previous(self, states: dict[str, State]) -> None:
        """Load what a rollback would bring back, and note what nothing names any more."""
        wanted = set()
        for task, state in states.items():
            for slots in state.slots().values():
                if previous := slots.get(Slot.PREVIOUS):
                    wanted.add(previous.digest)
                    self._load(task, previous)
        used = {served.digest for served in self.tables.champions.values()}
        used |= {served.digest for served, _ in self.tables.canaries.values()} | wanted
        now = time.monotonic()
        self._unused = {
            digest: self._unused.get(digest, now) for digest in self._loaded if digest not in used
        }

    def _due(self) -> bool:
        """Whether a refused package may be looked at again: somebody may have restored it."""
        return any(tried < time.monotonic() - RETRY_S for tried in self._refused.values())

    def _close_unused(self) -> None:
        """End what was swapped out long enough ago that no request can still hold it."""
        for digest in [one for one, since in self._unused.items() if since < time.monotonic() - GRACE_S]:
            del self._unused[digest]
            self._loaded.pop(digest).runner.close()

    def _load(self, task: str, placement: Placement) -> Served | None:
        """A package once, however many sites use it; None when it is refused."""
        digest = placement.digest
        if digest in self._loaded:
            return self._loaded[digest]
        tried = self._refused.get(digest)
        if tried is not None and tried > time.monotonic() - RETRY_S:
            return None
        folder = shelf(self._places.var, digest)
        try:
            evidence = verify_package(folder, self._ledger)
            told = evidence.statements.get(Statement.EVALUATION, {})
            engine = self._choose(folder, evidence.statements.get(Statement.QUALIFICATION, {}))
            served = load_package(folder, (placement.version, digest), engine, told)
        except (TrustError, DeviceMissing, NotReady) as error:
            self._refuse(task, placement, error)
            return None
        self._refused.pop(digest, None)
        self._loaded[digest] = served
        LOG.info("%s v%d is loaded with %s", task, placement.version, served.engine)
        return served

    def _choose(self, folder: Path, qualification: dict[str, Any]) -> str:
        kind = read_devices()[0].partition(":")[0] if read_profile() == "gpu" else "cpu"
        contract = read_contract(folder)
        return choose_engine(self._places.var, contract, qualification, self._engine, kind)

    def _refuse(self, task: str, placement: Placement, error: FormularyError) -> None:
        known = placement.digest in self._refused
        self._refused[placement.digest] = time.monotonic()
        self.refusal = str(error)
        if known:  # told already; one refusal is one incident
            return
        telemetry.LOAD_FAILURES.labels(task).inc()
        LOG.error("%s v%d is refused: %s", task, placement.version, error)
        if not isinstance(error, TrustError):  # a device that is missing is no question of trust
            return
        try:
            self._ledger.record_incident(
                error.fact, task, {"version": placement.version, "digest": placement.digest}
            )
        except Conflict:
            LOG.exception("the incident could not be written into the ledger")

    def _follow(self) -> None:
        while not self._stopped.wait(POLL_S):
            try:
                self.refresh()
            except Exception:  # a database that is busy or away must not end the following
                LOG.exception("the ledger could not be followed")
