"""What a site exports of a version for the cross-site card: sums, without images, rows or small cells."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator, model_validator

from imaging.config import explain
from imaging.errors import DataError
from imaging.intervals import calibration_line
from imaging.recipe import Section

LEAST = 10  # images and subjects in a cell; fewer are withheld
BINS = 10
STEP = 0.5  # to which a design effect is rounded up, where its exact value would tell too much
SHARES = ("accuracy", "sensitivity", "specificity")
MEANS = ("brier", "in_the_large")
FEW_CASES = "too few cases"  # whatever their answers: to leave them out biases nothing
FEW_ERRORS, FEW_RIGHT = "fewer than ten errors", "fewer than ten right answers"
Column = NDArray[Any]


class Moments(Section, allow_inf_nan=False):
    """Sums over the subjects of a site, enough for a ratio of sums and its interval by subject.

    Attributes:
        hits: sum of what is averaged: right answers, squared errors.
        cases: images that it is averaged over.
        subjects: that have a case.
        hits2: sum over subjects of the square of their own hits.
        both: sum over subjects of their hits times their cases.
        cases2: sum over subjects of the square of their cases.
        rounded: instead of these three, where they would tell how many subjects have, say, two wrong answers
            and that is under ten: the sum of squares around the site's own ratio, of a share rounded up.
    """

    hits: float
    cases: int = Field(ge=LEAST)
    subjects: int = Field(ge=LEAST)
    hits2: float | None = Field(default=None, ge=0)
    both: float | None = None
    cases2: float | None = Field(default=None, ge=0)
    rounded: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _says_how_it_scatters(self) -> Self:
        if (self.rounded is None) == (None in (self.hits2, self.both, self.cases2)):
            raise ValueError("sums of squares are incomplete")
        if abs(self.hits) > self.cases:
            raise ValueError("there are more hits than cases")
        return self

    def scatter(self, middle: float) -> float:
        """Sum over subjects of the square of what their hits have beyond `middle` times their cases."""
        if self.rounded is not None:
            return self.rounded + (self.hits / self.cases - middle) ** 2 * self.cases**2 / self.subjects
        told = (self.hits2 or 0) - 2 * middle * (self.both or 0) + middle**2 * (self.cases2 or 0)
        return max(0.0, told)


class Bin(Section, allow_inf_nan=False):
    """Images whose probability lies from `low` to `high`: how many, sum of probabilities, positives."""

    low: float
    high: float
    count: int = Field(ge=LEAST)
    said: float = Field(ge=0)
    positives: int = Field(ge=0)


class Line(Section, allow_inf_nan=False):
    """Calibration slope and intercept, each [estimate, low, high], as the site found them on its rows."""

    slope: tuple[float, float, float]
    intercept: tuple[float, float, float]


class Statistics(Section, allow_inf_nan=False):
    """The file. What is None was withheld; `withheld` says why.

    Attributes:
        format: version of this file's form.
        task, version, package: what was asked; cards mix no packages.
        threshold: operating point of the answers; None where it changed among them.
        site: whose cases.
        source: live: labelled answers; locked: the site's part of the evaluation's locked sets.
        simulated: what of the training data is not real, in plain words.
        at: when it was made, ISO 8601, UTC.
    """

    format: Literal[1] = 1
    task: str
    version: int
    package: str
    threshold: float | None
    site: str
    source: Literal["live", "locked"]
    simulated: str
    at: str
    accuracy: Moments | None = None
    sensitivity: Moments | None = None
    specificity: Moments | None = None
    brier: Moments | None = None
    in_the_large: Moments | None = None
    bins: tuple[Bin, ...] | None = None
    line: Line | None = None
    withheld: dict[str, str] = Field(default_factory=dict)

    @field_validator("withheld", mode="before")
    @classmethod
    def _read_names(cls, told: Any) -> Any:  # a file from before reasons were told
        return dict.fromkeys(told, "why is not told") if isinstance(told, (list, tuple)) else told

    def count_cases(self) -> int:
        """Images that the file tells of; 0 where it withholds everything."""
        return max((one.cases for name in (*SHARES, *MEANS) if (one := getattr(self, name))), default=0)


def sum_up(
    scores: Column, positive: Column, truth: Column, people: Column, threshold: float | None
) -> dict[str, Any]:
    """The sums of a site's cases; cells under ten, and what would betray one by a difference, are withheld.

    Args:
        scores: probability of a positive, 0 to 1, shape (n,).
        positive: what was answered, shape (n,).
        truth: 0 or 1, shape (n,).
        people: subject of each, shape (n,).
        threshold: of all of them; without one there are no bins.

    Returns:
        The fields of `Statistics` from `accuracy` on.
    """
    every, right, ill = np.ones(len(truth), bool), positive == truth, truth == 1
    cases = {
        "accuracy": (right, every), "sensitivity": (right & ill, ill), "specificity": (right & ~ill, ~ill),
        "brier": ((scores - truth) ** 2, every), "in_the_large": (truth - scores, every),
    }  # fmt: skip
    small = {name: _find_small(right[of], people[of])
             for name, of in (("accuracy", every), ("sensitivity", ill), ("specificity", ~ill))}  # fmt: skip
    allowed = _allow(small, ill, people)
    told: dict[str, Any] = {name: add_moments(*cases[name], people) for name in cases if name in allowed}
    if "line" in allowed and threshold is not None and (positive == (scores >= threshold)).all():
        told["bins"] = list_bins(scores, truth, people, threshold)
    if "line" in allowed and (line := calibration_line(truth, scores, people)):
        slope, intercept = ((one.estimate, one.low, one.high) for one in line)
        told["line"] = Line(slope=slope, intercept=intercept)
    return {**told, "withheld": {name: why for name, why in _explain(small).items() if name not in told}}


def add_moments(hits: Column, cases: Column, people: Column) -> Moments:
    """Sums over subjects; a subject without a case adds nothing."""
    _, who = np.unique(people, return_inverse=True)
    own, of = np.bincount(who, hits.astype(float)), np.bincount(who, cases.astype(float))
    own, of = own[of > 0], of[of > 0]
    is_share = bool((own % 1 == 0).all())
    told = Moments(hits=float(own.sum()), cases=int(of.sum()), subjects=len(of), rounded=0.0)
    if _may_tell(own if is_share else of, of, is_share):
        squares = {"hits2": (own**2).sum(), "both": (own * of).sum(), "cases2": (of**2).sum()}
        return told.model_copy(update={**squares, "rounded": None})
    share = told.hits / told.cases
    scatter = float(((own - share * of) ** 2).sum())
    if is_share and 0 < share < 1:
        even = share * (1 - share) / (told.cases - 1) * told.cases**2 * (1 - 1 / told.subjects)
        scatter = max(1.0, math.ceil(scatter / even / STEP) * STEP) * even
    return told.model_copy(update={"rounded": scatter})


def _may_tell(own: Column, of: Column, is_share: bool) -> bool:
    """Whether ten subjects have each number of right answers that their number of images allows."""
    counts = np.unique(np.stack([own, of]), axis=1, return_counts=True)[1]
    possible = int((np.unique(of) + 1).sum()) if is_share else len(counts)
    return len(counts) == possible and bool(counts.min() >= LEAST)


def list_bins(scores: Column, truth: Column, people: Column, threshold: float) -> tuple[Bin, ...]:
    """Tenths of the probability, and the threshold, as edges; a bin with too few of a class joins the next.

    The threshold stays an edge: else a bin's count and that of the answers on one side of it would tell how
    many lie between. Each side of it must have enough of each class.
    """
    cuts = sorted({number / BINS for number in range(BINS + 1)} | {threshold})
    edges = [0.0]
    for low, high in ((0.0, threshold), (threshold, 1.0)):
        inner = [cut for cut in cuts if low < cut <= high]
        for cut in inner:
            if cut == high or all(
                _fill(scores, truth, people, span) for span in ((edges[-1], cut), (cut, high))
            ):
                edges.append(cut)
    return tuple(_sum_bin(scores, truth, span) for span in pairwise(edges))


def write_statistics(told: Statistics, path: Path) -> None:
    """Write the file that leaves the site."""
    path.write_text(told.model_dump_json(indent=1) + "\n")


def read_statistics(path: Path) -> Statistics:
    """Read such a file.

    Raises:
        DataError: it cannot be read, or is not of this form.
    """
    try:
        return Statistics.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}).", "See its name.") from error
    except ValidationError as error:
        raise DataError(f"{path.name}: {explain(error, Statistics)[:300]}.",
                        "Export it again: `formulary monitoring export-statistics`.") from error  # fmt: skip


def _find_small(right: Column, people: Column) -> str:
    """What there is too little of; empty where there are enough right answers and enough errors."""
    if len(right) < 2 * LEAST or len(np.unique(people)) < LEAST:
        return FEW_CASES
    return next((why for why, cell in ((FEW_ERRORS, ~right), (FEW_RIGHT, right))
                 if not _is_enough(cell, people)), "")  # fmt: skip


def _explain(small: dict[str, str]) -> dict[str, str]:
    """Why each sum is withheld, if it is."""
    classes = {small["sensitivity"], small["specificity"]} - {""}
    either = FEW_CASES if FEW_CASES in classes else min(classes, default="")
    return {**small, "accuracy": small["accuracy"] or either, **dict.fromkeys(MEANS, FEW_CASES),
            "bins": either or "more than one threshold", "line": either or "no line fits"}  # fmt: skip


def _allow(small: dict[str, str], ill: Column, people: Column) -> set[str]:
    """Which sums may leave, so that no count of under ten does, not even as the difference of two others."""
    shown = {name for name in ("sensitivity", "specificity") if not small[name]}
    if len(shown) == 2:
        return {*shown, "accuracy", *MEANS, "line"}
    both = _is_enough(ill, people) and _is_enough(~ill, people)
    if not shown and not small["accuracy"]:
        shown.add("accuracy")  # beside one of the other two it would betray the third
    if both:
        shown |= set(MEANS)
    elif not shown & {"sensitivity", "specificity"} and _is_enough(ill | ~ill, people):
        shown.add("brier")  # it says how many images there are, and with one class's count the other's
    return shown


def _fill(scores: Column, truth: Column, people: Column, span: tuple[float, float]) -> bool:
    """Whether both classes have enough in a bin: what the classes differ by is a count, too."""
    inside = _lie(scores, span)
    return all(_is_enough(inside & (truth == label), people) for label in (0, 1))


def _sum_bin(scores: Column, truth: Column, span: tuple[float, float]) -> Bin:
    inside = _lie(scores, span)
    count, said, positives = int(inside.sum()), float(scores[inside].sum()), int(truth[inside].sum())
    return Bin(low=span[0], high=span[1], count=count, said=said, positives=positives)


def _lie(scores: Column, span: tuple[float, float]) -> Column:
    """Which scores lie from the lower end to below the upper one; 1 lies in the last bin."""
    return (scores >= span[0]) & ((scores < span[1]) | (span[1] == 1.0))


def _is_enough(chosen: Column, people: Column) -> bool:
    return bool(chosen.sum() >= LEAST and len(np.unique(people[chosen])) >= LEAST)
