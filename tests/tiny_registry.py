"""A registry small enough to be made anew for each test: what a pipeline would have left, without one."""

import json
from pathlib import Path

import yaml

from imaging.config import Places
from imaging.vocabulary import Kind
from registry.package import FILES, digest_package, write_contract
from tests.tiny import promise

ROOT = Path(__file__).parents[1]
TASK = "brain-tissue"
SITES = ("north", "east", "south", "west", "harbour")
SUBJECTS = 60
QUALIFIED = {"passed": True, **dict.fromkeys(("difference", "edges", "flips", "crossings", "dice"), 0.0)}


def told(value):
    """An estimate as a statement has it; the gate makes its own from the predictions."""
    return {"estimate": value, "low": value - 0.01, "high": value + 0.01, "subjects": SUBJECTS,
            "confidence": 0.95, "method": "told"}  # fmt: skip


def evaluation(digest, values, locked="1"):
    """Dice near a value at each site: of 60 subjects, the same images whatever the package."""
    counts = {"test": SUBJECTS * (len(SITES) - 1), "external": SUBJECTS}
    sets = {name: {"digest": f"sha256:{name}{locked}", "subjects": count, "images": count}
            for name, count in counts.items()}  # fmt: skip
    own = {site: values.get(site, values.get("overall", 0.9)) for site in SITES}
    predictions = [
        {"sha256": f"{site} {number} {locked}", "subject": f"{site}-{number}", "site": site,
         "split": "external" if site == "harbour" else "test", "dice": own[site] + (number % 5 - 2) / 1000}
        for site in SITES for number in range(SUBJECTS)
    ]  # fmt: skip
    return {"package": digest, "engine": "openvino/f32", "sets": sets, "threshold": 0.5,
            "overall": {"dice": told(0.9)}, "sites": {site: {"dice": told(own[site])} for site in SITES},
            "model_bytes": 1000, "predictions": predictions}  # fmt: skip


def make_places(folder):
    """A checkout with this one's parameters and sites, and a policy of its own."""
    root = folder / "checkout"
    root.mkdir()
    for name in ("params.yaml", "sites.yaml"):
        (root / name).write_text((ROOT / name).read_text())
    places = Places(root=root, build=folder / "build", var=folder / "var")
    write_policy(places)
    return places


def write_policy(places, **changed):
    """The policy of the task: dice of .8 everywhere, unless something else is said."""
    bounds = {"subjects": 50, "low": {"dice": 0.8}}
    policy = {"task": "brain-tissue", "why": "A test.", "primary": "dice",
              "network": {**bounds, "margin": {"dice": 0.5}},
              "internal": bounds, "external": bounds,
              "statements": ["package", "evaluation", "qualification", "alarms"], **changed}  # fmt: skip
    places.policies.mkdir(parents=True, exist_ok=True)
    (places.policies / "brain-tissue.yaml").write_text(yaml.safe_dump(policy))


def write_stages(places, content, locked="1", **values):
    """Write what the pipeline would have written for a package with these bytes and Dice by site."""
    stages = {
        name: places.stage(TASK, name) for name in ("package", "fit", "evaluate", "qualify", "reference")
    }
    for folder in stages.values():
        folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (stages["package"] / name).write_text(f"{content} {name}")
    write_contract(promise(Kind.SEGMENTATION, task=TASK, title=content), stages["package"])
    digest = digest_package(stages["package"])
    (stages["fit"] / "history.json").write_text('{"epochs": []}')
    (stages["evaluate"] / "evaluation.json").write_text(json.dumps(evaluation(digest, values, locked)))
    engines = {"package": digest, "engines": {"openvino/f32": QUALIFIED}}
    (stages["qualify"] / "qualification.json").write_text(json.dumps(engines))
    (stages["reference"] / "alarms.json").write_text(json.dumps({"package": digest}))
    return places
