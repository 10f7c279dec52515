"""What an engine changes, beside the reference engine: on golden and validation images and on edge cases."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.config import Places
from imaging.errors import FormularyError
from imaging.manifest import Pixels, read_manifest
from imaging.preparation import prepare
from imaging.recipe import QualifySection
from imaging.scores import dice
from imaging.vocabulary import Kind, Split
from registry.engines import Engine, check_answers, open_engine
from registry.gates import hold_engine
from registry.package import PROGRAM, Contract, read_golden
from registry.policy import Policy

MOST_NUMBERS = 2**26  # of answers at once: a task of volumes has fewer of them
LEAD = 0.9  # another engine serves only where it takes less than this share of the first one's time
REPEATS = 5
Probabilities = NDArray[np.float32]


@dataclass(frozen=True)
class Cases:
    """Prepared images, golden ones first, then validation, then edge cases, and the reference's answers.

    Attributes:
        reference: name of the reference engine.
        images: float32 (n, channels[, depth], rows, columns).
        expected: float32 (n, ...), as `Contract.probabilities` returns them; of golden images as packaged.
        golden: so many of n.
        edges: so many of n.
        masks: of the validation images of a segmentation; none of another task.
    """

    reference: str
    images: NDArray[np.float32]
    expected: Probabilities
    golden: int
    edges: int
    masks: list[NDArray[Any]]


def gather_cases(places: Places, task: str, contract: Contract, section: QualifySection) -> Cases:
    """Golden images, validation images of every site, and images that no scanner makes.

    Raises:
        DataError: the cohort or its split is not there.
        TrustError: golden images or the reference engine do not hold.
    """
    package, golden = places.stage(task, "package"), read_golden(places.stage(task, "package"))
    most = MOST_NUMBERS // (len(contract.classes) * math.prod(contract.spatial))
    pixels, masks = _read_validation(places, task, max(4, min(section.images, most)))
    real = [prepare(image.astype(np.float32), contract.preparation) for image in pixels]
    edges = _draw_edges(contract.shape)
    more = np.stack([*real, *edges])
    name = "torch" if (package / PROGRAM).exists() else "onnxruntime"
    told = answer(open_engine(package, name, "f32"), contract, more, min(8, contract.max_batch))
    return Cases(
        reference=f"{name}/f32",
        images=np.concatenate([golden.images, more]),
        expected=np.concatenate([contract.probabilities(golden.logits), told]),
        golden=len(golden.images),
        edges=len(edges),
        masks=masks if contract.kind is Kind.SEGMENTATION else [],
    )


def _read_validation(places: Places, task: str, most: int) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Images and masks of validation rows, evenly from all of them; rows lie by site."""
    table = read_manifest(places.stage(task, "split") / "manifest.parquet")
    rows = table[table["split"] == str(Split.VALIDATION)]
    chosen = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, most).astype(int))]
    shards, facts = Pixels(places.stage(task, "cohort")), chosen.to_dict("records")
    images = [shards.read(fact["image"], fact["row"]) for fact in facts]
    return images, [shards.read(fact["mask"], fact["row"]) for fact in facts if fact["mask"]]


def _draw_edges(shape: tuple[int, ...]) -> list[NDArray[np.float32]]:
    """Black, mid-grey and saturated images, and noise: `prepare` gives -1.5 to 1.5."""
    flat = [np.full(shape, value, np.float32) for value in (0, -1.5, 1.5)]
    noise = np.random.default_rng(0).normal(0, 1, shape).clip(-1.5, 1.5).astype(np.float32)
    return [*flat, noise, np.where(noise > 0, np.float32(1.5), np.float32(-1.5))]


def answer(engine: Engine, contract: Contract, images: NDArray[np.float32], size: int) -> Probabilities:
    """Probabilities of images, so many at once.

    Raises:
        TrustError: other shapes than promised, or numbers that are not finite.
    """
    found = []
    for start in range(0, len(images), size):
        batch = np.ascontiguousarray(images[start : start + size])
        answers = engine.run(batch)
        check_answers(answers, contract, len(batch))
        found.append(contract.probabilities(answers.logits))
    return np.concatenate(found)


def check_engines(
    package: Path, contract: Contract, cases: Cases, section: QualifySection, policy: Policy
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """What each engine changes, whether contract and policy allow it, and how fast it is.

    Returns:
        engine -> `measure_change`'s worst over all batch sizes, tolerance, passed, and why not; and engine ->
        batch size -> ms.
    """
    sizes = sorted({min(size, contract.max_batch) for size in (*section.batch_sizes, contract.max_batch)})
    told, opened = {}, {}
    for name in section.engines:
        kind, _, precision = name.partition("/")
        try:
            opened[name] = open_engine(package, kind, precision)
            told[name] = _check_engine(opened[name], contract, cases, sizes)
        except FormularyError as error:
            told[name] = {"passed": False, "reason": error.fact}
            continue
        if told[name]["passed"] and (reasons := list(hold_engine(name, told[name], policy))):
            told[name] |= {"passed": False, "reason": "; ".join(reasons)}
    answering = {name: opened[name] for name in told if "difference" in told[name]}
    return told, measure_speed(answering, cases.images, sizes)


def _check_engine(engine: Engine, contract: Contract, cases: Cases, sizes: list[int]) -> dict[str, Any]:
    changes = [
        measure_change(contract, cases, answer(engine, contract, cases.images, size)) for size in sizes
    ]
    worst = {what: max(change[what] for change in changes) for what in changes[0]}
    # Rounded up: the last bits of a difference depend on the machine, the verdict does not.
    told: dict[str, Any] = {what: _round_up(value) for what, value in worst.items()}
    tolerance = contract.tolerance.get(engine.name)
    if tolerance is None:
        return {**told, "passed": False, "reason": "the contract promises nothing for it"}
    if worst["difference"] <= tolerance:
        return {**told, "tolerance": tolerance, "passed": True}
    reason = f"a probability differs by {told['difference']:g}, and the contract promises {tolerance:g}"
    return {**told, "tolerance": tolerance, "passed": False, "reason": reason}


def measure_change(contract: Contract, cases: Cases, found: Probabilities) -> dict[str, float]:
    """How answers differ from the reference engine's.

    Args:
        contract: of the package.
        cases: with what the reference engine answered.
        found: the same shape as `cases.expected`.

    Returns:
        difference: the largest, of any probability of a golden or validation image; edges: of an edge case;
        flips: share of most likely classes (of images or pixels; of a detector: of places at or above the
        threshold) that change; crossed and crossings: number and share of images on the other side of the
        operating point; dice: by how much the mean Dice of a class changes. 0 where a kind of task has no
        such thing.
    """
    real = slice(len(found) - cases.edges)
    pair = cases.expected[real], found[real]
    labels: list[NDArray[Any]]
    if contract.kind is Kind.DETECTION:
        labels = [each >= contract.threshold for each in pair]
    else:
        labels = [each.argmax(axis=1) for each in pair]
    crossed = 0
    if contract.kind is not Kind.SEGMENTATION:
        sides = [contract.score(each) >= contract.threshold for each in pair]
        crossed = int((sides[0] != sides[1]).sum())
    return {
        "difference": float(np.abs(pair[1] - pair[0]).max()),
        "edges": float(np.abs(found - cases.expected)[real.stop :].max()),
        "flips": float((labels[0] != labels[1]).mean()),
        "crossed": crossed,
        "crossings": crossed / len(pair[0]),
        "dice": _change_dice(cases, [each[cases.golden :] for each in labels], len(contract.classes)),
    }


def _change_dice(cases: Cases, labels: list[NDArray[Any]], classes: int) -> float:
    """Where neither mask nor answer has a class, both are right: 1."""
    changes = [0.0]
    for label in range(1, classes) if cases.masks else ():
        scores = [[dice(*pair, label) for pair in zip(cases.masks, each, strict=True)] for each in labels]
        before, after = np.nan_to_num(scores, nan=1.0).mean(axis=1)
        changes.append(abs(float(after - before)))
    return max(changes)


def _round_up(value: float) -> float:
    """To three places; below a thousandth to the next power of ten."""
    if value <= 0 or isinstance(value, int):
        return value
    return math.ceil(1000 * value) / 1000 if value > 0.001 else float(10 ** np.ceil(np.log10(value)))


def measure_speed(
    engines: dict[str, Engine], images: NDArray[np.float32], sizes: list[int]
) -> dict[str, dict[str, float]]:
    """Engine -> batch size -> ms of a batch, the best of five after a warm-up; engines take turns."""
    spent: dict[str, dict[str, float]] = {name: {} for name in engines}
    for size in sizes:
        batch = np.resize(images, (size, *images.shape[1:]))
        for turn in range(REPEATS + 1):
            for name, engine in engines.items():
                start = time.perf_counter()
                engine.run(batch)
                took = round(1000 * (time.perf_counter() - start), 3)
                spent[name][str(size)] = min(took, spent[name].get(str(size), took)) if turn > 1 else took
    return spent


def choose_best(passed: list[str], speed: dict[str, dict[str, float]]) -> str:
    """The engine with the least time an image over all batch sizes, or the first if that is hardly slower."""
    cost = {name: np.mean([ms / int(size) for size, ms in speed[name].items()]) for name in passed}
    fastest = min(passed, key=lambda name: cost[name])
    return fastest if cost[fastest] < LEAD * cost[passed[0]] else passed[0]
