"""The change-control plan: what may differ from the first approved version, within which bounds, and why.

The FDA calls it a predetermined change control plan. A candidate is always compared with the first approved
version, so that small steps cannot add up; what no clause allows is out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, FiniteFloat, model_validator

from imaging.manifest import read_manifest
from imaging.recipe import Section
from imaging.vocabulary import Split, Statement

if TYPE_CHECKING:
    from registry.evidence import Evidence
    from registry.package import Contract

    Version = tuple[Contract, Evidence]


class ChangeKind(StrEnum):
    """What can differ between two versions; a clause allows one of them."""

    DATA = "data"  # subjects at known sites, more or fewer; or other images or labels of as many
    SITE = "site"
    SCANNER = "scanner"
    POPULATION = "population"
    TEST_SET = "test-set"
    LABEL_SET = "label-set"
    INPUT = "input"
    PREPARATION = "preparation"
    AUGMENTATION = "augmentation"
    RETRAINING = "retraining"
    INITIAL_WEIGHTS = "initial-weights"
    ARCHITECTURE = "architecture"
    WIDTH = "width"
    THRESHOLD = "threshold"
    CALIBRATION = "calibration"
    OPERATING_POINT = "operating-point"  # the rule that finds the threshold
    INTENDED_USE = "intended-use"
    ENGINE = "engine"
    ENVIRONMENT = "environment"
    EVALUATION = "evaluation"
    MONITORING = "monitoring"
    PERFORMANCE = "performance"  # the scores of every candidate, whatever changed
    OTHER = "other"  # what is on no list below


ABSENT = "absent"
GROUPS = {"scanner": ChangeKind.SCANNER, "age_band": ChangeKind.POPULATION, "sex": ChangeKind.POPULATION}
_PATHS: tuple[tuple[ChangeKind | None, str, str], ...] = (
    # Never a change: what the contract or the count of subjects tells better, and chance and place.
    (None, "params", "title kind modality classes preparation cohort.profile cohort.seed check.spacing_low_mm"
     " check.spacing_high_mm fit.seed fit.threads fit.device calibrate.positive package.intended_use"
     " package.png_offset package.max_batch package.tolerance evaluate.seed reference.seed"),
    (None, "contract", "lineage"),
    (ChangeKind.POPULATION, "params", "cohort.source"),
    (ChangeKind.TEST_SET, "params", "split"),  # its seed, too: it moves subjects from test to training
    (ChangeKind.LABEL_SET, "contract", "kind classes positive"),
    (ChangeKind.INPUT, "contract", "modality channels depth rows columns spacing_low_mm spacing_high_mm"),
    (ChangeKind.INPUT, "params.check", "pixel_low pixel_high subjects_per_split_and_site"),
    (ChangeKind.PREPARATION, "contract", "preparation png_offset"),
    (ChangeKind.AUGMENTATION, "params.fit", "augmentation"),
    (ChangeKind.RETRAINING, "params.fit", "epochs batch_size learning_rate backbone_rate weight_decay"
     " schedule class_weights clip patience mixed_precision architecture.dropout"),
    (ChangeKind.INITIAL_WEIGHTS, "params.fit", "start architecture.pretrained"),
    (ChangeKind.ARCHITECTURE, "params.fit.architecture", "name attention members"),
    (ChangeKind.WIDTH, "params.fit.architecture", "channels"),
    (ChangeKind.THRESHOLD, "contract", "threshold"),
    (ChangeKind.CALIBRATION, "contract", "temperature"),
    (ChangeKind.OPERATING_POINT, "params.calibrate", "sensitivity"),
    (ChangeKind.INTENDED_USE, "contract", "title intended_use simulated limits"),
    (ChangeKind.ENGINE, "contract", "max_batch tolerance"),
    (ChangeKind.ENGINE, "params", "package.golden evaluate.engine evaluate.precision qualify"),
    (ChangeKind.ENVIRONMENT, "environment", "requirements python machine"),
    (ChangeKind.EVALUATION, "params.evaluate", "confidence lesion_mm robustness explanation"),
    (ChangeKind.MONITORING, "params.reference", "alpha window repeats"),
)  # fmt: skip
_KINDS = {f"{parent}.{name}": kind for kind, parent, names in _PATHS for name in names.split()}


@dataclass(frozen=True)
class Change:
    """One thing that differs.

    Attributes:
        what: a parameter (`fit.epochs`), a field of the contract (`threshold`), or words (`site river`).
        old, new: in the first approved version and in the candidate; "absent" where there is none.
    """

    kind: ChangeKind
    what: str
    old: Any
    new: Any

    def __str__(self) -> str:
        name = self.what if self.kind.replace("-", " ") in self.what else f"{self.what} ({self.kind})"
        old, new = (f"{one:g}" if isinstance(one, float) else str(one)[:200] for one in (self.old, self.new))
        return f"{name} changed from {old} to {new}"


class Clause(Section):
    """One modification that the plan allows.

    Attributes:
        id: its name in every refusal.
        allow: the kind of change.
        what: the changes of that kind that it allows, by name; empty means all of them.
        why, protocol: why patients are as safe after it, and how it is made and checked; a sentence each.
        low, high: least and largest new value of a number.
        share: most that a number may grow or shrink, as a share of what it was at first.
        metric: metric -> how far its estimate over all internal sites may move from what it was at first:
            -0.02 is a fall of at most .02 (sensitivity), 0.02 a rise of at most .02 (brier).
    """

    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    allow: ChangeKind
    what: tuple[str, ...] = ()
    why: str = Field(min_length=1)
    protocol: str = Field(min_length=1)
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    share: FiniteFloat | None = Field(default=None, gt=0)
    metric: dict[str, FiniteFloat] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        needed = {ChangeKind.OTHER: self.what, ChangeKind.PERFORMANCE: self.metric}
        if not needed.get(self.allow, True):
            raise ValueError("`allow: other` needs `what`, and `allow: performance` needs `metric`")
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ValueError("low is above high")
        if 0 in self.metric.values():
            raise ValueError("metric: below 0 is a fall, above 0 a rise; 0 is neither")
        return self

    def covers(self, change: Change) -> bool:
        """Whether it speaks of such a change."""
        return change.kind is self.allow and (not self.what or change.what in self.what)

    def holds(self, change: Change) -> bool:
        """Whether a change that it covers is within its bounds; what is no number is within none."""
        if (self.low, self.high, self.share) == (None, None, None):
            return True
        old, new = change.old, change.new
        return (isinstance(old, int | float) and isinstance(new, int | float)
                and (self.low is None or new >= self.low) and (self.high is None or new <= self.high)
                and (self.share is None or abs(new - old) <= round(self.share * abs(old), 9)))  # fmt: skip

    def __str__(self) -> str:
        low, high = (f"{end:g}" if end is not None else "..." for end in (self.low, self.high))
        ends = f" from {low} to {high}" if (low, high) != ("...", "...") else ""
        share = f" by {self.share:.0%} at most" if self.share else ""
        moves = "".join(f", {metric} {most:+g}" for metric, most in self.metric.items())
        return f"clause {self.id} allows {', '.join(self.what) or self.allow}{ends}{share}{moves}"


def judge_changes(first: Version, new: Version, plan: tuple[Clause, ...]) -> list[str]:
    """Hold a candidate to the plan.

    Args:
        first: contract and evidence of the first approved version of the network.
        new: of the candidate.
        plan: the policy's `changes`; empty leaves everything to the gate.

    Returns:
        Why it is outside, a sentence each that names the clause; empty when it is inside. The first clause
        that allows a change must also keep its `metric`; those of `performance` hold whatever changed.
    """
    if not plan:
        return []
    reasons, used = [], [clause for clause in plan if clause.allow is ChangeKind.PERFORMANCE]
    for change in describe_changes(first, new):
        about = [clause for clause in plan if clause.covers(change)]
        allowing = next((clause for clause in about if clause.holds(change)), None)
        if allowing is None:
            told = "; ".join(map(str, about)) or "no clause allows it"
            reasons.append(f"{change} since the first approved version: {told}")
        elif allowing not in used:
            used.append(allowing)
    scores = [_body(version, Statement.EVALUATION).get("overall", {}) for version in (first, new)]
    return reasons + [reason for clause in used for reason in _hold_metrics(clause, *scores)]


def _hold_metrics(clause: Clause, first: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Why metrics moved too far, a sentence each."""
    for metric, most in clause.metric.items():
        if metric not in first or metric not in new:
            yield f"{metric} was not evaluated in both versions: {clause}"
            continue
        old, now = float(first[metric]["estimate"]), float(new[metric]["estimate"])
        moved = round(now - old, 9)  # .90 - .92 is not quite -.02
        if not (moved >= most if most < 0 else moved <= most):
            yield (f"{metric} moved by {moved:+.3f} since the first approved version "
                   f"({old:.3f} to {now:.3f}): {clause}")  # fmt: skip


def describe_changes(old: Version, new: Version) -> list[Change]:
    """What differs between two versions, apart from what never matters.

    Returns:
        Contract, parameters and environment, key by key; then the subjects by site, scanner, age and sex, and
        whether every locked image is still locked and labelled alike. An unknown key is `other`.
    """
    changes = [change for version in (old, new) for change in _check_params(version)]
    told = [{**_body(version, Statement.PACKAGE), "contract": version[0].model_dump(mode="json")}
            for version in (old, new)]  # fmt: skip
    for part in ("contract", "params", "environment"):
        for path, before, after in _differ(told[0].get(part, {}), told[1].get(part, {}), part):
            if kind := name_kind(path):
                changes.append(Change(kind, path.partition(".")[2].removesuffix(".name"), before, after))
    changes += _compare_subjects(old, new)
    answers = [_body(version, Statement.EVALUATION).get("predictions", []) for version in (old, new)]
    locked = [{(row["sha256"], row.get("truth")) for row in rows} for rows in answers]
    if locked[0] - locked[1]:
        counts = len(locked[0]), len(locked[0] & locked[1])
        changes.append(Change(ChangeKind.TEST_SET, "locked images kept", *counts))
    return changes


def _body(version: Version, kind: Statement) -> dict[str, Any]:
    return version[1].statements.get(kind, {})


def _check_params(version: Version) -> list[Change]:
    """That the signed parameters are those that the package was made from, as its lineage tells."""
    params = _body(version, Statement.PACKAGE).get("params", {})
    made_from = {name: section for name, section in params.items() if name not in ("qualify", "reference")}
    signed = "sha256:" + hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    packaged = version[0].lineage.get("params", ABSENT)
    return [] if signed == packaged else [Change(ChangeKind.OTHER, "params", packaged, signed)]


def _differ(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Path, old and new value of every leaf that differs; lists are leaves."""
    if all(isinstance(one, dict) or one == ABSENT for one in (old, new)):
        pair = [one if isinstance(one, dict) else {} for one in (old, new)]
        for key in sorted({*pair[0], *pair[1]}):
            before, after = (one.get(key, ABSENT) for one in pair)
            yield from _differ(before, after, f"{path}.{key}")
    elif old != new:
        yield path, old, new


def name_kind(path: str) -> ChangeKind | None:
    """The kind of the path or of what it is part of; None of what never matters."""
    while path not in _KINDS and "." in path:
        path = path.rpartition(".")[0]
    return _KINDS.get(path, ChangeKind.OTHER)


def _compare_subjects(old: Version, new: Version) -> list[Change]:
    """Sites, scanners, ages and sexes that come or go, and subjects at the sites that stay as they are."""
    told = [_body(version, Statement.PACKAGE).get("population", {}) for version in (old, new)]
    if not all(told):
        return [Change(ChangeKind.OTHER, "population", *("told" if one else ABSENT for one in told))]
    changes = []
    for column, kind in GROUPS.items():
        for name in sorted(set(told[0][column]) ^ set(told[1][column])):
            here = ("present" if name in one[column] else ABSENT for one in told)
            changes.append(Change(kind, f"{column.replace('_', ' ')} {name}", *here))
    for site in sorted({*told[0]["sites"], *told[1]["sites"]}):
        changes += _compare_site(site, *(one["sites"].get(site, {}) for one in told))
    digests = [version[0].lineage.get("cohort", ABSENT) for version in (old, new)]
    if digests[0] != digests[1] and not {ChangeKind.DATA, ChangeKind.SITE} & {one.kind for one in changes}:
        changes.append(Change(ChangeKind.DATA, "images or labels", *digests))
    return changes


def _compare_site(site: str, *splits: dict[str, int]) -> Iterator[Change]:
    """A site that comes, goes or changes sides, or whose subjects are more or fewer."""
    sides = [{"external" if name == Split.EXTERNAL else "internal" for name in one} for one in splits]
    if sides[0] != sides[1]:
        roles = [" and ".join(sorted(side)) or ABSENT for side in sides]
        yield Change(ChangeKind.SITE, f"site {site}", *roles)
        return
    uses = {"training": (Split.TRAIN, Split.VALIDATION), "locked": (Split.TEST, Split.EXTERNAL)}
    for name, chosen in uses.items():
        old, new = (sum(one.get(split, 0) for split in chosen) for one in splits)
        if old != new:
            yield Change(ChangeKind.DATA, f"{name} subjects at {site}", old, new)


def describe_population(manifest: Path) -> dict[str, Any]:
    """Subjects by site and split, scanners, ages and sexes, for a package statement; {} without a file."""
    if not manifest.exists():
        return {}
    table = read_manifest(manifest)
    counts = table.groupby(["site", "split"])["subject"].nunique()
    sites = {site: counts[site].to_dict() for site in counts.index.levels[0]}
    return {"sites": sites, **{column: sorted(table[column].astype(str).unique()) for column in GROUPS}}
