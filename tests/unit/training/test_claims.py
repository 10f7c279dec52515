"""Verdicts are a pure function of predictions: constructed ones give the sentence that they must."""

from typing import get_args

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm, t, ttest_1samp
from sklearn.metrics import roc_auc_score

from imaging.intervals import delong
from training.claims import FAILS, HOLDS, SHOWS, UNTESTABLE, Evidence, decide, judge, predict_site
from training.study import Claim, Row, Show, add_ensembles

SEEDS = (1, 2, 3)


def answer(variant, seed, score, truth, split="test", **told):
    """Rows of a run: two images a subject, thresholded at one half."""
    names = [f"{split}-{i:04d}" for i in range(len(truth))]
    return pd.DataFrame({
        "variant": variant, "seed": seed, "image": names, "site": "north",
        "subject": [f"{split}-{i // 2}" for i in range(len(truth))],
        "split": split, "truth": np.asarray(truth, float), "score": score, "family": "",
        "right": ((np.asarray(score) >= 0.5) == np.asarray(truth)).astype(float), **told,
    })  # fmt: skip


def make_scores(skill, count=300, seed=0):
    """Truth, and scores whose mean is `skill` standard deviations higher where it is 1."""
    truth = np.random.default_rng(5).integers(0, 2, count)
    return truth, 1 / (
        1 + np.exp(-(skill * (truth - 0.5) + np.random.default_rng([seed, 9]).normal(0, 1, count)))
    )


def make_runs(variants, seconds=(10.0, 20.0, 30.0), reached=(0.5, 0.7, 0.95), loss=1.0):
    epochs = [
        {"cpu_seconds": s, "validation_score": v, "validation_loss": loss}
        for s, v in zip(seconds, reached, strict=True)
    ]
    return [{"variant": v, "seed": seed, "leave_out": None, "cpu_seconds": seconds[-1], "epochs": epochs}
            for v in variants for seed in SEEDS]  # fmt: skip


def make_claim(*rows, variants=("a", "b"), **told):
    return Claim(
        sentence="s", task="t", control="c", variants={name: {} for name in variants}, rows=rows, **told
    )


def tables(**skills):
    """Answers of variants of a skill each, of three seeds."""
    return pd.concat([answer(name, seed, *make_scores(skill, seed=seed)[::-1])
                      for name, skill in skills.items() for seed in SEEDS], ignore_index=True)  # fmt: skip


@pytest.mark.parametrize(("skill", "verdict"), [(9.0, HOLDS), (3.0, FAILS)])
def test_an_accuracy_holds_only_where_its_whole_interval_lies_above(skill, verdict):
    told = judge(make_claim(Row(show="accuracy", of="a", above=0.94)), make_runs("a"), tables(a=skill), 0.95)
    (row,) = told["rows"]
    assert told["verdict"] == verdict
    assert row["held"] is (row["low"] > 0.94) is (verdict == HOLDS)
    assert row["estimate"] == pytest.approx(np.mean(row["seeds"]))


def test_what_equals_its_control_is_no_better():
    same = tables(a=2.0)
    table = pd.concat([same, same.assign(variant="b")])
    for show in ("auc", "accuracy"):
        told = judge(make_claim(Row(show=show, of="a", against="b", above=0.0)), make_runs("ab"), table, 0.95)
        assert told["verdict"] == FAILS
        assert told["rows"][0]["estimate"] == 0


@pytest.mark.parametrize(
    ("held", "every", "some"),
    [([True, True], HOLDS, HOLDS), ([True, False], FAILS, HOLDS), ([True, None], UNTESTABLE, HOLDS),
     ([False, None], FAILS, UNTESTABLE), ([False, False], FAILS, FAILS), ([], UNTESTABLE, UNTESTABLE)],
)  # fmt: skip
def test_the_sentence_follows_from_the_rows_that_decide(held, every, some):
    assert (decide(held, "all"), decide(held, "any")) == (every, some)


def test_one_class_alone_cannot_be_tested_and_the_row_says_why():
    table = tables(a=2.0).query("truth == 1")
    told = judge(make_claim(Row(show="auc", of="a", above=0.5)), make_runs("a"), table, 0.95)
    assert told["verdict"] == UNTESTABLE
    assert "class" in told["rows"][0]["reason"]


def test_the_auc_of_seeds_is_their_mean_and_of_one_seed_what_others_compute():
    table = tables(a=1.0, b=0.6)
    row = Row(show="auc", of="a", against="b")
    told = judge(make_claim(Row(show="auc", of="a"), row), make_runs("ab"), table, 0.95)["rows"]
    areas = {"a": [], "b": []}
    for (name, _), part in table.groupby(["variant", "seed"]):
        areas[name].append(roc_auc_score(part["truth"], part["score"]))
    assert told[0]["estimate"] == pytest.approx(np.mean(areas["a"]))
    assert told[0]["seeds"] == pytest.approx(areas["a"])
    assert told[1]["estimate"] == pytest.approx(np.mean(areas["a"]) - np.mean(areas["b"]))
    one = table[table["seed"] == 1]
    facts = one[one["variant"] == "a"]
    alone = SHOWS["auc"](Evidence(one, make_runs("ab"), 0.95), Row(show="auc", of="a"))
    known = delong(facts["truth"].to_numpy(int), facts["score"].to_numpy(), facts["subject"].to_numpy())
    assert (alone.estimate, alone.low, alone.high) == pytest.approx((known.estimate, known.low, known.high))


def test_pooling_seeds_does_not_pass_for_more_subjects():
    alone = tables(a=2.0).query("seed == 1")
    copies = pd.concat([alone.assign(seed=seed) for seed in SEEDS])
    for show in ("accuracy", "auc", "sensitivity"):
        one, three = (SHOWS[show](Evidence(t, [], 0.95), Row(show=show, of="a")) for t in (alone, copies))
        assert (three.low, three.high) == pytest.approx((one.low, one.high), abs=5e-3)


def time_saved(own, control, target=0.9):
    runs = [
        run
        for name, seconds, reached in (("a", *own), ("b", *control))
        for run in make_runs(name, seconds, reached)
    ]
    row = Row(show="seconds saved", of="a", against="b", target=target)
    return SHOWS["seconds saved"](Evidence(tables(a=1.0), runs, 0.95), row)


def test_time_saved_is_the_ratio_of_seconds_to_the_target():
    told = time_saved(((10, 20, 100), (0.5, 0.91, 0.95)), ((30, 80, 100), (0.5, 0.91, 0.95)))
    assert told.estimate == pytest.approx(1 - 20 / 80)


def test_a_control_that_never_gets_there_counts_with_the_shorter_budget():
    told = time_saved(((10, 20, 100), (0.5, 0.91, 0.95)), ((30, 80, 400), (0.5, 0.6, 0.7)))
    assert told.estimate == pytest.approx(1 - 20 / 100)
    assert "restricted to 100" in told.method


def test_a_variant_that_never_gets_there_saves_nothing_and_nobody_there_is_no_number():
    never = ((10, 20, 100), (0.5, 0.6, 0.7))
    assert time_saved(never, ((30, 80, 100), (0.5, 0.91, 0.95))).estimate == pytest.approx(1 - 100 / 80)
    assert "no run" in time_saved(never, never)


def test_the_interval_of_time_saved_is_a_t_interval_of_log_ratios():
    runs, ratios = [], (0.2, 0.3, 0.25)
    for seed, ratio in zip(SEEDS, ratios, strict=True):
        for name, seconds in (("a", 100 * ratio), ("b", 100.0)):
            epochs = [{"cpu_seconds": seconds, "validation_score": 0.95, "validation_loss": 1.0}]
            runs.append({"variant": name, "seed": seed, "cpu_seconds": 100.0, "epochs": epochs})
    told = SHOWS["seconds saved"](
        Evidence(None, runs, 0.95), Row(show="seconds saved", of="a", against="b", target=0.9)
    )
    known = ttest_1samp(np.log(ratios), 0).confidence_interval(0.95)
    assert (told.low, told.high) == pytest.approx((1 - np.exp(known.high), 1 - np.exp(known.low)))


def corrupt_answers(lost):
    """Everyone right when clean; corrupted, so many of 100 images a variant loses, by family."""
    truth = np.tile([0, 1], 50)
    parts = []
    for name, families in lost.items():
        for seed in SEEDS:
            parts.append(answer(name, seed, truth * 0.8 + 0.1, truth))
            for family, wrong in families.items():
                score = np.where(np.arange(100) < wrong, 0.9 - truth * 0.8, truth * 0.8 + 0.1)
                told = answer(name, seed, score, truth, family=family, severity=1.0)
                parts.append(told.assign(seen=(family == "noise") and name == "a"))
    return pd.concat(parts, ignore_index=True)


def test_drops_are_told_apart_by_what_augmentation_drew():
    table = corrupt_answers({"a": {"noise": 10, "contrast": 40}, "b": {"noise": 40, "contrast": 44}})
    rows = [
        Row(show="drop saved", of="a", against="b", where=where, above=0.25) for where in ("seen", "held out")
    ]
    told = judge(make_claim(*rows, Row(show="drop", of="b", where="seen")), make_runs("ab"), table, 0.95)
    assert told["verdict"] == FAILS
    seen, held_out = told["rows"][:2]
    assert seen["estimate"] == pytest.approx(1 - 10 / 40)
    assert (seen["held"], held_out["held"]) == (True, False)
    assert held_out["estimate"] == pytest.approx(1 - 40 / 44)


def test_a_drop_that_is_not_there_cannot_be_saved():
    table = corrupt_answers({"a": {"noise": 1}, "b": {"noise": 0}})
    row = Row(show="drop saved", of="a", against="b", where="seen", above=0.25)
    assert judge(make_claim(row), make_runs("ab"), table, 0.95)["verdict"] == UNTESTABLE


def test_an_ensemble_admits_by_validation_alone():
    table = tables(a=1.0, b=1.0, c=5.0)
    runs = make_runs("a", loss=1.0) + make_runs("b", loss=1.05) + make_runs("c", loss=1.2)
    rows = [Row(show="auc", of=of) for of in ("mixed", "mixed: best member", "mixed: one architecture")]
    claim = make_claim(*rows, Row(show="auc", of="mixed", against="mixed: best member", above=0.0),
                       variants="abc", ensembles={"mixed": ("a", "b", "c")})  # fmt: skip
    told = judge(claim, runs, add_ensembles(claim, runs, table), 0.95)["rows"]
    wide = {
        name: [table[(table["variant"] == name) & (table["seed"] == seed)] for seed in SEEDS] for name in "ab"
    }
    truth = wide["a"][0]["truth"]
    mixed = [roc_auc_score(truth, (a["score"].to_numpy() + b["score"].to_numpy()) / 2)
             for a, b in zip(wide["a"], wide["b"], strict=True)]  # fmt: skip
    assert told[0]["estimate"] == pytest.approx(np.mean(mixed))
    assert told[1]["estimate"] == pytest.approx(
        np.mean([roc_auc_score(truth, part["score"]) for part in wide["a"]])
    )
    same = np.mean([part["score"].to_numpy() for part in wide["a"]], axis=0)
    assert told[2]["estimate"] == pytest.approx(roc_auc_score(truth, same))


def test_any_of_several_rows_is_enough_but_with_wider_intervals():
    rows = [Row(show="auc", of="a", against=name, above=0.0) for name in ("b", "c")]
    table, runs = tables(a=1.0, b=0.5, c=1.0), make_runs("abc")
    every, some = (
        judge(make_claim(*rows, variants="abc", needs=needs), runs, table, 0.95) for needs in ("all", "any")
    )
    assert (every["verdict"], some["verdict"]) == (FAILS, HOLDS)
    assert some["rows"][0]["confidence"] == pytest.approx(0.975)
    assert some["rows"][0]["low"] < every["rows"][0]["low"]


def test_the_prediction_interval_of_a_new_site_is_metafors():
    """BCG (metafor dat.bcg): tau2 .30876, mean -.71412; its interval, with t(12), is -1.9872 to .5590."""
    cases = np.array([4, 123, 6, 306, 3, 231, 62, 13598, 33, 5069, 180, 1541, 8, 2545, 505, 88391, 29, 7499,
                      17, 1716, 186, 50634, 5, 2498, 27, 16913]).reshape(-1, 2)  # fmt: skip
    control = np.array([11, 139, 29, 303, 11, 220, 248, 12867, 47, 5808, 372, 1451, 10, 629, 499, 88391,
                        45, 7277, 65, 1665, 141, 27338, 3, 2341, 29, 17854]).reshape(-1, 2)  # fmt: skip
    effects = np.log(cases[:, 0] / cases[:, 1] / (control[:, 0] / control[:, 1]))
    variances = sum(1 / each[:, 0] - 1 / each[:, 1] for each in (cases, control))
    middle, half, between = predict_site(effects, variances, 0.95)
    assert (middle, between**2) == pytest.approx((-0.71412, 0.30876), abs=1e-4)
    assert half / t.ppf(0.975, 11) == pytest.approx((0.5590 + 1.9872) / 2 / t.ppf(0.975, 12), abs=1e-4)


def test_sites_that_do_not_differ_have_no_variance_between_them():
    levels, variances = np.array([0.8, 0.8001, 0.8]), np.full(3, 0.01)
    middle, half, between = predict_site(levels, variances, 0.95)
    assert (middle, between) == (pytest.approx(levels.mean()), 0)
    assert half == pytest.approx(t.ppf(0.975, 1) * np.sqrt(0.01 / 3))


def test_every_number_that_may_be_asked_for_can_be_told():
    assert set(get_args(Show)) == set(SHOWS)


def test_the_difference_of_two_areas_is_delongs_where_a_subject_has_one_image():
    table = tables(a=2.0, b=1.0).query("seed == 1")
    table = table.assign(subject=table["image"])
    told = SHOWS["auc"](Evidence(table, make_runs("ab"), 0.95), Row(show="auc", of="a", against="b"))
    wide = table.pivot(index="image", columns="variant", values="score")
    truth = table.query("variant == 'a'").set_index("image")["truth"].loc[wide.index].to_numpy()
    wins = [
        (s[truth == 1][:, None] > s[truth == 0]).astype(float)
        for s in (wide["a"].to_numpy(), wide["b"].to_numpy())
    ]
    ten, one = np.cov([w.mean(axis=1) for w in wins]), np.cov([w.mean(axis=0) for w in wins])
    contrast = np.array([1, -1])
    variance = contrast @ (ten / (truth == 1).sum() + one / (truth == 0).sum()) @ contrast
    difference = wins[0].mean() - wins[1].mean()
    assert told.estimate == pytest.approx(difference)
    assert told.high == pytest.approx(difference + norm.ppf(0.975) * np.sqrt(variance))


def test_an_ensemble_of_one_is_none_and_its_row_cannot_be_told():
    ensembles, runs = {"mixed": ("a", "b")}, make_runs("ab")
    for run in runs:
        run["epochs"] = [{"validation_loss": 1.0 if run["variant"] == "a" else 2.0}]
    rows = [Row(show="auc", of="mixed", against="mixed: best member", above=0.0)]
    claim = make_claim(*rows, ensembles=ensembles)
    told = judge(claim, runs, add_ensembles(claim, runs, tables(a=2.0, b=1.0)), 0.95)
    assert told["verdict"] == UNTESTABLE
    assert "mixed has not answered" in told["rows"][0]["reason"]
