"""Which package answers which site: the ledger's champions, verified, loaded aside, swapped at once."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import Places, read_params
from imaging.errors import Conflict, NotApproved, NotReady, Suspended, TrustError, UnknownTask
from imaging.greedy import GreedyWorker
from imaging.vocabulary import Statement
from monitoring import telemetry
from registry.engines import Answers, Engine, check_answers, check_parity, open_engine
from registry.evidence import verify_package
from registry.ledger import Ledger, open_ledger
from registry.package import Contract, read_contract, shelf
from registry.state import Placement, State

LOG = logging.getLogger(__name__)
POLL_S = 0.5
GRACE_S = 120.0
RETRY_S = 10.0
Table = dict[tuple[str, str], "Served"]


@dataclass(frozen=True)
class Served:
    """A version that answers.

    Attributes:
        version: its number.
        digest: of its package.
        contract: what it promises.
        engine: name of what runs it, e.g. openvino/f32.
        heat_withheld: why its heat maps are not shown; empty where they passed their audit.
        batches: takes prepared images, gives the answers of each.
    """

    version: int
    digest: str
    contract: Contract
    engine: str
    heat_withheld: str
    batches: GreedyWorker[NDArray[np.float32], Answers]


def start_batches(engine: Engine, contract: Contract) -> GreedyWorker[NDArray[np.float32], Answers]:
    """A worker that runs what waits as one batch; a bad image fails alone."""

    def work(images: list[NDArray[np.float32]]) -> list[Answers]:
        answers = engine.run(np.stack(images))
        check_answers(answers, contract, len(images))
        telemetry.BATCH.labels(contract.task).observe(len(images))
        parts = [slice(i, i + 1) for i in range(len(images))]
        return [Answers(answers.logits[part], answers.heat[part], answers.embedding[part]) for part in parts]

    return GreedyWorker(f"engine-{contract.task}", work, contract.max_batch, bisect=True)


def load_package(folder: Path, named: tuple[int, str], engine: str, evaluation: dict[str, Any]) -> Served:
    """Open a verified package: parity on the golden cases, then one batch of each size class as a warm-up.

    Args:
        folder: the package.
        named: the number and the digest of the version.
        engine: e.g. openvino/f32.
        evaluation: body of its evaluation statement; it says whether heat maps may be shown.

    Raises:
        ConfigError: no such engine.
        TrustError: it does not answer the golden cases as promised.
    """
    contract = read_contract(folder)
    name, _, precision = engine.partition("/")
    opened = open_engine(folder, name, precision, int(os.environ.get("OMP_NUM_THREADS", "1")))
    check_parity(opened, folder, contract)
    for size in (1, contract.max_batch):
        opened.run(np.zeros((size, *contract.shape), np.float32))
    audit = evaluation.get("explanation") or {"passed": False, "reasons": ["heat maps were not audited"]}
    withheld = "" if audit["passed"] is True else "; ".join(audit["reasons"])
    return Served(*named, contract, opened.name, withheld, start_batches(opened, contract))


class Slots:
    """The table of what answers where; one reference is swapped, so an answer never mixes versions.

    Args:
        places: where the ledger and the packages lie.
        engine: that opens every package, e.g. openvino/f32; FORMULARY_ENGINE.
    """

    def __init__(self, places: Places, engine: str = "openvino/f32") -> None:
        self._places, self._engine = places, engine
        self._ledger: Ledger = open_ledger(places.var)
        self.tasks = tuple(read_params(places).tasks)
        self.table: Table = {}
        self._generation = -1
        self._refused: dict[str, float] = {}
        self._withheld: dict[tuple[str, str], int] = {}
        self._states: dict[str, State] = {}
        self._retired: list[tuple[float, Served]] = []
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

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
        held = [*self.table.values(), *(served for _, served in self._retired)]
        for served in {id(served): served for served in held}.values():
            served.batches.close()

    def find(self, task: str, site: str) -> Served:
        """What answers a task at a site.

        Raises:
            UnknownTask: no such task.
            NotApproved: nothing is approved there.
            Suspended: somebody stopped it there.
            TrustError: what is approved there was changed, and nothing served before it.
            NotReady: the service has not read the ledger yet.
        """
        if task not in self.tasks:
            raise UnknownTask(f"No task {task[:60]!r}.", f"Tasks: {', '.join(self.tasks)}.")
        if self._generation < 0:
            raise NotReady("Models are loading.", "Try again in a few seconds.")
        state = self._states.get(task)
        if state and (stop := state.stopped(site)):
            raise Suspended(
                f"{task} is suspended at {site}, {stop.at[:16]}, by {stop.actor}: {stop.body['because']}.",
                f"See `formulary registry history {task}`.",
            )
        if (task, site) in self._withheld:
            version = self._withheld[(task, site)]
            raise TrustError(
                f"{task} v{version} is approved for {site}, but its package does not hold.",
                "See `formulary registry verify`; roll back, or restore the package from a copy.",
            )
        if (task, site) not in self.table:
            raise NotApproved(
                f"No version of {task} is approved for {site}.",
                f"See `formulary registry history {task}` for the reasons, or ask the committee.",
            )
        return self.table[(task, site)]

    def refresh(self) -> None:
        """Follow the ledger once: load what is new, swap the table, close what nobody uses any more."""
        generation, digest = self._ledger.head()
        telemetry.GENERATION.set(generation)
        telemetry.HEAD.clear()
        telemetry.HEAD.labels(digest).set(generation)
        self._close_retired()
        if generation == self._generation and not self._due():
            return
        loaded = {served.digest: served for served in self.table.values()}
        table: Table = {}
        withheld = {}
        states = {task: self._ledger.state(task) for task in self.tasks}
        champions = {task: state.champions() for task, state in states.items()}
        for task, placements in champions.items():
            for site, placement in placements.items():
                served = self._load(task, placement, loaded) or self.table.get((task, site))
                if served:
                    table[(task, site)] = served
                else:
                    withheld[(task, site)] = placement.version
        wanted = {placement.digest for placements in champions.values() for placement in placements.values()}
        self._refused = {digest: tried for digest, tried in self._refused.items() if digest in wanted}
        used = {served.digest for served in table.values()}
        self._retired += [
            (time.monotonic(), served) for digest, served in loaded.items() if digest not in used
        ]
        self.table, self._withheld, self._states, self._generation = table, withheld, states, generation

    def _due(self) -> bool:
        """Whether a refused package may be looked at again: somebody may have restored it."""
        return any(tried < time.monotonic() - RETRY_S for tried in self._refused.values())

    def _close_retired(self) -> None:
        """End what was swapped out long enough ago that no request can still hold it."""
        while self._retired and self._retired[0][0] < time.monotonic() - GRACE_S:
            self._retired.pop(0)[1].batches.close()

    def _load(self, task: str, placement: Placement, loaded: dict[str, Served]) -> Served | None:
        """A package once, however many sites use it; None when it is refused, and then the old one stays."""
        digest = placement.digest
        tried = self._refused.get(digest)
        if tried is not None and tried > time.monotonic() - RETRY_S:
            return None
        if digest not in loaded:
            folder = shelf(self._places.var, digest)
            try:
                evidence = verify_package(folder, self._ledger)
                told = evidence.statements.get(Statement.EVALUATION, {})
                loaded[digest] = load_package(folder, (placement.version, digest), self._engine, told)
            except TrustError as error:
                self._refuse(task, placement, error)
                return None
            self._refused.pop(digest, None)
            LOG.info("%s v%d is loaded with %s", task, placement.version, loaded[digest].engine)
        return loaded[digest]

    def _refuse(self, task: str, placement: Placement, error: TrustError) -> None:
        known = placement.digest in self._refused
        self._refused[placement.digest] = time.monotonic()
        if known:  # told already; one refusal is one incident
            return
        telemetry.LOAD_FAILURES.labels(task).inc()
        LOG.error("%s v%d is refused: %s", task, placement.version, error)
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
