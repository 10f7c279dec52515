"""Accuracy where nobody has told the truth: estimated from confidence (CBPE), and held to labels that come.

An answer of probability p at or above the threshold is right with probability p, another one with 1 - p. The
probability is first put on the calibration line of a labelled reference, whose uncertainty counts, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.vocabulary import Accuracy, Kind, Split
from monitoring.realised import (
    Floats,
    Labelled,
    list_weeks,
    make_labelled,
    measure_realised,
    note_choice,
    read_scores,
)
from registry.package import Contract

LEAST_SCORES = 30  # subjects with an answer, before anything is estimated
LEAST_CLASS = 20  # subjects of each class in a reference
LEAST_LABELS = 20  # labelled subjects, before a disagreement counts
VERIFYING = 50  # labelled subjects, before an agreement does
ALPHA = 0.04  # of one test of the labels: below the promised 5 %
DRAWS = 500
PRIOR = np.diag([0.25, 1.0])  # inverse variances of a line around intercept 0, slope 1: no class runs away


@dataclass(frozen=True)
class Reference:
    """The labelled set that calibration is found on.

    Attributes:
        scores: probability of a positive, 0 to 1, shape (n,).
        truth: 0 or 1, shape (n,).
        people: subject of each, shape (n,).
        origin: the site, or "all internal sites" where its own subjects are too few.
    """

    scores: Floats
    truth: NDArray[np.int64]
    people: NDArray[Any]
    origin: str = ""

    @property
    def suffices(self) -> bool:
        """Whether each class has its subjects."""
        return all(len(np.unique(self.people[self.truth == label])) >= LEAST_CLASS for label in (0, 1))


@dataclass(frozen=True)
class Verdict:
    """How far an estimate may be believed, why, and what the labels themselves say, overall and per week."""

    word: Accuracy
    sentence: str
    realised: dict[str, Any]
    weeks: list[dict[str, Any]]


def read_labelled(evaluation: dict[str, Any], site: str) -> Reference | None:
    """The labelled reference of a site in an evaluation statement's body.

    Args:
        evaluation: the body, with `predictions`.
        site: whose locked images are asked for first; where they are too few, those of all internal sites.

    Returns:
        None where there is no single probability (a segmentation), or where even all are too few.
    """
    rows = [row for row in evaluation.get("predictions") or [] if {"probability", "truth"} <= set(row)]
    own = [row for row in rows if row["site"] == site]
    tested = [row for row in rows if row["split"] == Split.TEST]
    for origin, some in ((site, own), ("all internal sites", tested)):
        found = Reference(
            np.array([row["probability"] for row in some], dtype=float),
            np.array([row["truth"] for row in some], dtype=int),
            np.array([f"{row['site']} {row['subject']}" for row in some]),
            origin,
        )
        if found.suffices:
            return found
    return None


def estimate(
    scores: Floats, reference: Reference, threshold: float | Floats, confidence: float = 0.95
) -> dict[str, Any]:
    """Estimate how many of these answers are right, without their truth.

    Args:
        scores: probability of a positive, one a subject, shape (n,).
        reference: where the same network's probabilities meet the truth.
        threshold: from which an answer is positive; of each, (n,), where they differ.
        confidence: of the intervals, two-sided. They are of the share among these very answers, and carry
            what chance does to n answers and what such a reference leaves open about the calibration.

    Returns:
        accuracy, sensitivity, specificity and prevalence {estimate, low, high}; subjects; `line`, the
        calibration: intercept, slope and their covariance; `calibration_error`, the half width of accuracy's
        interval that the calibration alone would have.
    """
    line, covariance = _fit_line(reference)
    x, told = _logit(scores), np.ones(len(scores))
    design = np.column_stack([told, x])
    p = _expit(design @ line)
    positive = (scores >= threshold).astype(float)
    faces = {  # right cases, cases, and how both change with p
        "accuracy": (positive * p + (1 - positive) * (1 - p), told, 2 * positive - 1, 0.0),
        "sensitivity": (positive * p, p, positive, 1.0),
        "specificity": ((1 - positive) * (1 - p), 1 - p, positive - 1, -1.0),
        "prevalence": (p, told, told, 0.0),
    }
    tail, found = NormalDist().inv_cdf((1 + confidence) / 2), dict[str, Any]()
    for name, (right, cases, change, change_cases) in faces.items():
        share = float(right.sum() / cases.sum())
        weights = (change - share * change_cases) * p * (1 - p)
        gradient = weights @ design / cases.sum()
        chance = float((weights * (change - share * change_cases)).sum() / cases.sum() ** 2)
        blur = float(gradient @ covariance @ gradient)
        found[name] = _bound(share, tail * (chance + blur) ** 0.5)
        if name == "accuracy":
            found["calibration_error"] = round(tail * blur**0.5, 6)
    told_line = {"intercept": float(line[0]), "slope": float(line[1]), "covariance": covariance.tolist()}
    return {**found, "subjects": len(scores), "line": told_line}


def judge(estimated: dict[str, Any], labelled: Labelled) -> Verdict:
    """Hold an estimate to the labels: do they lie on the line that it rests on?

    Args:
        estimated: as `estimate` returns it.
        labelled: the answers whose truth came; one a subject is tested.
    """
    rows = labelled.newest()
    realised, weeks = measure_realised(labelled), list_weeks(labelled)
    if len(rows) < LEAST_LABELS:
        return Verdict(Accuracy.NOT_VERIFIED, _ask_for(len(rows)), realised, weeks)
    p_value = compare_line(estimated["line"], labelled.scores[rows], labelled.truth[rows])
    if p_value <= ALPHA:
        word, sentence = Accuracy.NOT_VALID, "disagree with the calibration that the estimate rests on"
    elif len(rows) < VERIFYING:
        return Verdict(Accuracy.NOT_VERIFIED, _ask_for(len(rows)), realised, weeks)
    else:
        word, sentence = Accuracy.VERIFIED, "agree with the estimate"
    lacking = [name for label, name in ((1, "sensitivity"), (0, "specificity"))
               if not (labelled.truth[rows] == label).any()]  # fmt: skip
    note = f" No label speaks of {lacking[0]}." if lacking else ""
    return Verdict(
        word, f"{len(rows)} labelled subjects {sentence} (p {p_value:.2g}).{note}", realised, weeks
    )


def compare_line(line: dict[str, Any], scores: Floats, truth: NDArray[np.int64]) -> float:
    """Whether labels lie on a calibration line, intercept and slope tested at once (Cox 1958).

    The score test's p is found by drawing labels from the line, itself drawn within its uncertainty: with few
    labels and probabilities near 0 or 1 the chi-squared law does not hold.

    Args:
        line: of `estimate`.
        scores: probability of a positive, one a subject, shape (n,). They may be chosen by their score: the
            test asks what is true at each score.
        truth: 0 or 1, shape (n,).

    Returns:
        The share of draws that lie as far off or further, 0 to 1.
    """
    generator = np.random.default_rng(0)
    middle, covariance = np.array([line["intercept"], line["slope"]]), np.array(line["covariance"])
    design = np.column_stack([np.ones(len(scores)), _logit(scores)])
    p = _expit(design @ middle)
    spread = (design.T * (p * (1 - p))) @ design
    inverse = np.linalg.inv(spread + spread @ covariance @ spread + 1e-9 * np.eye(2))
    lines = middle + generator.standard_normal((DRAWS, 2)) @ np.linalg.cholesky(covariance).T
    drawn = generator.random((DRAWS, len(scores))) < _expit(lines @ design.T)
    away = (np.vstack([truth, drawn]) - p) @ design
    far = np.einsum("ki,ij,kj->k", away, inverse, away)
    return float(1 + (far[1:] >= far[0]).sum()) / (DRAWS + 1)


def estimate_place(
    rows: list[dict[str, Any]],
    labels: list[dict[str, Any]],
    evaluation: dict[str, Any],
    contract: Contract,
    site: str,
) -> dict[str, Any]:
    """What an estimate's row says of a version at a site.

    Args:
        rows: of the newest answers, one a subject: probability; and of a site with a profile raw_probability,
            threshold and abstained. An answer that was withheld counts neither way.
        labels: as `monitoring.labels.read_labels` gives them.
        evaluation: body of the version's evaluation statement.
        contract: of its package.
        site: the site.

    Returns:
        verdict, told (a sentence or two), estimated, realised, weeks, labels (subjects),
        calibration_error and reference (whose labelled images were used); JSON.
    """
    answered = [row for row in rows if not row.get("abstained")]
    scores, positive = read_scores(answered, contract.threshold)
    labelled = make_labelled(labels, contract.threshold)
    body: dict[str, Any] = {"labels": len(np.unique(labelled.people))}
    reference = None if contract.kind is Kind.SEGMENTATION else read_labelled(evaluation, site)
    if reference is None or len(scores) < LEAST_SCORES:
        verdict = _refuse(contract, reference, len(answered), labelled)
        return {**body, **_tell(verdict), "estimated": {}, "calibration_error": None, "reference": None}
    estimated = estimate(scores, reference, np.where(positive, 0.0, np.inf))
    notes = [*note_choice(labelled, scores), *_note_origin(reference, site)]
    told = _tell(judge(estimated, labelled), tuple(notes))
    error = estimated.pop("calibration_error")
    return {**body, **told, "estimated": estimated, "calibration_error": error, "reference": reference.origin}


def _fit_line(reference: Reference) -> tuple[Floats, NDArray[np.float64]]:
    """Intercept and slope of the truth on the logit of the probability, and their covariance by subject.

    A weak prior around 0 and 1 keeps them finite where the classes do not overlap.
    """
    design = np.column_stack([np.ones(len(reference.scores)), _logit(reference.scores)])
    middle, line = np.array([0.0, 1.0]), np.zeros(2)  # from 0 it converges where logits are large and wrong
    for _ in range(50):
        p = _expit(design @ line)
        curvature = (design.T * (p * (1 - p))) @ design + PRIOR
        step = np.linalg.solve(curvature, design.T @ (reference.truth - p) - PRIOR @ (line - middle))
        line = line + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    names, people = np.unique(reference.people, return_inverse=True)
    pulls = design * (reference.truth - _expit(design @ line))[:, None]
    sums = np.column_stack([np.bincount(people, pull) for pull in pulls.T])
    inverse = np.linalg.inv(curvature)
    return line, inverse @ (sums.T @ sums * len(names) / (len(names) - 1) + PRIOR) @ inverse


def _bound(share: float, half: float) -> dict[str, float]:
    """The interval on the logit scale, where it stays between 0 and 1."""
    if not 0 < share < 1:  # no answer is positive, or none is negative: that much is certain
        return {"estimate": share, "low": share, "high": share}
    middle, half = np.log(share / (1 - share)), half / (share * (1 - share))
    low, high = _expit(middle + np.array([-half, half]))
    return {"estimate": share, "low": float(low), "high": float(high)}


def _logit(scores: Floats) -> Floats:
    kept = np.clip(scores, 1e-6, 1 - 1e-6)
    return np.asarray(np.log(kept / (1 - kept)))


def _expit(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -700, 700))))


def _ask_for(count: int) -> str:
    told = f"{count} subjects have a label" if count else "No label has come"
    return f"{told}; {VERIFYING} labelled subjects are needed to hold the estimate to the truth."


def _refuse(contract: Contract, reference: Reference | None, count: int, labelled: Labelled) -> Verdict:
    """Why nothing is estimated."""
    realised = measure_realised(labelled), list_weeks(labelled)
    if contract.kind is Kind.SEGMENTATION:
        why = "A mask has no single probability, so its accuracy is not estimated."
        return Verdict(Accuracy.NOT_VERIFIED, why, *realised)
    if reference is None:
        why = f"The labelled reference has fewer than {LEAST_CLASS} subjects of a class."
    else:
        why = f"{count} subjects were answered; an estimate needs {LEAST_SCORES}."
    return Verdict(Accuracy.TOO_FEW, why, *realised)


def _tell(verdict: Verdict, notes: tuple[str, ...] = ()) -> dict[str, Any]:
    sentence = " ".join([verdict.sentence, *notes])
    return {"verdict": verdict.word, "told": sentence, "realised": verdict.realised, "weeks": verdict.weeks}


def _note_origin(reference: Reference, site: str) -> tuple[str, ...]:
    if reference.origin == site:
        return ()
    return (f"Calibration is that of {reference.origin}: {site} has too few labelled images of its own, and "
            "how sites differ is not in the interval.",)  # fmt: skip
