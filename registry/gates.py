"""Policy as code, and the gate: a pure function from evidence and policy to a verdict, by site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from imaging.config import Sites, read_yaml
from imaging.errors import ConfigError
from imaging.intervals import Estimate
from imaging.manifest import digest_file
from imaging.recipe import Section
from imaging.vocabulary import SiteKind, Statement
from registry.evidence import Evidence


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


class Bounds(Section):
    """What one population must show.

    Attributes:
        subjects: the least number a verdict may rest on.
        low: metric -> the lower end of its interval must reach this.
    """

    subjects: int = Field(ge=1)
    low: dict[str, float] = Field(min_length=1)


class Policy(Section):
    """The bounds of a task, and who may agree to a version.

    Attributes:
        network: over the test sets of all internal sites together.
        internal: at each internal site by itself.
        external: at each external site by itself.
        statements: what must be signed.
        approvers: identities that may approve; empty means anyone but the author and the asker.
    """

    task: str
    why: str
    network: Bounds
    internal: Bounds
    external: Bounds
    statements: tuple[Statement, ...]
    approvers: tuple[str, ...] = ()


POLICIES = Path(__file__).parent / "policies"


def policy_path(task: str, folder: Path = POLICIES) -> Path:
    """Where the policy of a task lies."""
    return folder / f"{task}.yaml"


def read_policy(task: str, folder: Path = POLICIES) -> Policy:
    """Read the policy of a task.

    Raises:
        ConfigError: there is none, a key is misspelt, or it is another task's.
    """
    policy = read_yaml(policy_path(task, folder), Policy)
    if policy.task != task:
        raise ConfigError(f"{task}.yaml is the policy of {policy.task}.", "Mend its `task`.")
    return policy


def digest_policy(task: str, folder: Path = POLICIES) -> str:
    """sha256 of the policy's file, for the ledger."""
    return "sha256:" + digest_file(policy_path(task, folder))


def explain_policy(policy: Policy) -> list[str]:
    """The policy in plain sentences."""
    sentences = [policy.why]
    places = (("Over all internal sites", policy.network), ("At an internal site", policy.internal),
              ("At an external site", policy.external))  # fmt: skip
    for where, bounds in places:
        asked = ", ".join(f"{metric.replace('_', ' ')} {low:g}" for metric, low in bounds.low.items())
        sentences.append(
            f"{where}, on at least {bounds.subjects} subjects, the interval's lower end must reach {asked}."
        )
    sentences.append(f"Signed statements: {', '.join(policy.statements)}.")
    who = ", ".join(policy.approvers) if policy.approvers else "anyone"
    sentences.append(f"A second person approves: {who}, not the author and not who asked.")
    return sentences
