"""What follows from the records about a task: what serves where, is tried, stopped, retired, asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from imaging.vocabulary import Decision, Slot, TrialVerdict
from registry.events import NETWORK, Event, is_sound
from registry.profiles import SiteProfile, read_profile
from registry.trials.plan import MOST_WEIGHT, SITE_SUBJECTS, Plan


@dataclass(frozen=True)
class Placement:
    """A version in a slot: its number, its package digest (sha256:...) and since when (ISO 8601, UTC)."""

    version: int
    digest: str
    since: str


@dataclass(frozen=True)
class Trial:
    """A silent trial at a site.

    Attributes:
        seq: number of the record that started it; its rows are kept under it.
        placed: the version that is tried; it answers nobody.
        against: digest of the champion; the trial ends when another one serves.
        plan: as it was registered.
    """

    seq: int
    placed: Placement
    against: str
    plan: Plan


@dataclass(frozen=True)
class Canary:
    """A version that answers a share of a site's studies, `weight`, on the request `asked` (its record)."""

    placed: Placement
    weight: float
    asked: int


@dataclass
class State:
    """What follows from a task's events. A site's name is a key; the network is a site of its own, `NETWORK`.

    Attributes:
        trail: site -> champions, oldest first; the last one serves, a rollback takes it away.
        challengers: site -> the version that is tried beside the champion.
        suspended: site -> the event that suspended it.
        retired: digests that may not serve again.
        first: site -> the first version that was ever approved there.
        moved: seq of the last event that moved a slot; 0 when none did.
        open: version -> the request that waits for a second person.
        makers: digest -> who registered the package or signed its evidence again.
        trials: site -> the silent trial that goes on there; all of one start.
        passed: site -> the trial that its challenger passed there, while the champion it was held to serves.
        canaries: site -> the version that answers a share of the studies there.
        alarms: site -> the alarms that nobody has acknowledged, oldest first.
        profiles: site -> package digest -> the site's own settings of it.
    """

    trail: dict[str, list[Placement]] = field(default_factory=dict)
    challengers: dict[str, Placement] = field(default_factory=dict)
    suspended: dict[str, Event] = field(default_factory=dict)
    retired: set[str] = field(default_factory=set)
    first: dict[str, Placement] = field(default_factory=dict)
    moved: int = 0
    open: dict[int, Event] = field(default_factory=dict)
    makers: dict[str, set[str]] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    passed: dict[str, Trial] = field(default_factory=dict)
    canaries: dict[str, Canary] = field(default_factory=dict)
    alarms: dict[str, list[Event]] = field(default_factory=dict)
    profiles: dict[str, dict[str, SiteProfile]] = field(default_factory=dict)

    def slots(self) -> dict[str, dict[str, Placement]]:
        """Site -> slot -> placement; slots that hold nothing are absent."""
        told: dict[str, dict[str, Placement]] = {}
        for site, trail in self.trail.items():
            named = zip((Slot.CHAMPION, Slot.PREVIOUS), reversed(trail), strict=False)
            told[site] = {str(slot): placement for slot, placement in named}
        for site, placement in self.challengers.items():
            told.setdefault(site, {})[Slot.CHALLENGER] = placement
        return told

    def champions(self) -> dict[str, Placement]:
        """What serves where: site -> champion; a site without one, or where it is suspended, is absent."""
        return {
            site: trail[-1]
            for site, trail in self.trail.items()
            if site != NETWORK and trail and not self.stopped(site)
        }

    def approved(self) -> set[str]:
        """Digests of every package that was ever approved and not taken back everywhere."""
        placed = [one for trail in self.trail.values() for one in trail]
        return {one.digest for one in [*placed, *self.first.values()]}

    def stopped(self, site: str) -> Event | None:
        """The event that suspended a site, or the network as a whole; None where neither is."""
        return self.suspended.get(NETWORK) or self.suspended.get(site)


def fold(events: Iterable[Event]) -> State:
    """What follows from a task's events, in their order."""
    state = State()
    for event in events:
        if event.kind in FOLDS:
            FOLDS[Decision(event.kind)](state, event)
        elif event.kind in NOTES:
            NOTES[Decision(event.kind)](state, event)
    return state


def _make(state: State, event: Event) -> None:
    state.makers.setdefault(event.body["digest"], set()).add(event.actor)


def _request(state: State, event: Event) -> None:
    state.open[event.body["version"]] = event
    _settle(state)


def _close(state: State, event: Event) -> None:
    state.open.pop(event.body["version"], None)
    _settle(state)


def is_approval(state: State, event: Event) -> bool:
    """Whether an `approved` record answers an open request, by somebody who neither asked nor made it."""
    body, asked = event.body, state.open.get(event.body["version"])
    return bool(
        asked
        and asked.seq == body.get("asked")
        and asked.body["digest"] == body["digest"]
        and set(body["sites"]) <= set(asked.body["sites"])
        and event.actor not in {asked.actor, *state.makers.get(body["digest"], ())}
    )


def _approve(state: State, event: Event) -> None:
    if not is_approval(state, event):  # whoever wrote it, it moves nothing
        return
    new = _placement(event)
    for site in [NETWORK, *event.body["sites"]]:
        trail = state.trail.setdefault(site, [])
        if not trail or trail[-1].digest != new.digest:
            trail.append(new)
        state.first.setdefault(site, new)
        if state.challengers.get(site, new).digest == new.digest:
            state.challengers.pop(site, None)
    state.open.clear()
    state.moved = event.seq
    _settle(state)


def _challenge(state: State, event: Event) -> None:
    state.challengers |= dict.fromkeys(event.body["sites"], _placement(event))
    state.moved = event.seq


def _roll_back(state: State, event: Event) -> None:
    for site, version in event.body["sites"].items():
        trail = state.trail[site]
        while trail[-1].version != version:
            trail.pop()
        back = trail[-1]
        trail[-1] = Placement(back.version, back.digest, event.at)
    state.open.clear()
    state.moved = event.seq
    _settle(state)


def _suspend(state: State, event: Event) -> None:
    state.suspended |= dict.fromkeys(event.body["sites"], event)


def _resume(state: State, event: Event) -> None:
    for site in event.body["sites"]:
        state.suspended.pop(site, None)


def _retire(state: State, event: Event) -> None:
    digest = event.body["digest"]
    state.retired.add(digest)
    state.open.pop(event.body["version"], None)
    kept = {site: placed for site, placed in state.challengers.items() if placed.digest != digest}
    state.challengers = kept
    for site, trail in state.trail.items():
        state.trail[site] = [placed for placed in trail if placed.digest != digest]
    state.moved = event.seq
    _settle(state)


def _start_trial(state: State, event: Event) -> None:
    for site in event.body["sites"]:
        plan = Plan.model_validate(event.body["plan"])
        state.trials[site] = Trial(event.seq, _placement(event), state.trail[site][-1].digest, plan)
        state.passed.pop(site, None)
    _settle(state)


def _end_trial(state: State, event: Event) -> None:
    ended = {site: one for site, one in state.trials.items() if one.seq == event.body["trial"]}
    state.trials = {site: one for site, one in state.trials.items() if site not in ended}
    if event.body["verdict"] == TrialVerdict.PASSED:  # of all sites together: each needs a share in it
        shown = event.body.get("deciding", {})
        state.passed |= {site: one for site, one in ended.items() if shown.get(site, 0) >= SITE_SUBJECTS}


def _set_canary(state: State, event: Event) -> None:
    """A weight of 0 ends it; another asks for what an approval asks for, and for a trial that was passed."""
    weight, sites = float(event.body["weight"]), event.body["sites"]
    if weight == 0:
        state.canaries = {site: one for site, one in state.canaries.items() if site not in sites}
    elif weight <= MOST_WEIGHT and is_approval(state, event):
        canary = Canary(_placement(event), weight, event.body["asked"])
        state.canaries |= dict.fromkeys(sites, canary)
        _settle(state)


def _alarm(state: State, event: Event) -> None:
    """An alarm may be told twice, the second time by who could contain it: the later record stands."""
    for site in event.body["sites"] if is_sound(event) else ():
        others = [one for one in state.alarms.get(site, ()) if name_alarm(one) != name_alarm(event)]
        state.alarms[site] = [*others, event]


def _acknowledge(state: State, event: Event) -> None:
    for site in event.body["sites"]:
        state.alarms.pop(site, None)


def _profile(state: State, event: Event) -> None:
    profile, digest = read_profile(event), event.body["digest"]
    for site in event.body["sites"]:
        held = state.profiles.setdefault(site, {})
        if profile:
            held[digest] = profile
        elif not event.body["profile"]:
            held.pop(digest, None)


def name_alarm(event: Event) -> tuple[int, str]:
    """Which row of the records an `alarmed` record is about: its number, and when it was written."""
    return event.body["alarm"], str(event.body.get("raised"))


def _settle(state: State) -> None:
    """End what rests on a champion that serves no more, a retired version, or a request that is closed."""
    serving = {site: trail[-1].digest for site, trail in state.trail.items() if trail}

    def stands(site: str, trial: Trial) -> bool:
        return trial.against == serving.get(site) and trial.placed.digest not in state.retired

    def is_asked(canary: Canary) -> bool:
        asked = state.open.get(canary.placed.version)
        return asked is not None and asked.seq == canary.asked

    state.trials = {site: one for site, one in state.trials.items() if stands(site, one)}
    state.passed = {site: one for site, one in state.passed.items() if stands(site, one)}
    state.canaries = {
        site: one for site, one in state.canaries.items()
        if is_asked(one) and site in state.passed and state.passed[site].placed.digest == one.placed.digest
    }  # fmt: skip


FOLDS: dict[Decision, Callable[[State, Event], None]] = {
    Decision.REGISTERED: _make,
    Decision.RENEWED: _make,
    Decision.REQUESTED: _request,
    Decision.REFUSED: _close,
    Decision.REJECTED: _close,
    Decision.APPROVED: _approve,
    Decision.CHALLENGED: _challenge,
    Decision.TRIAL_STARTED: _start_trial,
    Decision.TRIAL_ENDED: _end_trial,
    Decision.CANARY_SET: _set_canary,
    Decision.ROLLED_BACK: _roll_back,
    Decision.SUSPENDED: _suspend,
    Decision.RESUMED: _resume,
    Decision.RETIRED: _retire,
}
NOTES: dict[Decision, Callable[[State, Event], None]] = {  # they move no version
    Decision.ALARMED: _alarm,
    Decision.ACKNOWLEDGED: _acknowledge,
    Decision.PROFILED: _profile,
}


def _placement(event: Event) -> Placement:
    return Placement(event.body["version"], event.body["digest"], event.at)
