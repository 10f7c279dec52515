"""Accuracy without labels: does the interval cover, are labels that disagree found, how long does it take?

Simulated. A network's log odds are normal, its probabilities honest; its labelled reference has 200 subjects.

- covered: the share of repeats in which the interval of `monitoring.estimation.estimate` holds what 500
  answers realise, whose log odds have another mean and spread than the reference's (covariate shift); and
  what the same interval would hold without the calibration error, `sampling_only`.
- not_valid: the share of repeats in which 50 and 100 late labels make the verdict *not valid*: where labels
  follow the probabilities (false), and under three concept shifts: the log odds of the truth move by 1.6;
  three labels in ten are swapped; the probabilities tell a third of what they say. `drop` is what such a
  shift costs in accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

sys.path.insert(0, str(Path(__file__).parents[1]))

from imaging.vocabulary import Accuracy
from monitoring.estimation import Reference, estimate, judge
from monitoring.realised import Labelled

REFERENCE, ANSWERS, THRESHOLD = 200, 500, 0.5
MIDDLE, SPREAD = -0.5, 2.0
LIVE = {
    "the same": (-0.5, 2.0), "more ill": (0.8, 2.0), "many more ill": (1.5, 2.0), "fewer ill": (-1.5, 1.5),
    "harder": (-0.5, 1.0), "easier": (-0.5, 3.0),
}  # fmt: skip
Truth = Callable[[np.random.Generator, NDArray[Any]], NDArray[Any]]
CONCEPTS: dict[str, Truth] = {
    "none": lambda rng, p: rng.random(len(p)) < p,
    "log odds + 1.6": lambda rng, p: rng.random(len(p)) < expit(logit(p) + 1.6),
    "three in ten swapped": lambda rng, p: (rng.random(len(p)) < p) ^ (rng.random(len(p)) < 0.3),
    "a third of the slope": lambda rng, p: rng.random(len(p)) < expit(logit(p) / 3),
}  # fmt: skip


def draw(
    rng: np.random.Generator, count: int, place: tuple[float, float] = (MIDDLE, SPREAD), concept: str = "none"
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Probabilities and truths of a place."""
    scores = expit(rng.normal(*place, count))
    return scores, CONCEPTS[concept](rng, scores).astype(int)


def refer(rng: np.random.Generator) -> Reference:
    """A labelled reference."""
    return Reference(*draw(rng, REFERENCE), np.arange(REFERENCE).astype(str))


def cover(rng: np.random.Generator, place: tuple[float, float], runs: int) -> dict[str, float]:
    """How often the intervals hold what is realised."""
    held: dict[str, list[bool]] = {}
    for _ in range(runs):
        reference, (scores, truth) = refer(rng), draw(rng, ANSWERS, place)
        right, ill = (scores >= THRESHOLD) == truth, truth == 1
        real = {"accuracy": right.mean(), "sensitivity": right[ill].mean(), "specificity": right[~ill].mean()}
        told = estimate(scores, reference, THRESHOLD)
        for name, share in real.items():
            held.setdefault(name, []).append(told[name]["low"] <= share <= told[name]["high"])
        one = told["accuracy"]
        narrow = ((one["high"] - one["low"]) ** 2 / 4 - told["calibration_error"] ** 2) ** 0.5
        held.setdefault("sampling_only", []).append(abs(one["estimate"] - real["accuracy"]) <= narrow)
    return {name: round(float(np.mean(found)), 4) for name, found in held.items()}


def find(rng: np.random.Generator, concept: str, labels: int, runs: int) -> float:
    """How often labels of a concept make an estimate not valid."""
    found = 0
    for _ in range(runs):
        told = estimate(draw(rng, ANSWERS)[0], refer(rng), THRESHOLD)
        scores, truth = draw(rng, labels, concept=concept)
        people, days = np.arange(labels).astype(str), np.full(labels, "2026-01-01")
        came = Labelled(scores, scores >= THRESHOLD, truth, people, days, np.zeros(labels, bool))
        found += judge(told, came).word is Accuracy.NOT_VALID
    return found / runs


def cost(rng: np.random.Generator, concept: str) -> float:
    """What a concept shift costs in accuracy."""
    shares = []
    for one in ("none", concept):
        scores, truth = draw(rng, 200_000, concept=one)
        shares.append(((scores >= THRESHOLD) == truth).mean())
    return round(float(shares[0] - shares[1]), 4)


def clock(rng: np.random.Generator) -> float:
    """Seconds that 1,000 estimates of 1,000 answers take."""
    reference, (scores, _) = refer(rng), draw(rng, 1000)
    start = time.perf_counter()
    for _ in range(1000):
        estimate(scores, reference, THRESHOLD)
    return round(time.perf_counter() - start, 3)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the repeats")
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked = parser.parse_args()
    runs, rng = 100 if asked.quick else 1000, np.random.default_rng(0)
    told: dict[str, Any] = {
        "runs": runs, "reference": REFERENCE, "answers": ANSWERS,
        "covered": {name: cover(rng, place, runs) for name, place in LIVE.items()},
        "not_valid": {concept: {"drop": cost(rng, concept),
                                **{str(labels): find(rng, concept, labels, runs) for labels in (50, 100)}}
                      for concept in CONCEPTS},
        "seconds_per_1000_estimates": clock(rng),
    }  # fmt: skip
    for name, found in [*told["covered"].items(), *told["not_valid"].items()]:
        print(f"{name:<22}", "  ".join(f"{key} {value:.3f}" for key, value in found.items()))
    print(f"1,000 estimates: {told['seconds_per_1000_estimates']} s")
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
