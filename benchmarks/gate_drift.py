"""What twenty updates leave of a model's accuracy: our gate beside the two usual rules.

Simulated. The first version is right on 90 % of all subjects. Every update brings a candidate whose true
accuracy is its champion's plus a step; most steps are losses too small to be seen on a set of this size (mean
-0.5, SD 0.5 points), as where data or labels get slowly worse. Versions err alike: that two of them are right
on a subject correlates with .8 on the latent scale. A locked set is 500 subjects, one image each; after five
updates, our budget, a site locks a new one, and what serves and what came first are scored on it again. All
rules meet the same subjects, errors and steps:

- formulary: `registry.gates.judge` on evidence made of the simulated predictions: 3 points of margin against
  the champion and the first version, .05 spent harmonically over the five uses of a set.
- threshold: accepts what scores 85 % or more.
- not_worse: accepts what scores no less than its champion on the same set.

Told: change of true accuracy from the first version to the last champion, in points: mean and 5th percentile
over the repeats. Under `context`, `even` is the same where retraining helps as often as it harms (mean 0, SD
1), with a tenth of the repeats: there a rule without a margin is the stricter one, also in the tail.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).parents[1]))

from imaging.config import Sites
from registry.evidence import Evidence
from registry.gates import Standing, judge
from registry.policy import Policy
from registry.predictions import digest_images

UPDATES, SUBJECTS, USES = 20, 500, 5
START, ALIKE, MARGIN, THRESHOLD = 0.90, 0.8, 0.03, 0.85
DECLINE, EVEN = (-0.005, 0.005), (0.0, 0.01)  # mean and SD of a step
ANY = {"subjects": 100, "low": {"accuracy": 0.5}}
POLICY = Policy.model_validate({
    "task": "drift", "why": "A simulation.", "primary": "accuracy", "statements": ["evaluation"],
    "network": ANY | {"margin": {"accuracy": MARGIN}}, "internal": ANY, "external": ANY,
    "test_set": {"uses": USES, "spending": "harmonic"},
})  # fmt: skip
SITES = Sites.model_validate({"sites": {"one": {"kind": "internal", "title": "One"}}})

Version = tuple[int, float]  # number and true accuracy
Right = NDArray[np.bool_]


class World:
    """Subjects of every locked set, and what versions answer on them; each can be scored on any set again."""

    def __init__(self, generator: np.random.Generator, steps: tuple[float, float]) -> None:
        sets = UPDATES // USES
        self.ease = generator.normal(size=(sets, SUBJECTS))
        self.own = generator.normal(size=(UPDATES + 1, sets, SUBJECTS))
        self.steps = generator.normal(*steps, UPDATES)
        self.stated: dict[tuple[Version, int], Evidence] = {}

    def score(self, version: Version, number: int) -> Right:
        """Which subjects of a set a version, its number and true accuracy, is right on."""
        latent = np.sqrt(ALIKE) * self.ease[number] + np.sqrt(1 - ALIKE) * self.own[version[0], number]
        return np.asarray(latent < norm.ppf(version[1]))

    def state(self, version: Version, number: int) -> Evidence:
        """An evaluation statement that lists its answers; every second subject has the finding."""
        if (version, number) not in self.stated:
            rows = [
                {"sha256": f"{number} {i}", "subject": str(i), "site": "one", "split": "test", "truth": i % 2,
                 "probability": float(i % 2 == good)}
                for i, good in enumerate(self.score(version, number).tolist())
            ]  # fmt: skip
            sets = {"test": {"digest": str(number), "images": SUBJECTS, "subjects": SUBJECTS}}
            body = {"threshold": 0.5, "sets": sets, "predictions": rows}
            self.stated[version, number] = Evidence(str(version), {"evaluation": body}, {})
        return self.stated[version, number]


@dataclass(frozen=True)
class Asked:
    """An update: the candidate and its champion."""

    world: World
    update: int
    candidate: Version
    champion: Version

    def count(self, version: Version) -> int:
        """How many subjects of the current set a version is right on."""
        return int(self.world.score(version, self.update // USES).sum())


def pass_gate(asked: Asked) -> bool:
    number, use = asked.update // USES, asked.update % USES + 1
    placed = [{"*": (one[0], asked.world.state(one, number))} for one in (asked.champion, (0, START))]
    evidence = asked.world.state(asked.candidate, number)
    locked = digest_images(evidence.statements["evaluation"])["test"]
    standing = Standing(*placed, {locked: use}, [])
    return judge(evidence, POLICY, SITES, standing).network.passed


RULES: dict[str, Callable[[Asked], bool]] = {
    "formulary": pass_gate,
    "threshold": lambda asked: asked.count(asked.candidate) >= THRESHOLD * SUBJECTS,
    "not_worse": lambda asked: asked.count(asked.candidate) >= asked.count(asked.champion),
}


def follow(world: World, accepts: Callable[[Asked], bool]) -> tuple[float, int]:
    """Change of true accuracy after all updates, in points, and how many were accepted."""
    champion, accepted = (0, START), 0
    for update, step in enumerate(world.steps):
        candidate = (update + 1, float(np.clip(champion[1] + step, 0.5, 0.999)))
        if accepts(Asked(world, update, candidate, champion)):
            champion, accepted = candidate, accepted + 1
    return 100 * (champion[1] - START), accepted


def simulate(repeats: int, steps: tuple[float, float], seed: int = 0) -> dict[str, Any]:
    """Every rule's mean and 5th percentile of the change, and its mean number of accepted updates."""
    generator, found = np.random.default_rng(seed), {name: [] for name in RULES}
    for _ in range(repeats):
        world = World(generator, steps)
        for name, accepts in RULES.items():
            found[name].append(follow(world, accepts))
    table = {name: np.array(told) for name, told in found.items()}
    return {
        name: {"mean": round(float(told[:, 0].mean()), 2),
               "p5": round(float(np.percentile(told[:, 0], 5)), 2),
               "accepted": round(float(told[:, 1].mean()), 1)}
        for name, told in table.items()
    }  # fmt: skip


def main() -> None:
    """Simulate, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100 repeats")
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    asked = parser.parse_args()
    started, repeats = time.perf_counter(), 100 if asked.quick else asked.repeats
    told = simulate(repeats, DECLINE)
    fewer = max(1, repeats // 10)
    told["context"] = {
        "even": simulate(fewer, EVEN), "even_repeats": fewer, "repeats": repeats, "updates": UPDATES,
        "subjects": SUBJECTS, "uses_of_a_set": USES, "start": START, "decline": DECLINE, "alike": ALIKE,
        "margin": MARGIN, "threshold": THRESHOLD, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    print(json.dumps(told, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
