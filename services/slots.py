"""Which package answers which site: the ledger's champions, verified, loaded aside, swapped at once."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field

from imaging.config import Places, read_params
from imaging.errors import FormularyError, NotApproved, NotReady, Suspended, TrustError, UnknownTask
from imaging.vocabulary import Decision, Slot
from registry.events import Event
from registry.ledger import Ledger, open_ledger
from registry.state import Placement, State, Trial
from registry.trials.plan import takes_canary
from services.loading import Loader, Wanted
from services.served import Served

LOG = logging.getLogger(__name__)
POLL_S = 0.25
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
        opening: versions that are approved and not open yet.
        stopped: the events that suspended a task.
        trials: silent trials that go on.
        alarms: what nobody has acknowledged.
    """

    generation: int = -1
    champions: Table = field(default_factory=dict)
    canaries: dict[Key, tuple[Served, float]] = field(default_factory=dict)
    withheld: dict[Key, int] = field(default_factory=dict)
    opening: dict[Key, int] = field(default_factory=dict)
    stopped: dict[Key, Event] = field(default_factory=dict)
    trials: dict[Key, Trial] = field(default_factory=dict)
    alarms: dict[Key, list[Event]] = field(default_factory=dict)


@dataclass
class Wishes:
    """What should be open: `now` what answers, `later` what a rollback would bring back.

    Attributes:
        task: whose versions they are.
        renewed: digest -> number of the record that renewed its evidence.
    """

    task: str = ""
    renewed: dict[str, int] = field(default_factory=dict)
    now: list[Wanted] = field(default_factory=list)
    later: list[Wanted] = field(default_factory=list)

    def wish(self, placed: Placement) -> Wanted:
        """Want a version now."""
        self.now.append(self._name(placed))
        return self.now[-1]

    def wish_later(self, placed: Placement) -> None:
        """Want a version when the rest is open."""
        self.later.append(self._name(placed))

    def add(self, other: Wishes) -> None:
        """Another task's wishes."""
        self.now += other.now
        self.later += other.later

    def _name(self, placed: Placement) -> Wanted:
        return Wanted(self.task, placed.version, placed.digest, self.renewed.get(placed.digest, 0))


class Slots:
    """The tables of what answers where; one reference is swapped, so an answer never mixes versions.

    What answered before stays loaded, so that a rollback is a swap as well.

    Args:
        places: where the ledger and the packages lie.
        engine: that opens every package, e.g. openvino/f32 (FORMULARY_ENGINE); "" is the host's best.
    """

    def __init__(self, places: Places, engine: str = "") -> None:
        self._ledger: Ledger = open_ledger(places.var)
        self.tasks = tuple(read_params(places).tasks)
        self.tables = Tables()
        self.loader = Loader(places, self._ledger, engine)
        self.head = ""
        self._seen: tuple[int, int, frozenset[Wanted]] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="slots", daemon=True)

    @property
    def table(self) -> Table:
        """(task, site) -> what answers."""
        return self.tables.champions

    def start(self) -> None:
        """Open what the ledger says, then follow it in the background."""
        self.refresh()
        self.loader.start()
        self.refresh()
        self._thread.start()

    def stop(self) -> None:
        """Stop following, and finish what the engines have queued."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        self.loader.stop()

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
        if tables.generation < 0 or (task, site) in tables.opening:
            return NotReady("The model is loading.", "Try again in a few seconds.")
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
        """Follow the ledger once: swap the tables by what is open, and say what should be.

        Nothing is opened here, so that a suspension or a rollback never waits for a package.
        """
        generation, self.head = self._ledger.head()
        seen = generation, self.loader.changes, self.loader.ready()
        if seen == self._seen:  # nor did another worker open what this one waits for
            return
        tables, wanted = Tables(generation), Wishes()
        for task in self.tasks:
            state = self._ledger.state(task)
            renewals = self._ledger.events(task, Decision.RENEWED)
            wishes = Wishes(task, {event.body["digest"]: event.seq for event in renewals})
            self._fill(tables, state, wishes)
            self._fill_rest(tables, state, wishes)
            wanted.add(wishes)
        self.tables, self._seen = tables, seen
        serving = [*tables.champions.values(), *(served for served, _ in tables.canaries.values())]
        self.loader.want([*wanted.now, *wanted.later], serving)

    def _fill(self, tables: Tables, state: State, wishes: Wishes) -> None:
        """One task's champions; until one is open the one before answers, if it still may."""
        task = wishes.task
        for site, placement in state.champions().items():
            place, wanted = (task, site), wishes.wish(placement)
            served = self.loader.find(wanted) or self._keep(place, state)
            if served:
                tables.champions[place] = served.at(site, state)
            elif self.loader.is_refused(wanted):
                tables.withheld[place] = placement.version
            else:
                tables.opening[place] = placement.version
        for site in [site for site, held in state.trail.items() if held]:
            if stop := state.stopped(site):
                tables.stopped[(task, site)] = stop
        tables.trials |= {(task, site): trial for site, trial in state.trials.items()}
        tables.alarms |= {(task, site): events for site, events in state.alarms.items()}

    def _fill_rest(self, tables: Tables, state: State, wishes: Wishes) -> None:
        """One task's canaries, and what a rollback would bring back."""
        for site, canary in state.canaries.items():
            place, served = (wishes.task, site), self.loader.find(wishes.wish(canary.placed))
            if served and place in tables.champions:
                tables.canaries[place] = served.at(site, state), canary.weight
        for slots in state.slots().values():
            if previous := slots.get(Slot.PREVIOUS):
                wishes.wish_later(previous)

    def _keep(self, place: Key, state: State) -> Served | None:
        """What answers there now, where it was neither rolled back nor retired."""
        served = self.tables.champions.get(place)
        trail = {placed.digest for placed in state.trail.get(place[1], ())} - state.retired
        return served if served and served.digest in trail else None

    def _follow(self) -> None:
        while not self._stopped.wait(POLL_S):
            try:
                self.refresh()
            except Exception:  # a database that is busy or away must not end the following
                LOG.exception("the ledger could not be followed")
