"""Sites that exist nowhere: null streams of numbers, and the lung phantom under changes of its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.image import STATISTICS, describe
from imaging.preparation import prepare
from imaging.vocabulary import Corruption, Modality
from monitoring.reference import summarise
from registry.engines import open_engine
from registry.package import read_contract
from registry.projection import fit_projection
from training.cohorts.lung_nodule import CHANGED_SCANNER, CHANGED_SITE, make_case
from training.corruption import corrupt

PACKAGE = Path("build/lung-nodule/package")
COLUMNS = (*STATISTICS, "probability", "uncertainty")
A_DAY, AXES, REFERENCE, EFFECT = 20, 8, 200, 0.2
CLEAN_DAYS, CHANGED_DAYS, RAMP_DAYS = 60, 60, 30
CORRUPTED = {"brightness": (Corruption.OFFSET, 1), "blur": (Corruption.BLUR, 1),
             "noise": (Corruption.NOISE, 1), "contrast": (Corruption.CONTRAST, 1)}  # fmt: skip
PREVALENCE, TURNED, MOVED = 0.7, 0.3, 0.8
SHIFTS = (*CORRUPTED, "scanner", "gradual", "embedding", "prevalence", "label")
Values = NDArray[Any]


def draw_normal(rng: np.random.Generator, shape: tuple[int, ...], alike: float = 0.0) -> Values:
    """Normal values, float32 (..., columns); columns correlate."""
    shared = rng.standard_normal((*shape[:-1], 1), np.float32)
    return np.sqrt(alike) * shared + np.sqrt(1 - alike) * rng.standard_normal(shape, np.float32)


def draw_mixed(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    """Columns of five kinds in turn."""
    told, (*rows, columns) = draw_normal(rng, shape, 0.5), shape
    kinds = (lambda: rng.exponential(1, rows), lambda: rng.standard_t(2, rows),
             lambda: rng.poisson(1.5, rows), lambda: rng.random(rows) < 0.3)  # fmt: skip
    for column in range(columns):
        if column % 5:
            told[..., column] = kinds[column % 5 - 1]()
    return told


def draw_effect(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    """Correlated normals of days that differ: (sites, days, subjects, columns)."""
    return draw_normal(rng, shape, 0.3) + EFFECT * rng.standard_normal((*shape[:2], 1, shape[3]), np.float32)


KINDS = {"mixed": draw_mixed, "day effect": draw_effect, "independent": draw_normal,
         "correlated": lambda rng, shape: draw_normal(rng, shape, 0.8),
         "heavy-tailed": lambda rng, shape: rng.standard_t(2, shape).astype(np.float32),
         "yes or no": lambda rng, shape: (rng.random(shape) < 0.2).astype(np.float32)}  # fmt: skip


class Clinic:
    """Subjects of one site as every change leaves them, answered by the packaged engine.

    Attributes:
        columns: change -> (subjects, COLUMNS).
        axes: change -> (subjects, AXES), standard deviations of the clean ones.
        wrong: whether the answer misses the truth, (subjects,), and label the truth.
    """

    def __init__(self, subjects: int) -> None:
        self._contract = read_contract(PACKAGE)
        self._engine = open_engine(PACKAGE, "onnxruntime", "f32")
        cases = [make_case(1, CHANGED_SITE, number, 0) for number in range(subjects)]
        planes = {"clean": [case.pixels for case in cases]}
        planes["scanner"] = [make_case(1, CHANGED_SITE, number, 0, CHANGED_SCANNER).pixels
                             for number in range(subjects)]  # fmt: skip
        for name, (family, severity) in CORRUPTED.items():
            seeds = range(subjects) if family is Corruption.NOISE else [1] * subjects
            planes[name] = [corrupt(plane, family, severity, Modality.CT, seed)
                            for plane, seed in zip(planes["clean"], seeds, strict=True)]  # fmt: skip
        told = {name: self._answer(each) for name, each in planes.items()}
        projection = fit_projection(told["clean"][1])
        self.columns = {name: columns for name, (columns, _) in told.items()}
        self.axes = {name: (each - projection.mean) @ projection.axes for name, (_, each) in told.items()}
        self.label = np.array([case.label for case in cases])
        said = self.columns["clean"][:, COLUMNS.index("probability")] >= self._contract.threshold
        self.wrong = said != self.label

    def _answer(self, planes: list[Values]) -> tuple[Values, Values]:
        images = np.stack([prepare(plane.astype(np.float32), self._contract.preparation) for plane in planes])
        rows, embeddings = [], []
        for start in range(0, len(images), self._contract.max_batch):
            batch = images[start : start + self._contract.max_batch]
            answers = self._engine.run(batch)
            embeddings.append(answers.embedding)
            for image, one in zip(batch, self._contract.probabilities(answers.logits), strict=True):
                row = describe(image) | summarise(self._contract, one)
                rows.append([row[name] for name in COLUMNS])
        return np.array(rows), np.concatenate(embeddings)

    def stream(self, shift: str, rng: np.random.Generator) -> tuple[Values, Values, Values]:
        """Cases, (days, A_DAY, ...): columns, axes, and whether the answer is wrong."""
        days = CLEAN_DAYS + CHANGED_DAYS
        changed = np.broadcast_to((np.arange(days) >= CLEAN_DAYS)[:, None], (days, A_DAY))
        who = rng.integers(0, len(self.label), (days, A_DAY))
        if shift == "prevalence":
            ill = rng.choice(np.flatnonzero(self.label), who.shape)
            well = rng.choice(np.flatnonzero(self.label == 0), who.shape)
            who = np.where(changed, np.where(rng.random(who.shape) < PREVALENCE, ill, well), who)
        wrong = self.wrong[who]
        if shift == "label":
            wrong = wrong ^ (changed & (rng.random(who.shape) < TURNED))
        if shift == "gradual":
            share = np.clip((np.arange(days) - CLEAN_DAYS + 1) / RAMP_DAYS, 0, 1)
            changed, shift = rng.random(who.shape) < share[:, None], "brightness"
        name = shift if shift in self.columns else "clean"
        moved = MOVED * (np.arange(AXES) == 3) * changed[..., None] * (shift == "embedding")
        columns, axes = (np.where(changed[..., None], table[name][who], table["clean"][who])
                         for table in (self.columns, self.axes))  # fmt: skip
        jitter = 1e-3 * self.columns["clean"].std(axis=0) * rng.standard_normal(columns.shape)
        return columns + jitter, axes + moved + 1e-3 * rng.standard_normal(axes.shape), wrong

    def reference(self, rng: np.random.Generator) -> tuple[Values, Values]:
        """As many subjects before anything changed: columns and axes."""
        who = rng.integers(0, len(self.label), REFERENCE)
        jitter = 1e-3 * self.columns["clean"].std(axis=0) * rng.standard_normal((REFERENCE, len(COLUMNS)))
        return self.columns["clean"][who] + jitter, self.axes["clean"][who]
