"""The life of a version: registered, asked for, approved by a second person, rolled back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from imaging.config import Places, read_sites
from imaging.errors import Conflict, Forbidden, Refused
from imaging.vocabulary import Decision, Statement
from registry.access import Acting
from registry.changes import judge_changes
from registry.events import NETWORK, Event, count_uses
from registry.evidence import (
    Evidence,
    find_cited,
    verify_package,
)
from registry.gates import Standing, Verdict, judge
from registry.ledger import Ledger, Writer
from registry.package import read_contract, shelf
from registry.policy import Policy, digest_policy, read_policy
from registry.predictions import digest_images
from registry.signing import Signer
from registry.state import FOLDS, Placement, State

TOLD = set(FOLDS) - {Decision.REGISTERED, Decision.RENEWED}


@dataclass(frozen=True)
class Judgement:
    """A verdict, and what it rests on.

    Attributes:
        verdict: of the gate.
        evidence: of the version.
        policy: digest of the policy.
        approvers: whom the policy names; empty means anybody else.
        moved: the ledger record that had last moved a slot of the task.
    """

    verdict: Verdict
    evidence: Evidence
    policy: str
    approvers: tuple[str, ...]
    moved: int


def judge_version(places: Places, ledger: Ledger, task: str, version: int) -> Judgement:
    """What the gate says of a version today; nothing is written.

    Raises:
        TrustError: the package or a statement does not hold.
    """
    digest, _ = ledger.version(task, version)
    evidence = verify_package(shelf(places.var, digest), ledger)
    policy, decided = read_policy(task, places.policies), ledger.state(task)
    policy_digest = digest_policy(task, places.policies)
    sets = digest_images(evidence.statements.get(Statement.EVALUATION, {"sets": {}}))
    uses = count_uses(ledger.signed())
    numbers = {one: uses[one].index(digest) + 1 for one in sets.values() if digest in uses.get(one, [])}
    champions = {site: held[-1] for site, held in decided.trail.items() if held}
    first = _open_all(places, ledger, decided.first)
    change = _judge_change(places, policy, first.get(NETWORK), evidence)
    standing = Standing(_open_all(places, ledger, champions), first, numbers, change)
    verdict = judge(evidence, policy, read_sites(places), standing)
    return Judgement(verdict, evidence, policy_digest, policy.approvers, decided.moved)


def _still(writer: Writer, task: str, judged: Judgement) -> State:
    """The task's state, if what the gate compared is still there.

    Raises:
        Conflict: slots moved, or the evidence was signed again.
    """
    state = writer.state(task)
    if state.moved != judged.moved:
        by = next(event for event in writer.events() if event.seq == state.moved)
        raise Conflict(f"{by.actor} moved the slots of {task} meanwhile ({by.kind}).", "Ask again.")
    if judged.evidence.cited != _cited(writer, judged.evidence.digest):
        raise Conflict(f"The evidence of this version of {task} was signed again meanwhile.", "Ask again.")
    return state


def _judge_change(
    places: Places, policy: Policy, first: tuple[int, Evidence] | None, candidate: Evidence
) -> list[str]:
    """Why the change-control plan does not cover what differs from the first approved version."""
    if first is None or not policy.changes:
        return []
    old, new = ((read_contract(shelf(places.var, one.digest)), one) for one in (first[1], candidate))
    return judge_changes(old, new, policy.changes)


def _open_all(
    places: Places, ledger: Ledger, placed: dict[str, Placement]
) -> dict[str, tuple[int, Evidence]]:
    """The evidence of placements, each package opened once."""
    opened = {one.digest: verify_package(shelf(places.var, one.digest), ledger) for one in placed.values()}
    return {site: (one.version, opened[one.digest]) for site, one in placed.items()}


def request(acting: Acting, task: str, version: int) -> tuple[Verdict, Event | None]:
    """Ask for a version: run the gate and write its verdict.

    Returns:
        The verdict, and the event; no event when the version is champion at every site that passes.

    Raises:
        Refused: no site passes; the reasons stand in the ledger too.
        Conflict: somebody else asked for it already; asking again oneself changes nothing.
        Forbidden: it was retired.
        TrustError: the package or a statement does not hold.
    """
    ledger = acting.ledger
    digest, _ = ledger.version(task, version)
    judged = judge_version(acting.places, ledger, task, version)
    verdict, champions, wanted = judged.verdict, ledger.champions(task), judged.verdict.approvable
    if wanted and all(name in champions and champions[name].version == version for name in wanted):
        return verdict, None
    with ledger.writing() as writer:
        state = _still(writer, task, judged)
        if asked := _find_open(state, task, version, judged):
            if asked.actor == acting.signer.actor:
                return verdict, asked
            raise Conflict(
                f"{asked.actor} asked for {task} v{version} already (ledger record {asked.seq}).",
                f"A second person agrees: formulary registry approve {task} {version} --because ...",
            )
        body = {
            "version": version, "digest": digest, "policy": judged.policy,
            "approvers": list(judged.approvers), "verdict": verdict.model_dump(mode="json"),
            "sites": wanted, "evidence": judged.evidence.cited, "generation": state.moved,
        }  # fmt: skip
        asked = writer.append(Decision.REQUESTED if wanted else Decision.REFUSED, task, body, acting.signer)
    if not wanted:
        reasons = "; ".join(verdict.network.reasons)
        raise Refused(
            f"{task} v{version} passes at no site: {reasons}.", "Nothing changed; train a better one."
        )
    return verdict, asked


def _find_open(state: State, task: str, version: int, judged: Judgement) -> Event | None:
    """The request for a version, with this digest and this evidence, that waits already."""
    if judged.evidence.digest in state.retired:
        raise Forbidden(f"{task} v{version} was retired.", "Register another version.")
    asked = state.open.get(version)
    same = asked and asked.body["evidence"] == judged.evidence.cited and asked.body["policy"] == judged.policy
    return asked if same else None


def approve(acting: Acting, task: str, version: int, sites: tuple[str, ...] = ()) -> list[str]:
    """Agree to what somebody else asked for: the slots of the approved sites move in one transaction.

    Args:
        acting: who agrees, and why.
        task: the task.
        version: the number asked for.
        sites: some of the sites that passed; empty means all of them.

    Returns:
        The sites where the version serves now.

    Raises:
        Forbidden: the approver asked for it, made it, or is not among the policy's approvers.
        Conflict: nobody asked, or something was decided since.
        TrustError: the package or a statement does not hold any more.
    """
    with agreeing(acting, task, version, sites) as (writer, state, body):
        event = writer.append(Decision.APPROVED, task, {**body, "generation": state.moved}, acting.signer)
        for site in [NETWORK, *body["sites"]]:
            writer.queue(event, site, version)
    return list(body["sites"])


@contextmanager
def agreeing(
    acting: Acting, task: str, version: int, sites: tuple[str, ...] = ()
) -> Iterator[tuple[Writer, State, dict[str, Any]]]:
    """A transaction in which somebody may agree to a request, with what the record of it has to say.

    Raises:
        Forbidden, Conflict, TrustError: as `approve`.
    """
    ledger, signer = acting.ledger, acting.signer
    digest, _ = ledger.version(task, version)
    with ledger.writing() as writer:
        find_request(writer, task, version)  # before the gate's work, so that the winner is named at once
    judged = judge_version(acting.places, ledger, task, version)
    with ledger.writing() as writer:
        asked = find_request(writer, task, version)
        state = _still(writer, task, judged)
        makers = {asked.actor, *state.makers[digest], *judged.evidence.signed_by.values()}
        _second_person(signer, asked, makers)
        if (asked.body["evidence"], asked.body["policy"]) != (judged.evidence.cited, judged.policy):
            raise Conflict(
                f"The policy, or the evidence of {task} v{version}, is another one since the gate judged it.",
                f"Ask again: formulary registry promote {task} {version}",
            )
        chosen = _choose(asked, judged.verdict.approvable, sites)
        yield writer, state, {"version": version, "digest": digest, "because": acting.because,
                              "asked": asked.seq, "sites": chosen}  # fmt: skip


def find_request(writer: Writer, task: str, version: int) -> Event:
    """The request for a version that waits for a second person.

    Raises:
        Conflict: there is none; the last decision is named, and who took it.
    """
    state = writer.state(task)
    if version in state.open:
        return state.open[version]
    decided = [event for event in writer.events() if event.task == task and event.kind in TOLD]
    last = "none"
    if decided:
        last = f"the last decision is {decided[-1].kind} by {decided[-1].actor}"
        if "version" in decided[-1].body:
            last = last.replace(" by ", f" v{decided[-1].body['version']} by ")
    raise Conflict(
        f"Nothing is open for {task} v{version}: {last}.",
        f"Ask: formulary registry promote {task} {version}",
    )


def _cited(writer: Writer, digest: str) -> dict[str, str]:
    record = find_cited(writer.events(), digest)
    return dict(record.body["evidence"]) if record else {}


def _choose(asked: Event, passing: list[str], sites: tuple[str, ...]) -> list[str]:
    """The sites that were asked for, named here, and pass today, too."""
    passed = [name for name in asked.body["sites"] if name in passing]
    if (unknown := set(sites) - set(passed)) or not passed:
        where = ", ".join(sorted(unknown)) or "any site"
        raise Forbidden(f"The gate did not pass {where}.", f"It passed {', '.join(passed) or 'none'}.")
    return [name for name in passed if not sites or name in sites]


def _second_person(signer: Signer, asked: Event, makers: set[str]) -> None:
    """The approver is nobody who made the version, signed its evidence or asked for it."""
    own_key = signer.key_id == asked.key and not signer.speaks_for
    if signer.actor in makers or own_key:
        raise Forbidden(
            f"{signer.actor} made or asked for this version.", "Another person approves: --identity NAME."
        )
    allowed = asked.body["approvers"]
    if allowed and signer.actor not in allowed:
        raise Forbidden(f"{signer.actor} may not approve.", f"The policy names {', '.join(allowed)}.")
