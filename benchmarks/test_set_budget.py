"""What twenty looks at one locked set cost: the naive report of the best, and the ledger's bound.

Simulated. The set is 250 subjects, one image each; every candidate is right on 90 % of all subjects, and any
two err alike with a latent correlation of .5. Naive: twenty candidates are scored, and the best score is
reported. Ledger: at use n of twenty the author is told the verdict (does the gate's lower bound, `measure` at
`Policy.confidence_at(n)`, reach 86 %?) and that bound, and in the end reports the highest bound of all:

- afresh: twenty candidates trained anew.
- by_verdict: each candidate keeps what the last one that passed answers on a random half of all subjects, of
  the set too, and is trained anew for the rest: it is as good in truth, but what pleased the set is kept.
- by_bound: the same with the candidate of the highest bound so far, and .7 of the subjects, which is worst.
- by_bound_of_five: the same with .5, and the budget that policies have unless they say otherwise.

Told: by how many points the naive report exceeds the truth in the mean, and the share of repeats in which the
ledger's does not, of `afresh` or `by_verdict`, whichever is less. Under `context` all four: who builds twenty
candidates in a row on the best bound presses the share under 95 %; with five uses it stays above.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).parents[1]))

from imaging.estimation import measure
from registry.policy import Policy

CANDIDATES, SUBJECTS, TRUTH, ALIKE, ASKED = 20, 250, 0.9, 0.5, 0.86
PEOPLE, ONES = np.arange(SUBJECTS), np.ones(SUBJECTS, dtype=int)
Right = NDArray[np.bool_]


@dataclass(frozen=True)
class Author:
    """Who makes candidates: how many, what of an earlier one each keeps, and of which one."""

    policy: Policy
    keeps: float = 0.0
    by_verdict: bool = False

    @property
    def uses(self) -> int:
        """Uses of the set."""
        return self.policy.test_set.uses

    def bound(self, right: Right, use: int) -> float:
        """The gate's lower bound of the accuracy."""
        scores = {"truth": ONES, "right": right.astype(int)}
        told = measure("accuracy", scores, PEOPLE, self.policy.confidence_at(use))
        return told.low if told else float("nan")

    def prefers(self, bound: float, best: float) -> bool:
        """Whether to build on a candidate of this bound, rather than on the one of `best`."""
        return bound >= ASKED if self.by_verdict else bound > best


def allow(uses: int) -> Policy:
    """A policy with a budget."""
    asked = {"subjects": 1, "low": {"accuracy": ASKED}, "margin": {"accuracy": 0.03}}
    return Policy.model_validate({
        "task": "budget", "why": "A simulation.", "primary": "accuracy", "statements": ["evaluation"],
        "network": asked, "internal": asked, "external": asked, "test_set": {"uses": uses},
    })  # fmt: skip


AUTHORS = {
    "afresh": Author(allow(CANDIDATES)),
    "by_verdict": Author(allow(CANDIDATES), 0.5, by_verdict=True),
    "by_bound": Author(allow(CANDIDATES), 0.7),
    "by_bound_of_five": Author(allow(5), 0.5),
}


def try_all(generator: np.random.Generator, author: Author) -> tuple[float, float]:
    """The best score of all candidates, and the highest bound that the author was told."""
    ease = np.sqrt(ALIKE) * generator.normal(size=SUBJECTS)
    scores, bounds, base, best = [], [], None, -1.0
    for use in range(1, author.uses + 1):
        right = ease + np.sqrt(1 - ALIKE) * generator.normal(size=SUBJECTS) < norm.ppf(TRUTH)
        if base is not None:
            right = np.where(generator.random(SUBJECTS) < author.keeps, base, right)
        scores.append(float(right.mean()))
        bounds.append(author.bound(right, use))
        if author.prefers(bounds[-1], best):
            base, best = right, bounds[-1]
    return max(scores), max(bounds)


def simulate(repeats: int, author: Author, seed: int = 0) -> dict[str, float]:
    """Points by which the best score exceeds the truth, and the share of repeats whose bound does not."""
    generator = np.random.default_rng(seed)
    found = np.array([try_all(generator, author) for _ in range(repeats)])
    return {"naive_optimism": round(100 * float(found[:, 0].mean() - TRUTH), 2),
            "coverage": round(float((found[:, 1] <= TRUTH).mean()), 4)}  # fmt: skip


def main() -> None:
    """Simulate, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100 repeats")
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    asked = parser.parse_args()
    started, repeats = time.perf_counter(), 100 if asked.quick else asked.repeats
    found = {name: simulate(repeats, author) for name, author in AUTHORS.items()}
    told: dict[str, Any] = {
        "naive_optimism": found["afresh"]["naive_optimism"],
        "coverage": min(found["afresh"]["coverage"], found["by_verdict"]["coverage"]),
        "context": {**found, "repeats": repeats, "candidates": CANDIDATES, "subjects": SUBJECTS,
                    "truth": TRUTH, "alike": ALIKE, "asked": ASKED,
                    "seconds": round(time.perf_counter() - started, 1)},
    }  # fmt: skip
    print(json.dumps(told, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
