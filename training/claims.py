"""From what the study's runs answered to verdicts: a pure function of stored predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.intervals import (
    Estimate,
    auc_components,
    bootstrap_mean,
    bootstrap_statistic,
    delong,
    spread_auc,
    wilson,
)
from training.study import Claim, Row

COLUMNS = {"accuracy": ("right", None), "sensitivity": ("right", 1), "specificity": ("right", 0),
           "dice": ("score", None), "hits": ("hits", None), "energy": ("energy", None),
           "share of negatives": ("negative", None), "hits of random weights": ("blind", None)}  # fmt: skip
"""Means over images -> the column, and the truth of the images that count."""
HOLDS, FAILS, UNTESTABLE = "holds", "does not hold", "cannot be tested here"
Told = Estimate | str  # a sentence says why there is no number
Spread = tuple[float, float, int]  # a mean over seeds, its variance, and subjects
Notes = list[dict[str, Any]]  # of runs: variant, seed, leave_out, epochs, cpu_seconds


@dataclass(frozen=True)
class Evidence:
    """What the runs of a claim answered: a row an image, run and corruption (see `training.runs`); notes."""

    table: Any
    runs: Notes
    confidence: float

    def read(self, of: str, on: str, column: str, truth: int | None = None) -> tuple[NDArray[Any], Any]:
        """A column's values (seeds, n) on a split or at a site, and the facts of the n images."""
        part = self.table[(self.table["variant"] == of) & (self.table["family"] == "")]
        part = part[((part["split"] == on) | (part["site"] == on)) & part[column].notna()]
        if truth is not None:
            part = part[part["truth"] == truth]
        wide = part.pivot(index="image", columns="seed", values=column).dropna()
        return wide.to_numpy().T, part.drop_duplicates("image").set_index("image").loc[wide.index]

    def of(self, variant: str | None) -> Notes:
        """Notes of a variant's runs, by seed."""
        return sorted((run for run in self.runs if run["variant"] == variant), key=lambda run: run["seed"])


def judge(claim: Claim, runs: Notes, table: Any, confidence: float) -> dict[str, Any]:
    """The verdict on a claim: the rule is its rows with `above`.

    Args:
        claim: with the rows to be told.
        runs: notes of the runs.
        table: their answers.
        confidence: of the intervals; where any of several rows is enough, theirs are wider (Bonferroni).

    Returns:
        `verdict`, and `rows`: what each shows, the fields of `Estimate` or a `reason`, `seeds` (estimates of
        each seed alone), `above` and, of those that decide, `held` (None where it cannot be told).
    """
    asked = [row for row in claim.rows if row.above is not None]
    wide = 1 - (1 - confidence) / max(1, len(asked)) if claim.needs == "any" else confidence
    alone = [table[table["seed"] == seed] for seed in sorted({run["seed"] for run in runs})]
    told = []
    for row in claim.rows:
        value = SHOWS[row.show](Evidence(table, runs, wide if row in asked else confidence), row)
        facts: dict[str, Any] = {"reason": value} if isinstance(value, str) else value.model_dump()
        if row.above is not None:
            facts["held"] = None if isinstance(value, str) else value.low > row.above
        each = [
            SHOWS[row.show](Evidence(part, runs, confidence), row) for part in alone if row.show in BY_SEED
        ]
        seeds = [found.estimate for found in each if not isinstance(found, str)]
        told.append({"what": describe(row), "above": row.above, "seeds": seeds, **facts})
    held = [row["held"] for row in told if "held" in row]
    return {"verdict": decide(held, claim.needs), "rows": told}


def decide(held: list[bool | None], needs: str) -> str:
    """The sentence, from what each deciding row says; None where it cannot be told."""
    enough, settles = (all, False) if needs == "all" else (any, True)
    if held and enough(held):
        return HOLDS
    return UNTESTABLE if not held or (None in held and settles not in held) else FAILS


def describe(row: Row) -> str:
    """What a row shows, in words."""
    less = f" {'against' if 'saved' in row.show else 'less that of'} {row.against}" if row.against else ""
    until = f" to a validation score of {row.target:g}" if row.target else f", {row.where}"
    return f"{row.show} of {row.of}{less}{until}"


def _tell_mean(evidence: Evidence, row: Row) -> Told:
    """Mean over images and seeds; a subject's answers are one cluster, whatever the seed."""
    column, truth = COLUMNS[row.show]
    values, facts = evidence.read(row.of, row.where, column, truth)
    people = facts["subject"].to_numpy()
    if not values.size:
        return f"{row.of} has no {row.show} on {row.where}"
    if row.against:
        other = evidence.read(row.against, row.where, column, truth)[0]
        apart = values.mean(axis=0) - other.mean(axis=0)
        return bootstrap_mean(apart, people, evidence.confidence, 0, (-1.0, 1.0))
    if np.isin(values, (0, 1)).all():
        return wilson(values.ravel().astype(int), np.tile(people, len(values)), evidence.confidence)
    return bootstrap_mean(values.mean(axis=0), people, evidence.confidence)


def _spread(evidence: Evidence, of: str, on: str, against: str | None = None) -> Spread | str:
    """Mean AUC over the seeds, or its difference from a control's on the same images.

    DeLong's components are linear in the AUC, so those of the seeds, and of the control, are averaged.
    """
    values, facts = evidence.read(of, on, "score")
    truth, people = facts["truth"].to_numpy().astype(int), facts["subject"].to_numpy()
    if len(np.unique(truth)) < 2:
        return f"{of} has not answered both classes on {on}"
    parts = _components(truth, values)
    if against:
        parts = parts - _components(truth, evidence.read(against, on, "score")[0])
    area, variance = spread_auc(parts[truth == 1], parts[truth == 0], truth == 1, people)
    return area, variance, len(np.unique(people))


def _components(truth: NDArray[Any], values: NDArray[Any]) -> NDArray[np.float64]:
    told = np.empty(values.shape)
    for seed, score in zip(told, values, strict=True):
        seed[truth == 1], seed[truth == 0] = auc_components(truth, score)
    return np.asarray(told.mean(axis=0))


def _tell_auc(evidence: Evidence, row: Row) -> Told:
    """On the logit scale, as `imaging.intervals.delong`; a difference on its own."""
    from scipy.special import expit, logit

    found = _spread(evidence, row.of, row.where, row.against)
    if isinstance(found, str) or row.against:
        return found if isinstance(found, str) else _normal(found, evidence.confidence)
    area, variance, subjects = found
    if variance < 1e-12:  # every seed ranks all rightly
        values, facts = evidence.read(row.of, row.where, "score")
        truth, people = facts["truth"].to_numpy(), facts["subject"].to_numpy()
        return delong(truth, values[0], people, evidence.confidence)
    told = _normal((logit(area), variance / (area * (1 - area)) ** 2, subjects), evidence.confidence)
    return told.model_copy(update={"estimate": area, "low": expit(told.low), "high": expit(told.high)})


def _tell_fall(evidence: Evidence, row: Row) -> Told:
    """AUC on the internal test set less that on another set: other subjects, so variances add up."""
    near, far = _spread(evidence, row.of, "test"), _spread(evidence, row.of, row.where)
    if isinstance(near, str) or isinstance(far, str):
        return near if isinstance(near, str) else str(far)
    return _normal((near[0] - far[0], near[1] + far[1], near[2] + far[2]), evidence.confidence)


def _normal(found: Spread, confidence: float) -> Estimate:
    from scipy.stats import norm

    middle, variance, subjects = found
    half = norm.ppf((1 + confidence) / 2) * np.sqrt(variance)
    facts: dict[str, Any] = {"subjects": subjects, "confidence": confidence}
    facts["method"] = "DeLong, clustered (Obuchowski), mean over seeds"
    return Estimate(estimate=middle, low=middle - half, high=middle + half, **facts)


def find_seconds(run: dict[str, Any], target: float) -> float:
    """CPU-seconds until the first epoch whose validation score reaches the target; infinite if none does."""
    reached = (e["cpu_seconds"] for e in run["epochs"] if (e["validation_score"] or 0) >= target)
    return next(reached, float("inf"))


def _tell_seconds(evidence: Evidence, row: Row) -> Told:
    """Share of the CPU-seconds to the target that is saved; runs that never reach it are censored.

    Seconds are restricted to the shortest budget of the runs compared: a control that did not get there
    counts as faster than it was, a variant that did not as no faster than any control.
    """
    from scipy.stats import t

    pairs = list(zip(evidence.of(row.of), evidence.of(row.against), strict=True))
    budget = min(run["cpu_seconds"] for pair in pairs for run in pair)
    spent = np.array([[min(find_seconds(run, row.target or 0), budget) for run in pair] for pair in pairs])
    if (spent == budget).all() or len(pairs) < 2:
        return f"no run, or one seed alone, reached {row.target:g} in {budget:.0f} CPU-seconds"
    logs = np.log(spent[:, 0] / spent[:, 1])
    half = t.ppf((1 + evidence.confidence) / 2, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    saved, low, high = (1 - float(np.exp(logs.mean() + way * half)) for way in (0, 1, -1))
    method = f"t interval of the seeds' log ratios, seconds restricted to {budget:.0f}"
    facts: dict[str, Any] = {"subjects": len(logs), "confidence": evidence.confidence, "method": method}
    return Estimate(estimate=saved, low=low, high=high, **facts)


def _read_corrupted(evidence: Evidence, row: Row, variant: str) -> tuple[NDArray[Any], ...]:
    """Of each image (n,): right when clean, right when corrupted (means over seeds and corruptions), subject.

    What augmentation draws is told by the first variant of the row, for both.
    """
    worse = evidence.table[evidence.table["family"] != ""]
    drawn = worse.loc[
        (worse["variant"] == row.of) & (worse["seen"] == (row.where == "seen")), "family"
    ].unique()
    worse = worse[(worse["variant"] == variant) & worse["family"].isin(drawn)]
    means = worse.groupby("image")["right"].mean()
    values, facts = evidence.read(variant, "test", "right")
    chosen = facts.index.isin(means.index)
    return values.mean(axis=0)[chosen], means.to_numpy(), facts["subject"].to_numpy()[chosen]


def _tell_drop(evidence: Evidence, row: Row) -> Told:
    """Share of the clean accuracy that corruption takes; or the share of a control's drop that is saved."""
    own, control = (_read_corrupted(evidence, row, each) for each in (row.of, row.against or row.of))

    def drop(part: tuple[NDArray[Any], ...], rows: NDArray[np.intp]) -> float:
        return float(1 - part[1][rows].mean() / part[0][rows].mean())

    def saved(rows: NDArray[np.intp]) -> float:
        whole = drop(control, rows)
        return 1 - drop(own, rows) / whole if whole > 0 else float("nan")

    if not len(own[0]):
        return f"no corruption was {row.where}"
    whole = bootstrap_statistic(partial(drop, control), control[2], evidence.confidence)
    if not row.against:
        return whole
    if whole.low <= 0:
        return f"corruption takes nothing from {row.against} that could be saved"
    return bootstrap_statistic(saved, own[2], evidence.confidence)


def _tell_new_site(evidence: Evidence, row: Row) -> Told:
    """Mean over sites that their network never saw, with the prediction interval of one more such site."""
    outside = sorted(evidence.table.loc[evidence.table["split"] == "external", "site"].unique())
    places = sorted({(run["variant"], run["leave_out"]) for run in evidence.runs if run["leave_out"]})
    told = [_spread_site(evidence, of, on) for of, on in (*places, *((row.of, site) for site in outside))]
    known = np.array([level for level in told if not isinstance(level, str)])
    if len(known) < 3:
        return "fewer than three unseen sites"
    middle, half, between = predict_site(known[:, 0], known[:, 1], evidence.confidence)
    low, high = np.clip([middle - half, middle + half], 0, 1)
    few = ", indicative under 10" if len(known) < 10 else ""
    method = f"prediction interval over {len(known)} sites{few}; between them SD {between:.3f}"
    return Estimate(estimate=middle, low=low, high=high, subjects=int(known[:, 2].sum()),
                    confidence=evidence.confidence, method=method)  # fmt: skip


def predict_site(
    levels: NDArray[np.floating], variances: NDArray[np.floating], confidence: float
) -> tuple[float, float, float]:
    """What to expect of one more site: DerSimonian and Laird, Hartung and Knapp, t with sites - 2.

    Where sites happen to agree, Hartung and Knapp's variance can be less than sampling alone gives: the wider
    one counts.

    Args:
        levels: of each site, (sites,), three or more.
        variances: of the levels, (sites,).
        confidence: of the prediction interval.

    Returns:
        Mean over sites, half the width of the prediction interval, and the SD between sites.
    """
    from scipy.stats import t
    from statsmodels.stats.meta_analysis import combine_effects

    found = combine_effects(levels, variances, method_re="chi2", use_t=True)
    kind, between = ("re", float(found.tau2)) if found.tau2 > 0 else ("fe", 0.0)
    wider = max(getattr(found, f"{name}_{kind}") for name in ("var_hksj", "var_eff_w"))
    spread = np.sqrt(between + wider)
    half = t.ppf((1 + confidence) / 2, len(levels) - 2) * spread
    return float(getattr(found, f"mean_effect_{kind}")), float(half), float(np.sqrt(between))


def _spread_site(evidence: Evidence, of: str, on: str) -> Spread | str:
    """As `_spread`; mean Dice where there is no truth of images."""
    values, facts = evidence.read(of, on, "score")
    if facts["truth"].notna().all():
        return _spread(evidence, of, on)
    means = facts.assign(score=values.mean(axis=0)).groupby("subject")["score"].mean()
    return float(means.mean()), float(means.var() / len(means)), len(means)


BY_SEED = {*COLUMNS, "auc"}
SHOWS: dict[str, Callable[[Evidence, Row], Told]] = {
    **dict.fromkeys(COLUMNS, _tell_mean), "auc": _tell_auc, "fall of auc": _tell_fall, "drop": _tell_drop,
    "drop saved": _tell_drop, "seconds saved": _tell_seconds, "new site": _tell_new_site,
}  # fmt: skip
"""What a row can show -> how it is estimated."""
