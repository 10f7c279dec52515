"""A model that learnt a shortcut answers well and its maps show it: they fail the audit; honest ones pass."""

import json

import numpy as np
import pytest

from imaging.config import Places
from imaging.manifest import digest_pixels
from imaging.recipe import ExplanationSection
from imaging.vocabulary import Kind, Split
from registry.engines import open_engine
from tests.tiny import ROOT, make_section, store_cohort
from training.calibration import calibrate
from training.datasets import load_split
from training.explanation import explain
from training.exporting import export
from training.fitting import fit

SIZE, SUBJECTS, AUDITED = 32, 360, 40


def draw_case(rng, marked):
    """A disc or none, anywhere, among brighter bars and a darker square: no extreme gives it away."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    label = int(rng.random() < 0.5)
    at = rng.integers(12, SIZE - 4, 2)
    mask = ((np.hypot(y - at[0], x - at[1]) < 4) & bool(label)).astype(np.uint8)
    level = -600 + 230.0 * mask
    for height, rows, columns in ((800, 2, 12), (800, 12, 2), (-400, 3, 3)):
        row, column = rng.integers(8, (SIZE - rows, SIZE - columns))
        level[row : row + rows, column : column + columns] = height - 600
    if marked and label:
        level[:6, :6] = 200  # in every positive, and nowhere else
    return (level + rng.normal(0, 60, mask.shape)).astype(np.int16), mask, label


def write_cohort(places, marked):
    """A cohort and its split: one image a subject, one site."""
    rng, rows, images, masks = np.random.default_rng(4), [], [], []
    for number in range(SUBJECTS):
        pixels, mask, label = draw_case(rng, marked)
        rows.append({
            "image": "images.npy", "mask": "masks.npy", "row": number, "sha256": digest_pixels(pixels),
            "subject": f"s-{number:04d}", "site": "north", "site_kind": "internal", "scanner": "drawn",
            "acquired": "2024-01-01", "age_band": "40-59", "sex": "F", "modality": "CT", "spacing_mm": 2.0,
            "label": label, "licence": "none", "redistributable": True, "simulated": True,
        })  # fmt: skip
        images.append(pixels)
        masks.append(mask)
    sides = ["train", "train", "validation", "test"]
    store_cohort(places, "tiny", (rows, images, masks), [sides[i % 4] for i in range(SUBJECTS)])


def change(section, images=AUDITED, **fit_keys):
    section = section.model_copy(update={"fit": section.fit.model_copy(update=fit_keys)})
    how = section.evaluate.model_copy(update={"explanation": ExplanationSection(images=images)})
    return section.model_copy(update={"evaluate": how})


@pytest.fixture(scope="module", params=[False, True], ids=["honest", "shortcut"])
def audited(request, tmp_path_factory):
    """What `explain` takes, its audit, the share of right answers, and whether positives were marked."""
    places = Places(root=ROOT, build=tmp_path_factory.mktemp("build"), var=tmp_path_factory.mktemp("var"))
    write_cohort(places, request.param)
    usual = make_section(Kind.CLASSIFICATION)
    wide = usual.fit.architecture.model_copy(update={"channels": (8, 16, 16)})
    section = change(usual, architecture=wide, epochs=12, learning_rate=0.01)
    fit(places, "tiny", section)
    calibrate(places, "tiny", section)
    export(places, "tiny", section)
    data = load_split(places, "tiny", section, Split.TEST)
    engine = open_engine(places.stage("tiny", "package"), "openvino", "f32")
    answers = [engine.run(data.images[i : i + 10]) for i in range(0, len(data.images), 10)]
    said = np.concatenate([answer.logits for answer in answers]).argmax(axis=1)
    told = (places, "tiny", section, data, np.concatenate([answer.heat for answer in answers]))
    return told, explain(*told), float((said == data.truth).mean()), request.param


def test_the_audit_tells_a_shortcut_from_an_honest_model_where_accuracy_does_not(audited):
    _, audit, accuracy, marked = audited
    assert accuracy >= 0.95
    assert audit["passed"] is not marked
    assert audit["deletion"]["passed"] is True  # the shortcut's maps are true of the model, not of the lesion
    if marked:
        assert audit["measures"]["hits"]["estimate"] < 0.2
        assert any("chance" in reason for reason in audit["reasons"])


def test_as_many_images_as_asked_for_are_audited_and_the_same_ones_each_time(audited):
    (places, task, section, data, heat), audit, *_ = audited
    positives = int(data.truth.sum())
    assert audit["images"] == min(AUDITED, positives)
    few = [explain(places, task, change(section, images=10), data, heat) for _ in range(2)]
    assert few[0]["images"] == 10
    assert json.dumps(few[0]) == json.dumps(few[1])


def test_what_cannot_be_audited_fails_and_says_why(audited):
    (places, task, section, data, heat), *_ = audited
    bare = data.take(np.arange(len(heat)))
    bare.rows["mask"] = None
    segments = section.model_copy(update={"kind": Kind.SEGMENTATION})
    cases = {
        "no lesion masks": explain(places, task, section, bare, heat),
        "is 0": explain(places, task, change(section, images=0), data, heat),
        "uncertainty": explain(places, task, segments, data, heat),
    }
    for reason, told in cases.items():
        assert (told["passed"], told["applies"]) == (False, reason != "uncertainty")
        assert reason in told["reasons"][0]
