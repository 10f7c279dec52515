"""Robustness compares a subject with itself, by subject, and tells the families that training saw apart."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from imaging.errors import DataError
from imaging.manifest import Pixels
from imaging.preparation import prepare
from imaging.recipe import RobustnessSection
from imaging.vocabulary import Corruption, Kind
from tests.tiny import make_section
from training.corruption import SEEN, corrupt
from training.datasets import Dataset
from training.robustness import list_robustness, measure_robustness

SUBJECTS, SIDE = 24, 32


def section(kind=Kind.CLASSIFICATION, **told):
    made = make_section(kind)
    how = RobustnessSection(**{"subjects": 20, "severities": (1, 5), **told})
    return made.model_copy(update={"evaluate": made.evaluate.model_copy(update={"robustness": how})})


@pytest.fixture
def cohort(tmp_path):
    """Two images a subject of a dim or a bright disc, as a locked set and as they are stored."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    labels = np.repeat(np.arange(SUBJECTS) % 2, 2)
    stored = rng.normal(-700, 30, (2 * SUBJECTS, SIDE, SIDE))
    stored += (np.hypot(y, x) < 9) * rng.normal(150 + 150 * labels, 90)[:, None, None]
    stored = stored.astype(np.int16)
    np.save(tmp_path / "images.npy", stored)
    rows = pd.DataFrame({
        "image": "images.npy", "row": range(2 * SUBJECTS),
        "sha256": [f"{i * 7919 % 97:08x}" + 56 * "0" for i in range(48)],
        "subject": [f"s-{i // 2:02d}" for i in range(2 * SUBJECTS)],
        "split": np.where(np.arange(2 * SUBJECTS) < 40, "test", "external"),
    })  # fmt: skip
    window = section().preparation
    images = np.stack([prepare(image.astype(np.float32), window) for image in stored])
    return Dataset(images, labels.astype(np.int64), rows), Pixels(tmp_path)


class Engine:
    """Answers by the brightness of the middle, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, data):
        self.asked.append(data)
        middle = data.images[:, 0, 10:22, 10:22].mean((1, 2))
        probability = 1 / (1 + np.exp(-12 * (middle + 0.2)))
        return {"truth": data.truth, "probability": probability,
                "right": ((probability >= 0.5) == data.truth).astype(int)}  # fmt: skip


def cell(told, family, severity):
    return next(c for c in told["cells"] if (c["family"], c["severity"]) == (family, severity))


def test_numbers_are_those_that_are_found_by_hand(cohort):
    data, pixels = cohort
    engine, how = Engine(), section(families=("noise", "offset"))
    told = measure_robustness(engine, data, pixels, how)
    clean, *worse = engine.asked
    assert len(worse) == 4
    before = np.mean(engine(clean)["right"])
    for asked, found in zip(worse, told["cells"], strict=True):
        scores = engine(asked)
        after = np.mean(scores["right"])
        area = roc_auc_score(scores["truth"], scores["probability"])
        assert found["value"]["estimate"] == pytest.approx(after, abs=1e-6)
        assert found["drop"]["estimate"] == pytest.approx((before - after) / before, abs=1e-6)
        assert found["corruption_error"]["estimate"] == pytest.approx((1 - after) / (1 - before), abs=1e-6)
        assert found["auc"]["estimate"] == pytest.approx(area, abs=1e-6)
    mean = np.mean([found["drop"]["estimate"] for found in told["cells"]])
    assert told["groups"]["seen"]["drop"]["estimate"] == pytest.approx(mean, abs=2e-6)
    assert cell(told, "offset", 5)["drop"]["estimate"] > 0.2


def test_intervals_are_those_of_scipys_paired_bootstrap(cohort):
    from scipy.stats import bootstrap

    data, pixels = cohort
    engine = Engine()
    told = measure_robustness(engine, data, pixels, section(families=("offset",), severities=(5,)))
    before, after = (engine(asked)["right"].astype(float) for asked in engine.asked[:2])
    drop = lambda a, b, axis: 1 - b.mean(axis) / a.mean(axis)  # noqa: E731
    expected = bootstrap((before, after), drop, paired=True, method="percentile", n_resamples=20000, rng=1)
    found = told["cells"][0]["drop"]
    low, high = expected.confidence_interval
    assert (found["low"], found["high"]) == (pytest.approx(low, abs=0.04), pytest.approx(high, abs=0.04))
    assert found["low"] < found["estimate"] < found["high"]


def test_images_are_corrupted_as_they_are_stored_and_then_prepared(cohort):
    data, pixels = cohort
    engine, how = Engine(), section(families=("blur",), severities=(4,))
    measure_robustness(engine, data, pixels, how)
    row = engine.asked[1].rows.iloc[3]
    stored = pixels.read(row["image"], int(row["row"]))
    worse = corrupt(stored, Corruption.BLUR, 4, how.modality, int(row["sha256"][:8], 16))
    np.testing.assert_array_equal(
        engine.asked[1].images[3], prepare(worse.astype(np.float32), how.preparation)
    )
    np.testing.assert_array_equal(engine.asked[0].truth, engine.asked[1].truth)


def test_one_image_of_each_subject_of_the_internal_test_set_whatever_the_order(cohort):
    data, pixels = cohort
    shuffled = data.take(np.random.default_rng(0).permutation(len(data.rows)))
    engine, how = Engine(), section(subjects=12, families=("gain",))
    first, second = (measure_robustness(engine, d, pixels, how) for d in (data, shuffled))
    assert first == second
    chosen = engine.asked[0].rows
    assert len(chosen) == chosen["subject"].nunique() == first["subjects"] == 12
    assert {*chosen["split"]} == {"test"}
    assert (
        measure_robustness(engine, data, pixels, section(subjects=99, families=("gain",)))["subjects"] == 20
    )


def test_groups_are_what_augmentation_may_use_and_what_it_never_does(cohort):
    told = measure_robustness(Engine(), *cohort, section())
    seen = {c["family"] for c in told["cells"] if c["group"] == "seen"}
    held_out = {c["family"] for c in told["cells"] if c["group"] == "held_out"}
    assert seen == {*SEEN} - {"colour"}
    assert held_out == {"contrast", "resolution", "compression", "occlusion"}
    assert {*told["not_applicable"]} == {"colour", "bias", "ringing", "motion"}
    assert told["groups"]["seen"]["cells"] + told["groups"]["held_out"]["cells"] == len(told["cells"]) == 16


def test_what_is_told_is_json_with_six_digits_and_null_where_a_division_has_no_answer(cohort):
    data, pixels = cohort

    def faultless_when_clean(part):
        right = np.ones(len(part.rows))
        right[: 5 * (part is not asked[0] if asked else False)] = 0
        asked.append(part)
        return {"right": right}

    asked = []
    told = measure_robustness(faultless_when_clean, data, pixels, section(families=("noise",)))
    json.dumps(told, allow_nan=False)
    found = told["cells"][0]
    assert found["drop"]["estimate"] == 0.25
    assert found["corruption_error"] == {"estimate": None, "low": None, "high": None}
    assert "auc" not in found
    never_wrong = measure_robustness(lambda part: {"right": np.ones(len(part.rows))}, data, pixels, section())
    assert never_wrong["groups"]["held_out"]["corruption_error"] == {"estimate": 1, "low": 1, "high": 1}


def test_subjects_without_anything_to_score_are_left_out(cohort):
    def dice(part):
        values = np.full(len(part.rows), 0.8 if not asked else 0.6)
        values[::4] = np.nan
        asked.append(part)
        return {"dice": values}

    asked = []
    told = measure_robustness(dice, *cohort, section(Kind.SEGMENTATION, families=("noise",), severities=(2,)))
    assert told["score"] == "dice"
    assert told["clean"]["value"] == {"estimate": 0.8, "low": 0.8, "high": 0.8}
    assert told["cells"][0]["drop"] == {"estimate": 0.25, "low": 0.25, "high": 0.25}


def test_rows_of_a_report_tell_drop_and_interval_of_every_cell_and_group(cohort):
    told = measure_robustness(Engine(), *cohort, section(families=("noise", "occlusion")))
    rows = list_robustness(told)
    assert [row[:3] for row in rows] == [
        ["noise", "seen", "1"], ["noise", "seen", "5"], ["occlusion", "held out", "1"],
        ["occlusion", "held out", "5"], ["mean", "held out", "all"], ["mean", "seen", "all"],
    ]  # fmt: skip
    drop = cell(told, "occlusion", 5)["drop"]
    assert rows[3][4] == f"{drop['estimate']:.3f} [{drop['low']:.3f} {drop['high']:.3f}]"


def test_without_an_internal_test_set_there_is_nothing_to_measure(cohort):
    data, pixels = cohort
    outside = data.take((data.rows["split"] == "external").to_numpy())
    with pytest.raises(DataError, match="no internal test image"):
        measure_robustness(Engine(), outside, pixels, section())
