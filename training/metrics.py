"""From what each image scores to estimates with intervals: of a group, between sites, and as curves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.detection import RATES, froc
from imaging.intervals import (
    Estimate,
    bootstrap_mean,
    bootstrap_statistic,
    calibration_line,
    delong,
    wilson,
)
from imaging.manifest import Pixels
from imaging.recipe import EvaluateSection
from imaging.scores import auc, brier, calibration_error, equivalent_mm, reliability
from imaging.vocabulary import Kind, Split
from registry.package import Contract
from training.datasets import Dataset

SUBGROUPS = ("sex", "age_band", "scanner")

Measure = Callable[[NDArray[np.intp]], float]  # row numbers -> a metric, NaN where it has no case
Scores = dict[str, NDArray[Any]]
"""Name of a score -> its value for each image, (n,); see `training.evaluation.score_images`."""


def estimate(
    contract: Contract,
    scores: Scores,
    subjects: NDArray[Any],
    chosen: NDArray[np.bool_],
    how: EvaluateSection,
) -> dict[str, Any]:
    """Estimates with intervals over the chosen images: metric -> the fields of `Estimate`.

    What cannot be estimated, such as a calibration slope where the classes do not overlap, is left out.
    """
    picked, people = {name: values[chosen] for name, values in scores.items()}, subjects[chosen]
    if contract.kind is Kind.CLASSIFICATION:
        told = _estimate_labels(picked, people, how)
    elif contract.kind is Kind.DETECTION:
        told = _estimate_lesions(picked, people, how)
    else:
        kept = (name for name in picked if "_mm" not in name or _spread(picked[name], people))
        told = {name: bootstrap_mean(picked[name], people, how.confidence, how.seed) for name in kept}
    return {name: value.model_dump() for name, value in told.items()}


def _estimate_labels(scores: Scores, people: NDArray[Any], how: EvaluateSection) -> dict[str, Estimate]:
    truth, right, score = (scores[name] for name in ("truth", "right", "probability"))
    sure = how.confidence
    told = {
        "accuracy": wilson(right, people, sure),
        "sensitivity": wilson(right[truth == 1], people[truth == 1], sure),
        "specificity": wilson(right[truth == 0], people[truth == 0], sure),
        "auc": delong(truth, score, people, sure),
    }
    if "class_right" in scores:
        told["class_accuracy"] = wilson(scores["class_right"], people, sure)
    if not len(truth):
        return told
    for name, measure in {"brier": brier, "calibration_error": calibration_error}.items():
        drawn = partial(_measure_rows, measure, truth, score)
        told[name] = _resample(drawn, people, how)
    if line := calibration_line(truth, score, people, sure):
        told["calibration_slope"], told["calibration_intercept"] = line
    return told


def _resample(
    measure: Measure, people: NDArray[Any], how: EvaluateSection, strata: NDArray[Any] | None = None
) -> Estimate:
    """Bootstrap of a measure of 0 to 1; where all draws agree resampling is blind, and nothing is claimed."""
    told = bootstrap_statistic(measure, people, how.confidence, how.seed, strata)
    if told.low < told.high:
        return told
    return told.model_copy(update={"low": 0.0, "high": 1.0, "method": "no spread to resample"})


def _measure_rows(
    measure: Callable[..., float], truth: NDArray[Any], score: NDArray[Any], rows: NDArray[np.intp]
) -> float:
    return measure(truth[rows], score[rows])


def _estimate_lesions(scores: Scores, people: NDArray[Any], how: EvaluateSection) -> dict[str, Estimate]:
    found, missed = scores["found"], scores["lesions"] - scores["found"]
    right = np.repeat([1, 0], [int(found.sum()), int(missed.sum())])  # one row a lesion
    owners = np.concatenate([np.repeat(people, found), np.repeat(people, missed)])
    told = {
        "lesion_sensitivity": wilson(right, owners, how.confidence),
        "auc": delong(scores["truth"], scores["probability"], people, how.confidence),
    }
    if _spread(scores["false_positives"], people):
        alarms = scores["false_positives"].astype(float)
        told["false_positives"] = bootstrap_mean(alarms, people, how.confidence, how.seed)
    if len(right):
        told["froc"] = _resample(lambda rows: froc(list(scores["match"][rows])).mean, people, how)
    return told


def _spread(values: NDArray[Any], people: NDArray[Any]) -> bool:
    """Whether a mean without an upper limit can be given an interval: two subjects that differ."""
    kept = np.isfinite(values)
    return len(np.unique(people[kept])) > 1 and np.ptp(values[kept]) > 0


def estimate_subgroups(
    cohort: Path, contract: Contract, data: Dataset, scores: Scores, how: EvaluateSection
) -> dict[str, dict[str, Any]]:
    """Estimates of the internal test set's subgroups: column -> value -> metric -> the fields of `Estimate`.

    A column with a single value is left out. Where `evaluate.lesion_mm` has limits, `lesion_size` has the
    metrics that depend on lesions: a classification is asked of the positives of a size and all negatives.
    """
    internal, told = (data.rows["split"] == Split.TEST).to_numpy(), {}
    for column in SUBGROUPS:
        values = data.rows[column].astype(object).where(data.rows[column].notna(), "not told").to_numpy()
        if len(names := sorted(set(values[internal]))) > 1:
            told[column] = {
                str(name): estimate(contract, scores, data.subjects, internal & (values == name), how)
                for name in names
            }
    edges = (0.0, *sorted(how.lesion_mm), float("inf")) if how.lesion_mm else ()
    sizes = measure_lesions(cohort, contract, data, scores) if edges else []
    for low, high in pairwise(edges):
        inside = [(low <= own) & (own < high) for own in sizes]
        part, chosen, asked = _of_size(contract, scores, inside)
        if any(own.any() for own, here in zip(inside, internal, strict=True) if here):
            found = estimate(contract, part, data.subjects, internal & chosen, how)
            kept = {name: found[name] for name in found if not asked or name in asked}
            told.setdefault("lesion_size", {})[_name_size(low, high)] = kept
    return told


def measure_lesions(
    cohort: Path, contract: Contract, data: Dataset, scores: Scores
) -> list[NDArray[np.float64]]:
    """Equivalent diameters in mm of each image's lesions: of a detection of every one, else of the largest.

    An image without a lesion, or whose cohort has no mask of it, has none.
    """
    pixels, found = Pixels(cohort), []
    for i, (shard, row, spacing) in enumerate(
        data.rows[["mask", "row", "spacing_mm"]].itertuples(index=False)
    ):
        if contract.kind is Kind.DETECTION:
            area = scores["match"][i].areas * np.prod(np.broadcast_to(spacing, 2))
            found.append(np.sqrt(4 / np.pi * area))
        elif not isinstance(shard, str) or (contract.kind is Kind.CLASSIFICATION and not scores["truth"][i]):
            found.append(np.zeros(0))
        else:
            size = equivalent_mm(_largest(pixels.read(str(shard), int(row)) > 0), spacing)
            found.append(np.array([size] if size else []))
    return found


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected part of a mask, corners included."""
    from scipy.ndimage import label

    parts, count = label(mask, np.ones((3,) * mask.ndim))
    return np.asarray(parts == 1 + np.bincount(parts.ravel())[1:].argmax()) if count else mask


def _of_size(
    contract: Contract, scores: Scores, inside: list[NDArray[np.bool_]]
) -> tuple[Scores, NDArray[np.bool_], tuple[str, ...]]:
    """Scores of the lesions of a size (`inside`), which images count, and which metrics (none: all)."""
    some = np.array([own.any() for own in inside])
    if contract.kind is Kind.CLASSIFICATION:
        return scores, some | (scores["truth"] == 0), ("sensitivity", "auc")
    if contract.kind is Kind.SEGMENTATION:
        return scores, some, ()
    pairs = list(zip(scores["match"], inside, strict=True))
    found = [int((match.hits[own] >= contract.threshold).sum()) for match, own in pairs]
    counts = {"lesions": np.array([int(own.sum()) for own in inside]), "found": np.array(found)}
    return {**scores, **counts}, some, ("lesion_sensitivity",)


def _name_size(low: float, high: float) -> str:
    if not low:
        return f"under {high:g} mm"
    return f"{low:g} to {high:g} mm" if np.isfinite(high) else f"from {low:g} mm"


def measure_gap(
    contract: Contract, scores: Scores, subjects: NDArray[Any], site: NDArray[Any], how: EvaluateSection
) -> dict[str, Any]:
    """How much the best site exceeds the worst, internal or external, subjects drawn within their sites.

    Sites that are equally good also differ by chance: a gap is never below 0.

    Returns:
        Metric -> the fields of `Estimate`, `best` and `worst` (sites), and `by_chance`, the mean gap if the
        subjects had come to their sites at random; empty with fewer than two sites.
    """
    told: dict[str, Any] = {}
    for name, measure in _measures(contract, scores).items():
        found = {str(place): measure(np.flatnonzero(site == place)) for place in np.unique(site)}
        ranked = sorted((place for place in found if np.isfinite(found[place])), key=found.__getitem__)
        if len(ranked) < 2:
            continue
        kept = np.flatnonzero(np.isin(site, ranked))
        people, places = subjects[kept], np.unique(site[kept], return_inverse=True)[1]
        spread = partial(_spread_sites, measure, kept, places)
        gap = _resample(spread, people, how, places)
        told[name] = {**gap.model_dump(), "best": ranked[-1], "worst": ranked[0],
                      "by_chance": _spread_by_chance(measure, kept, places, people, how.seed)}  # fmt: skip
    return told


def _spread_sites(
    measure: Measure, kept: NDArray[np.intp], places: NDArray[Any], drawn: NDArray[np.intp]
) -> float:
    return float(np.ptp([measure(kept[drawn[places[drawn] == place]]) for place in range(places.max() + 1)]))


def _spread_by_chance(
    measure: Measure, kept: NDArray[np.intp], places: NDArray[Any], people: NDArray[Any], seed: int
) -> float:
    """Mean gap over 200 draws in which the subjects, whole, change places with each other."""
    _, first, owner = np.unique(people, return_index=True, return_inverse=True)
    generator, rows = np.random.default_rng(seed), np.arange(len(kept))
    drawn = (generator.permutation(places[first])[owner] for _ in range(200))
    return float(np.nanmean([_spread_sites(measure, kept, other, rows) for other in drawn]))


def _measures(contract: Contract, scores: Scores) -> dict[str, Measure]:
    """Of the metrics that are the better the larger: row numbers -> the metric, NaN where it has no case."""

    def share(hits: NDArray[Any], cases: NDArray[Any]) -> Measure:
        return lambda rows: float(hits[rows].sum() / count) if (count := cases[rows].sum()) else float("nan")

    if contract.kind is Kind.SEGMENTATION:
        return {"dice": share(np.nan_to_num(scores["dice"]), np.isfinite(scores["dice"]))}
    truth, score = scores["truth"], scores["probability"]
    ranking: dict[str, Measure] = {"auc": lambda rows: auc(truth[rows], score[rows])}
    if contract.kind is Kind.DETECTION:
        return {"lesion_sensitivity": share(scores["found"], scores["lesions"]), **ranking}
    right = scores["right"]
    shares = {"accuracy": share(right, np.ones(len(right))), "sensitivity": share(right * truth, truth),
              "specificity": share(right * (1 - truth), 1 - truth)}  # fmt: skip
    return {**shares, **ranking}


def tabulate(contract: Contract, scores: Scores, chosen: NDArray[np.bool_]) -> dict[str, Any]:
    """Curves of the chosen images: a classification's reliability table, a detection's FROC curve."""
    if contract.kind is Kind.CLASSIFICATION:
        return {"reliability": reliability(scores["truth"][chosen], scores["probability"][chosen])}
    if contract.kind is Kind.DETECTION and scores["lesions"][chosen].any():
        curve = froc(list(scores["match"][chosen])).sensitivity
        return {"froc": {"false_positives": list(RATES), "sensitivity": list(curve)}}
    return {}
