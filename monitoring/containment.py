"""What an alarm does: a record in the ledger and, by the policy, a suspension or a fallback of its site."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from imaging.config import Places
from imaging.errors import ConfigError, RegistryError, TrustError
from imaging.vocabulary import Contained as Outcome
from imaging.vocabulary import Containment, Decision, Scope
from monitoring.records import Alarm, Records
from registry import decisions
from registry.access import Acting, act
from registry.events import Event, is_sound
from registry.ledger import Ledger, Writer, open_ledger
from registry.policy import read_policy
from registry.state import State, name_alarm
from registry.surveillance import Surveillance

LOG = logging.getLogger(__name__)
MONITOR = "monitor"  # the identity that contains; FORMULARY_MONITOR names another
LONGEST_S = 5.0
HURT = (Outcome.SUSPENDED, Outcome.FELL_BACK)


@dataclass(frozen=True)
class Contained:
    """What became of an alarm.

    Attributes:
        alarm: number of its row.
        event: number of the ledger's record.
        outcome: what was done.
    """

    alarm: int
    event: int
    outcome: Outcome


def contain_new(places: Places, records: Records, ledger: Ledger) -> list[Contained]:
    """Work off every alarm that the ledger does not know, in their order.

    An alarm's record and what it does are one transaction: a process that is killed loses nothing, and the
    next call, or another process, does nothing twice. What cannot be worked off now is logged and stays.

    Args:
        places: of the checkout, for policies and the monitor's key.
        records: where the alarms lie.
        ledger: where decisions go.
    """
    if not (alarms := records.read(Alarm)):
        return []
    (acting, why), told = _find_monitor(places, ledger), []
    is_read = cache(lambda task: not _read(places, task)[1])
    known = _list_known(ledger.signed(), bool(acting), is_read)
    new = [alarm for alarm in alarms if (alarm.seq, alarm.at) not in known]
    if new and why:
        LOG.error("alarms cannot contain anything: %s", why)
    until = time.monotonic() + LONGEST_S
    for alarm in new:
        if time.monotonic() > until:  # a pass may come between; the rest is worked off after it
            break
        try:
            told.append(contain(places, acting, alarm))
        except Exception:  # whatever is wrong with one must not keep the others from their sites
            LOG.exception("alarm %d of %s at %s could not be worked off", alarm.seq, alarm.task, alarm.site)
    return told


def contain(places: Places, acting: Acting | None, alarm: Alarm) -> Contained:
    """Write an alarm into the ledger and do what the policy asks, in one transaction.

    Args:
        places: of the checkout.
        acting: the monitor; without its key, or a policy, nothing is contained, and the record says so.
        alarm: a row of the records.

    Returns:
        What was done; where another process was first, what that one did.

    Raises:
        Conflict: the ledger is held by somebody else.
    """
    ledger, (asked, why) = acting.ledger if acting else open_ledger(places.var), _ask(places, alarm)
    if why:
        LOG.error("alarm %d of %s at %s cannot contain anything: %s", alarm.seq, alarm.task, alarm.site, why)
    with ledger.writing() as writer:
        known = _list_known(writer.events(), bool(acting), lambda _: not why)
        if event := known.get((alarm.seq, alarm.at)):
            return Contained(alarm.seq, event.seq, Outcome(event.body.get("contained", Outcome.NOTIFIED)))
        outcome = _choose(acting, writer.state(alarm.task), alarm, asked)
        body = _describe(writer.events(), alarm) | {"asked": asked, "contained": outcome}
        event = writer.append(Decision.ALARMED, alarm.task, body, acting.signer if acting else MONITOR)
        if acting and outcome in HURT:
            _hurt(replace(acting, because=_explain(alarm, event)), writer, alarm, outcome)
    _log(alarm, event, outcome)
    return Contained(alarm.seq, event.seq, outcome)


def open_alarms(ledger: Ledger, task: str) -> dict[str, list[Event]]:
    """Site -> its `alarmed` records that nobody has acknowledged, oldest first."""
    return ledger.state(task).alarms


def _find_monitor(places: Places, ledger: Ledger) -> tuple[Acting | None, str]:
    """The monitor's identity at work; or None, and why it has no key or may not contain."""
    name = os.environ.get("FORMULARY_MONITOR") or MONITOR
    try:
        return Acting(places, ledger, act(places, ledger, name, Scope.CONTAIN)), ""
    except (TrustError, RegistryError) as error:
        return None, str(error)


def _list_known(
    events: list[Event], has_key: bool, is_read: Callable[[str], bool]
) -> dict[tuple[int, str], Event]:
    """Alarms that need no more work: what lacked a key or a policy does when that is there.

    What somebody acknowledged needs none. `is_read` says of a task whether its policy can be read.
    """
    told = (event for event in events if event.kind == Decision.ALARMED and is_sound(event))
    known = {name_alarm(event): event for event in told}
    closed = [(event.seq, event.task, site) for event in events if event.kind == Decision.ACKNOWLEDGED
              for site in event.body["sites"]]  # fmt: skip

    def is_closed(event: Event) -> bool:
        return any(seq > event.seq and task == event.task and site in event.body["sites"]
                   for seq, task, site in closed)  # fmt: skip

    def is_left(event: Event) -> bool:
        key, policy = has_key and not event.key, event.body.get("contained") == Outcome.NO_POLICY
        return (key or policy) and not is_closed(event) and (key or is_read(event.task))

    return {name: event for name, event in known.items() if not is_left(event)}


def _read(places: Places, task: str) -> tuple[Surveillance | None, str]:
    """What the policy says of alarms; or None, and why it cannot be read."""
    try:
        return read_policy(task, places.policies).surveillance, ""
    except ConfigError as error:
        return None, str(error)


def _ask(places: Places, alarm: Alarm) -> tuple[Containment | None, str]:
    surveillance, why = _read(places, alarm.task)
    if surveillance is None:
        return None, why
    return (surveillance.contain if alarm.part in surveillance.parts else Containment.NOTIFY), ""


def _choose(acting: Acting | None, state: State, alarm: Alarm, asked: Containment | None) -> Outcome:
    if asked is None:
        return Outcome.NO_POLICY
    if asked is Containment.NOTIFY:
        return Outcome.NOTIFIED
    if state.stopped(alarm.site):
        return Outcome.ALREADY
    if [held.version for held in state.trail.get(alarm.site, ())][-1:] != [alarm.version]:
        return Outcome.OTHER
    if acting is None:
        return Outcome.NO_KEY
    if asked is Containment.FALLBACK and _has_previous(acting, state, alarm):
        return Outcome.FELL_BACK
    return Outcome.SUSPENDED


def _has_previous(acting: Acting, state: State, alarm: Alarm) -> bool:
    try:
        decisions.find_previous(acting, state.trail[alarm.site], f"{alarm.task} at {alarm.site}")
    except (RegistryError, TrustError) as error:
        LOG.error("%s cannot fall back at %s and is suspended: %s", alarm.task, alarm.site, error)
        return False
    return True


def _hurt(acting: Acting, writer: Writer, alarm: Alarm, outcome: Outcome) -> None:
    if outcome is Outcome.FELL_BACK:
        decisions.put_back(acting, writer, alarm.task, [alarm.site])
    else:
        decisions.stop(acting, writer, alarm.task, [alarm.site])


def _describe(events: list[Event], alarm: Alarm) -> dict[str, Any]:
    digests = [event.body["digest"] for event in events if event.kind == Decision.REGISTERED
               and (event.task, event.body["version"]) == (alarm.task, alarm.version)]  # fmt: skip
    beyond = f"{alarm.value:.4g} beyond {alarm.bound:.4g}"
    told = {"fact": f"{alarm.statistic} left its limit: {beyond}, {alarm.direction}, since {alarm.since}",
            "alarm": alarm.seq, "raised": alarm.at, "sites": [alarm.site],
            "digest": "".join(digests)}  # fmt: skip
    names = ("version", "kind", "statistic", "part", "direction", "value", "bound", "since", "budget_days",
             "last_seq", "detail")  # fmt: skip
    return told | {name: getattr(alarm, name) for name in names}


def _explain(alarm: Alarm, event: Event) -> str:
    """Why a site was stopped, and how it goes on; a caller reads it in the 503."""
    resume = f"formulary registry resume {alarm.task} --site {alarm.site} --because ..."
    return f"alarm {alarm.seq} (ledger record {event.seq}): {event.body['fact']}; go on with `{resume}`"


def _log(alarm: Alarm, event: Event, outcome: Outcome) -> None:
    level = logging.ERROR if outcome in (Outcome.NO_KEY, Outcome.NO_POLICY) else logging.WARNING
    LOG.log(level, "alarm %d of %s at %s: %s; %s", alarm.seq, alarm.task, alarm.site, outcome,
            event.body["fact"])  # fmt: skip
