"""Scores of the packaged engine on the locked sets: by site, by subject, with intervals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import EvaluateSection, Places, TaskSection
from imaging.intervals import Estimate, bootstrap_auc, bootstrap_mean, wilson
from imaging.scores import dice
from imaging.vocabulary import Kind, Split
from registry.contract import Contract, read_contract
from registry.engines import check_answers, open_engine
from registry.package import digest_package
from training.datasets import Dataset, load_split, stage_folder
from training.evaluation_report import write_report

Scores = dict[str, NDArray[Any]]


def evaluate(places: Places, task: str, section: TaskSection) -> dict[str, Any]:
    """Score the package, and write evaluation.json and report.html.

    Returns:
        The body of the evaluation statement: the same bytes in every run.
    """
    package = places.stage(task, "package")
    contract, how = read_contract(package), section.evaluate
    data = load_split(places, task, section, Split.TEST, Split.EXTERNAL)
    answers, heat = answer_all(package, contract, how, data.images)
    scores = score_images(contract, data.truth, answers)
    internal = (data.rows["split"] == Split.TEST).to_numpy()
    sites = {site: (data.rows["site"] == site).to_numpy() for site in data.rows["site"].unique()}
    body = {
        "package": digest_package(package),
        "engine": f"{how.engine}/{how.precision}",
        "confidence": how.confidence,
        "threshold": contract.threshold,
        "simulated": contract.simulated,
        "sets": {str(split): _describe_set(data, split) for split in (Split.TEST, Split.EXTERNAL)},
        "overall": estimate(contract, scores, data.subjects, internal, how),
        "sites": {
            site: estimate(contract, scores, data.subjects, chosen, how) for site, chosen in sites.items()
        },
        "predictions": _list_predictions(data, scores),
    }
    folder = stage_folder(places, task, "evaluate")
    (folder / "evaluation.json").write_text(
        json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n"
    )
    write_report(folder / "report.html", contract, body, (data, answers, heat))
    return body


def answer_all(
    package: Path, contract: Contract, how: EvaluateSection, images: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the packaged engine says of every image.

    Returns:
        Probabilities (n, classes[, rows, columns]), and heat (n, rows, columns).

    Raises:
        TrustError: an answer has another shape than promised, or is not finite.
    """
    from rich.console import Console
    from rich.progress import track

    engine = open_engine(package, how.engine, how.precision)
    starts, console = range(0, len(images), contract.max_batch), Console(stderr=True)
    said, heat = [], []
    for start in track(starts, description=f"evaluate {contract.title}", console=console):
        batch = images[start : start + contract.max_batch]
        answers = engine.run(batch)
        check_answers(answers, contract, len(batch))
        said.append(contract.probabilities(answers.logits))
        heat.append(answers.heat)
    return np.concatenate(said), np.concatenate(heat)


def score_images(contract: Contract, truth: NDArray[np.int64], answers: NDArray[np.float32]) -> Scores:
    """What each image scores.

    Returns:
        Classification: truth (0, 1), probability, right (at the contract's threshold). Segmentation: Dice
        of each class but the first, `dice_<class>`, and `dice`, their mean over the classes that the image
        has; NaN where neither truth nor answer has any.
    """
    if contract.kind is Kind.CLASSIFICATION:
        said = answers[:, 1] >= contract.threshold
        return {"truth": truth, "probability": answers[:, 1], "right": (said == truth).astype(int)}
    labels = answers.argmax(axis=1)
    found = {
        f"dice_{name.replace(' ', '_')}": _dices(truth, labels, label)
        for label, name in enumerate(contract.classes)
        if label
    }
    table = np.stack(list(found.values()))
    present = np.isfinite(table).sum(axis=0)
    total = np.nansum(table, axis=0)
    return {**found, "dice": np.where(present > 0, total / np.maximum(present, 1), np.nan)}


def _dices(truth: NDArray[Any], labels: NDArray[Any], label: int) -> NDArray[np.float64]:
    return np.array([dice(t, answer, label) for t, answer in zip(truth, labels, strict=True)])


def estimate(
    contract: Contract,
    scores: Scores,
    subjects: NDArray[Any],
    chosen: NDArray[np.bool_],
    how: EvaluateSection,
) -> dict[str, Any]:
    """Estimates with intervals over the chosen images: metric -> the fields of `Estimate`."""
    told: dict[str, Estimate] = {}
    if contract.kind is Kind.CLASSIFICATION:
        truth, right, score = (scores[name][chosen] for name in ("truth", "right", "probability"))
        people = subjects[chosen]
        told["sensitivity"] = wilson(right[truth == 1], people[truth == 1], how.confidence)
        told["specificity"] = wilson(right[truth == 0], people[truth == 0], how.confidence)
        told["auc"] = bootstrap_auc(truth, score, people, how.confidence, how.seed)
    else:
        for name, values in scores.items():
            told[name] = bootstrap_mean(values[chosen], subjects[chosen], how.confidence, how.seed)
    return {name: value.model_dump() for name, value in told.items()}


def _describe_set(data: Dataset, split: Split) -> dict[str, Any]:
    """A locked set by the digest of its images, in any order."""
    rows = data.rows[data.rows["split"] == split]
    digest = hashlib.sha256("\n".join(sorted(rows["sha256"])).encode()).hexdigest()
    return {"digest": f"sha256:{digest}", "images": len(rows), "subjects": int(rows["subject"].nunique())}


def _list_predictions(data: Dataset, scores: Scores) -> list[dict[str, Any]]:
    facts = data.rows[["sha256", "subject", "site", "split"]].to_dict("records")
    return [
        {**fact, **{name: _plain(values[i]) for name, values in scores.items() if name != "right"}}
        for i, fact in enumerate(facts)
    ]


def _plain(value: Any) -> int | float | None:
    """A JSON number; NaN (nothing to score) is null."""
    if isinstance(value, np.integer):
        return int(value)
    return round(float(value), 6) if np.isfinite(value) else None
