"""From what each image scores to estimates with intervals: of a group, between sites, and as curves."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.detection import RATES, froc
from imaging.estimation import LINE, Measure, Scores, measure, resample, select
from imaging.manifest import Pixels
from imaging.recipe import EvaluateSection
from imaging.scores import equivalent_mm, reliability
from imaging.vocabulary import Kind, Split
from registry.package import Contract
from training.datasets import Dataset

SUBGROUPS = ("sex", "age_band", "scanner")

METRICS = {
    Kind.CLASSIFICATION: ("accuracy", "sensitivity", "specificity", "auc", "class_accuracy", "brier",
                          "calibration_error", *LINE),
    Kind.DETECTION: ("lesion_sensitivity", "auc", "false_positives", "froc"),
}  # fmt: skip
GAPS = {
    Kind.CLASSIFICATION: ("accuracy", "sensitivity", "specificity", "auc"),
    Kind.DETECTION: ("lesion_sensitivity", "auc"),
    Kind.SEGMENTATION: ("dice",),
}


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
    names = METRICS.get(contract.kind, tuple(picked))  # of a segmentation each score is a metric
    told = {name: measure(name, picked, people, how.confidence, how.seed) for name in names}
    return {name: value.model_dump() for name, value in told.items() if value}


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
    for name in GAPS[contract.kind]:
        ask = select(name, scores)
        found = {str(place): ask(np.flatnonzero(site == place)) for place in np.unique(site)}
        ranked = sorted((place for place in found if np.isfinite(found[place])), key=found.__getitem__)
        if len(ranked) < 2:
            continue
        kept = np.flatnonzero(np.isin(site, ranked))
        people, places = subjects[kept], np.unique(site[kept], return_inverse=True)[1]
        spread = partial(_spread_sites, ask, kept, places)
        gap = resample(spread, people, how.confidence, how.seed, places)
        told[name] = {**gap.model_dump(), "best": ranked[-1], "worst": ranked[0],
                      "by_chance": _spread_by_chance(ask, kept, places, people, how.seed)}  # fmt: skip
    return told


def _spread_sites(
    ask: Measure, kept: NDArray[np.intp], places: NDArray[Any], drawn: NDArray[np.intp]
) -> float:
    return float(np.ptp([ask(kept[drawn[places[drawn] == place]]) for place in range(places.max() + 1)]))


def _spread_by_chance(
    ask: Measure, kept: NDArray[np.intp], places: NDArray[Any], people: NDArray[Any], seed: int
) -> float:
    """Mean gap over 200 draws in which the subjects, whole, change places with each other."""
    _, first, owner = np.unique(people, return_index=True, return_inverse=True)
    generator, rows = np.random.default_rng(seed), np.arange(len(kept))
    drawn = (generator.permutation(places[first])[owner] for _ in range(200))
    return float(np.nanmean([_spread_sites(ask, kept, other, rows) for other in drawn]))


def tabulate(contract: Contract, scores: Scores, chosen: NDArray[np.bool_]) -> dict[str, Any]:
    """Curves of the chosen images: a classification's reliability table, a detection's FROC curve."""
    if contract.kind is Kind.CLASSIFICATION:
        return {"reliability": reliability(scores["truth"][chosen], scores["probability"][chosen])}
    if contract.kind is Kind.DETECTION and scores["lesions"][chosen].any():
        curve = froc(list(scores["match"][chosen])).sensitivity
        return {"froc": {"false_positives": list(RATES), "sensitivity": list(curve)}}
    return {}
