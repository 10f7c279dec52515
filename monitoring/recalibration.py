"""A site's own calibration of a score: none, a temperature or a logistic line, as held-out cases confirm."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.profiles import SMALLEST

LEAST = 50  # subjects a class
FOLDS = 10
SEED = 6
NOTHING, TEMPERATURE, LOGISTIC = "nothing", "temperature", "logistic"
Line = tuple[float, float]  # intercept and slope, in logits


def choose_line(score: NDArray[Any], truth: NDArray[Any]) -> tuple[Line, dict[str, Any]]:
    """The recalibration that lowers log loss on subjects it was not fitted to by more than a standard error.

    Args:
        score: the network's probability of a positive, one a subject, (n,).
        truth: 1 or 0, (n,).

    Returns:
        Intercept and slope, (0, 1) for none; and the figures that decided.
    """
    least = min(int((truth == 1).sum()), int((truth == 0).sum()))
    if least < LEAST:
        return (0.0, 1.0), {
            "chosen": NOTHING,
            "why": f"{least} subjects of the rarer class, fewer than {LEAST}",
        }
    losses = {name: _cross(score, truth, name) for name in (NOTHING, TEMPERATURE, LOGISTIC)}
    told: dict[str, Any] = {"folds": FOLDS, "held_out_log_loss": {
        name: round(float(loss.mean()), 6) for name, loss in losses.items()}}  # fmt: skip
    best = min(losses, key=lambda name: float(losses[name].mean()))
    gain = losses[NOTHING] - losses[best]
    error = float(gain.std(ddof=1) / np.sqrt(len(gain)))
    told |= {"gain": round(float(gain.mean()), 6), "standard_error": round(error, 6)}
    chosen = best if gain.mean() > error else NOTHING
    return fit_line(score, truth, chosen), {**told, "chosen": chosen}


def fit_line(score: NDArray[Any], truth: NDArray[Any], method: str) -> Line:
    """Intercept and slope with the least log loss, by Newton's method.

    Args:
        score: the network's probability of a positive, (n,).
        truth: 1 or 0, (n,).
        method: nothing, temperature (the slope alone) or logistic.

    Returns:
        (0, 1) too where the best slope is not between 0 and 20, as of classes that do not overlap.
    """
    if method == NOTHING:
        return 0.0, 1.0
    columns = np.stack([np.ones(len(score)), logit(score)], axis=1)[:, method == TEMPERATURE :]
    weights = np.zeros(columns.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-columns @ weights))
        slopes = columns.T @ (truth - p)
        curve = (columns * (p * (1 - p))[:, None]).T @ columns + 1e-9 * np.eye(len(weights))
        step = np.linalg.solve(curve, slopes)
        weights = weights + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    intercept, slope = (0.0, *weights) if method == TEMPERATURE else weights
    fits = 0 < slope < 20 and abs(intercept) < 20
    return (round(float(intercept), 6), round(float(slope), 6)) if fits else (0.0, 1.0)


def apply_line(score: NDArray[Any], line: Line) -> NDArray[np.float64]:
    """The recalibrated probability, (n,)."""
    told: NDArray[np.float64] = 1 / (1 + np.exp(-(line[0] + line[1] * logit(score))))
    return told


def logit(score: NDArray[Any]) -> NDArray[np.float64]:
    """Log odds, (n,), of probabilities a millionth away from 0 and 1 at least."""
    inner = np.clip(np.asarray(score, np.float64), SMALLEST, 1 - SMALLEST)
    return np.asarray(np.log(inner / (1 - inner)))


def draw_folds(truth: NDArray[Any]) -> NDArray[np.intp]:
    """The fold of each subject, (n,), both classes spread evenly; the same in every run."""
    folds = np.empty(len(truth), np.intp)
    generator = np.random.default_rng(SEED)
    for label in (0, 1):
        rows = np.flatnonzero(truth == label)
        folds[generator.permutation(rows)] = np.arange(len(rows)) % FOLDS
    return folds


def _cross(score: NDArray[Any], truth: NDArray[Any], method: str) -> NDArray[np.float64]:
    """Log loss of every subject, by a line that the others fitted."""
    folds, loss = draw_folds(truth), np.empty(len(truth))
    for fold in range(FOLDS):
        here = folds == fold
        p = apply_line(score[here], fit_line(score[~here], truth[~here], method))
        loss[here] = -np.log(np.where(truth[here] == 1, p, 1 - p))
    return loss
