"""A ledger, two people and a pipeline's outputs, small enough to be made anew for each test."""

import json
from pathlib import Path

import pytest

from imaging.config import Places, read_sites
from registry.access import admit
from registry.gates import Bounds, Policy
from registry.ledger import open_ledger
from registry.package import FILES, digest_package

ROOT = Path(__file__).parents[3]
SITES = ("north", "east", "south", "west", "harbour")


def score(low, subjects=100):
    return {"estimate": min(1.0, low + 0.05), "low": low, "high": min(1.0, low + 0.1), "subjects": subjects,
            "confidence": 0.95, "method": "told"}  # fmt: skip


def evaluation(digest, lows):
    sets = {"test": {"digest": "sha256:" + "1" * 64, "subjects": 400, "images": 800}}
    overall = {"dice": score(lows.get("overall", 0.9), 400)}
    return {"package": digest, "engine": "openvino/f32", "sets": sets, "overall": overall,
            "sites": {site: {"dice": score(lows.get(site, 0.9))} for site in SITES}}  # fmt: skip


@pytest.fixture
def places(tmp_path):
    return Places(root=ROOT, build=tmp_path / "build", var=tmp_path / "var")


@pytest.fixture
def ledger(places):
    return open_ledger(places.var)


@pytest.fixture
def author(places, ledger):
    return admit(places.var, ledger, "author@test")


@pytest.fixture
def approver(places, ledger, author):
    return admit(places.var, ledger, "approver@test")


@pytest.fixture
def sites(places):
    return read_sites(places)


@pytest.fixture
def policy():
    bounds = Bounds(subjects=50, low={"dice": 0.8})
    return Policy(task="brain-tissue", why="A test.", network=bounds, internal=bounds, external=bounds,
                  statements=("package", "evaluation", "qualification", "alarms"))  # fmt: skip


@pytest.fixture
def judged(policy, sites):
    return policy, "sha256:policy", sites


@pytest.fixture
def build(places):
    """Write what the pipeline would have written for a package with these bytes and lower bounds."""

    def make(content: str, **lows: float) -> Places:
        stages = {name: places.stage("brain-tissue", name) for name in
                  ("package", "fit", "evaluate", "qualify", "reference")}  # fmt: skip
        for folder in stages.values():
            folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (stages["package"] / name).write_text(f"{content} {name}")
        digest = digest_package(stages["package"])
        (stages["fit"] / "history.json").write_text('{"epochs": []}')
        (stages["evaluate"] / "evaluation.json").write_text(json.dumps(evaluation(digest, lows)))
        engines = {"package": digest, "engines": {"openvino/f32": {"passed": True}}}
        (stages["qualify"] / "qualification.json").write_text(json.dumps(engines))
        (stages["reference"] / "alarms.json").write_text(json.dumps({"package": digest}))
        return places

    return make
