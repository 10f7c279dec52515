"""The life of a version: registered, asked for, approved by a second person, rolled back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imaging.config import Places, Sites
from imaging.errors import Conflict, DataError, Forbidden, Refused, RegistryError, TrustError
from imaging.vocabulary import Decision, Slot, Statement
from registry.events import NETWORK, Event
from registry.evidence import (
    Evidence,
    describe_provenance,
    digest_statements,
    sign_statements,
    verify_package,
)
from registry.gates import Policy, Verdict, judge
from registry.ledger import Ledger
from registry.package import digest_package, shelf, shelve
from registry.signing import Signer

STAGES = {
    Statement.EVALUATION: ("evaluate", "evaluation.json"),
    Statement.QUALIFICATION: ("qualify", "qualification.json"),
    Statement.ALARMS: ("reference", "alarms.json"),
}


@dataclass(frozen=True)
class Registration:
    """A registered version; `did` is registered, renewed (its evidence was signed again) or known already."""

    task: str
    version: int
    digest: str
    did: str


def register(places: Places, ledger: Ledger, task: str, signer: Signer) -> Registration:
    """Sign what the pipeline made and give it a number. Idempotent by digest. Nobody trusts it yet.

    Where a known package's stages say something new, or what was signed does not hold any more (a revoked
    key, a damaged file), the evidence is signed again under the same number.

    Raises:
        DataError: a stage has not run, or speaks of another package.
        TrustError: the package on the shelf was changed.
    """
    source = places.stage(task, "package")
    digest = digest_package(source)
    bodies = {kind: _read_body(places, task, kind, digest) for kind in STAGES}
    package = shelve(source, places.var)
    with ledger.writing() as writer:
        numbers = {known: number for _, number, known, _ in ledger.versions(task)}
        if digest in numbers and _is_current(ledger, package, bodies):
            return Registration(task, numbers[digest], digest, "known already")
        statement = describe_provenance(places, task)
        sign_statements(package, {Statement.PACKAGE: statement, **bodies}, signer)
        kind = Decision.RENEWED if digest in numbers else Decision.REGISTERED
        number = numbers.get(digest, len(numbers) + 1)
        body = {"version": number, "digest": digest, "commit": statement["commit"],
                "evidence": digest_statements(package)}  # fmt: skip
        writer.append(kind, task, body, signer)
    return Registration(task, number, digest, str(kind))


def _is_current(ledger: Ledger, package: Path, bodies: dict[Statement, dict[str, Any]]) -> bool:
    """Whether the signed statements hold, and say what the stages say now."""
    try:
        signed = verify_package(package, ledger).statements
    except TrustError:
        return False
    return all(signed.get(kind) == body for kind, body in bodies.items())


def request(
    ledger: Ledger, var: Path, event: Event, judged: tuple[Policy, str, Sites], signer: Signer
) -> tuple[Verdict, Event | None]:
    """Ask for a version: run the gate and write its verdict.

    Args:
        ledger: where the verdict goes.
        var: where packages are kept.
        event: the one that registered the version.
        judged: policy, its digest, and the sites.
        signer: who asks.

    Returns:
        The verdict, and the event; no event when the version is champion at every site that passes.

    Raises:
        Refused: no site passes; the reasons stand in the ledger too.
        TrustError: the package or a statement does not hold.
    """
    policy, policy_digest, sites = judged
    task, number, digest = event.task, int(event.body["version"]), str(event.body["digest"])
    cited = digest_statements(shelf(var, digest))
    verdict = judge(_verified(ledger, var, digest), policy, sites)
    champions = ledger.champions(task)
    wanted = verdict.approvable
    if wanted and all(name in champions and champions[name].version == number for name in wanted):
        return verdict, None
    body = {
        "version": number, "digest": digest, "policy": policy_digest, "approvers": list(policy.approvers),
        "verdict": verdict.model_dump(mode="json"), "sites": wanted,
        "evidence": cited,
    }  # fmt: skip
    with ledger.writing() as writer:
        if cited != digest_statements(shelf(var, digest)):
            raise Conflict(f"The evidence of {task} v{number} was signed again meanwhile.", "Ask again.")
        asked = writer.append(Decision.REQUESTED if wanted else Decision.REFUSED, task, body, signer)
    if not wanted:
        reasons = "; ".join(verdict.network.reasons)
        raise Refused(
            f"{task} v{number} passes at no site: {reasons}.", "Nothing changed; train a better one."
        )
    return verdict, asked


def approve(ledger: Ledger, var: Path, task: str, version: int, reason: tuple[Signer, str]) -> list[str]:
    """Agree to what somebody else asked for: the slots of the approved sites move in one transaction.

    Args:
        ledger: where the decision goes.
        var: where packages are kept.
        task: the task.
        version: the number asked for.
        reason: who agrees, and why.

    Returns:
        The sites where the version serves now.

    Raises:
        Forbidden: the approver asked for it, made it, or is not among the policy's approvers.
        Conflict: nobody asked, or something was decided since.
        TrustError: the package or a statement does not hold any more.
    """
    signer, because = reason
    digest, registered = ledger.version(task, version)
    with ledger.writing() as writer:
        evidence = _verified(ledger, var, digest)
        kinds = (Decision.REQUESTED, Decision.REFUSED, Decision.APPROVED, Decision.ROLLED_BACK)
        asked = writer.latest(task, *kinds)
        if asked is None or asked.kind != Decision.REQUESTED or asked.body["version"] != version:
            last = (
                f"the last decision is {asked.kind} v{asked.body['version']} by {asked.actor}"
                if asked
                else "none"
            )
            raise Conflict(
                f"Nothing is open for {task} v{version}: {last}.",
                f"Ask: formulary registry promote {task} {version}",
            )
        _second_person(signer, asked, {asked.actor, registered.actor, *evidence.signed_by.values()})
        if asked.body["evidence"] != digest_statements(shelf(var, digest)):
            raise Conflict(
                f"The evidence of {task} v{version} was signed again since the gate judged it.",
                f"Ask again: formulary registry promote {task} {version}",
            )
        body = {"version": version, "digest": digest, "because": because, "asked": asked.seq,
                "sites": asked.body["sites"]}  # fmt: skip
        event = writer.append(Decision.APPROVED, task, body, signer)
        for site in [NETWORK, *asked.body["sites"]]:
            writer.queue(event, site, version)
    return list(asked.body["sites"])


def roll_back(
    ledger: Ledger, var: Path, task: str, site: str | None, reason: tuple[Signer, str]
) -> dict[str, int]:
    """Put the previous champion back, at one site or wherever there is one. One person suffices.

    What is rolled back does not become `previous`: it serves again only when it is asked for and approved.

    Returns:
        Site -> version that serves now.

    Raises:
        RegistryError: no previous version there.
        TrustError: the previous version does not hold any more.
    """
    signer, because = reason
    held = ledger.slots(task)
    chosen = [name for name in held if Slot.PREVIOUS in held[name] and site in (None, name)]
    if not chosen:
        raise RegistryError(
            f"{task} has no previous version at {site or 'any site'}.", "See `formulary registry history`."
        )
    for name in chosen:
        _verified(ledger, var, held[name][Slot.PREVIOUS].digest)
    with ledger.writing() as writer:
        moves = {name: held[name][Slot.PREVIOUS].version for name in chosen}
        now = ledger.slots(task)
        if now != held:
            raise Conflict(
                f"The slots of {task} moved meanwhile.", "Look at `formulary registry history`; try again."
            )
        version = max(moves.values())
        body = {"version": version, "sites": moves, "because": because}
        event = writer.append(Decision.ROLLED_BACK, task, body, signer)
        for name, number in moves.items():
            writer.queue(event, name, number)
    return moves


def _second_person(signer: Signer, asked: Event, makers: set[str]) -> None:
    """The approver is nobody who made the version, signed its evidence or asked for it."""
    if signer.identity in makers or signer.key_id == asked.key:
        raise Forbidden(
            f"{signer.identity} made or asked for this version.", "Another person approves: --identity NAME."
        )
    allowed = asked.body["approvers"]
    if allowed and signer.identity not in allowed:
        raise Forbidden(f"{signer.identity} may not approve.", f"The policy names {', '.join(allowed)}.")


def _verified(ledger: Ledger, var: Path, digest: str) -> Evidence:
    return verify_package(shelf(var, digest), ledger)


def _read_body(places: Places, task: str, kind: Statement, digest: str) -> dict[str, Any]:
    stage, name = STAGES[kind]
    path = places.stage(task, stage) / name
    try:
        body: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read.", "Run `dvc repro` first.") from error
    if body.get("package") != digest:
        raise DataError(f"{path} speaks of another package.", "Run `dvc repro`; it makes the stages agree.")
    return body
