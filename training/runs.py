"""One run of the study, in a process of its own: weights, and what they answer to images of locked sets."""

from __future__ import annotations

import json
import os
import platform
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import DataError
from imaging.manifest import Pixels, read_manifest
from imaging.preparation import prepare
from imaging.recipe import ExplanationSection, RobustnessSection, SplitSection, TaskSection
from imaging.scores import auc, dice
from imaging.vocabulary import Kind, Split
from registry.architectures import build
from training.calibration import fit_temperature
from training.cohorts.cases import stable_hash
from training.corruption import SEEN, apply_to, corrupt
from training.datasets import Dataset, load_masks, load_rows
from training.explanation import SEEDS, TOLERANCE, look_untrained, measure_maps

SCORED = 16  # epochs whose validation score is told, evenly; of fewer epochs all
FACTS = {"sha256": "image", "subject": "subject", "site": "site", "split": "split"}


@dataclass(frozen=True)
class Run:
    """A run to be made.

    Attributes:
        folder: where it is kept.
        cohort: folder of that stage; the split's lies beside it.
        section: the task's, with the run's own recipe and seed.
        share: of the training subjects.
        leave_out: a site whose subjects are neither trained nor validated on.
        corruption: under which the internal test set is answered too.
        maps: how many heat maps are held against lesion masks.
        split: of the task; it chooses local subjects of external sites.
        local: numbers of local subjects that the network is adapted to, see `training.adaptation`.
    """

    folder: Path
    cohort: Path
    section: TaskSection
    share: float
    leave_out: str | None
    corruption: RobustnessSection
    maps: ExplanationSection
    split: SplitSection
    local: tuple[int, ...] = ()

    @property
    def notes(self) -> Path:
        """How the run was made and went, as JSON."""
        return self.folder / "run.json"

    def files(self) -> dict[str, Path]:
        """The tables that a claim needs of the run; a run that claims share may have more."""
        told = {"answers": self.folder / "answers.parquet"}
        asked = {
            "corrupted": (self.corruption, self.corruption.subjects),
            "maps": (self.maps, self.maps.images),
        }
        for kind in (kind for kind, (_, size) in asked.items() if size):
            name = f"{kind}-{stable_hash(asked[kind][0].model_dump_json()):016x}.parquet"
            told[kind] = self.folder / name
        if self.local:
            told["adapted"] = self.folder / f"adapted-{'-'.join(map(str, self.local))}.parquet"
        return told

    def missing(self) -> dict[str, Path]:
        """Those that are not there yet."""
        return {kind: path for kind, path in self.files().items() if not path.exists()}


def perform(run: Run) -> None:
    """Make what is missing of a run; what training says of itself goes to log.txt."""
    from training.adaptation import adapt

    makers = {"answers": _train, "corrupted": _answer_corrupted, "maps": _look, "adapted": adapt}
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "log.txt").open("a") as log, redirect_stderr(log):
        for kind, path in run.missing().items():
            table = makers[kind](run)
            table.to_parquet(path.with_suffix(".draft"), index=False)
            os.replace(path.with_suffix(".draft"), path)  # last: what has its name is whole


def _train(run: Run) -> Any:
    """Find weights, freeze temperature and threshold on internal validation, answer the locked sets."""
    from safetensors.torch import save_file

    from training.fitting import find_weights

    section, epochs = run.section, list[dict[str, Any]]()
    train, validation = (_load(run, split) for split in (Split.TRAIN, Split.VALIDATION))

    def watch(told: dict[str, Any], network: Any) -> None:
        kept = {name: told[name] for name in ("epoch", "loss", "validation_loss", "cpu_seconds")}
        epochs.append({**kept, "validation_score": None})
        if told["epoch"] % -(-section.fit.epochs // SCORED) == 0:
            epochs[-1]["validation_score"] = _grade(
                *_score(section, validation, _ask(network, validation.images)[0])
            )

    found = find_weights((train, validation), section, None, watch)
    save_file(found.weights, run.folder / "weights.safetensors")
    network = _open(run, train)
    notes = {
        "fit": section.fit.model_dump(mode="json"), "subjects": len(np.unique(train.subjects)),
        "images": len(train.images), "leave_out": run.leave_out, "epochs": epochs,
        "cpu_seconds": found.spent["cpu_seconds"], "machine": describe_machine(),
        "parameters": sum(value.numel() for value in network.parameters()),
        **freeze(section, network, validation),
    }  # fmt: skip
    run.notes.write_text(json.dumps(notes, indent=1) + "\n")
    return answer(run, network, _load(run, Split.TEST, Split.EXTERNAL), notes)


def freeze(section: TaskSection, network: Any, data: Dataset) -> dict[str, float]:
    """`temperature` and `threshold` of a network, on data that it was not trained on."""
    if section.kind is not Kind.CLASSIFICATION:
        return {"temperature": 1.0, "threshold": 0.5}
    logits = _ask(network, data.images)[0]
    temperature = fit_temperature(logits.astype(np.float64), data.truth)
    return {"temperature": temperature, "threshold": choose_cut(*_score(section, data, logits, temperature))}


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> str:
    """What the CPU-seconds were measured on, in words."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = next(iter(models), platform.processor() or platform.machine())
    return f"{name}, {count_cores()} cores, one thread a run, torch {version('torch')}"


def choose_cut(score: NDArray[np.floating], truth: NDArray[np.floating]) -> float:
    """The threshold with the most right answers, since the review speaks of accuracy.

    Args:
        score: probability of a positive, (n,).
        truth: 0 or 1, (n,).

    Returns:
        Halfway between two scores, or beyond all; the highest of equally good ones.
    """
    places = np.unique(score)
    cuts = np.concatenate([[0.0], (places[1:] + places[:-1]) / 2, [1.0 + 1e-6]])
    below, missed = (np.searchsorted(np.sort(score[truth == label]), cuts) for label in (0, 1))
    return float(cuts[::-1][np.argmax((below - missed)[::-1])])


def _load(run: Run, *splits: Split) -> Dataset:
    """Images of splits; those that are learnt from without the site and the subjects left out."""
    table = read_manifest(run.cohort.parent / "split" / "manifest.parquet")
    rows = table[table["split"].isin([str(split) for split in splits])]
    if splits[0] in (Split.TRAIN, Split.VALIDATION):
        rows = rows[rows["site"] != run.leave_out]
    if splits[0] is Split.TRAIN:
        people = sorted(rows["subject"].unique(), key=partial(stable_hash, run.section.fit.seed))
        rows = rows[rows["subject"].isin(people[: max(1, round(run.share * len(people)))])]
    return load_rows(run.cohort, run.section, rows.reset_index(drop=True))


def _open(run: Run, data: Dataset) -> Any:
    from safetensors.torch import load_file

    section = run.section
    network = build(
        section.fit.architecture, data.images.shape[1:], len(section.classes), section.positive_labels
    )
    network.load_state_dict(load_file(run.folder / "weights.safetensors"))
    return network.eval()


def _ask(network: Any, images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits and heat of images."""
    import torch

    torch.set_num_threads(1)
    with torch.inference_mode():
        parts = [network(part)[:2] for part in torch.split(torch.from_numpy(np.asarray(images)), 64)]
    logits, heat = (np.concatenate([part[i].numpy() for part in parts]) for i in (0, 1))
    return logits, heat


def _score(
    section: TaskSection, data: Dataset, logits: NDArray[np.float32], temperature: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each image (n,): the score of a positive, and 1 where it is one; or of masks mean Dice, and NaN."""
    from scipy.special import expit, softmax

    if section.kind is Kind.SEGMENTATION:
        pairs = list(zip(data.truth, logits.argmax(axis=1), strict=True))
        table = [[dice(*pair, label) for label in range(1, len(section.classes))] for pair in pairs]
        known = np.ma.masked_invalid(table).mean(axis=1)
        return known.filled(np.nan), np.full(len(table), np.nan)
    if section.kind is Kind.DETECTION:
        centre, any_lesion = (
            each.reshape(len(logits), -1).max(axis=1) for each in (logits[:, 0], data.truth)
        )
        return expit(centre.astype(np.float64)), (any_lesion > 0).astype(np.float64)
    positive = list(section.positive_labels)
    score = softmax(logits.astype(np.float64) / temperature, axis=1)[:, positive].sum(axis=1)
    return score, np.isin(data.truth, positive).astype(np.float64)


def _grade(score: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """AUC, or mean Dice."""
    return float(np.nanmean(score)) if np.isnan(truth).all() else auc(truth.astype(int), score)


def answer(run: Run, network: Any, data: Dataset, notes: dict[str, Any]) -> Any:
    """A row an image: who and where, truth (0, 1), score, and whether it is right at the frozen threshold."""
    logits = _ask(network, data.images)[0]
    score, truth = _score(run.section, data, logits, notes["temperature"])
    right = np.where(np.isnan(truth), np.nan, (score >= notes["threshold"]) == truth)
    return (
        data.rows[list(FACTS)]
        .rename(columns=FACTS)
        .assign(truth=truth, negative=1 - truth, score=score, right=right, family="")
    )


def reopen(run: Run) -> tuple[Dataset, Any, dict[str, Any]]:
    """The internal test set, shuffled by digest, the trained network, and its notes."""
    data = _load(run, Split.TEST)
    notes = json.loads(run.notes.read_text())
    return data.take(np.argsort(data.rows["sha256"].to_numpy(), kind="stable")), _open(run, data), notes


def _answer_corrupted(run: Run) -> Any:
    """Answers to one image each of some test subjects, corrupted as stored; `seen`: training drew such."""
    import pandas as pd

    data, network, notes = reopen(run)
    section, how, pixels = run.section, run.corruption, Pixels(run.cohort)
    data = data.take(np.flatnonzero(~data.rows["subject"].duplicated())[: how.subjects])
    facts = list(zip(data.rows["image"], data.rows["row"], data.rows["sha256"], strict=True))
    possible = apply_to(section.modality, data.images.ndim == 4 and data.images.shape[1] == 3)
    tables = []
    for family, step in product((each for each in how.families if each in possible), how.severities):
        stored = (
            corrupt(pixels.read(str(shard), int(row)), family, step, section.modality, int(digest[:8], 16))
            for shard, row, digest in facts
        )
        images = np.stack([prepare(image.astype(np.float32), section.preparation) for image in stored])
        drawn = getattr(section.fit.augmentation, SEEN.get(family, ""), 0) > 0
        answered = answer(run, network, Dataset(images, data.truth, data.rows), notes)
        tables.append(answered.assign(family=str(family), severity=step, seen=drawn))
    return pd.concat(tables, ignore_index=True)


def _look(run: Run) -> Any:
    """How well maps of positive test images show the lesion, image by image, with and without training."""
    from scipy.ndimage import maximum_filter

    data, network, _ = reopen(run)
    masks = load_masks(run.cohort, data.rows)
    if masks is None:
        raise DataError("The cohort has no lesion masks.", "Leave `maps` out of the claim.")
    positive = np.isin(data.truth, run.section.positive_labels) & masks.reshape(len(masks), -1).any(axis=1)
    chosen = np.flatnonzero(positive)[: run.maps.images]
    images, lesions = data.images[chosen], masks[chosen] > 0
    heats = [_ask(network, images)[1], *(look_untrained(run.section, images, seed) for seed in SEEDS)]
    reach = (max(1, round(side * TOLERANCE)) for side in lesions.shape[1:])
    grown = maximum_filter(lesions, (1, *(2 * pixels + 1 for pixels in reach)), mode="constant")
    hits, energy, _ = measure_maps(heats[0], lesions, grown)
    blind = np.mean([measure_maps(heat, lesions, grown)[0] for heat in heats[1:]], axis=0)
    table = data.rows.iloc[chosen][list(FACTS)].rename(columns=FACTS)
    return table.assign(family="", hits=hits, energy=energy, blind=blind)
