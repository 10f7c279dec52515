"""Tasks that need no cohort builder: discs on noise, three sites, fitted in seconds. No fixtures here."""

import os
from pathlib import Path

import numpy as np
import yaml

from imaging.config import Params, Places, read_params
from imaging.manifest import digest_pixels, write_manifest
from imaging.vocabulary import Kind
from registry.package import Contract

ROOT = Path(__file__).parents[1]
os.environ.setdefault("FORMULARY_TRACKING", "off")  # it costs seconds a training and has tests of its own
SITES = ("north", "east", "harbour")
SIZE = 32


def promise(kind, classes=("background", "grey matter", "csf"), **told):
    """A contract of a kind; what is not said does not matter."""
    usual = {"task": "t", "title": "t", "kind": kind, "modality": "CT", "classes": classes,
             "positive": classes[1:], "channels": 1, "depth": 0, "rows": 32, "columns": 32,
             "spacing_low_mm": 1, "spacing_high_mm": 2, "png_offset": 0, "max_batch": 8,
             "preparation": {"kind": "window", "low_hu": -1000, "high_hu": 200}, "temperature": 1,
             "threshold": 0.5, "tolerance": {}, "intended_use": "", "simulated": "", "limits": (),
             "lineage": {}}  # fmt: skip
    return Contract.model_validate({**usual, **told})


def draw_case(kind, rng):
    """A bright disc (class 1) that a ring (class 2) surrounds; a classification case has a disc or none."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    distance = np.hypot(y - rng.integers(12, 20), x - rng.integers(12, 20))
    label = int(rng.random() < 0.5)
    mask = np.where(distance < 5, 1, np.where(distance < 8, 2, 0)).astype(np.uint8)
    if kind is not Kind.SEGMENTATION:
        mask = ((distance < 5) & bool(label)).astype(np.uint8)
    level = np.array([0.0, 300.0, 150.0])[mask] - 600
    return (level + rng.normal(0, 60, mask.shape)).astype(np.int16), mask, label


def write_cohort(places, task, kind, subjects=24):
    """A cohort and its split as those stages write them: two images a subject."""
    rng = np.random.default_rng(4)
    rows, images, masks, splits = [], [], [], []
    for site in SITES:
        for number in range(subjects):
            split = ("train", "train", "validation", "test")[number % 4] if site != "harbour" else "external"
            for _ in range(2):
                pixels, mask, label = draw_case(kind, rng)
                rows.append({
                    "image": "images.npy", "mask": "masks.npy", "row": len(rows),
                    "sha256": digest_pixels(pixels), "subject": f"{site}-{number:04d}", "site": site,
                    "site_kind": "external" if site == "harbour" else "internal", "scanner": "drawn",
                    "acquired": "2024-01-01", "age_band": "40-59", "sex": "F", "modality": "CT",
                    "spacing_mm": 2.0, "label": label if kind is not Kind.SEGMENTATION else None,
                    "licence": "none", "redistributable": site != "north", "simulated": True,
                })  # fmt: skip
                images.append(pixels)
                masks.append(mask)
                splits.append(split)
    store_cohort(places, task, (rows, images, masks), splits)


def store_cohort(places, task, drawn, splits):
    """Rows, images and masks as the cohort stage writes them, and the splits of the rows."""
    import pandas as pd

    rows, images, masks = drawn
    cohort, split = places.stage(task, "cohort"), places.stage(task, "split")
    cohort.mkdir(parents=True)
    split.mkdir(parents=True)
    np.save(cohort / "images.npy", np.stack(images))
    np.save(cohort / "masks.npy", np.stack(masks))
    (cohort / "cohort.yaml").write_text("simulation: Everything is drawn.\n")
    write_manifest(rows, cohort / "manifest.parquet")
    table = pd.read_parquet(cohort / "manifest.parquet").assign(split=splits)
    table.to_parquet(split / "manifest.parquet", index=False)


def describe_task(kind):
    """The checkout's own section for CT, made tiny."""
    task = yaml.safe_load((ROOT / "params.yaml").read_text())["tasks"]["lung-nodule"]
    cnn = {"name": "cnn", "channels": [4, 8], "dropout": 0.0}
    unet = {"name": "unet", "channels": [4, 8, 8], "dropout": 0.0}
    detector = {"name": "detector", "channels": [8, 16, 16], "dropout": 0.0}
    networks = {Kind.CLASSIFICATION: cnn, Kind.SEGMENTATION: unet, Kind.DETECTION: detector}
    segments = kind is Kind.SEGMENTATION
    task |= {"kind": str(kind), "classes": ["background", "disc", "rim"] if segments else ["none", "disc"]}
    epochs = 12 if kind is Kind.DETECTION else 3
    task["fit"] |= {"architecture": networks[kind], "epochs": epochs, "batch_size": 8,
                    "learning_rate": 0.02, "threads": 1, "device": "cpu"}  # fmt: skip
    task["package"] |= {"golden": 4, "max_batch": 16}
    task["cohort"] |= {"profile": "tiny"}
    for costly in ("robustness", "explanation"):
        task["evaluate"].pop(costly)
    task["reference"] |= {"window": 20, "repeats": 20}
    task["qualify"] |= {"engines": ["openvino/f32"], "images": 8}  # which is fastest differs by machine
    return task


def describe_params(**kinds):
    """params.yaml as a dictionary: a tiny task of each name and kind."""
    profiles = {"tiny": {"internal": 24, "external": 24, "views": 2}}
    return {"profiles": profiles, "tasks": {name: describe_task(kind) for name, kind in kinds.items()}}


def make_section(kind):
    """A tiny task's section, typed."""
    return Params.model_validate(describe_params(tiny=kind)).task("tiny")


def run_stages(places, section, task="tiny"):
    """From a split to an evaluated package, in this process."""
    from training.calibration import calibrate
    from training.evaluation import evaluate
    from training.exporting import export
    from training.fitting import fit

    fit(places, task, section)
    calibrate(places, task, section)
    digest = export(places, task, section)
    evaluate(places, task, section)
    return digest


def write_root(root, **kinds):
    """A checkout's three kinds of decision: params.yaml, sites.yaml and a policy for each task."""
    (root / "params.yaml").write_text(yaml.safe_dump(describe_params(**kinds), sort_keys=False))
    sites = {name: {"kind": "external" if name == "harbour" else "internal", "title": name} for name in SITES}
    (root / "sites.yaml").write_text(yaml.safe_dump({"sites": sites}, sort_keys=False))
    for task, kind in kinds.items():
        metric = "dice" if kind is Kind.SEGMENTATION else "auc"
        asked = {"subjects": 1, "low": {metric: 0.0}}
        # The external site asks for what nobody reaches, so one site stays without an approved version.
        policy = {"task": task, "why": "A test.", "primary": metric,
                  "network": {**asked, "margin": {metric: 1.0}}, "internal": asked,
                  "external": {"subjects": 1000, "low": {metric: 1.0}},
                  "statements": ["package", "evaluation", "qualification", "alarms"]}  # fmt: skip
        folder = root / "registry" / "policies"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(policy))
    return Places(root=root, build=root / "build", var=root / "var")


def train(places, task):
    """Every stage of a task, then registered; its version's number."""
    from monitoring.alarms import calibrate_alarms, write_alarms
    from registry.access import admit
    from registry.ledger import open_ledger
    from registry.registration import register
    from services.qualification import qualify

    section = read_params(places).task(task)
    if not places.stage(task, "cohort").exists():
        write_cohort(places, task, section.kind)
    run_stages(places, section, task)
    qualify(places, task, section)
    alarms = calibrate_alarms(section.reference, places.stage(task, "package"))
    write_alarms(alarms, places.stage(task, "reference"))
    ledger = open_ledger(places.var)
    return register(places, ledger, task, admit(places.var, ledger, "author@test")).version


def train_another(places, seed):
    """The task `nodes` trained again from another seed; the number of its version."""
    path = places.root / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["tasks"]["nodes"]["fit"]["seed"] = seed
    path.write_text(yaml.safe_dump(params))
    return train(places, "nodes")


def promote(places, task, version):
    """Asked for by one person and approved by another; the sites where the version serves now."""
    from registry.access import Acting, admit
    from registry.ledger import open_ledger
    from registry.promotion import approve, request

    ledger = open_ledger(places.var)
    author, approver = (admit(places.var, ledger, f"{who}@test") for who in ("author", "approver"))
    request(Acting(places, ledger, author), task, version)
    return approve(Acting(places, ledger, approver, "A test."), task, version)
