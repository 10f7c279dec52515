"""How much worse the packaged engine answers when images go wrong, by family and severity of corruption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import DataError
from imaging.manifest import Pixels
from imaging.preparation import prepare
from imaging.recipe import TaskSection
from imaging.vocabulary import Corruption, Kind, Split
from training.corruption import SEEN, apply_to, corrupt
from training.datasets import Dataset

RESAMPLES = 2000
RIGHT = {Kind.CLASSIFICATION: "right", Kind.SEGMENTATION: "dice", Kind.DETECTION: "found"}
"""The score of each image that counts here: 0 (wrong) to 1 (right), NaN where there is nothing to score."""

Scores = dict[str, NDArray[Any]]
Told = dict[str, float | None]


@dataclass(frozen=True)
class _Sample:
    """What estimates and intervals are made from: how often each resample holds each of n subjects.

    Attributes:
        counts: float64 (1 + RESAMPLES, n); the first row holds everybody once: the estimate itself.
        confidence: of the intervals.
    """

    counts: NDArray[np.float64]
    confidence: float

    def mean(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Mean over each resample, of the values that are numbers."""
        counts = self.counts[:, np.isfinite(values)]
        return np.asarray(counts @ values[np.isfinite(values)] / counts.sum(1))

    def auc(self, scores: Scores) -> NDArray[np.float64]:
        """AUC of each resample: its pairs of a positive and a negative, each as often as both are in it."""
        positive = scores["truth"] == 1
        above = np.sign(scores["probability"][positive][:, None] - scores["probability"][~positive])
        ahead, behind = self.counts[:, positive], self.counts[:, ~positive]
        return np.asarray(((ahead @ (above + 1) / 2) * behind).sum(1) / (ahead.sum(1) * behind.sum(1)))

    def tell(self, draws: NDArray[np.float64]) -> Told:
        """Estimate and percentile interval; null where there is none, as of a division by 0."""
        known, tail = draws[~np.isnan(draws)], (1 - self.confidence) / 2
        ends = np.quantile(known, [tail, 1 - tail], method="nearest") if len(known) else (np.nan, np.nan)
        told = zip(("estimate", "low", "high"), (draws[0], *ends), strict=True)
        return {name: round(float(value), 6) if np.isfinite(value) else None for name, value in told}


def measure_robustness(
    score: Callable[[Dataset], Scores], data: Dataset, pixels: Pixels, section: TaskSection
) -> dict[str, Any]:
    """Corrupt stored pixels, prepare them as always, and score what the engine says of them.

    Args:
        score: asks the packaged engine about the images of a data set and scores its answers at the frozen
            threshold, each (n,): `RIGHT` of the task's kind, and of a classification also `truth` (0, 1)
            and `probability`. Others are ignored. Called 1 + families x severities times.
        data: the locked sets; one image each of `evaluate.robustness.subjects` subjects of the internal
            test set is used. Who it is depends on their names and `evaluate.seed` alone.
        pixels: the cohort's stored pixels.
        section: of the task.

    Returns:
        JSON values, rounded to 6 digits, the same in every run. `cells`, one a family and severity, tell the
        score (`value`), its relative drop, the corruption error (error over the clean error; null where that
        is 0, but 1 where both are) and of a classification `auc` and `auc_drop`, with percentile intervals
        over resampled subjects, the clean and the corrupted image of a subject always together. `groups` are
        means over the cells of families that augmentation may use (`seen`) and never uses (`held_out`).

    Raises:
        DataError: there is no internal test image.
    """
    from rich.console import Console
    from rich.progress import track

    how, name = section.evaluate.robustness, RIGHT[section.kind]
    chosen = _choose(data, how.subjects, section.evaluate.seed)
    count, generator = len(chosen.rows), np.random.default_rng(section.evaluate.seed)
    drawn = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    sample = _Sample(np.vstack([np.ones(count), drawn]), section.evaluate.confidence)
    clean = score(chosen)
    possible = apply_to(section.modality, chosen.images.ndim == 4 and chosen.images.shape[1] == 3)
    asked = [(family, step) for family in how.families if family in possible for step in how.severities]
    cells, draws = [], []
    with np.errstate(divide="ignore", invalid="ignore"):  # what cannot be told becomes null
        for family, step in track(asked, f"robustness {section.title}", console=Console(stderr=True)):
            worse = _corrupt(chosen, pixels, section, (family, step))
            told, drawn = _compare(sample, clean, score(worse), name)
            cells.append({"family": str(family), "severity": step, "group": _group(family), **told})
            draws.append((_group(family), drawn))
        body = {"value": sample.tell(sample.mean(clean[name]))}
        body |= {"auc": sample.tell(sample.auc(clean))} if "probability" in clean else {}
    return {
        "score": name,
        "subjects": count,
        "confidence": sample.confidence,
        "not_applicable": [str(family) for family in how.families if family not in possible],
        "clean": body,
        "cells": cells,
        "groups": {group: _summarise(sample, draws, group) for group in sorted({g for g, _ in draws})},
    }


def _group(family: Corruption) -> str:
    return "seen" if family in SEEN else "held_out"


def _choose(data: Dataset, subjects: int, seed: int) -> Dataset:
    """One image each of some subjects of the internal test set, whatever the order of the rows."""
    rows = data.rows.reset_index(drop=True).sort_values(["subject", "sha256"])
    first = rows[rows["split"] == Split.TEST].drop_duplicates("subject").index.to_numpy()
    if not len(first):
        raise DataError("There is no internal test image to corrupt.", "Change `split` in params.yaml.")
    return data.take(first[np.sort(np.random.default_rng(seed).permutation(len(first))[:subjects])])


def _corrupt(data: Dataset, pixels: Pixels, section: TaskSection, cell: tuple[Corruption, int]) -> Dataset:
    """The same cases, their images corrupted as they are stored, then prepared."""
    images = []
    for shard, row, digest in data.rows[["image", "row", "sha256"]].itertuples(index=False):
        worse = corrupt(pixels.read(shard, int(row)), *cell, section.modality, int(digest[:8], 16))
        images.append(prepare(worse.astype(np.float32), section.preparation))
    return replace(data, images=np.stack(images))


def _compare(sample: _Sample, clean: Scores, found: Scores, name: str) -> tuple[dict[str, Told], Any]:
    """What a cell tells; and its drop and corruption error in each resample, (2, 1 + RESAMPLES)."""
    before, after = sample.mean(clean[name]), sample.mean(found[name])
    drop = (before - after) / before
    error = np.where((before == 1) & (after == 1), 1, (1 - after) / (1 - before))
    told = {"value": sample.tell(after), "drop": sample.tell(drop), "corruption_error": sample.tell(error)}
    if "probability" in clean:
        best, auc = sample.auc(clean), sample.auc(found)
        told |= {"auc": sample.tell(auc), "auc_drop": sample.tell((best - auc) / best)}
    return told, np.stack([drop, error])


def _summarise(sample: _Sample, draws: list[tuple[str, Any]], group: str) -> dict[str, Any]:
    """Means over the cells of a group, resample by resample."""
    kept = [drawn for name, drawn in draws if name == group]
    drop, error = np.mean(kept, axis=0)
    return {"cells": len(kept), "drop": sample.tell(drop), "corruption_error": sample.tell(error)}


def list_robustness(told: dict[str, Any]) -> list[list[str]]:
    """Rows for a report: family, group, severity, score, relative drop, with intervals; last, the means."""
    cells = [(cell["family"], cell["group"], str(cell["severity"]), cell) for cell in told["cells"]]
    means = [("mean", group, "all", values) for group, values in told["groups"].items()]
    return [
        [family, group.replace("_", " "), severity, _write(values.get("value")), _write(values["drop"])]
        for family, group, severity, values in cells + means
    ]


def _write(told: Told | None) -> str:
    if told is None:
        return ""
    middle, low, high = ("–" if value is None else f"{value:.3f}" for value in told.values())
    return f"{middle} [{low} {high}]"
