"""What follows from the records about a task: what serves where, is tried, stopped, retired, asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from imaging.vocabulary import Decision, Slot
from registry.events import NETWORK, Event


@dataclass(frozen=True)
class Placement:
    """A version in a slot: its number, its package digest (sha256:...) and since when (ISO 8601, UTC)."""

    version: int
    digest: str
    since: str


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
    """

    trail: dict[str, list[Placement]] = field(default_factory=dict)
    challengers: dict[str, Placement] = field(default_factory=dict)
    suspended: dict[str, Event] = field(default_factory=dict)
    retired: set[str] = field(default_factory=set)
    first: dict[str, Placement] = field(default_factory=dict)
    moved: int = 0
    open: dict[int, Event] = field(default_factory=dict)
    makers: dict[str, set[str]] = field(default_factory=dict)

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
    return state


def _make(state: State, event: Event) -> None:
    state.makers.setdefault(event.body["digest"], set()).add(event.actor)


def _request(state: State, event: Event) -> None:
    state.open[event.body["version"]] = event


def _close(state: State, event: Event) -> None:
    state.open.pop(event.body["version"], None)


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


FOLDS: dict[Decision, Callable[[State, Event], None]] = {
    Decision.REGISTERED: _make,
    Decision.RENEWED: _make,
    Decision.REQUESTED: _request,
    Decision.REFUSED: _close,
    Decision.REJECTED: _close,
    Decision.APPROVED: _approve,
    Decision.CHALLENGED: _challenge,
    Decision.ROLLED_BACK: _roll_back,
    Decision.SUSPENDED: _suspend,
    Decision.RESUMED: _resume,
    Decision.RETIRED: _retire,
}


def _placement(event: Event) -> Placement:
    return Placement(event.body["version"], event.body["digest"], event.at)
