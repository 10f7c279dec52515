"""What each locked image scored, as an evaluation statement lists it; and two versions image by image."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import DataError
from imaging.estimation import Scores

FACTS = ("sha256", "subject", "site", "split")
COUNTS = ("truth", "label", "answer", "lesions", "found", "false_positives")
FIX = "Run `dvc repro` and register the version again."


@dataclass(frozen=True)
class Predictions:
    """The rows of one version, each an image.

    Attributes:
        images: sha256 of each, (n,).
        people: subject of each, (n,).
        sites: where each was made, (n,).
        sets: locked set of each, test or external, (n,).
        scores: name -> value of each, (n,).
        threshold: operating point of the version.
    """

    images: NDArray[Any]
    people: NDArray[Any]
    sites: NDArray[Any]
    sets: NDArray[Any]
    scores: Scores
    threshold: float

    def take(self, rows: NDArray[Any]) -> Predictions:
        """Some of the rows, by number or by mask."""
        scores = {name: values[rows] for name, values in self.scores.items()}
        images, people, sites, sets = (
            told[rows] for told in (self.images, self.people, self.sites, self.sets)
        )
        return Predictions(images, people, sites, sets, scores, self.threshold)


def read_predictions(evaluation: dict[str, Any]) -> Predictions:
    """The predictions of an evaluation statement's body.

    Raises:
        DataError: there are none, they are no table, an image stands in it twice, a set is not complete, or
            a classification has a truth or a probability that is none.
    """
    listed, threshold = evaluation.get("predictions") or [], evaluation.get("threshold")
    if not listed or not isinstance(threshold, int | float):
        raise DataError("The evaluation lists no predictions, or no threshold.", FIX)
    try:
        images, people, sites, sets = (np.array([str(row[name]) for row in listed]) for name in FACTS)
        names = [name for name in listed[0] if name not in FACTS]
        scores = {name: np.array([row[name] for row in listed], dtype=float) for name in names}
        if any(values.ndim > 1 for values in scores.values()):
            raise ValueError("a list")
        asked = {
            str(name): int(told["images"]) for name, told in evaluation["sets"].items() if told["digest"]
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"The predictions of the locked sets are not a table of numbers ({error!r:.80}).", FIX
        ) from error
    _check_rows(images, sets, asked)
    complete = _complete(scores, float(threshold))
    return Predictions(images, people, sites, sets, complete, float(threshold))


def digest_images(evaluation: dict[str, Any]) -> dict[str, str]:
    """Name of each locked set -> sha256 of its images' sorted sha256: what the use of a set is counted by.

    A set's own digest covers labels too, and is whatever the statement says; {} where no predictions are.

    Raises:
        DataError: a prediction names no image, or no set.
    """
    sets: defaultdict[str, list[str]] = defaultdict(list)
    try:
        for row in evaluation.get("predictions") or []:
            sets[str(row["split"])].append(str(row["sha256"]))
    except (KeyError, TypeError) as error:
        raise DataError(f"A prediction names no image or no locked set ({error!r:.80}).", FIX) from error
    joined = {name: "\n".join(sorted(images)) for name, images in sets.items()}
    return {name: f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" for name, text in joined.items()}


def _check_rows(images: NDArray[Any], sets: NDArray[Any], asked: dict[str, int]) -> None:
    if twice := len(images) - len(np.unique(images)):
        raise DataError(f"{twice} predictions are of an image that has one already.", FIX)
    found = dict(zip(*(part.tolist() for part in np.unique(sets, return_counts=True)), strict=True))
    if found != asked:
        raise DataError(f"The locked sets have {asked} images, and {found} were scored.", FIX)


def _complete(scores: Scores, threshold: float) -> Scores:
    """Counts and labels as integers, and what follows from them: `right`, `class_right`."""
    for name in [name for name in scores if name in COUNTS]:
        if not (np.isfinite(scores[name]) & (scores[name] >= 0) & (scores[name] % 1 == 0)).all():
            raise DataError(f"Some {name} is no whole number.", FIX)
        scores[name] = scores[name].astype(int)
    if {"lesions", "found"} <= set(scores) and (scores["found"] > scores["lesions"]).any():
        raise DataError("More lesions were found than there are.", FIX)
    if {"truth", "probability"} <= set(scores):
        truth, score = scores["truth"], scores["probability"]
        if not (truth <= 1).all() or not ((score >= 0) & (score <= 1)).all():
            raise DataError("A truth is neither 0 nor 1, or a probability is none.", FIX)
        scores["right"] = ((score >= threshold) == truth).astype(int)
    if {"label", "answer"} <= set(scores):
        scores["class_right"] = (scores["label"] == scores["answer"]).astype(int)
    return scores


def pair_up(new: Predictions, old: Predictions) -> tuple[NDArray[Any], tuple[Scores, Scores]]:
    """Subjects and both versions' scores of the images that both answered, each at its own threshold.

    Where the truth was mended since, both are held to the new one.
    """
    _, here, there = np.intersect1d(new.images, old.images, assume_unique=True, return_indices=True)
    first, second = new.take(here), old.take(there)
    same = {
        name: first.scores[name]
        for name in ("truth", "label")
        if name in second.scores and name in first.scores
    }
    return first.people, (first.scores, _complete(second.scores | same, old.threshold))
