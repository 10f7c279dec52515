"""Whether heat maps show the lesion: an audit against masks, baselines and networks that learnt nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import Places
from imaging.intervals import Estimate, bootstrap_mean, group_by_subject, wilson
from imaging.recipe import Architecture, EvaluateSection, TaskSection
from imaging.vocabulary import Kind, Split
from registry.architectures import build
from registry.engines import open_engine
from registry.package import read_contract
from training.datasets import Dataset, load_masks

SEEDS = (101, 102, 103)  # of networks with random weights
TOLERANCE = 1 / 16  # of an axis, whatever the network's own grid: 14 pixels of 224, as pointing games allow
RHO = 0.5  # a map that keeps a higher rank correlation without its weights does not show what was learnt
LEAST = 20  # subjects: fewer that all agree would fool a bootstrap
MEASURES = ("hits", "energy", "iou")
Score = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def explain(
    places: Places, task: str, section: TaskSection, data: Dataset, heat: NDArray[np.float32]
) -> dict[str, Any]:
    """The audit of a package's maps: what the evaluation statement says under `explanation`.

    Args:
        places: where package and masks lie.
        task: its name.
        section: `evaluate.explanation` has the number of images and the margin.
        data: the locked sets; positive images of the internal test set are audited, whatever was answered.
        heat: of the packaged engine on them, (n[, depth], rows, columns).

    Returns:
        As `audit_explanations`, or only `passed` (false), `applies` (could it be audited?) and `reasons`.
    """
    how, package = section.evaluate, places.stage(task, "package")
    if section.kind is Kind.SEGMENTATION:
        return _refuse("The heat of a segmentation is its uncertainty: it explains nothing.", applies=False)
    if "imported" in read_contract(package).lineage:
        return _refuse("It was trained elsewhere: there is no network to draw random weights for.")
    if not how.explanation.images:
        return _refuse("The audit of maps is off: `explanation.images` is 0.")
    labels = section.kind is Kind.CLASSIFICATION
    positive = np.isin(data.truth, section.positive_labels) if labels else _has_any(data.truth)
    positive &= data.rows["mask"].notna().to_numpy() & (data.rows["split"] == Split.TEST).to_numpy()
    drawn = np.random.default_rng(how.seed).permutation(np.flatnonzero(positive))
    drawn = np.sort(drawn[: how.explanation.images])
    masks = load_masks(places.stage(task, "cohort"), data.rows.iloc[drawn]) if len(drawn) else None
    if masks is None or not masks.any():
        return _refuse("There are no lesion masks, so maps cannot be audited.")
    rows, masks = drawn[_has_any(masks)], masks[_has_any(masks)]
    lesions = replace(data.take(rows), truth=masks.astype(np.int64))
    engine, size = open_engine(package, how.engine, how.precision), section.package.max_batch

    def score(images: NDArray[np.float32]) -> NDArray[np.float32]:
        parts = np.split(images, range(size, len(images), size))
        return _log_odds(np.concatenate([engine.run(part).logits for part in parts]), section)

    untrained = [look_untrained(section, lesions.images, seed) for seed in SEEDS]
    return audit_explanations(lesions, [heat[rows], *untrained], score, how)


def audit_explanations(
    lesions: Dataset, heats: Sequence[NDArray[np.float32]], score: Score, how: EvaluateSection
) -> dict[str, Any]:
    """Hold maps against lesion masks, against what knows nothing, and against their own weights.

    Args:
        lesions: truly positive images; truth is a mask, at least one pixel above 0 in each.
        heats: maps of the packaged engine, then of networks with random weights, (n[, depth], rows, columns).
        score: log odds that images are positive, (n,), by the packaged engine.
        how: confidence, seed and `explanation`.

    Returns:
        `measures` with intervals and `baselines`: see `measure_maps` and `_measure_baselines`;
        `randomisation`: absolute rank correlation with untrained maps (all weights at once; Adebayo 2018);
        `deletion`: fall of the log odds when the hottest pixels, as many as the grown lesion has,
        become the mean of others in a box of half an axis, and when a patch of their form elsewhere does;
        `passed`: hits exceed each baseline's by the margin and the paired interval excludes 0, and the
        correlation's interval ends below `RHO`; `reasons`: what failed, or else what held. Four digits.
    """
    from scipy.ndimage import maximum_filter

    masks, who, margin = lesions.truth > 0, lesions.subjects, how.explanation.margin
    reach = [max(1, round(side * TOLERANCE)) for side in masks.shape[1:]]
    box = (1, *(2 * pixels + 1 for pixels in reach))
    grown = maximum_filter(masks, box, mode="constant")
    found = measure_maps(heats[0], masks, grown)
    found[0] = found[0] > 0.5
    baselines = _measure_baselines(lesions.images, heats[1:], (masks, grown), box)
    ahead = {name: _estimate(found[0] - told[0], who, how) for name, told in baselines.items()}
    rho = _estimate(np.mean([_correlate(heats[0], other) for other in heats[1:]], axis=0), who, how)
    people = len(np.unique(who))
    judged = [(people >= LEAST, f"{people} subjects were audited, at least {LEAST} must be.")]
    judged += [(rho.high < RHO, f"Rank correlation with random weights: {rho}, must be below {RHO}.")]
    for name, told in ahead.items():
        reason = f"Hits less those of {name}: {told}, must lie above 0 and be more than {margin:g}."
        judged.append((told.low > 0 and told.estimate > margin, reason))
    passed = all(held for held, _ in judged)
    pairs = zip(MEASURES, found, strict=True)
    measures = {n: bootstrap_mean(told, who, how.confidence, how.seed) for n, told in pairs}
    measures["hits"] = wilson(found[0].astype(int), who, how.confidence)
    body = {
        "passed": passed, "applies": True, "reasons": [why for held, why in judged if held is passed],
        "images": len(masks), "subjects": people, "tolerance_px": reach, "margin": margin,
        "measures": measures, "differences": ahead,
        "baselines": {n: dict(zip(MEASURES, b.mean(axis=1), strict=True)) for n, b in baselines.items()},
        "randomisation": {"rho": rho, "limit": RHO, "passed": rho.high < RHO},
        "deletion": _delete(lesions, heats[0], grown, score, how),
    }  # fmt: skip
    text = json.dumps(body, default=Estimate.model_dump)
    return dict(json.loads(text, parse_float=lambda digits: round(float(digits), 4)))


def measure_maps(heat: NDArray[Any], masks: NDArray[Any], grown: NDArray[Any]) -> NDArray[np.float64]:
    """`MEASURES` of each map, 0 to 1, (3, n): hits, energy, iou.

    Is the maximum on the lesion or, with its tolerance, `grown`? What share of the map is on the lesion? IoU
    of the lesion and as many of the hottest pixels. Ties count by their share; blank maps hit nothing.
    """
    told = []
    for hot, mask, near in zip(heat.astype(float), masks, grown, strict=True):
        area = int(mask.sum())
        limit = np.partition(hot, -area, axis=None)[-area]
        both = (mask & (hot > limit)).sum() + (area - (hot > limit).sum()) * mask[hot == limit].mean()
        hits = near[hot == hot.max()].mean() if np.ptp(hot) else 0.0
        told.append((hits, hot[mask].sum() / max(hot.sum(), 1e-30), both / (2 * area - both)))
    return np.array(told).T


def look_untrained(section: TaskSection, images: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Maps of the task's architecture with random weights, a pretrained backbone's among them."""
    import torch

    def forget(told: Architecture) -> Architecture:
        return told.model_copy(update={"pretrained": None, "members": tuple(map(forget, told.members))})

    shape, positive = images.shape[1:], section.positive_labels
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = build(forget(section.fit.architecture), shape, len(section.classes), positive).eval()
        parts = torch.split(torch.from_numpy(images), 32)
        return np.concatenate([network(part)[1].numpy() for part in parts])


def _refuse(reason: str, applies: bool = True) -> dict[str, Any]:
    return {"passed": False, "applies": applies, "reasons": [reason]}


def _log_odds(logits: NDArray[Any], section: TaskSection) -> NDArray[Any]:
    """A probability near 1 would hide a fall."""
    from scipy.special import logsumexp

    if section.kind is Kind.DETECTION:
        return np.asarray(logits[:, 0].max(axis=(1, 2)))
    positive = np.isin(np.arange(logits.shape[1]), section.positive_labels)
    return np.asarray(logsumexp(logits[:, positive], axis=1) - logsumexp(logits[:, ~positive], axis=1))


def _has_any(masks: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(masks.reshape(len(masks), -1).any(axis=1))


def _measure_baselines(
    images: NDArray[Any], untrained: Sequence[NDArray[Any]], lesions: tuple[Any, Any], box: tuple[int, ...]
) -> dict[str, NDArray[Any]]:
    """What knows nothing -> (3, n). Spots are means of boxes; the middle's SD is 1/4 of an axis."""
    from scipy.ndimage import uniform_filter

    grey = uniform_filter(images.mean(axis=1), box, mode="nearest")
    grid = np.meshgrid(*(np.linspace(-2, 2, side) for side in grey.shape[1:]), indexing="ij")
    middle = np.broadcast_to(np.exp(-np.square(grid).sum(axis=0) / 2), grey.shape)
    blind = {"random weights": untrained, "the brightest spot": [grey - grey.min()],
             "the darkest spot": [grey.max() - grey], "the middle": [middle]}  # fmt: skip
    found = {
        n: np.mean([measure_maps(look, *lesions) for look in looks], axis=0) for n, looks in blind.items()
    }
    share, near = (part.reshape(len(part), -1).mean(axis=1) for part in lesions)
    return {"chance": np.array([near, share, share / (2 - share)]), **found}  # of the expected overlap


def _correlate(heat: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """Absolute rank correlation (Spearman) of two maps of each image, (n,); 0 where one is blank."""
    from scipy.stats import rankdata

    ranks = [rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (heat, other)]
    spread = [rank - rank.mean(axis=1, keepdims=True) for rank in ranks]
    a, b = (rank / np.maximum(rank.std(axis=1, keepdims=True), 1e-12) for rank in spread)
    return np.asarray(np.abs((a * b).mean(axis=1)))


def _estimate(values: NDArray[Any], subjects: NDArray[Any], how: EvaluateSection) -> Estimate:
    """Mean of values of -1 to 1, by subject; where all are equal a bootstrap is blind, and Wilson is not."""
    means = np.array([group.mean() for group in group_by_subject(values, subjects)])
    if np.ptp(means) > 1e-9:
        return bootstrap_mean(values.astype(float), subjects, how.confidence, how.seed)
    half = wilson(np.asarray((means + 1) / 2), np.arange(len(means)), how.confidence)
    return half.model_copy(update={n: 2 * getattr(half, n) - 1 for n in ("estimate", "low", "high")})


def _delete(
    lesions: Dataset, heat: NDArray[Any], grown: NDArray[Any], score: Score, how: EvaluateSection
) -> dict[str, Any]:
    from scipy.ndimage import uniform_filter

    images, spatial, axes = lesions.images, heat.shape[1:], tuple(range(heat.ndim - 1))
    box = (1, 1, *(side // 2 for side in spatial))
    limits = [np.partition(h, -n.sum(), axis=None)[-n.sum()] for h, n in zip(heat, grown, strict=True)]
    hot = np.stack([(h >= limit) & (h > 0) for h, limit in zip(heat, limits, strict=True)])
    moves = np.random.default_rng(how.seed).integers(0, spatial, (len(hot), len(spatial)))
    moved = np.stack([np.roll(patch, move, axes) for patch, move in zip(hot, moves, strict=True)])

    def fall(patch: NDArray[Any]) -> NDArray[Any]:
        kept = 1 - patch[:, None].astype(np.float32)  # what is erased must not colour what replaces it
        sums, counts = (uniform_filter(part, box, mode="nearest") for part in (images * kept, kept))
        return score(images) - score(np.where(kept > 0, images, sums / np.maximum(counts, 1e-3)))

    heated, elsewhere = fall(hot), fall(moved)
    difference = bootstrap_mean(heated - elsewhere, lesions.subjects, how.confidence, how.seed)
    falls = {"heated": float(heated.mean()), "elsewhere": float(elsewhere.mean())}
    return {**falls, "difference": difference, "passed": difference.low > 0}
