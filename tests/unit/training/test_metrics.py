"""Metrics of groups, subgroups and sites, against scikit-learn and cases by hand; and the page of them."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, brier_score_loss, recall_score, roc_auc_score

from imaging.detection import encode_lesions
from imaging.recipe import EvaluateSection
from imaging.scores import surface_distances
from imaging.vocabulary import Kind
from tests.tiny import promise
from training.datasets import Dataset
from training.evaluation import score_images
from training.evaluation_report import write_report
from training.metrics import estimate, estimate_subgroups, measure_gap, measure_lesions, tabulate

HOW = EvaluateSection(engine="torch", precision="f32", confidence=0.95, seed=1, lesion_mm=(6.0,))


def make_rows(count, **told):
    sites = np.resize(["north", "east", "harbour"], count)
    usual = {
        "sha256": [f"{i:064d}" for i in range(count)],
        "subject": [f"s{i // 6}-{i % 3}" for i in range(count)],  # two images each, at one site
        "site": sites, "split": np.where(sites == "harbour", "external", "test"),
        "image": "images.npy", "mask": None, "row": np.arange(count), "spacing_mm": 2.0,
        "sex": np.resize(["F", "F", "F", "M"], count), "age_band": "40-59", "scanner": None,
    }  # fmt: skip
    return pd.DataFrame({**usual, **told})


def classify(count=240, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, count)
    powers = np.exp(rng.normal(size=(count, classes)) + 1.5 * np.eye(classes)[truth])
    return truth, (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def everything(rows):
    return np.ones(len(rows), dtype=bool)


def test_the_metrics_of_several_classes_are_scikit_learns_on_the_sum_of_the_positive_ones():
    truth, answers = classify()
    contract = promise(
        Kind.CLASSIFICATION, ("healthy", "mild", "severe"), positive=("mild", "severe"), threshold=0.6
    )
    scores, rows = score_images(contract, truth, answers), make_rows(240)
    told = estimate(contract, scores, np.asarray(rows["subject"]), everything(rows), HOW)
    positive, score = truth > 0, answers[:, 1:].sum(axis=1)
    said = score >= np.float32(0.6)
    expected = {
        "accuracy": accuracy_score(positive, said),
        "sensitivity": recall_score(positive, said),
        "specificity": recall_score(~positive, ~said),
        "auc": roc_auc_score(positive, score),
        "brier": brier_score_loss(positive, score),
        "class_accuracy": accuracy_score(truth, answers.argmax(axis=1)),
    }
    assert {name: told[name]["estimate"] for name in expected} == pytest.approx(expected)
    assert set(told) - set(expected) == {"calibration_error", "calibration_slope", "calibration_intercept"}
    for score in told.values():
        assert score["low"] <= score["estimate"] <= score["high"]
    assert told["accuracy"]["subjects"] == told["auc"]["subjects"] == len(set(rows["subject"]))


def test_what_cannot_be_estimated_is_left_out_and_never_not_a_number():
    contract = promise(Kind.CLASSIFICATION, ("none", "disc"))
    answers = np.array([[0.9, 0.1], [0.2, 0.8]], dtype=np.float32)
    told = estimate(
        contract, score_images(contract, np.array([0, 1]), answers), np.arange(2), np.ones(2, bool), HOW
    )
    assert "calibration_slope" not in told
    json.dumps(told, allow_nan=False)
    alone = estimate(
        contract, score_images(contract, np.array([0, 1]), answers), np.arange(2), np.zeros(2, bool), HOW
    )
    assert {(score["low"], score["high"], score["subjects"]) for score in alone.values()} == {(0.0, 1.0, 0)}


def test_volumes_are_scored_with_the_spacing_of_every_axis():
    contract = promise(Kind.SEGMENTATION, ("background", "liver", "large lesion"), depth=6)
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, (3, 6, 12, 12))
    truth[1, :2] = 2
    answers = np.moveaxis(np.eye(3)[np.roll(truth, 1, axis=-1)], -1, 1)
    spacings = [(5.0, 1.0, 1.0)] * 3
    scores = score_images(contract, truth, answers, spacings)
    expected = surface_distances(truth[1] == 2, np.roll(truth, 1, axis=-1)[1] == 2, (5.0, 1.0, 1.0))
    assert (scores["surface_mm_large_lesion"][1], scores["hausdorff95_mm_large_lesion"][1]) == expected
    assert np.isnan(scores["surface_mm_large_lesion"][[0, 2]]).all()
    both = scores["surface_mm_liver"][1], scores["surface_mm_large_lesion"][1]
    assert scores["surface_mm"][1] == pytest.approx(np.mean(both))
    assert scores["surface_mm"][0] == scores["surface_mm_liver"][0]
    assert "surface_mm" not in score_images(contract, truth, answers)
    told = estimate(contract, scores, np.arange(3), np.ones(3, bool), HOW)
    assert "surface_mm_large_lesion" not in told  # one subject has it: no interval
    assert told["surface_mm"]["low"] > 0


def detect(shifted=0):
    """Twelve images of two lesions each, and a detector that misses the small ones of the last images."""
    masks = np.zeros((12, 64, 64), dtype=np.int64)
    masks[:, 8:20, 8:20] = 1
    masks[:, 40:44, 40:44] = 1
    targets = encode_lesions(masks, 4)
    logits = np.full((12, 3, 16, 16), -6.0, dtype=np.float32)
    logits[:, 0] = np.where(targets[:, 3] > 0, 4.0, -6.0)
    logits[:, 1:] = targets[:, 1:3]
    logits[12 - shifted :, 0, 10, 10] = -6.0
    logits[12 - shifted :, 0, 2, 14] = 3.0  # nothing is there
    return masks, logits


def test_lesions_found_missed_and_made_up_are_counted_by_lesion_and_by_image():
    contract = promise(Kind.DETECTION, ("background", "nodule"), rows=64, columns=64)
    masks, logits = detect(shifted=3)
    scores, rows = score_images(contract, masks, logits), make_rows(12)
    told = estimate(contract, scores, np.asarray(rows["subject"]), everything(rows), HOW)
    assert told["lesion_sensitivity"]["estimate"] == pytest.approx(21 / 24)
    assert told["false_positives"]["estimate"] == pytest.approx(3 / 12)
    assert told["froc"]["estimate"] == pytest.approx(21 / 24, abs=0.03)
    curve = tabulate(contract, scores, everything(rows))["froc"]
    assert curve["sensitivity"][-1] == pytest.approx(21 / 24)
    perfect = estimate(contract, score_images(contract, *detect()), np.arange(12), everything(rows), HOW)
    assert perfect["lesion_sensitivity"]["estimate"] == 1
    assert perfect["lesion_sensitivity"]["low"] < 1
    assert (perfect["froc"]["estimate"], perfect["froc"]["low"]) == (1.0, 0.0)


def test_subgroups_are_of_the_internal_test_set_and_lesions_have_sizes(tmp_path):
    contract = promise(Kind.DETECTION, ("background", "nodule"), rows=64, columns=64)
    masks, logits = detect(shifted=3)
    scores, rows = score_images(contract, masks, logits), make_rows(12, spacing_mm=0.5)
    data = Dataset(np.zeros((12, 1, 64, 64), np.float32), masks, rows)
    sizes = measure_lesions(tmp_path, contract, data, scores)
    assert sizes[0] == pytest.approx(0.5 * np.sqrt(4 / np.pi * np.array([144, 16])))  # 6.8 and 2.3 mm
    told = estimate_subgroups(tmp_path, contract, data, scores, HOW)
    small, large = (told["lesion_size"][name]["lesion_sensitivity"] for name in ("under 6 mm", "from 6 mm"))
    assert large["estimate"] == 1
    assert small["estimate"] == pytest.approx(
        6 / 8
    )  # of twelve images eight are internal, two of them missed
    assert set(told["sex"]) == {"F", "M"}
    assert "scanner" not in told  # nobody said which


def test_a_classification_is_asked_of_positives_of_a_size_and_of_all_negatives(tmp_path):
    contract = promise(Kind.CLASSIFICATION, ("none", "disc"))
    masks = np.zeros((12, 16, 16), np.uint8)
    masks[6:9, 4:6, 4:6] = 1  # 4 pixels: 4.5 mm
    masks[9:, 4:12, 4:12] = 1  # 64 pixels: 18 mm
    masks[9:, 0, 0] = 1  # a speck apart does not count
    np.save(tmp_path / "masks.npy", masks)
    truth = np.repeat([0, 1], 6)
    score = np.array([0.1, 0.2, 0.3, 0.1, 0.2, 0.7, 0.4, 0.6, 0.3, 0.9, 0.8, 0.9])
    answers = np.stack([1 - score, score], axis=1).astype(np.float32)
    rows = make_rows(12, site="north", split="test", mask="masks.npy")
    data = Dataset(np.zeros((12, 1, 16, 16), np.float32), truth, rows)
    told = estimate_subgroups(tmp_path, contract, data, score_images(contract, truth, answers), HOW)[
        "lesion_size"
    ]
    assert told["under 6 mm"]["sensitivity"]["estimate"] == pytest.approx(1 / 3)
    assert told["from 6 mm"]["sensitivity"]["estimate"] == 1
    assert told["under 6 mm"]["auc"]["estimate"] == pytest.approx(roc_auc_score(truth[:9], score[:9]))
    bare = Dataset(data.images, truth, rows.assign(mask=None))
    assert "lesion_size" not in estimate_subgroups(
        tmp_path, contract, bare, score_images(contract, truth, answers), HOW
    )


def test_the_gap_is_that_between_the_best_and_the_worst_site():
    rng = np.random.default_rng(5)
    site = np.repeat(["north", "east", "harbour"], 100)
    right = rng.random(300) < np.repeat([0.9, 0.85, 0.5], 100)
    truth = np.resize([0, 1], 300)
    score = np.where(right == truth, 0.8, 0.2)
    contract = promise(Kind.CLASSIFICATION, ("none", "disc"))
    answers = np.stack([1 - score, score], axis=1).astype(np.float32)
    scores = score_images(contract, truth, answers)
    told = measure_gap(contract, scores, np.arange(300), site, HOW)["accuracy"]
    shares = [right[site == name].mean() for name in ("north", "harbour")]
    assert told["estimate"] == pytest.approx(shares[0] - shares[1])
    assert (told["best"], told["worst"]) == ("north", "harbour")
    assert told["by_chance"] < told["low"] < 0.4 < told["high"]
    assert measure_gap(contract, scores, np.arange(300), np.full(300, "north"), HOW) == {}


def test_sites_that_never_err_are_not_called_equal():
    truth = np.resize([0, 1], 60)
    answers = np.eye(2, dtype=np.float32)[truth]
    contract = promise(Kind.CLASSIFICATION, ("none", "disc"))
    told = measure_gap(
        contract, score_images(contract, truth, answers), np.arange(60), np.repeat(["a", "b"], 30), HOW
    )
    assert (told["auc"]["low"], told["auc"]["high"]) == (0.0, 1.0)


def write_page(path, contract, case, internal_only=False):
    """A page of a task that nobody trained."""
    truth, answers = case
    count = len(truth)
    rows = make_rows(count, **({"site": "north", "split": "test"} if internal_only else {}))
    images = np.random.default_rng(0).uniform(-1, 1, (count, *contract.shape)).astype(np.float32)
    data = Dataset(images, truth, rows)
    scores = score_images(contract, truth, answers, rows["spacing_mm"])
    subjects, site = np.asarray(rows["subject"]), np.asarray(rows["site"])
    groups = {"overall": (rows["split"] == "test").to_numpy()} | {name: site == name for name in set(site)}
    told = {name: estimate(contract, scores, subjects, group, HOW) for name, group in groups.items()}
    kept = {name: values for name, values in scores.items() if name != "match"}
    body = {
        "package": "sha256:" + "0" * 64, "engine": "torch/f32", "confidence": 0.95,
        "threshold": contract.threshold, "simulated": contract.simulated, "limits": list(contract.limits),
        "model_bytes": 1_500_000, "overall": told.pop("overall"), "sites": told, "subgroups": {},
        "sets": {split: {"images": 8, "subjects": 4} for split in set(rows["split"])},
        "curves": {name: tabulate(contract, scores, group) for name, group in groups.items()},
        "gap": measure_gap(contract, scores, subjects, site, HOW),
        "predictions": [
            {**fact, **{name: None if np.isnan(values[i]) else values[i] for name, values in kept.items()}}
            for i, fact in enumerate(rows[["site", "split"]].to_dict("records"))
        ],
    }  # fmt: skip
    write_report(path, contract, body, (data, answers, np.abs(images[:, 0])))
    return path.read_text()


VOLUMES = np.random.default_rng(1).integers(0, 2, (12, 4, 32, 32))
SEGMENTED = VOLUMES, np.moveaxis(np.eye(2, dtype=np.float32)[np.roll(VOLUMES, 1, -1)], -1, 1)
TOLD = {"simulated": "Everything is drawn.", "limits": ("Subject split not possible: no names.",)}


@pytest.mark.parametrize(
    ("contract", "case", "sentence"),
    [
        (
            promise(Kind.CLASSIFICATION, ("none", "disc", "ring"), channels=3, **TOLD),
            classify(60),
            "negative ones",
        ),
        (promise(Kind.SEGMENTATION, ("background", "liver"), depth=4, **TOLD), SEGMENTED, "overlap by"),
        (
            promise(Kind.DETECTION, ("background", "nodule"), rows=64, columns=64, **TOLD),
            detect(3),
            "false marks",
        ),
    ],
    ids=["colour", "volume", "detection"],
)
def test_the_page_tells_of_colours_volumes_and_lesions(tmp_path, contract, case, sentence):
    page = write_page(tmp_path / "report.html", contract, case)
    assert sentence in page.split("</p>")[0]
    assert "Everything is drawn." in page
    assert "Subject split not possible: no names." in page
    assert "by subject" in page
    text = re.sub(r'src="data:image/png;base64,[^"]+"', "", page)
    assert not re.search(r"https?://|src=|\bnan\b|None(?! of)", text)


def test_a_page_without_an_external_site_says_so(tmp_path):
    contract = promise(Kind.CLASSIFICATION, ("none", "disc", "ring"), channels=3)
    page = write_page(tmp_path / "report.html", contract, classify(60), internal_only=True)
    assert "There is no external site" in page
    assert "Between sites" not in page
