"""The gate: a pure function from evidence and policy to a verdict, for the network and for each site."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from imaging.config import Sites
from imaging.intervals import Estimate
from imaging.vocabulary import SiteKind, Statement
from registry.evidence import Evidence
from registry.policy import Bounds, Policy


class Finding(BaseModel):
    """Passed or not, and why; `reasons` says what was compared either way."""

    model_config = ConfigDict(frozen=True)
    passed: bool
    reasons: tuple[str, ...]


class Verdict(BaseModel):
    """What the gate says.

    Attributes:
        network: over all internal sites; no site passes when it fails.
        sites: each site by itself.
    """

    model_config = ConfigDict(frozen=True)
    network: Finding
    sites: dict[str, Finding]

    @property
    def approvable(self) -> list[str]:
        """Sites where the version may serve once a second person agrees."""
        return [name for name, finding in self.sites.items() if finding.passed]


def judge(evidence: Evidence, policy: Policy, sites: Sites) -> Verdict:
    """Compare the lower ends of intervals with the policy's bounds.

    Args:
        evidence: signed, already verified.
        policy: of the same task.
        sites: all sites that the task is asked at.
    """
    missing = [f"no {kind} statement" for kind in policy.statements if kind not in evidence.statements]
    missing += _qualify(evidence)
    if missing:
        return _refuse_all(sites, tuple(missing))
    scores = evidence.body(Statement.EVALUATION)
    network = _compare(scores["overall"], policy.network)
    found: dict[str, Finding] = {}
    for name, site in sites.sites.items():
        bounds = policy.internal if site.kind is SiteKind.INTERNAL else policy.external
        finding = _compare(scores["sites"].get(name, {}), bounds)
        if not network.passed:
            finding = Finding(passed=False, reasons=("the network's bounds are not met", *finding.reasons))
        found[name] = finding
    return Verdict(network=network, sites=found)


def _compare(scores: dict[str, Any], bounds: Bounds) -> Finding:
    told = [_bound(metric, scores.get(metric), low, bounds.subjects) for metric, low in bounds.low.items()]
    failed = tuple(reason for passed, reason in told if not passed)
    return Finding(passed=not failed, reasons=failed or tuple(reason for _, reason in told))


def _bound(metric: str, score: Any, low: float, subjects: int) -> tuple[bool, str]:
    name = metric.replace("_", " ")
    try:
        estimate = Estimate.model_validate(score)
    except ValidationError:
        return False, f"{name} was not evaluated here"
    if estimate.subjects < subjects:
        return False, f"{name} rests on {estimate.subjects} subjects, fewer than {subjects}"
    if not estimate.low >= low:  # NaN fails
        return False, f"{name} lower bound {estimate.low:.3f} < {low:g}"
    return True, f"{name} lower bound {estimate.low:.3f} reaches {low:g}"


def _qualify(evidence: Evidence) -> list[str]:
    """The engine that was scored must be one that passed parity."""
    if {Statement.EVALUATION, Statement.QUALIFICATION} - set(evidence.statements):
        return []
    engine = evidence.statements[Statement.EVALUATION]["engine"]
    checked = evidence.statements[Statement.QUALIFICATION]["engines"].get(engine, {})
    return [] if checked.get("passed") is True else [f"{engine} did not pass qualification"]


def _refuse_all(sites: Sites, reasons: tuple[str, ...]) -> Verdict:
    finding = Finding(passed=False, reasons=reasons)
    return Verdict(network=finding, sites=dict.fromkeys(sites.sites, finding))
