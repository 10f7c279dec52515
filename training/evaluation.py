"""Scores of the packaged engine on the locked sets: by site, by subgroup, with the operating point frozen."""

from __future__ import annotations

import hashlib
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import Places
from imaging.detection import STRIDE, find_lesions, match_lesions
from imaging.estimation import Scores
from imaging.manifest import Pixels
from imaging.preparation import prepare
from imaging.recipe import EvaluateSection, TaskSection
from imaging.scores import dice, surface_distances
from imaging.vocabulary import Kind, Split
from registry.engines import Engine, check_answers, open_engine
from registry.ledger import open_ledger
from registry.package import Contract, digest_package, read_contract
from registry.predictions import digest_images
from training.cohorts.building import load_builder
from training.datasets import Dataset, load_split, stage_folder
from training.evaluation_report import write_report
from training.explanation import explain
from training.metrics import estimate, estimate_subgroups, measure_gap, tabulate
from training.robustness import measure_robustness

INNER = ("right", "class_right", "match")  # scores that predictions do not repeat


def evaluate(places: Places, task: str, section: TaskSection) -> dict[str, Any]:
    """Score the package, and write evaluation.json and report.html; the ledger counts the use of each set.

    Returns:
        The body of the evaluation statement: the same bytes in every run. What this machine took for it is
        written to var/host/<task>-cost.json alone.
    """
    package, how = places.stage(task, "package"), section.evaluate
    engine = open_engine(package, how.engine, how.precision)
    body, (data, answers, heat) = score_package(places, task, section, package, engine)
    open_ledger(places.var).record_uses(task, body["package"], digest_images(body), "evaluate")
    contract = read_contract(package)
    body["explanation"] = explain(places, task, section, data, heat)
    body |= score_real(section, contract, engine)
    if how.robustness.subjects:
        ask, pixels = partial(_score_again, engine, contract), Pixels(places.stage(task, "cohort"))
        body["robustness"] = measure_robustness(ask, data, pixels, section)
    folder = stage_folder(places, task, "evaluate")
    (folder / "evaluation.json").write_text(
        json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n"
    )
    write_report(folder / "report.html", contract, body, (data, answers, heat))
    _write_cost(places, task, how, data.images[:1])
    return body


def score_package(
    places: Places, task: str, section: TaskSection, package: Path, engine: Engine
) -> tuple[dict[str, Any], tuple[Dataset, NDArray[np.float32], NDArray[np.float32]]]:
    """Score any package of the task on the locked sets as the split has them now.

    Returns:
        What an evaluation statement says of scores; and the images, the answers and the heat.
    """
    contract, how = read_contract(package), section.evaluate
    data = load_split(places, task, section, Split.TEST, Split.EXTERNAL)
    answers, heat = answer_all(engine, contract, data.images)
    scores = score_images(contract, data.truth, answers, data.rows["spacing_mm"])
    site = np.asarray(data.rows["site"])
    groups = {"overall": (data.rows["split"] == Split.TEST).to_numpy()}
    groups |= {name: site == name for name in data.rows["site"].unique()}
    told = {name: estimate(contract, scores, data.subjects, group, how) for name, group in groups.items()}
    body = {
        "package": digest_package(package), "engine": f"{how.engine}/{how.precision}",
        "confidence": how.confidence, "threshold": contract.threshold,
        "simulated": contract.simulated, "limits": list(contract.limits),
        "model_bytes": (package / "model.onnx").stat().st_size,
        "sets": {split: _describe_set(data, split) for split in data.rows["split"].unique()},
        "overall": told.pop("overall"), "sites": told,
        "subgroups": estimate_subgroups(places.stage(task, "cohort"), contract, data, scores, how),
        "gap": measure_gap(contract, scores, data.subjects, site, how),
        "curves": {name: tabulate(contract, scores, group) for name, group in groups.items()},
        "predictions": _list_predictions(data, scores),
    }  # fmt: skip
    return body, (data, answers, heat)


def score_real(section: TaskSection, contract: Contract, engine: Engine) -> dict[str, Any]:
    """Dice of real people whose slices the cohort's builder can read; it is told and gates nothing.

    Returns:
        {"real": ...}, the builder's sentence and mean Dice over the slices of each of its REAL_REGIONS; {}
        where a builder knows nobody real, and of imports.
    """
    source = section.cohort.source
    if not source.endswith(".py") or not hasattr(builder := load_builder(source), "read_real"):
        return {}
    sentence, slices = builder.read_real()
    scores = {}
    if slices:
        images = np.stack([prepare(one.pixels.astype(np.float32), contract.preparation) for one in slices])
        labels = answer_all(engine, contract, images, silent=True)[0].argmax(axis=1)
        pairs = list(zip((one.mask for one in slices), labels, strict=True))
        for name, region in builder.REAL_REGIONS.items():
            dices = [
                dice(np.isin(mask, region).astype(int), np.isin(said, region).astype(int), 1)
                for mask, said in pairs
            ]
            scores[name] = round(float(np.nanmean(dices)), 4)
    return {"real": {"sentence": sentence, "slices": len(slices), "scores": scores}}


def answer_all(
    engine: Engine, contract: Contract, images: NDArray[np.float32], silent: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the packaged engine says of every image.

    Returns:
        Probabilities (n, classes[[, depth], rows, columns]), but of a detector its logits (n, 3, rows / 4,
        columns / 4); and heat (n[, depth], rows, columns).

    Raises:
        TrustError: an answer has another shape than promised, or is not finite.
    """
    from rich.console import Console
    from rich.progress import track

    starts, console = range(0, len(images), contract.max_batch), Console(stderr=True)
    said, heat = [], []
    for start in track(starts, f"evaluate {contract.title}", console=console, disable=silent):
        batch = np.ascontiguousarray(images[start : start + contract.max_batch])
        answers = engine.run(batch)
        check_answers(answers, contract, len(batch))
        detects = contract.kind is Kind.DETECTION
        said.append(answers.logits if detects else contract.probabilities(answers.logits))
        heat.append(answers.heat)
    return np.concatenate(said), np.concatenate(heat)


def _score_again(engine: Engine, contract: Contract, data: Dataset) -> Scores:
    """Scores of other images of the same cases; `found` as the share of an image's lesions, NaN of none."""
    scores = score_images(contract, data.truth, answer_all(engine, contract, data.images, silent=True)[0])
    if contract.kind is Kind.DETECTION:
        shares = scores["found"] / np.maximum(scores["lesions"], 1)
        scores["found"] = np.where(scores["lesions"] > 0, shares, np.nan)
    return scores


def score_images(
    contract: Contract, truth: NDArray[np.int64], answers: NDArray[np.float32], spacings_mm: Any = None
) -> Scores:
    """What each image scores.

    Args:
        contract: of the package.
        truth: labels (n,) or masks (n[, depth], rows, columns).
        answers: as `answer_all` returns them.
        spacings_mm: of each image; without it no distances are measured.

    Returns:
        Classification: truth (0, 1: is its label a positive one?), probability of the positive classes, right
        (at the contract's threshold); of more than two classes also label, answer and class_right.
        Segmentation: Dice of each class but the first, `dice_<class>`, and `dice`, their mean over the
        classes that the image has, NaN where neither truth nor answer has any; likewise `surface_mm` and
        `hausdorff95_mm`, NaN where either has none.
        Detection: lesions, found (at the threshold), false_positives, truth (0, 1), probability and match.
    """
    if contract.kind is Kind.CLASSIFICATION:
        return _score_labels(contract, truth, answers)
    if contract.kind is Kind.DETECTION:
        return _score_lesions(contract, truth, answers)
    labels, found = answers.argmax(axis=1), {}
    for label, name in enumerate(contract.classes[1:], start=1):
        end = name.replace(" ", "_")
        found[f"dice_{end}"] = np.array([dice(*pair, label) for pair in zip(truth, labels, strict=True)])
        if spacings_mm is not None:
            cases = zip(truth == label, labels == label, spacings_mm, strict=True)
            table = np.array([surface_distances(*case) for case in cases])
            found[f"surface_mm_{end}"], found[f"hausdorff95_mm_{end}"] = table.T
    for name in ("dice", *(("surface_mm", "hausdorff95_mm") if spacings_mm is not None else ())):
        table = np.stack([values for key, values in found.items() if key.startswith(f"{name}_")])
        present = np.isfinite(table).sum(axis=0)
        found[name] = np.where(present > 0, np.nansum(table, axis=0) / np.maximum(present, 1), np.nan)
    return found


def _score_labels(contract: Contract, truth: NDArray[np.int64], answers: NDArray[np.float32]) -> Scores:
    positive = np.isin(truth, contract.positive_labels).astype(int)
    score = contract.score(answers)
    right = ((score >= contract.threshold) == positive).astype(int)
    found = {"truth": positive, "probability": score, "right": right}
    if len(contract.classes) > 2:
        answer = answers.argmax(axis=1)
        found |= {"label": truth, "answer": answer, "class_right": (answer == truth).astype(int)}
    return found


def _score_lesions(contract: Contract, truth: NDArray[np.int64], answers: NDArray[np.float32]) -> Scores:
    matches = np.empty(len(truth), dtype=object)
    for i, (mask, logits) in enumerate(zip(truth, answers, strict=True)):
        matches[i] = match_lesions(mask, find_lesions(logits, STRIDE, contract.temperature))
    least = contract.threshold
    lesions = np.array([len(match.hits) for match in matches])
    return {
        "lesions": lesions,
        "found": np.array([int((match.hits >= least).sum()) for match in matches]),
        "false_positives": np.array([int((match.false >= least).sum()) for match in matches]),
        "truth": (lesions > 0).astype(int),
        "probability": contract.score(contract.probabilities(answers)),
        "match": matches,
    }


def _describe_set(data: Dataset, split: str) -> dict[str, Any]:
    """A locked set by the digest of its images and labels, in any order."""
    rows = data.rows[data.rows["split"] == split]
    named = sorted(f"{image},{label}" for image, label in zip(rows["sha256"], rows["label"], strict=True))
    digest = hashlib.sha256("\n".join(named).encode()).hexdigest()
    return {"digest": f"sha256:{digest}", "images": len(rows), "subjects": int(rows["subject"].nunique())}


def _list_predictions(data: Dataset, scores: Scores) -> list[dict[str, Any]]:
    facts = data.rows[["sha256", "subject", "site", "split"]].to_dict("records")
    told = {name: values for name, values in scores.items() if name not in INNER}
    return [{**fact, **{name: _plain(told[name][i]) for name in told}} for i, fact in enumerate(facts)]


def _plain(value: Any) -> int | float | None:
    """A JSON number; NaN (nothing to score) is null."""
    if isinstance(value, np.integer):
        return int(value)
    return round(float(value), 6) if np.isfinite(value) else None


def measure_cost(
    package: Path, how: EvaluateSection, image: NDArray[np.float32], repeats: int = 20
) -> dict[str, Any]:
    """What one prediction takes on this machine, one image (1, channels[, depth], rows, columns) at a time.

    Returns:
        ms_per_image (median after a warm-up), cpu_seconds_per_image, and memory_mb, by which the process grew
        (0 where it reused what was free).
    """
    import psutil

    process = psutil.Process()
    before = process.memory_info().rss
    engine = open_engine(package, how.engine, how.precision)
    engine.run(image)
    spent, cpu = [], time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        engine.run(image)
        spent.append(time.perf_counter() - start)
    grown = max(0, process.memory_info().rss - before)
    return {
        "engine": engine.name, "ms_per_image": round(1000 * float(np.median(spent)), 3),
        "cpu_seconds_per_image": round((time.process_time() - cpu) / repeats, 6),
        "memory_mb": round(grown / 2**20, 1),
    }  # fmt: skip


def _write_cost(places: Places, task: str, how: EvaluateSection, image: NDArray[np.float32]) -> None:
    """Facts of this host, so neither in the package nor in the statement: what fit told, and a prediction."""
    package, spent = places.stage(task, "package"), places.stage(task, "fit") / "cost.json"
    made_here = spent.exists() and "imported" not in read_contract(package).lineage
    told = {
        "package": digest_package(package),
        "fit": json.loads(spent.read_text()) if made_here else None,
        "predict": measure_cost(package, how, np.ascontiguousarray(image)),
    }
    host = places.var / "host"
    host.mkdir(parents=True, exist_ok=True)
    (host / f"{task}-cost.json").write_text(json.dumps(told, indent=1) + "\n")
