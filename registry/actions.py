"""What people do in the registry: one table, from which the commands and the HTTP calls are made.

An action has a name, the scope that it asks for, its arguments (a pydantic model) and a function. Its meaning
and its errors are the same wherever it is called from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from imaging.config import read_params
from imaging.errors import Unreadable
from imaging.recipe import Section
from imaging.vocabulary import Scope
from registry import custody, decisions, profiles, promotion
from registry.access import Acting, Desk
from registry.arguments import (
    Asked,
    Drafted,
    Looked,
    Named,
    Nothing,
    OnTask,
    OnTaskAtSites,
    OnTaskReasoned,
    OnVersionAtSites,
    OnVersionReasoned,
    Pair,
    Shared,
    Tried,
)
from registry.evidence import verify_package
from registry.package import shelf
from registry.trials import conduct

Run = Callable[[Any, Any], dict[str, Any]]  # of an Acting, or of a Desk where it only reads


@dataclass(frozen=True)
class Action:
    """Something that may be done.

    Attributes:
        name: of the command and of the HTTP call.
        help: a sentence or two.
        scope: what the identity must hold.
        arguments: what is asked; `because` is taken from it.
        run: does it; `told` in its answer is for people.
        reads: changes nothing.
    """

    name: str
    help: str
    scope: Scope
    arguments: type[Section]
    run: Run
    reads: bool = False


def _request(acting: Acting, asked: Asked) -> dict[str, Any]:
    if asked.dry_run:
        judged = promotion.judge_version(acting.places, acting.ledger, asked.task, asked.version)
        return {**judged.verdict.model_dump(mode="json"), "asked": None, "told": "Nothing has changed."}
    verdict, event = promotion.request(acting, asked.task, asked.version)
    told = "It is champion at each of these sites already."
    if event:
        command = f"formulary registry approve {asked.task} {asked.version} --because ..."
        told = f"Waits for a second person: {command}"
    return {**verdict.model_dump(mode="json"), "asked": event.seq if event else None, "told": told}


def _approve(acting: Acting, asked: OnVersionAtSites) -> dict[str, Any]:
    sites = promotion.approve(acting, asked.task, asked.version, asked.sites)
    return {"sites": sites, "told": f"{asked.task} v{asked.version} is champion at {', '.join(sites)}."}


def _reject(acting: Acting, asked: OnVersionReasoned) -> dict[str, Any]:
    event = decisions.reject(acting, asked.task, asked.version)
    return {"event": event.seq, "told": f"The request for {asked.task} v{asked.version} is closed."}


def _challenge(acting: Acting, asked: OnVersionAtSites) -> dict[str, Any]:
    sites = decisions.challenge(acting, asked.task, asked.version, asked.sites)
    where = ", ".join("the network" if site == "*" else site for site in sites)
    return {
        "sites": sites,
        "told": f"{asked.task} v{asked.version} is challenger at {where}; it answers nobody.",
    }


def _start_trial(acting: Acting, asked: Tried) -> dict[str, Any]:
    event, needed = conduct.start_trial(acting, asked.task, asked.version, asked.plan(), asked.sites)
    where = ", ".join(event.body["sites"])
    return {"trial": event.seq, "sites": event.body["sites"], "needed": needed,
            "told": f"Trial {event.seq}: {asked.task} v{asked.version} sees what is answered at {where}, and "
            f"answers nobody. One that never differs passes after {needed} subjects."}  # fmt: skip


def _end_trial(acting: Acting, asked: OnTaskReasoned) -> dict[str, Any]:
    event, told = conduct.end_trial(acting, asked.task)
    return {**told, "event": event.seq}


def _report_trial(desk: Desk, asked: OnTask) -> dict[str, Any]:
    return conduct.report_trial(desk, asked.task)


def _set_canary(acting: Acting, asked: Shared) -> dict[str, Any]:
    sites = conduct.set_canary(acting, asked.task, asked.version, asked.weight, asked.sites)
    told = f"answers {100 * asked.weight:g} % of the studies" if asked.weight else "is canary no more"
    return {"sites": sites, "told": f"{asked.task} v{asked.version} {told} at {', '.join(sites)}."}


def _roll_back(acting: Acting, asked: OnTaskAtSites) -> dict[str, Any]:
    moved = decisions.roll_back(acting, asked.task, asked.sites)
    lines = [f"{'network' if site == '*' else site}: {asked.task} v{version} serves again"
             for site, version in moved.items()]  # fmt: skip
    return {"sites": moved, "told": "\n".join(lines)}


def _suspend(acting: Acting, asked: OnTaskAtSites) -> dict[str, Any]:
    sites = decisions.suspend(acting, asked.task, asked.sites)
    where = "the whole network" if "*" in sites else ", ".join(sites)
    return {
        "sites": sites,
        "told": f"{asked.task} answers nobody at {where} until `formulary registry resume`.",
    }


def _resume(acting: Acting, asked: OnTaskAtSites) -> dict[str, Any]:
    sites = decisions.resume(acting, asked.task, asked.sites)
    where = ", ".join("the network" if site == "*" else site for site in sites)
    return {"sites": sites, "told": f"{asked.task} answers again: {where}."}


def _acknowledge(acting: Acting, asked: OnTaskAtSites) -> dict[str, Any]:
    numbers = decisions.acknowledge(acting, asked.task, asked.sites)
    listed = ", ".join(map(str, numbers))
    told = f"Closed alarms of {asked.task}: {listed}. What was suspended stays so until it is resumed."
    return {"alarms": numbers, "told": told}


def _profile(acting: Acting, asked: Drafted) -> dict[str, Any]:
    draft = profiles.read_draft(acting.places.var / "profiles" / asked.draft)
    event = profiles.store_profile(acting, asked.task, draft)
    site, number = draft.profile.site, event.body["number"]
    told = f"{site} is answered by {asked.task} v{draft.version} with its profile {number}."
    return {"site": site, "number": number, "told": told}


def _drop_profile(acting: Acting, asked: OnTaskAtSites) -> dict[str, Any]:
    sites = profiles.drop_profile(acting, asked.task, asked.sites)
    return {"sites": sites, "told": f"{asked.task} answers by its contract again: {', '.join(sites)}."}


def _retire(acting: Acting, asked: OnVersionReasoned) -> dict[str, Any]:
    event = decisions.retire(acting, asked.task, asked.version)
    return {"event": event.seq, "told": f"{asked.task} v{asked.version} is retired; it never serves again."}


def _look(desk: Desk, asked: Looked) -> dict[str, Any]:
    return {"events": [vars(event) for event in desk.ledger.events(asked.task)]}


def _compare(desk: Desk, asked: Pair) -> dict[str, Any]:
    return decisions.compare_versions(desk, asked.task, asked.first, asked.second)


def _verify(desk: Desk, _: Nothing) -> dict[str, Any]:
    count, versions = desk.ledger.verify(), desk.ledger.versions()
    for _task, _number, digest, _event in versions:
        verify_package(shelf(desk.places.var, digest), desk.ledger)
    return {"events": count, "packages": len(versions),
            "told": f"{count} events and {len(versions)} packages hold."}  # fmt: skip


def _back_up(acting: Acting, _: Nothing) -> dict[str, Any]:
    path = custody.back_up(acting)
    return {"name": path.name, "told": f"Ledger and packages are in {path}. Private keys are not."}


def _restore(acting: Acting, asked: Named) -> dict[str, Any]:
    backup = acting.places.var / "backups" / asked.name
    if not backup.is_file():
        raise Unreadable(f"There is no backup {asked.name}.", "See the names in var/backups.")
    told = custody.restore(acting.places, acting.ledger, backup, acting.signer)
    return {**told, "told": f"{told['events']} events and {told['packages']} packages were put back."}


def perform(action: Action, desk: Desk, asked: Section) -> dict[str, Any]:
    """Do what is asked; a task that nobody knows is refused before anything happens.

    Raises:
        UnknownTask: params.yaml has no such task, and the ledger no version of it.
    """
    task, params = getattr(asked, "task", None), read_params(desk.places)
    if task is not None and not any(name == task for name, *_ in desk.ledger.versions(task)):
        params.task(task)
    return action.run(desk, asked)


ACTIONS = {
    action.name: action
    for action in (
        Action("request", "Ask for VERSION of TASK: the gate judges it by site; a second person approves.",
               Scope.PROMOTE, Asked, _request),
        Action("promote", "Ask for VERSION of TASK: the same as request.", Scope.PROMOTE, Asked, _request),
        Action("approve", "Agree to VERSION of TASK, which another asked for: it serves where it passed.",
               Scope.APPROVE, OnVersionAtSites, _approve),
        Action("reject", "Say no to a request for VERSION of TASK; it is closed.",
               Scope.APPROVE, OnVersionReasoned, _reject),
        Action("challenge", "Put VERSION of TASK beside the champion, to be tried; it answers nobody.",
               Scope.PROMOTE, OnVersionAtSites, _challenge),
        Action("trial", "Let VERSION of TASK see what champions answer, in a silent trial by a plan.",
               Scope.PROMOTE, Tried, _start_trial),
        Action("trial-report", "The newest trial of TASK in numbers, and its verdict so far.",
               Scope.READ_AUDIT, OnTask, _report_trial, reads=True),
        Action("end-trial", "End the trial of TASK; its verdict and its numbers stand in the ledger.",
               Scope.PROMOTE, OnTaskReasoned, _end_trial),
        Action("canary", "Let VERSION of TASK, which another asked for, answer some studies, after a trial.",
               Scope.APPROVE, Shared, _set_canary),
        Action("rollback", "Put the last champion of TASK with valid evidence back. One person suffices.",
               Scope.PROMOTE, OnTaskAtSites, _roll_back),
        Action("suspend", "Let TASK answer nobody at some sites, or in the whole network.",
               Scope.PROMOTE, OnTaskAtSites, _suspend),
        Action("resume", "Let TASK answer again.", Scope.PROMOTE, OnTaskAtSites, _resume),
        Action("acknowledge", "Close the open alarms of TASK at some sites: somebody has looked into them.",
               Scope.CONTAIN, OnTaskAtSites, _acknowledge),
        Action("profile", "Let a site's answers of TASK follow DRAFT, its own settings, which another made.",
               Scope.APPROVE, Drafted, _profile),
        Action("drop-profile", "Take the profiles of TASK back: sites are answered by the contract again.",
               Scope.APPROVE, OnTaskAtSites, _drop_profile),
        Action("retire", "End VERSION of TASK: it never serves again.",
               Scope.PROMOTE, OnVersionReasoned, _retire),
        Action("history", "Every decision, oldest first; of TASK, if one is named.",
               Scope.READ_AUDIT, Looked, _look, reads=True),
        Action("diff",
               "What differs between versions FIRST and SECOND of TASK: contract, parameters, sets, scores.",
               Scope.READ_AUDIT, Pair, _compare, reads=True),
        Action("verify", "Read the ledger and every package again; name the first thing that does not hold.",
               Scope.READ_AUDIT, Nothing, _verify, reads=True),
        Action("backup", "Write ledger and packages into one file under var/backups.",
               Scope.PROMOTE, Nothing, _back_up),
        Action("restore", "Put back what a backup has and the ledger lacks; nothing that is here gives way.",
               Scope.PROMOTE, Named, _restore),
    )
}  # fmt: skip
