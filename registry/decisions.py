"""What else is decided about versions and sites: rejected, challenged, rolled back, suspended, retired."""

from __future__ import annotations

from typing import Any

from imaging.config import read_sites
from imaging.errors import Conflict, Forbidden, RegistryError, TrustError
from imaging.vocabulary import Decision, Statement
from registry.access import Acting, Desk
from registry.events import NETWORK, Event
from registry.evidence import (
    Evidence,
    digest_statements,
    flatten,
    sign_statements,
    verify_package,
)
from registry.ledger import Writer
from registry.package import Contract, read_contract, shelf
from registry.predictions import digest_images
from registry.promotion import find_request
from registry.registration import hold_answers
from registry.state import Placement, State


def reject(acting: Acting, task: str, version: int) -> Event:
    """Say no to what somebody asked for; the request is closed.

    Raises:
        Conflict: nothing is open.
    """
    with acting.ledger.writing() as writer:
        asked = find_request(writer, task, version)
        body = {"version": version, "digest": asked.body["digest"], "because": acting.because,
                "asked": asked.seq, "sites": asked.body["sites"]}  # fmt: skip
        return writer.append(Decision.REJECTED, task, body, acting.signer)


def challenge(acting: Acting, task: str, version: int, sites: tuple[str, ...] = ()) -> list[str]:
    """Put a version beside the champion, to be tried; it answers nobody.

    Args:
        acting: who, and why.
        task: the task.
        version: a registered version whose evidence holds.
        sites: where; empty means in the network and wherever a champion serves.

    Returns:
        The sites.

    Raises:
        Conflict: it is the champion there.
        Forbidden: it was retired.
        TrustError: its evidence does not hold.
    """
    hold_evidence(acting, task, version)
    with acting.ledger.writing() as writer:
        state = writer.state(task)
        chosen = _known(acting, sites) or [site for site, held in state.trail.items() if held]
        put_beside(acting, writer, task, version, chosen)
    return chosen


def hold_evidence(acting: Acting, task: str, version: int) -> Contract:
    """The contract of a registered version whose evidence holds.

    Raises:
        TrustError: it does not.
    """
    package = shelf(acting.places.var, acting.ledger.version(task, version)[0])
    verify_package(package, acting.ledger)
    return read_contract(package)


def put_beside(acting: Acting, writer: Writer, task: str, version: int, sites: list[str]) -> None:
    """Make a version the challenger at some sites, within a transaction.

    Raises:
        Conflict: it is the champion there.
        Forbidden: it was retired.
    """
    state, (digest, _) = writer.state(task), acting.ledger.version(task, version)
    if digest in state.retired:
        raise Forbidden(f"{task} v{version} was retired.", "Register another version.")
    serving = [site for site in sites if _champion(state, site) == digest]
    if serving or not sites:
        where = ", ".join(serving) or "no site: nothing serves yet"
        raise Conflict(f"{task} v{version} cannot challenge at {where}.", "Name other sites: --site.")
    body = {"version": version, "digest": digest, "sites": sites, "because": acting.because}
    event = writer.append(Decision.CHALLENGED, task, body, acting.signer)
    _queue(writer, event, sites, version)


def roll_back(acting: Acting, task: str, sites: tuple[str, ...] = ()) -> dict[str, int]:
    """Put the last champion with valid evidence back, at some sites or wherever there is one.

    One person suffices. What is rolled back serves again only when it is asked for and approved.

    Returns:
        Site -> version that serves now.

    Raises:
        RegistryError: no earlier version there.
        TrustError: earlier versions exist, and the evidence of none of them holds.
    """
    with acting.ledger.writing() as writer:
        state = writer.state(task)
        chosen = _known(acting, sites) or [site for site, held in state.trail.items() if len(held) > 1]
        return put_back(acting, writer, task, chosen)


def put_back(acting: Acting, writer: Writer, task: str, sites: list[str]) -> dict[str, int]:
    """As `roll_back`, within a transaction; at these sites."""
    trail = writer.state(task).trail
    back = {site: find_previous(acting, trail.get(site, []), f"{task} at {site}") for site in sites}
    if not back:
        raise RegistryError(f"{task} has no previous version anywhere.", "See `formulary registry history`.")
    moves = {site: placed.version for site, placed in back.items()}
    body = {"version": max(moves.values()), "sites": moves, "because": acting.because}
    event = writer.append(Decision.ROLLED_BACK, task, body, acting.signer)
    for site, number in moves.items():
        writer.queue(event, site, number)
    return moves


def find_previous(acting: Acting, trail: list[Placement], where: str) -> Placement:
    """The last champion before this one whose evidence holds; RegistryError or TrustError where none is."""
    if len(trail) < 2:
        raise RegistryError(f"{where} has no previous version.", "See `formulary registry history`.")
    reasons = []
    for placed in (one for one in reversed(trail[:-1]) if one.digest != trail[-1].digest):
        try:
            verify_package(shelf(acting.places.var, placed.digest), acting.ledger)
        except TrustError as error:
            reasons.append(error.fact)
        else:
            return placed
    raise TrustError(
        f"Nothing before the champion of {where} holds: {'; '.join(reasons)}", "Suspend the site."
    )


def suspend(acting: Acting, task: str, sites: tuple[str, ...] = ()) -> list[str]:
    """Let a task answer nobody at some sites, or in the whole network when none is named.

    Returns:
        The sites, `*` for the network.

    Raises:
        Conflict: suspended already.
    """
    with acting.ledger.writing() as writer:
        return stop(acting, writer, task, _known(acting, sites) or [NETWORK])


def stop(acting: Acting, writer: Writer, task: str, sites: list[str]) -> list[str]:
    """As `suspend`, within a transaction; at these sites."""
    state = writer.state(task)
    if held := [site for site in sites if site in state.suspended]:
        by = state.suspended[held[0]]
        raise Conflict(f"{task} is suspended at {', '.join(held)} by {by.actor} already.", "")
    writer.append(Decision.SUSPENDED, task, {"sites": sites, "because": acting.because}, acting.signer)
    return sites


def resume(acting: Acting, task: str, sites: tuple[str, ...] = ()) -> list[str]:
    """Let a task answer again, at some sites, or wherever it is suspended when none is named.

    Returns:
        The sites, `*` for the network.

    Raises:
        Conflict: not suspended there.
    """
    with acting.ledger.writing() as writer:
        state = writer.state(task)
        chosen = _known(acting, sites) or list(state.suspended)
        if not chosen or set(chosen) - set(state.suspended):
            where = ", ".join(state.suspended) or "nowhere"
            raise Conflict(f"{task} is suspended {where}, not {', '.join(sites) or 'at any site'}.", "")
        body = {"sites": chosen, "because": acting.because}
        writer.append(Decision.RESUMED, task, body, acting.signer)
    return chosen


def acknowledge(acting: Acting, task: str, sites: tuple[str, ...] = ()) -> list[int]:
    """Close the open alarms of some sites, or of every site when none is named. It resumes nothing.

    Returns:
        Their numbers.

    Raises:
        Conflict: none is open there.
    """
    with acting.ledger.writing() as writer:
        open_ones, chosen = writer.state(task).alarms, _known(acting, sites)
        closed = {site: open_ones[site] for site in chosen or open_ones if site in open_ones}
        if not closed or set(chosen) - set(closed):
            where = ", ".join(open_ones) or "nowhere"
            raise Conflict(f"Alarms of {task} are open: {where}.", "")
        numbers = sorted({event.body["alarm"] for events in closed.values() for event in events})
        body = {"sites": list(closed), "alarms": numbers, "because": acting.because}
        writer.append(Decision.ACKNOWLEDGED, task, body, acting.signer)
    return numbers


def retire(acting: Acting, task: str, version: int) -> Event:
    """End a version: it is never asked for, tried or rolled back to again.

    Raises:
        Conflict: it serves somewhere, or was retired before.
    """
    digest, _ = acting.ledger.version(task, version)
    with acting.ledger.writing() as writer:
        state = writer.state(task)
        serving = [site for site in state.trail if _champion(state, site) == digest]
        if serving:
            raise Conflict(
                f"{task} v{version} serves at {', '.join(serving)}.",
                "Approve another version or roll back first.",
            )
        if digest in state.retired:
            raise Conflict(f"{task} v{version} was retired before.", "")
        body = {"version": version, "digest": digest, "because": acting.because}
        event = writer.append(Decision.RETIRED, task, body, acting.signer)
        _queue(writer, event, sorted({NETWORK, *state.trail, *state.challengers}), version)
        return event


def renew_scores(acting: Acting, task: str, version: int, scores: dict[str, Any]) -> Event:
    """Sign what a version scores on the locked sets as they are now, so that others can be compared with it.

    Of a version that was approved it decides nothing, and spends no use of the sets; else it does.

    Args:
        acting: who scored it again, and why.
        task: the task.
        version: its number.
        scores: the parts of an evaluation statement that `training.evaluation.score_package` gives.
    """
    digest, _ = acting.ledger.version(task, version)
    package = shelf(acting.places.var, digest)
    with acting.ledger.writing() as writer:
        evidence, approved = verify_package(package, acting.ledger), writer.state(task).approved()
        if digest not in approved:
            writer.use(task, digest, digest_images(scores), acting.signer)
        kind = Statement.EVALUATION
        if digest in approved:
            hold_answers(evidence.body(kind), scores)
        sign_statements(package, {kind: {**evidence.body(kind), **scores}}, acting.signer)
        facts = {"version": version, "digest": digest, "because": acting.because,
                 "evidence": evidence.cited | {kind: digest_statements(package)[kind]}}  # fmt: skip
        return writer.append(Decision.RENEWED, task, facts, acting.signer)


def compare_versions(desk: Desk, task: str, first: int, second: int) -> dict[str, Any]:
    """What differs between two versions: contract, parameters, environment, locked sets, scores.

    Returns:
        "facts": path -> [first, second] of everything that differs; "scores": place -> metric -> [first,
        second], each an estimate with its interval.
    """
    pair = []
    for version in (first, second):
        package = shelf(desk.places.var, desk.ledger.version(task, version)[0])
        pair.append((read_contract(package), verify_package(package, desk.ledger)))
    flat = [flatten(_list_facts(*one)) for one in pair]
    paths = sorted({*flat[0], *flat[1]})
    scores = [evidence.body(Statement.EVALUATION) for _, evidence in pair]
    tables = [{"overall": told["overall"], **told["sites"]} for told in scores]
    pairs = {path: [one.get(path) for one in flat] for path in paths}
    return {
        "facts": {path: told for path, told in pairs.items() if told[0] != told[1]},
        "scores": {place: {name: [one.get(place, {}).get(name) for one in tables] for name in told}
                   for place, told in tables[0].items()},
    }  # fmt: skip


def _list_facts(contract: Contract, evidence: Evidence) -> dict[str, Any]:
    made, scores = evidence.body(Statement.PACKAGE), evidence.body(Statement.EVALUATION)
    return {"contract": contract.model_dump(mode="json"), "params": made["params"],
            "environment": made["environment"], "sets": scores["sets"]}  # fmt: skip


def _known(acting: Acting, sites: tuple[str, ...]) -> list[str]:
    """The sites as they are, each held to sites.yaml; `*` names the network."""
    listed = read_sites(acting.places)
    return [site for site in sites if site == NETWORK or listed.site(site)]


def _champion(state: State, site: str) -> str:
    trail = state.trail.get(site)
    return trail[-1].digest if trail else ""


def _queue(writer: Writer, event: Event, sites: list[str], version: int) -> None:
    for site in sites:
        writer.queue(event, site, version)
