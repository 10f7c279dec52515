"""Two tiny tasks that need no cohort builder: discs on noise, four sites, fitted in seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from imaging.config import Params, Places
from imaging.manifest import digest_pixels, write_manifest
from imaging.vocabulary import Kind

ROOT = Path(__file__).parents[2]
SITES = ("north", "east", "harbour")
SIZE = 32


def draw_case(kind, rng):
    """A bright disc (class 1) that a ring (class 2) surrounds; a classification case has a disc or none."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    distance = np.hypot(y - rng.integers(12, 20), x - rng.integers(12, 20))
    label = int(rng.random() < 0.5)
    mask = np.where(distance < 5, 1, np.where(distance < 8, 2, 0)).astype(np.uint8)
    if kind is Kind.CLASSIFICATION:
        mask = ((distance < 5) & bool(label)).astype(np.uint8)
    level = np.array([0.0, 300.0, 150.0])[mask] - 600
    return (level + rng.normal(0, 60, mask.shape)).astype(np.int16), mask, label


def write_cohort(places, task, kind, subjects=24):
    """A cohort and its split as those stages write them: two images a subject."""
    import pandas as pd

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
                    "spacing_mm": 2.0, "label": label if kind is Kind.CLASSIFICATION else None,
                    "licence": "none", "redistributable": site != "north", "simulated": True,
                })  # fmt: skip
                images.append(pixels)
                masks.append(mask)
                splits.append(split)
    cohort, split = places.stage(task, "cohort"), places.stage(task, "split")
    cohort.mkdir(parents=True)
    split.mkdir(parents=True)
    np.save(cohort / "images.npy", np.stack(images))
    np.save(cohort / "masks.npy", np.stack(masks))
    (cohort / "cohort.yaml").write_text("simulation: Everything is drawn.\n")
    write_manifest(rows, cohort / "manifest.parquet")
    table = pd.read_parquet(cohort / "manifest.parquet").assign(split=splits)
    table.to_parquet(split / "manifest.parquet", index=False)


def make_section(kind):
    """The checkout's own section for CT, made tiny."""
    task = yaml.safe_load((ROOT / "params.yaml").read_text())["tasks"]["lung-nodule"]
    cnn = {"name": "cnn", "channels": [4, 8], "dropout": 0.0}
    unet = {"name": "unet", "channels": [4, 8, 8], "dropout": 0.0}
    segments = kind is Kind.SEGMENTATION
    task |= {"kind": str(kind), "classes": ["background", "disc", "rim"] if segments else ["none", "disc"]}
    task["fit"] |= {"architecture": unet if segments else cnn, "epochs": 3, "batch_size": 8,
                    "learning_rate": 0.02, "threads": 1, "device": "cpu"}  # fmt: skip
    task["package"] |= {"golden": 4, "max_batch": 16}
    profile = {"internal": 24, "external": 24, "views": 2}
    tasks = {"tiny": task | {"cohort": task["cohort"] | {"profile": "tiny"}}}
    return Params.model_validate({"profiles": {"tiny": profile}, "tasks": tasks}).task("tiny")


def run_stages(places, section):
    """From a split to an evaluated package, in this process."""
    from training.calibration import calibrate
    from training.evaluation import evaluate
    from training.exporting import export
    from training.fitting import fit

    fit(places, "tiny", section)
    calibrate(places, "tiny", section)
    digest = export(places, "tiny", section)
    evaluate(places, "tiny", section)
    return digest


@pytest.fixture(scope="session", params=[Kind.CLASSIFICATION, Kind.SEGMENTATION], ids=str)
def built(request, tmp_path_factory):
    """Places, section and digest of a package that went through every stage once."""
    places = Places(root=ROOT, build=tmp_path_factory.mktemp("build"), var=tmp_path_factory.mktemp("var"))
    write_cohort(places, "tiny", request.param)
    section = make_section(request.param)
    digest = run_stages(places, section)
    (places.build / "section.json").write_text(json.dumps(section.model_dump(mode="json")))
    return places, section, digest


@pytest.fixture
def unbuilt(tmp_path):
    """Places with a classification cohort, split, and nothing more."""
    places = Places(root=ROOT, build=tmp_path / "build", var=tmp_path / "var")
    write_cohort(places, "tiny", Kind.CLASSIFICATION)
    return places
