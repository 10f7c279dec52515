"""What the pipeline made becomes a version: signed, numbered, kept on the shelf. Nobody trusts it yet."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imaging.config import Places
from imaging.errors import DataError, Refused, TrustError
from imaging.vocabulary import Decision, Statement
from registry.evidence import describe_provenance, digest_statements, sign_statements, verify_package
from registry.ledger import Ledger
from registry.package import digest_package, shelve
from registry.predictions import digest_images
from registry.qualified import read_host
from registry.signing import Signer

SLACK = 0.01  # another engine or machine may round otherwise
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
    key, a damaged file), the evidence is signed again under the same number. That the package was scored on
    the locked sets is recorded too, once.

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
        found = read_host(places.var, digest)
        speed = {"measured": found} if found else {}
        if digest in numbers and _is_current(ledger, package, bodies, speed):
            return Registration(task, numbers[digest], digest, "known already")
        if digest in writer.state(task).approved():
            hold_answers(_last_evaluation(package, ledger), bodies[Statement.EVALUATION])
        uses = writer.use(task, digest, digest_images(bodies[Statement.EVALUATION]), signer)
        bodies[Statement.EVALUATION] |= {"uses": uses}
        statement = describe_provenance(places, task)
        bodies[Statement.QUALIFICATION] |= speed
        sign_statements(package, {Statement.PACKAGE: statement, **bodies}, signer)
        kind = Decision.RENEWED if digest in numbers else Decision.REGISTERED
        number = numbers.get(digest, len(numbers) + 1)
        body = {"version": number, "digest": digest, "commit": statement["commit"],
                "evidence": digest_statements(package)}  # fmt: skip
        writer.append(kind, task, body, signer)
    return Registration(task, number, digest, str(kind))


def _is_current(
    ledger: Ledger, package: Path, bodies: dict[Statement, dict[str, Any]], speed: dict[str, Any]
) -> bool:
    """Whether the signed statements hold and say what the stages say now; another speed alone is no news."""
    try:
        signed = verify_package(package, ledger).statements
    except TrustError:
        return False
    measured = signed.get(Statement.QUALIFICATION, {}).pop("measured", None)
    signed.get(Statement.EVALUATION, {}).pop("uses", None)
    return all(signed.get(kind) == body for kind, body in bodies.items()) and bool(measured or not speed)


def _last_evaluation(package: Path, ledger: Ledger) -> dict[str, Any]:
    """What was signed of a package before; {} where that does not hold any more, and is signed anew."""
    try:
        return verify_package(package, ledger).body(Statement.EVALUATION)
    except TrustError:
        return {}


def hold_answers(old: dict[str, Any], new: dict[str, Any]) -> None:
    """An approved version's answers stand: others are compared with them.

    Args:
        old: the evaluation that is signed.
        new: the one that would take its place; further images are welcome.

    Raises:
        Refused: an image that both have was answered otherwise.
    """
    known = {row["sha256"]: row for row in old.get("predictions", ())}
    for row in new.get("predictions", ()):
        before = known.get(row["sha256"], {})
        for name in set(row) & set(before):
            if not _alike(before[name], row[name]):
                raise Refused(
                    f"An approved version now answers {name} otherwise than what was signed.",
                    "Its evidence stands; register the package as another version.",
                )


def _alike(old: Any, new: Any) -> bool:
    if isinstance(old, int | float) and isinstance(new, int | float):
        return abs(old - new) <= SLACK
    return bool(old == new)


def _read_body(places: Places, task: str, kind: Statement, digest: str) -> dict[str, Any]:
    stage, name = STAGES[kind]
    path = places.stage(task, stage) / name
    try:
        body: dict[str, Any] = json.loads(path.read_text(), parse_constant=_refuse_constant)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read.", "Run `dvc repro` first.") from error
    if body.get("package") != digest:
        raise DataError(f"{path} speaks of another package.", "Run `dvc repro`; it makes the stages agree.")
    return body


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
