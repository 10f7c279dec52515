"""How good an answer is, one image at a time; intervals are elsewhere."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def dice(truth: NDArray[np.integer], answer: NDArray[np.integer], label: int) -> float:
    """Dice overlap of one label.

    Args:
        truth: integer labels, any shape.
        answer: integer labels, same shape.
        label: the label to compare.

    Returns:
        0 to 1; NaN where neither has the label, so that an empty slice counts neither way.
    """
    a, b = truth == label, answer == label
    total = int(a.sum()) + int(b.sum())
    return float(2 * int((a & b).sum()) / total) if total else float("nan")


def auc(truth: NDArray[np.integer], score: NDArray[np.floating]) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative, ties half.

    Args:
        truth: 0 or 1, shape (n,).
        score: any scale, shape (n,).

    Returns:
        0 to 1; NaN where one class is absent.
    """
    from scipy.stats import rankdata

    positives = int(truth.sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(score)[truth == 1].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))


def surface_distances(
    truth: NDArray[np.bool_], answer: NDArray[np.bool_], spacing_mm: float | tuple[float, ...]
) -> tuple[float, float]:
    """How far apart two surfaces lie: average symmetric distance, and 95th percentile Hausdorff distance.

    Args:
        truth: a mask (rows, columns) or (depth, rows, columns).
        answer: a mask of the same shape.
        spacing_mm: of every axis, or of each.

    Returns:
        Both in mm: the mean over both surfaces of the distance to the other one; and the larger of the two
        directed 95th percentiles. NaN where either mask is empty: Dice counts what was missed.
    """
    from scipy.ndimage import distance_transform_edt, find_objects

    if not truth.any() or not answer.any():
        return float("nan"), float("nan")
    (box,) = find_objects((truth | answer).astype(np.uint8))  # the rest of the image says nothing
    edges = [_surface(mask[box]) for mask in (truth, answer)]
    spacing = np.broadcast_to(spacing_mm, truth.ndim)
    away = [distance_transform_edt(~edge, sampling=spacing) for edge in edges]
    there, back = away[1][edges[0]], away[0][edges[1]]
    worst = max(np.percentile(there, 95), np.percentile(back, 95))
    return float(np.concatenate([there, back]).mean()), float(worst)


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Those pixels of a mask that have a neighbour (by a side) outside it; beyond the image is outside."""
    from scipy.ndimage import binary_erosion

    return np.asarray(mask & ~binary_erosion(mask))


def equivalent_mm(mask: NDArray[np.bool_], spacing_mm: float | tuple[float, ...]) -> float:
    """Diameter in mm of the disc (or ball) that is as large as a mask; 0 of an empty one."""
    size = float(mask.sum()) * float(np.prod(np.broadcast_to(spacing_mm, mask.ndim)))
    return float(2 * np.sqrt(size / np.pi) if mask.ndim == 2 else 2 * np.cbrt(size * 3 / (4 * np.pi)))


def brier(truth: NDArray[np.integer], score: NDArray[np.floating]) -> float:
    """Mean squared distance of the probability (n,) of a positive from the truth (n,), 0 or 1."""
    return float(((score - truth) ** 2).mean())


def reliability(
    truth: NDArray[np.integer], score: NDArray[np.floating], bins: int = 10
) -> list[dict[str, float]]:
    """What was said against what was true, in equally wide bins of the probability.

    Args:
        truth: 0 or 1, shape (n,).
        score: probability of a positive, shape (n,).
        bins: of equal width from 0 to 1; the last one has its upper limit.

    Returns:
        Of each bin that is not empty: `said` (mean probability), `share` (of positives) and `count`.
    """
    place = np.minimum((score * bins).astype(int), bins - 1)
    counts, said, share = (np.bincount(place, w, bins) for w in (None, score, truth))
    return [
        {"said": float(said[i] / counts[i]), "share": float(share[i] / counts[i]), "count": int(counts[i])}
        for i in np.flatnonzero(counts)
    ]


def calibration_error(truth: NDArray[np.integer], score: NDArray[np.floating], bins: int = 10) -> float:
    """Expected calibration error: |said - share| in `reliability`'s equally wide bins, weighed by count.

    Returns:
        0 to 1; above 0 also for honest probabilities, the more so the fewer images.
    """
    table = reliability(truth, score, bins)
    return float(sum(row["count"] * abs(row["said"] - row["share"]) for row in table) / len(score))
