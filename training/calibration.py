"""Temperature and operating point, frozen on internal validation before any test image is seen."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import Places, TaskSection
from imaging.errors import DataError
from imaging.scores import dice
from imaging.vocabulary import Kind, Split
from registry.architectures import build
from training.datasets import load_split, stage_folder


def calibrate(places: Places, task: str, section: TaskSection) -> dict[str, Any]:
    """Find temperature and threshold, and write calibration.json.

    Returns:
        temperature, threshold, and what they do on validation.
    """
    data = load_split(places, task, section, Split.VALIDATION)
    logits = _forward(places, task, section, data.images)
    flat, truth = _per_decision(logits, data.truth)
    temperature, threshold = fit_temperature(flat, truth), 0.5
    validation: dict[str, Any] = {
        "images": len(data.images), "subjects": len(np.unique(data.subjects)),
        "nll_before": _nll(flat, truth, 1.0), "nll_after": _nll(flat, truth, temperature),
        "brier_before": measure_brier(_softmax(flat), truth),
        "brier_after": measure_brier(_softmax(flat / temperature), truth),
    }  # fmt: skip
    if section.kind is Kind.CLASSIFICATION:
        positive = _softmax(flat / temperature)[:, 1]
        threshold = choose_threshold(positive, truth, section.calibrate.sensitivity)
        said = positive >= threshold
        validation["sensitivity"] = float(said[truth == 1].mean())
        validation["specificity"] = float(1 - said[truth == 0].mean())
    else:
        validation["dice"] = _score_masks(section, data.truth, logits.argmax(axis=1))
    told = {"temperature": temperature, "threshold": threshold, "validation": validation}
    path = stage_folder(places, task, "calibrate") / "calibration.json"
    path.write_text(json.dumps(told, indent=1) + "\n")
    return told


def fit_temperature(logits: NDArray[np.floating], truth: NDArray[np.integer]) -> float:
    """The temperature with the least negative log-likelihood (Guo 2017).

    Args:
        logits: (n, classes).
        truth: (n,).

    Returns:
        Between .05 and 20, rounded to four digits.
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log: _nll(logits, truth, float(np.exp(log))),
        bounds=(np.log(0.05), np.log(20)),
        method="bounded",
    )
    return round(float(np.exp(found.x)), 4)


def choose_threshold(positive: NDArray[np.floating], truth: NDArray[np.integer], sensitivity: float) -> float:
    """The highest threshold that keeps a sensitivity, rounded down to four digits.

    Rounding down errs towards sensitivity, and leaves room for what engines differ by.

    Args:
        positive: probability of the positive class, (n,).
        truth: 0 or 1, (n,).
        sensitivity: the least share of positives that must lie at or above it.

    Raises:
        DataError: there is no positive.
    """
    scores = np.sort(positive[truth == 1])
    if not len(scores):
        raise DataError("Validation has no positive image.", "Raise `split.validation` in params.yaml.")
    index = int(np.floor((1 - sensitivity) * len(scores) + 1e-9))  # so many may be missed
    return float(np.floor(float(scores[index]) * 1e4) / 1e4)


def measure_brier(probabilities: NDArray[np.floating], truth: NDArray[np.integer]) -> float:
    """Brier score: the squared distance of the probabilities from the truth, summed over classes.

    Args:
        probabilities: (n, classes).
        truth: (n,).

    Returns:
        0 (certain and right) to 2; of two classes twice what scikit-learn gives for the positive one.
    """
    hits = np.eye(probabilities.shape[1])[truth]
    return float(((probabilities - hits) ** 2).sum(axis=1).mean())


def _forward(
    places: Places, task: str, section: TaskSection, images: NDArray[np.float32]
) -> NDArray[np.float32]:
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(section.fit.threads)
    network = build(section.fit.architecture, len(section.classes))
    network.load_state_dict(load_file(places.stage(task, "fit") / "weights.safetensors"))
    network.eval()
    with torch.inference_mode():
        parts = [network(torch.from_numpy(images[i : i + 64]))[0].numpy() for i in range(0, len(images), 64)]
    return np.concatenate(parts)


def _per_decision(logits: NDArray[Any], truth: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Logits (decisions, classes): of images, or of every 17th pixel of a mask (neighbours say the same)."""
    if logits.ndim == 2:
        return logits, truth
    flat = np.moveaxis(logits, 1, -1).reshape(-1, logits.shape[1])
    return flat[::17].astype(np.float64), truth.reshape(-1)[::17]


def _score_masks(section: TaskSection, truth: NDArray[Any], answers: NDArray[Any]) -> dict[str, float]:
    """Mean Dice of each class but the first, over the images."""
    pairs = list(zip(truth, answers, strict=True))
    return {
        name: float(np.nanmean([dice(*pair, label) for pair in pairs]))
        for label, name in enumerate(section.classes)
        if label
    }


def _nll(logits: NDArray[Any], truth: NDArray[Any], temperature: float) -> float:
    probabilities = _softmax(logits / temperature)[np.arange(len(truth)), truth]
    return float(-np.log(np.maximum(probabilities, 1e-12)).mean())


def _softmax(logits: NDArray[Any]) -> NDArray[Any]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
