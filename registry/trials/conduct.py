"""A silent trial is started, looked at and ended; a canary is set after one that was passed."""

from __future__ import annotations

from typing import Any

from imaging.config import read_sites
from imaging.errors import Conflict, Forbidden, RegistryError
from imaging.vocabulary import Decision, Endpoint, Kind, Scope, TrialVerdict
from registry.access import Acting, Desk
from registry.decisions import hold_evidence, put_beside
from registry.events import Event
from registry.package import Contract, read_contract, shelf
from registry.promotion import agreeing
from registry.state import State
from registry.trials.plan import Plan
from registry.trials.report import report
from registry.trials.rows import open_rows
from registry.trials.stopping import count_needed

TRUTH_SCOPE = Scope.PROMOTE  # of who says what cases really were
FACTS = ("after_subjects", "cases", "subjects", "labelled", "dropped", "failures", "disagreement", "accuracy",
         "deciding", "needed_at_a_site", "earlier_trials")  # fmt: skip


def start_trial(
    acting: Acting, task: str, version: int, plan: Plan, sites: tuple[str, ...] = ()
) -> tuple[Event, int]:
    """Register a silent trial: the version sees what champions answer, and nobody sees what it says.

    Args:
        acting: who, and why.
        task: the task.
        version: a registered version whose evidence holds; it becomes the challenger.
        plan: size, margin and the rest, written before the first case.
        sites: where; empty means wherever a champion serves.

    Returns:
        The record, and after how many subjects a challenger passes that never differs.

    Raises:
        Conflict: a trial or a canary is on, or the version is the champion there, or nothing serves there.
        Forbidden: it was retired.
        RegistryError: the plan cannot be passed, or asks of masks what is asked of yes or no.
        TrustError: its evidence does not hold.
    """
    contract = hold_evidence(acting, task, version)
    _check_plan(plan, contract.kind)
    needed = count_needed(plan)
    if needed is None:
        least = count_needed(plan.model_copy(update={"size": 100_000}))
        raise RegistryError(
            f"Even a challenger that never differs would not pass with {plan.size} subjects.",
            f"Take a larger margin, or a size well over {least}.",
        )
    digest, _ = acting.ledger.version(task, version)
    with acting.ledger.writing() as writer:
        state = writer.state(task)
        chosen = _choose(acting, state, task, sites)
        _compare_words(acting, contract, {state.trail[site][-1].digest for site in chosen})
        put_beside(acting, writer, task, version, chosen)
        body = {"version": version, "digest": digest, "sites": chosen, "because": acting.because,
                "plan": plan.model_dump(mode="json"), "stop": "betting e-process by subject"}  # fmt: skip
        return writer.append(Decision.TRIAL_STARTED, task, body, acting.signer), needed


def _check_plan(plan: Plan, kind: Kind) -> None:
    if plan.endpoint is Endpoint.ACCURACY and kind is Kind.SEGMENTATION:
        raise RegistryError(
            "Late labels say yes or no, and this task answers with masks.", "Try it by --endpoint agreement."
        )


def _compare_words(acting: Acting, contract: Contract, champions: set[str]) -> None:
    for digest in champions:
        other = read_contract(shelf(acting.places.var, digest))
        if (other.kind, other.classes, other.positive) != (
            contract.kind,
            contract.classes,
            contract.positive,
        ):
            raise RegistryError(
                f"{contract.task} now answers {', '.join(other.classes)}; this version answers "
                f"{', '.join(contract.classes)}.",
                "Findings in other words cannot be compared.",
            )


def _choose(acting: Acting, state: State, task: str, sites: tuple[str, ...]) -> list[str]:
    serving, listed = state.champions(), read_sites(acting.places)
    for site in sites:
        listed.site(site)
    if state.trials or state.canaries:
        where, what = ("trial", state.trials) if state.trials else ("canary", state.canaries)
        version = next(iter(what.values())).placed.version  # type: ignore[attr-defined]
        raise Conflict(f"A {where} of {task} v{version} is on at {', '.join(what)}.", "End it first.")
    if absent := set(sites) - set(serving):
        raise Conflict(f"No version of {task} serves at {', '.join(sorted(absent))}.", "Name other sites.")
    return list(sites or serving)


def report_trial(desk: Desk, task: str) -> dict[str, Any]:
    """The newest trial of a task in numbers; see `registry.trials.report`.

    Raises:
        Conflict: there never was one.
    """
    started = [event for event in desk.ledger.signed()
               if event.task == task and event.kind == Decision.TRIAL_STARTED]  # fmt: skip
    if not started:
        raise Conflict(f"{task} has had no trial.", "Start one: formulary services trial TASK VERSION ...")
    event, rows = started[-1], open_rows(desk.places.var)
    plan, body = Plan.model_validate(event.body["plan"]), event.body
    running = [site for site, one in desk.ledger.state(task).trials.items() if one.seq == event.seq]
    told = report(plan, rows.read(event.seq), rows.dropped(event.seq))
    earlier = sum(one.body["digest"] == body["digest"] for one in started[:-1])
    return {"task": task, "trial": event.seq, "version": body["version"], "started": event.at,
            "sites_planned": body["sites"], "running_at": running, "plan": body["plan"],
            "earlier_trials": earlier, **told}  # fmt: skip


def end_trial(acting: Acting, task: str) -> tuple[Event, dict[str, Any]]:
    """End the trial of a task, and write its verdict and its numbers into the ledger.

    Returns:
        The record, and the report.

    Raises:
        Conflict: none goes on.
    """
    trials = acting.ledger.state(task).trials
    if not trials:
        raise Conflict(f"No trial of {task} goes on.", "See `formulary registry history`.")
    told = report_trial(acting, task)
    verdict = told["verdict"] if told["verdict"] != TrialVerdict.RUNNING else TrialVerdict.UNDECIDED
    trial = next(iter(trials.values()))
    body = {"version": trial.placed.version, "digest": trial.placed.digest, "trial": trial.seq,
            "sites": list(trials), "verdict": str(verdict), "because": acting.because,
            **{name: told[name] for name in FACTS}}  # fmt: skip
    with acting.ledger.writing() as writer:
        if not writer.state(task).trials:
            raise Conflict(f"The trial of {task} was ended meanwhile.", "See `formulary registry history`.")
        event = writer.append(Decision.TRIAL_ENDED, task, body, acting.signer)
    words = told["told"] if verdict == told["verdict"] else "Ended before there was a verdict."
    return event, {**told, "verdict": str(verdict), "running_at": [], "told": words}


def set_canary(
    acting: Acting, task: str, version: int, weight: float, sites: tuple[str, ...] = ()
) -> list[str]:
    """Let a version answer a share of the studies where it passed the gate and its trial.

    It asks for all that an approval asks for: an open request, a second person, evidence that holds, a policy
    that has not changed. A weight of 0 ends it, whoever asked or made it.

    Args:
        acting: who, and why.
        task: the task.
        version: the number asked for.
        weight: the share of studies, 0 to `MOST_WEIGHT`.
        sites: some of those; empty means all of them.

    Returns:
        The sites.

    Raises:
        Forbidden: it has not passed a trial there, or as `approve`.
        Conflict: there is nothing to end; or as `approve`.
        TrustError: the package or a statement does not hold.
    """
    if weight == 0:
        return _end_canary(acting, task, version, sites)
    with agreeing(acting, task, version, sites) as (writer, state, body):
        passed = [site for site, trial in state.passed.items() if trial.placed.digest == body["digest"]]
        chosen = [site for site in body["sites"] if site in passed]
        if not chosen or (sites and set(sites) - set(chosen)):
            raise Forbidden(
                f"{task} v{version} has passed no trial against what serves at "
                f"{', '.join(set(body['sites']) - set(chosen))}.",
                "A canary follows a trial: formulary services trial TASK VERSION ...",
            )
        writer.append(Decision.CANARY_SET, task, {**body, "sites": chosen, "weight": weight}, acting.signer)
    return chosen


def _end_canary(acting: Acting, task: str, version: int, sites: tuple[str, ...]) -> list[str]:
    digest, _ = acting.ledger.version(task, version)
    with acting.ledger.writing() as writer:
        held = [site for site, one in writer.state(task).canaries.items() if one.placed.digest == digest]
        chosen = [site for site in held if not sites or site in sites]
        if not chosen or set(sites) - set(chosen):
            raise Conflict(f"{task} v{version} is canary at {', '.join(held) or 'no site'}.", "")
        body = {"version": version, "digest": digest, "sites": chosen, "weight": 0, "because": acting.because}
        writer.append(Decision.CANARY_SET, task, body, acting.signer)
    return chosen
