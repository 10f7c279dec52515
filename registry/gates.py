"""The gate: a pure function from evidence, policy and what stands to a verdict, by site.

It makes its bounds itself, of the statement's predictions, at the confidence that the policy leaves for this
use of the locked set (docs/decisions/0010). The statement's own intervals are for readers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from imaging.config import Sites
from imaging.errors import DataError
from imaging.vocabulary import SiteKind, Split, Statement
from registry.bounds import Comparison, Shown, compare_versions, hold
from registry.events import NETWORK
from registry.evidence import Evidence
from registry.policy import Bounds, Policy
from registry.predictions import Predictions, digest_images, read_predictions

Placed = dict[str, tuple[int, Evidence]]
"""Site, or `*` for the network -> number and evidence of a version."""


@dataclass(frozen=True)
class Standing:
    """What the ledger says beside the evidence.

    Attributes:
        champions: the version that serves, at each site and in the network.
        first: the version that was approved there first.
        uses: what `digest_images` gives of a locked set -> which use of it this package is, 1, 2, ...
        change: why the change-control plan does not cover what changed; empty where it does.
    """

    champions: Placed = field(default_factory=dict)
    first: Placed = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    change: list[str] = field(default_factory=list)


class Use(BaseModel):
    """Which use of a locked set's images this is, of how many, and the two-sided confidence left for it."""

    model_config = ConfigDict(frozen=True)
    digest: str
    use: int
    of: int
    confidence: float


class Finding(BaseModel):
    """Passed or not, and why; `reasons` says what was compared either way."""

    model_config = ConfigDict(frozen=True)
    passed: bool
    reasons: tuple[str, ...]
    comparisons: tuple[Comparison, ...] = ()


class Verdict(BaseModel):
    """What the gate says.

    Attributes:
        network: over all internal sites; no site passes when it fails.
        sites: each site by itself.
        uses: name of each locked set -> its use.
    """

    model_config = ConfigDict(frozen=True)
    network: Finding
    sites: dict[str, Finding]
    uses: dict[str, Use] = {}

    @property
    def approvable(self) -> list[str]:
        """Sites where the version may serve once a second person agrees."""
        return [name for name, finding in self.sites.items() if finding.passed]


@dataclass(frozen=True)
class _Case:
    """What is judged, and beside what; an opponent that cannot be read is the reason why."""

    digest: str
    new: Predictions
    standing: Standing
    uses: dict[str, Use]
    others: dict[str, Predictions | str]

    def opponents(self, place: str) -> Iterator[tuple[str, Predictions | str]]:
        """What it is and what it answered, of each version to be compared with, once."""
        seen = {self.digest}
        for word, placed in (("champion", self.standing.champions), ("first approved", self.standing.first)):
            number, evidence = placed.get(place, (0, None))
            if evidence and evidence.digest not in seen:
                seen.add(evidence.digest)
                yield f"{word} v{number}", self.others[evidence.digest]


def judge(evidence: Evidence, policy: Policy, sites: Sites, standing: Standing) -> Verdict:
    """Hold a version to the policy, and beside what serves and what was approved first.

    Args:
        evidence: signed, already verified.
        policy: of the same task.
        sites: all sites that the task is asked at.
        standing: what the ledger says.
    """
    evaluation = evidence.statements.get(Statement.EVALUATION, {})
    new, faults = _read(evaluation, sites)
    uses = _count_uses(evaluation, policy, standing) if new else {}
    reasons = (*_find_gaps(evidence, policy), *standing.change, *faults)
    if reasons or new is None:
        finding = Finding(passed=False, reasons=reasons)
        return Verdict(network=finding, sites=dict.fromkeys(sites.sites, finding), uses=uses)
    case = _Case(evidence.digest, new, standing, uses, _read_others(standing))
    network = _judge_place(case, NETWORK, new.sets == Split.TEST, policy.network)
    found: dict[str, Finding] = {}
    for name, site in sites.sites.items():
        bounds = policy.internal if site.kind is SiteKind.INTERNAL else policy.external
        found[name] = finding = _judge_place(case, name, new.sites == name, bounds)
        if not network.passed:
            failed = ("the network's bounds are not met", *finding.reasons)
            found[name] = finding.model_copy(update={"passed": False, "reasons": failed})
    return Verdict(network=network, sites=found, uses=uses)


def _count_uses(evaluation: dict[str, Any], policy: Policy, standing: Standing) -> dict[str, Use]:
    """Of each set of the evaluation that the ledger knows it was scored on."""
    return {
        name: Use(digest=digest, use=use, of=policy.test_set.uses, confidence=policy.confidence_at(use))
        for name, digest in digest_images(evaluation).items()
        if (use := standing.uses.get(digest))
    }


def _find_gaps(evidence: Evidence, policy: Policy) -> Iterator[str]:
    """What no score makes up for: statements, a qualified engine, its speed, size, robustness."""
    missing = [kind for kind in policy.statements if kind not in evidence.statements]
    yield from (f"no {kind} statement" for kind in missing)
    scores = evidence.statements.get(Statement.EVALUATION, {})
    checked = evidence.statements.get(Statement.QUALIFICATION, {})
    engine = str(scores.get("engine"))
    if scores and checked and _find(checked, "engines", engine, "passed") is not True:
        yield f"{engine} did not pass qualification"
    elif scores and checked:
        yield from hold_engine(engine, checked["engines"][engine], policy)
    if policy.robustness:
        drop = _find(scores, "robustness", "groups", "held_out", "drop", "high")
        yield from _limit(
            "the relative drop under corruptions never trained on", drop, policy.robustness.drop
        )
    if policy.latency_ms:
        spent = _find(checked, "measured", "ms_per_batch", engine, "1")
        yield from _limit(f"the time of one image on {engine}, in ms,", spent, policy.latency_ms)
    if policy.size_bytes:
        yield from _limit("the model's size in bytes", scores.get("model_bytes"), policy.size_bytes)


def hold_engine(name: str, told: dict[str, Any], policy: Policy) -> Iterator[str]:
    """Why an engine changes more than the policy allows, by what its qualification says of it."""
    for what, most in policy.engines.model_dump().items():
        yield from _limit(f"what {name} changes, in {what},", told.get(what), most)


def _find(body: Any, *path: str) -> Any:
    """What stands at the end of a path of keys; None where it breaks off."""
    for key in path:
        body = body.get(key) if isinstance(body, dict) else None
    return body


def _limit(what: str, found: Any, most: float) -> Iterator[str]:
    if not isinstance(found, int | float) or math.isnan(found):
        again = "run `dvc repro -f -s qualify@TASK` and register it again"
        yield f"{what} was not measured, and {most:g} is the limit; {again}"
    elif found > most:
        yield f"{what} is {found:g}, and {most:g} is the limit"


def _read(evaluation: dict[str, Any], sites: Sites) -> tuple[Predictions | None, list[str]]:
    """The predictions, and what is wrong with them."""
    if not evaluation:
        return None, []  # that it is missing is said already
    try:
        new = read_predictions(evaluation)
    except DataError as error:
        return None, [str(error)]
    strangers = sorted(set(new.sites.tolist()) - set(sites.sites))
    return new, [f"{name} was scored, and sites.yaml lists no such site" for name in strangers]


def _read_others(standing: Standing) -> dict[str, Predictions | str]:
    """Digest -> predictions of each version to be compared with, or why there are none."""
    found: dict[str, Predictions | str] = {}
    versions = (*standing.champions.values(), *standing.first.values())
    for digest, evidence in {evidence.digest: evidence for _, evidence in versions}.items():
        try:
            found[digest] = read_predictions(evidence.statements.get(Statement.EVALUATION, {}))
        except DataError as error:
            found[digest] = error.fact
    return found


def _judge_place(case: _Case, place: str, rows: NDArray[np.bool_], bounds: Bounds) -> Finding:
    here = case.new.take(rows)
    sets = np.unique(here.sets).tolist()
    spent = [reason for name in sets for reason in _find_spent(name, case.uses.get(name))]
    if spent or not sets:
        return Finding(passed=False, reasons=tuple(spent) or ("no image of it was scored",))
    sure = max(case.uses[name].confidence for name in sets)
    others = list(case.opponents(place))
    shown = list(hold(here, others, bounds, sure))
    if bounds.margin:
        for against, other in others:
            shown += compare_versions((here, other), against, bounds, sure)
        if not others:
            shown.append(Shown(True, "no other version was approved here before, to be compared with"))
    failed = tuple(one.reason for one in shown if not one.passed)
    return Finding(
        passed=not failed,
        reasons=failed or tuple(one.reason for one in shown),
        comparisons=tuple(one.comparison for one in shown if one.comparison),
    )


def _find_spent(name: str, use: Use | None) -> Iterator[str]:
    """Why a locked set says nothing of this version any more."""
    if use is None:
        yield f"the ledger does not know that it was scored on the {name} set; register it again"
    elif use.use > use.of:
        yield (f"it is package {use.use} that was scored on the {name} set {use.digest[:19]}, and the policy "
               f"allows {use.of}; lock a new set")  # fmt: skip
