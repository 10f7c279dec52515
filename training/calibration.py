"""Temperature and operating point, frozen on internal validation before any test image is seen."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import Places
from imaging.detection import STRIDE, find_lesions, match_lesions
from imaging.errors import DataError
from imaging.recipe import TaskSection
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
    found = choose_point(section, data.truth, logits)
    facts = {"images": len(data.images), "subjects": len(np.unique(data.subjects))}
    told = {**found, "validation": {**facts, **found["validation"]}}
    path = stage_folder(places, task, "calibrate") / "calibration.json"
    path.write_text(json.dumps(told, indent=1) + "\n")
    return told


def choose_point(
    section: TaskSection, truth: NDArray[np.integer], logits: NDArray[np.floating]
) -> dict[str, Any]:
    """Temperature and threshold from validation, and what they do there.

    Args:
        section: of the task.
        truth: labels (n,) or masks (n[, depth], rows, columns).
        logits: of the network: (n, classes[[, depth], rows, columns]), or (n, 3, rows / 4, columns / 4).

    Returns:
        temperature (1 of a detector), threshold (.5 of a segmentation) and validation.

    Raises:
        DataError: there is no positive, or a detector finds too few lesions at any score.
    """
    choose = _choose_lesions if section.kind is Kind.DETECTION else _choose_probabilities
    return choose(section, truth, logits)


def _choose_probabilities(section: TaskSection, masks: NDArray[Any], logits: NDArray[Any]) -> dict[str, Any]:
    """Temperature and threshold of a classification; of a segmentation the temperature alone."""
    flat, truth = _per_decision(logits, masks)
    temperature, threshold = fit_temperature(flat, truth), 0.5
    calibrated = _softmax(flat / temperature)
    validation: dict[str, Any] = {
        "nll_before": _nll(flat, truth, 1.0), "nll_after": _nll(flat, truth, temperature),
        "brier_before": measure_brier(_softmax(flat), truth),
        "brier_after": measure_brier(calibrated, truth),
    }  # fmt: skip
    if section.kind is Kind.CLASSIFICATION:
        score = calibrated[:, list(section.positive_labels)].sum(axis=1)
        positive = np.isin(truth, section.positive_labels)
        threshold = choose_threshold(score, positive.astype(int), section.calibrate.sensitivity)
        said = score >= threshold
        validation["sensitivity"] = float(said[positive].mean())
        validation["specificity"] = float(1 - said[~positive].mean()) if not positive.all() else None
    else:
        validation["dice"] = _score_masks(section, masks, logits.argmax(axis=1))
    return {"temperature": temperature, "threshold": threshold, "validation": validation}


def _choose_lesions(section: TaskSection, masks: NDArray[Any], logits: NDArray[Any]) -> dict[str, Any]:
    """The highest score of a detector that keeps the asked sensitivity by lesion; it has no temperature."""
    pairs = zip(masks, logits, strict=True)
    matches = [match_lesions(mask, find_lesions(answer, STRIDE)) for mask, answer in pairs]
    hits = np.concatenate([match.hits for match in matches])
    threshold = choose_threshold(hits, np.ones(len(hits), int), section.calibrate.sensitivity)
    if not np.isfinite(threshold):
        raise DataError(
            f"The detector finds {np.isfinite(hits).mean():.0%} of validation's lesions at any score.",
            "Train longer, or lower `calibrate.sensitivity` in params.yaml.",
        )
    false = np.concatenate([match.false for match in matches])
    validation = {"lesions": len(hits), "lesion_sensitivity": float((hits >= threshold).mean()),
                  "false_positives": float((false >= threshold).sum() / len(matches))}  # fmt: skip
    return {"temperature": 1.0, "threshold": threshold, "validation": validation}


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
    shape = images.shape[1:]
    network = build(section.fit.architecture, shape, len(section.classes), section.positive_labels)
    network.load_state_dict(load_file(places.stage(task, "fit") / "weights.safetensors"))
    network.eval()
    with torch.inference_mode():
        starts = range(0, len(images), section.package.max_batch)
        batches = (np.ascontiguousarray(images[i : i + section.package.max_batch]) for i in starts)
        return np.concatenate([network(torch.from_numpy(batch))[0].numpy() for batch in batches])


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
