"""Policy as code: the bounds of a task, who may agree to a version, and what may change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, FiniteFloat, model_validator

from imaging.config import read_yaml, suggest
from imaging.errors import ConfigError
from imaging.estimation import BY_CLASS, LARGER, LINE, SMALLER, name_stem
from imaging.manifest import digest_file
from imaging.recipe import Section
from imaging.vocabulary import Spending, Statement
from registry.changes import Clause
from registry.comparison import is_paired
from registry.surveillance import Surveillance

METRICS = (*LARGER, *SMALLER, *LINE)
UP_TO_ONE = (*LARGER, "brier", "calibration_error")
POLICIES = Path(__file__).parent / "policies"


def _check_metric(metric: str) -> str:
    if name_stem(metric) not in METRICS:
        known = dict.fromkeys((*METRICS, *(f"{stem}_<class>" for stem in BY_CLASS)))
        raise ValueError(f"no metric {metric[:60]!r}. {suggest(metric, known, 'Metrics')}")
    return metric


Metric = Annotated[str, AfterValidator(_check_metric)]
Limits = Annotated[
    dict[Metric, FiniteFloat],
    Field(json_schema_extra={"propertyNames": {"anyOf": [
        {"enum": list(METRICS)}, {"pattern": f"^({'|'.join(BY_CLASS)})_.+$"}]}}),
]  # fmt: skip


class Bounds(Section):
    """What one population must show.

    Attributes:
        subjects: the least number that each verdict may rest on.
        low: metric -> the lower bound of its value must reach this.
        high: metric -> the upper bound must not exceed this.
        margin: metric -> by how much it may be worse than in the champion and in the first approved version,
            above 0; the bound of the paired difference must stay within.
        unscored: largest share of images without a value of such a metric as Dice, where no champion or first
            approved version was scored on them too.
    """

    subjects: int = Field(ge=1)
    low: Limits = Field(default_factory=dict)
    high: Limits = Field(default_factory=dict)
    margin: Limits = Field(default_factory=dict)
    unscored: float = Field(default=0.05, ge=0, lt=1)

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        if not (self.low or self.high):
            raise ValueError("ask for something: `low` or `high`")
        for side, wrong, word in (("low", SMALLER, "less"), ("high", LARGER, "more")):
            if mistaken := [name for name in getattr(self, side) if name_stem(name) in wrong]:
                raise ValueError(f"{side}: {mistaken[0]} is the better the {word} it is")
        for metric, limit in [*self.low.items(), *self.high.items(), *self.margin.items()]:
            if name_stem(metric) in UP_TO_ONE and not 0 <= limit <= 1:
                raise ValueError(f"{metric} {limit:g} is not between 0 and 1")
        return self

    @model_validator(mode="after")
    def _can_be_compared(self) -> Self:
        for metric, most in self.margin.items():
            if not is_paired(metric):
                raise ValueError(f"margin: two versions cannot be compared by {metric}")
            if most <= 0:
                raise ValueError(f"margin: {metric} {most:g} is not above 0, and no study shows equality")
        return self


class Budget(Section):
    """How often a locked set may be used.

    Attributes:
        uses: packages that may be scored on it.
        spending: `equal` gives every use alpha / uses; `harmonic` gives use n an n-th of what the first has.
    """

    uses: int = Field(default=5, ge=1, le=20)
    spending: Spending = Spending.HARMONIC


class Robustness(Section):
    """What corrupted images may cost.

    Attributes:
        drop: most that the score may fall, relatively, in the mean over families that training never draws.
    """

    drop: float = Field(gt=0, le=1)


class EngineBounds(Section):
    """What an engine may change on golden and validation images, as the qualification measured it.

    Attributes:
        difference: of a probability; the contract's tolerance holds beside it.
        edges: of a probability of an image that no scanner makes: a normalisation makes noise of a black one.
        flips: share of the most likely classes (of images or pixels; of a detector: of places) that change.
        crossings: share of images that change sides of the operating point.
        dice: by how much the mean Dice of a class changes.
    """

    difference: float = Field(default=0.1, ge=0, le=1)
    edges: float = Field(default=1, ge=0, le=1)
    flips: float = Field(default=0.01, ge=0, le=1)
    crossings: float = Field(default=0.01, ge=0, le=1)
    dice: float = Field(default=0.01, ge=0, le=1)


class Policy(Section):
    """The bounds of a task, who may agree to a version, and what may change.

    Attributes:
        why: these bounds are right.
        primary: the metric that says which of two versions is the better one; the network has a bound and a
            margin for it.
        alpha: one-sided error of each bound over all uses of a locked set.
        network: over the test sets of all internal sites together.
        internal: at each internal site by itself.
        external: at each external site by itself.
        robustness: None asks for nothing.
        engines: bounds of every engine and precision beside the reference engine.
        latency_ms: most for a batch of one on the scored engine, as the qualification measured it.
        size_bytes: largest model file.
        statements: what must be signed.
        approvers: identities that may approve; empty means anyone but the author and the asker.
        foreign_alias: what becomes of an alias in MLflow that the ledger does not know.
        surveillance: what monitoring promises, and what an alarm does.
        changes: the change-control plan; empty leaves everything to the gate.
    """

    task: str
    why: str = Field(min_length=1)
    primary: Metric
    alpha: float = Field(default=0.05, gt=0, le=0.2)
    network: Bounds
    internal: Bounds
    external: Bounds
    test_set: Budget = Budget()
    robustness: Robustness | None = None
    engines: EngineBounds = EngineBounds()
    latency_ms: float | None = Field(default=None, gt=0)
    size_bytes: int | None = Field(default=None, gt=0)
    statements: tuple[Statement, ...]
    approvers: tuple[str, ...] = ()
    foreign_alias: Literal["revert", "report"] = "revert"
    surveillance: Surveillance = Surveillance()
    changes: tuple[Clause, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.primary not in {**self.network.low, **self.network.high}:
            raise ValueError(f"primary: the network has no bound on {self.primary}")
        if not is_paired(self.primary):
            raise ValueError(f"primary: two versions cannot be compared by {self.primary}")
        if self.primary not in self.network.margin:
            raise ValueError(f"network.margin: say by how much {self.primary}, the primary metric, may be "
                             "worse than in the champion")  # fmt: skip
        if Statement.EVALUATION not in self.statements:
            raise ValueError("statements: the gate judges by the evaluation; name it")
        if self.latency_ms and Statement.QUALIFICATION not in self.statements:
            raise ValueError("statements: latency_ms needs the qualification")
        names = [clause.id for clause in self.changes]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"changes: two clauses are called {twice[0]}")
        return self

    def confidence_at(self, use: int) -> float:
        """Two-sided confidence of the intervals whose ends are the bounds at use number 1, 2, ... of a set.

        Over all uses the one-sided errors add up to `alpha`; beyond them nothing is left, and it is 1.
        """
        if not 1 <= use <= self.test_set.uses:
            return 1.0
        if self.test_set.spending is Spending.EQUAL:
            return 1 - 2 * self.alpha / self.test_set.uses
        return 1 - 2 * self.alpha / (use * sum(1 / n for n in range(1, self.test_set.uses + 1)))


def policy_path(task: str, folder: Path = POLICIES) -> Path:
    """Where the policy of a task lies."""
    return folder / f"{task}.yaml"


def read_policy(task: str, folder: Path = POLICIES) -> Policy:
    """Read the policy of a task.

    Raises:
        ConfigError: there is none, a key or a metric is misspelt, a bound cannot be, or it is another task's.
    """
    policy = read_yaml(policy_path(task, folder), Policy)
    if policy.task != task:
        raise ConfigError(f"{task}.yaml is the policy of {policy.task}.", "Mend its `task`.")
    return policy


def digest_policy(task: str, folder: Path = POLICIES) -> str:
    """sha256 of the policy's file, for the ledger."""
    return "sha256:" + digest_file(policy_path(task, folder))


def policy_schema() -> dict[str, Any]:
    """JSON Schema of a policy, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Policy.model_json_schema()}


def explain_policy(policy: Policy) -> list[str]:
    """The policy in plain sentences."""
    places = (("Over all internal sites", policy.network), ("At an internal site", policy.internal),
              ("At an external site", policy.external))  # fmt: skip
    bounds = [sentence for where, asked in places for sentence in _explain_bounds(where, asked)]
    who = ", ".join(policy.approvers) if policy.approvers else "anyone"
    return [
        policy.why,
        f"Of two versions the better one is that with the better {spell(policy.primary)}.",
        *bounds,
        *_explain_uses(policy),
        *_explain_limits(policy),
        f"Signed statements: {', '.join(policy.statements)}.",
        f"A second person approves: {who}, not the author and not who asked.",
        *(f"Changes: {clause}." for clause in policy.changes),
        f"An alias in MLflow that the ledger does not know is recorded, never served, and "
        f"{'reverted' if policy.foreign_alias == 'revert' else 'left as it is'}.",
    ]


def _explain_bounds(where: str, bounds: Bounds) -> Iterator[str]:
    least = f"{where}, on at least {bounds.subjects} subjects,"
    if bounds.low:
        yield f"{least} the lower bound must reach: {_list(bounds.low)}."
    if bounds.high:
        yield f"{least} the upper bound must not exceed: {_list(bounds.high)}."
    if bounds.margin:
        yield (f"{least} it must be shown that it is not worse than the champion, or than the first approved "
               f"version, by more than: {_list(bounds.margin)}.")  # fmt: skip
    if any(name_stem(metric) in BY_CLASS for metric in {**bounds.low, **bounds.high, **bounds.margin}):
        yield (f"{where} at most {100 * bounds.unscored:g} % of the images may have no value, beside those "
               "that a version before was scored on; where that had one there must be one.")  # fmt: skip


def _explain_uses(policy: Policy) -> Iterator[str]:
    uses = policy.test_set.uses
    sure = [f"{100 * policy.confidence_at(use):.1f} %" for use in range(1, uses + 1)]
    told = sure[0] if len(set(sure)) == 1 else f"{sure[0]} at the first, {sure[-1]} at the last"
    yield (f"A locked set serves {uses} packages; bounds are the ends of two-sided intervals of {told}: "
           f"over all uses of the set each errs with at most {100 * policy.alpha:g} %.")  # fmt: skip


def _explain_limits(policy: Policy) -> Iterator[str]:
    if policy.robustness:
        yield (f"Under corruptions that training never draws the score falls by at most "
               f"{100 * policy.robustness.drop:g} % of itself, upper end of its interval.")  # fmt: skip
    most = ", ".join(f"{name} {limit:g}" for name, limit in policy.engines.model_dump().items())
    yield f"An engine differs from the reference engine by at most: {most}."
    if policy.latency_ms:
        yield f"The scored engine answers one image within {policy.latency_ms:g} ms."
    if policy.size_bytes:
        yield f"The model's file has at most {policy.size_bytes / 1e6:g} MB."


def _list(limits: dict[str, float]) -> str:
    return ", ".join(f"{spell(metric)} {limit:g}" for metric, limit in limits.items())


def spell(metric: str) -> str:
    """A metric in words."""
    return metric.replace("_", " ").replace("auc", "AUC")
