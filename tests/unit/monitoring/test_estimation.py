"""Accuracy without labels covers what is realised, and labels that disagree are found."""

import numpy as np
import pytest
from scipy.special import expit, logit

from imaging.intervals import calibration_line
from imaging.vocabulary import Accuracy, Kind
from monitoring.estimation import Reference, compare_line, estimate, estimate_place, judge, read_labelled
from monitoring.realised import Labelled
from tests.tiny import promise

CLASSES = ("none", "disc")
RUNS = 250


def draw(rng, count, middle=-0.5, spread=2.0, truth=lambda rng, p: rng.random(len(p)) < p):
    """Probabilities that are honest, and truths; or truths of another law."""
    scores = expit(rng.normal(middle, spread, count))
    return scores, truth(rng, scores).astype(int)


def refer(rng, count=200, images=1):
    scores, truth = draw(rng, count)
    rows = np.repeat(np.arange(count), images)
    return Reference(scores[rows], truth[rows], rows.astype(str))


def label(scores, truth, threshold=0.5):
    count = len(scores)
    return Labelled(scores, scores >= threshold, truth, np.arange(count).astype(str),
                    np.full(count, "2026-11-23T08:00"), np.zeros(count, bool))  # fmt: skip


def describe(scores, truth, threshold):
    right, ill = (scores >= threshold) == truth, truth == 1
    return {"accuracy": right.mean(), "sensitivity": right[ill].mean(), "specificity": right[~ill].mean(),
            "prevalence": ill.mean()}  # fmt: skip


@pytest.mark.parametrize(("middle", "spread", "threshold"), [(-0.5, 2, 0.5), (0.8, 2, 0.5), (-1.5, 1.5, 0.3)])
def test_the_interval_covers_the_realised_share_under_covariate_shift(middle, spread, threshold):
    rng, covered, narrow = np.random.default_rng(1), [], []
    for _ in range(4 * RUNS):
        reference = refer(rng)
        scores, truth = draw(rng, 500, middle, spread)
        told, real = estimate(scores, reference, threshold), describe(scores, truth, threshold)
        covered.append([told[name]["low"] <= real[name] <= told[name]["high"] for name in real])
        one = told["accuracy"]
        sampling = ((one["high"] - one["low"]) ** 2 / 4 - told["calibration_error"] ** 2) ** 0.5
        narrow.append(abs(one["estimate"] - real["accuracy"]) <= sampling)
    assert np.mean(covered, axis=0) == pytest.approx(0.95, abs=0.02)
    assert np.mean(narrow) < 0.9  # what an interval without the calibration error would cover


@pytest.mark.parametrize("sure", [2, 3])
def test_a_network_that_is_too_sure_of_itself_is_estimated_by_its_reference(sure):
    rng, covered = np.random.default_rng(2), []

    def draw_sure(count):
        honest = rng.normal(-0.5, 2, count)
        return expit(sure * honest), (rng.random(count) < expit(honest)).astype(int)

    for _ in range(RUNS):
        reference = Reference(*draw_sure(200), np.arange(200).astype(str))
        scores, truth = draw_sure(500)
        told, real = estimate(scores, reference, 0.5), describe(scores, truth, 0.5)
        covered.append(told["accuracy"]["low"] <= real["accuracy"] <= told["accuracy"]["high"])
    assert np.mean(covered) > 0.91


def test_two_images_a_subject_say_no_more_than_one_where_they_are_the_same():
    rng = np.random.default_rng(2)
    one = refer(rng, 300)
    two = Reference(*(np.repeat(column, 2) for column in (one.scores, one.truth, one.people)))
    scores, _ = draw(rng, 500)
    wide = [estimate(scores, reference, 0.5)["calibration_error"] for reference in (one, two)]
    assert wide[1] == pytest.approx(wide[0], rel=0.05)  # not smaller by the root of two


def test_the_calibration_line_is_that_of_a_logistic_regression():
    reference = refer(np.random.default_rng(3), 4000)
    slope, intercept = calibration_line(reference.truth, reference.scores, reference.people)
    line = estimate(np.array([0.5]), reference, 0.5)["line"]
    assert (line["slope"], line["intercept"]) == pytest.approx((slope.estimate, intercept.estimate), abs=2e-3)
    errors = np.sqrt(np.diag(line["covariance"]))
    widths = [(one.high - one.low) / 2 / 1.959964 for one in (intercept, slope)]
    assert errors == pytest.approx(widths, rel=1e-2)


def test_honest_probabilities_give_the_sums_that_a_hand_gives():
    rng = np.random.default_rng(4)
    told = estimate(np.array([0.9, 0.8, 0.3]), refer(rng, 100_000), 0.5)
    hand = {"accuracy": (0.9 + 0.8 + 0.7) / 3, "sensitivity": 1.7 / 2.0, "specificity": 0.7 / 1.0,
            "prevalence": 2.0 / 3}  # fmt: skip
    assert {name: told[name]["estimate"] for name in hand} == pytest.approx(hand, abs=0.01)


def shift_odds(rng, p):
    return rng.random(len(p)) < expit(logit(p) + 1.6)


def swap(rng, p):
    return (rng.random(len(p)) < p) ^ (rng.random(len(p)) < 0.3)


def share_not_valid(truth, labels, runs=RUNS, seed=5):
    rng, words = np.random.default_rng(seed), []
    for _ in range(runs):
        told = estimate(draw(rng, 200)[0], refer(rng), 0.5)
        words.append(judge(told, label(*draw(rng, labels, truth=truth))).word)
    return np.mean([word is Accuracy.NOT_VALID for word in words]), words


@pytest.mark.parametrize("truth", [shift_odds, swap])
def test_concept_shift_is_found_by_fifty_labels_and_more_surely_by_a_hundred(truth):
    assert share_not_valid(truth, 50)[0] >= 0.8
    assert share_not_valid(truth, 100)[0] >= 0.95


@pytest.mark.parametrize("labels", [50, 100])
def test_labels_that_agree_seldom_make_an_estimate_not_valid(labels):
    share, words = share_not_valid(lambda rng, p: rng.random(len(p)) < p, labels, 400, 6)
    assert share <= 0.05
    assert set(words) == {Accuracy.VERIFIED, Accuracy.NOT_VALID}


def test_labels_that_were_chosen_by_their_score_are_tested_as_fairly():
    rng, found = np.random.default_rng(7), 0
    for _ in range(RUNS):
        told = estimate(draw(rng, 200)[0], refer(rng), 0.5)
        scores, truth = draw(rng, 400)
        near = np.argsort(np.abs(scores - 0.5))[:60]  # what readers find hard
        found += compare_line(told["line"], scores[near], truth[near]) <= 0.04
    assert found / RUNS <= 0.06


def test_without_enough_labels_it_is_not_verified_and_says_how_many_are_needed():
    rng = np.random.default_rng(8)
    told = estimate(draw(rng, 200)[0], refer(rng), 0.5)
    for count in (0, 12, 30):
        verdict = judge(told, label(*draw(rng, count)))
        assert verdict.word is Accuracy.NOT_VERIFIED
        assert "50 labelled subjects are needed" in verdict.sentence
    assert verdict.realised["accuracy"]["subjects"] == 30


def evaluate(reference, site="north", split="test"):
    rows = zip(reference.scores, reference.truth, reference.people, strict=True)
    return [
        {"probability": p, "truth": y, "subject": who, "site": site, "split": split} for p, y, who in rows
    ]


def answer(scores, **more):
    return [{"probability": float(score), **more} for score in scores]


def tell_truths(scores, truth, verdict="labelled", day="2026-11-23"):
    return [{"probability": float(p), "truth": int(y), "subject": f"s{i}", "prediction": f"p{i}",
             "at": f"{day}T08:00:00", "verdict": verdict}
            for i, (p, y) in enumerate(zip(scores, truth, strict=True))]  # fmt: skip


def test_a_place_is_told_with_its_weeks_and_where_its_calibration_comes_from():
    rng = np.random.default_rng(9)
    labels = [*tell_truths(*draw(rng, 40)), *tell_truths(*draw(rng, 40), day="2027-01-02")]
    for number, row in enumerate(labels):
        row["subject"] = None if number % 2 else f"s{number}"
        row["prediction"] = f"p{number}"
    evaluation = {"predictions": evaluate(refer(rng))}
    contract = promise(Kind.CLASSIFICATION, CLASSES)
    body = estimate_place(answer(draw(rng, 100)[0]), labels, evaluation, contract, "north")
    assert body["verdict"] in (Accuracy.VERIFIED, Accuracy.NOT_VALID)
    assert [(week["week"], week["labels"]) for week in body["weeks"]] == [("2026-W48", 40), ("2026-W53", 40)]
    assert (body["labels"], body["reference"]) == (80, "north")
    assert 0 < body["calibration_error"] < 0.2
    elsewhere = estimate_place(answer(draw(rng, 100)[0]), [], evaluation, contract, "harbour")
    assert elsewhere["reference"] == "all internal sites"
    assert "harbour has too few labelled images of its own" in elsewhere["told"]


def test_a_choice_of_labels_is_told():
    rng = np.random.default_rng(10)
    scores, truth = draw(rng, 400)
    odd = np.argsort(-scores)[:60]
    labels = tell_truths(scores[odd], truth[odd], "accepted")
    evaluation = {"predictions": evaluate(refer(rng))}
    contract = promise(Kind.CLASSIFICATION, CLASSES)
    body = estimate_place(answer(scores), labels, evaluation, contract, "north")
    assert "Readers chose 60 of the labelled cases" in body["told"]
    assert "other scores than the rest" in body["told"]
    plain = tell_truths(scores[:60], truth[:60])
    body = estimate_place(answer(scores), plain, evaluation, contract, "north")
    assert "Readers" not in body["told"]
    assert "other scores" not in body["told"]


def test_what_cannot_be_estimated_says_why():
    rng = np.random.default_rng(11)
    evaluation = {"predictions": evaluate(refer(rng))}
    contract = promise(Kind.CLASSIFICATION, CLASSES)
    few = estimate_place(answer([0.5] * 29), [], evaluation, contract, "north")
    assert few["verdict"] is Accuracy.TOO_FEW
    assert few["estimated"] == {}
    assert "29 subjects were answered; an estimate needs 30" in few["told"]
    short = {"predictions": evaluate(refer(rng, 30))}
    assert read_labelled(short, "north") is None
    assert "fewer than 20" in estimate_place(answer([0.5] * 99), [], short, contract, "north")["told"]
    mask = estimate_place([], [], {"predictions": [{"dice": 1.0}]}, promise(Kind.SEGMENTATION), "north")
    assert "no single probability" in mask["told"]
    assert mask["verdict"] is Accuracy.NOT_VERIFIED


def test_a_site_of_its_own_threshold_and_calibration_is_held_to_the_network_it_has():
    rng = np.random.default_rng(12)
    raw, _ = draw(rng, 300)
    evaluation = {"predictions": evaluate(refer(rng))}
    contract = promise(Kind.CLASSIFICATION, CLASSES, threshold=0.5)
    own = expit(logit(raw) + 1.0)  # a profile that shifts every probability, and its threshold with them
    plain = estimate_place(answer(raw), [], evaluation, contract, "north")
    shifted = [{"probability": p, "raw_probability": r, "threshold": expit(1.0), "abstained": 0.0}
               for p, r in zip(own, raw, strict=True)]  # fmt: skip
    moved = estimate_place(shifted, [], evaluation, contract, "north")
    assert moved["estimated"]["sensitivity"] == pytest.approx(plain["estimated"]["sensitivity"])
    silent = [{**row, "abstained": 1.0} for row in shifted[:271]]
    assert estimate_place([*silent, *shifted[271:]], [], evaluation, contract, "north")["estimated"] == {}
