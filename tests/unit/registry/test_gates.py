"""The gate holds a version to the policy and beside what serves, in the network and at each site."""

import hashlib
import math
import os
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

from imaging.config import Sites
from imaging.errors import DataError
from registry.evidence import Evidence
from registry.gates import Standing, judge
from registry.policy import Policy
from registry.power import estimate_power, explain_power
from registry.predictions import digest_images
from tests.tiny_registry import QUALIFIED

REPEATS = 2000 if os.environ.get("FORMULARY_SOAK") else 150
PLACES = ("north", "east", "south", "west", "harbour")
SITES = Sites.model_validate({"sites": {
    name: {"kind": "external" if name == "harbour" else "internal", "title": name} for name in PLACES
}})  # fmt: skip
MARGIN = {"auc": 0.03, "sensitivity": 0.05, "specificity": 0.05}
SITE = {"subjects": 30, "low": {"sensitivity": 0.6, "specificity": 0.6},
        "margin": {"sensitivity": 0.1, "specificity": 0.1}}  # fmt: skip
ASKED = {
    "task": "t", "why": "A test.", "primary": "auc", "statements": ["package", "evaluation", "qualification"],
    "network": {"subjects": 100, "low": {"auc": 0.85, "sensitivity": 0.75}, "margin": MARGIN},
    "internal": SITE, "external": SITE | {"low": {"sensitivity": 0.5}},
}  # fmt: skip
POLICY = Policy.model_validate(ASKED)


def ask(**changed):
    return Policy.model_validate(ASKED | changed)


def evidence(digest, rows, **facts):
    """What is signed of a package that answered these rows."""
    sets = {name: {"digest": f"{name} set", "images": sum(row["split"] == name for row in rows)}
            for name in ("test", "external")}  # fmt: skip
    body = {
        "engine": "openvino/f32",
        "threshold": 0.5,
        "model_bytes": 1000,
        "sets": sets,
        "predictions": rows,
    }
    passed = {"engines": {"openvino/f32": dict(QUALIFIED)}}
    return Evidence(digest, {"package": {}, "evaluation": body | facts, "qualification": passed}, {})


def answer(digest, skill=3.5, locked=0, subjects=120, **by_site):
    """A classifier that answers two images of each subject; all versions find the same subjects hard.

    Args:
        digest: of the package; seeds what is its own.
        skill: distance of the classes on the scale of the logit, whose noise has an SD of 1.
        locked: number of the locked sets, which seeds the subjects.
        subjects: at each site, half of them with the finding.
        by_site: skill at a site.
    """
    own, shared = np.random.default_rng([*digest.encode()]), np.random.default_rng(locked)
    rows = []
    for site in PLACES:
        hard, noise = shared.normal(0, 0.8, subjects), own.normal(0, 0.6, (subjects, 2))
        for i in range(subjects):
            for j in range(2):
                logit = by_site.get(site, skill) * (i % 2 - 0.5) + hard[i] + noise[i, j]
                rows.append({"sha256": f"{locked} {site} {i} {j}", "subject": f"{site}-{i}", "site": site,
                             "split": "external" if site == "harbour" else "test", "truth": i % 2,
                             "probability": 1 / (1 + math.exp(-logit))})  # fmt: skip
    return evidence(digest, rows)


def stand(champion=None, first=None, use=1, places=("*", *PLACES), change=()):
    """What the ledger says: versions 2 and 1, wherever they are."""
    placed = [
        dict.fromkeys(places, (number, told)) if told else {} for number, told in ((2, champion), (1, first))
    ]
    return Standing(*placed, {"test": use, "external": use}, list(change))


def judged(told, standing=None, policy=POLICY):
    """The verdict; the standing names the uses by the name of the set."""
    standing, named = standing or stand(), digest_images(told.statements.get("evaluation", {}))
    uses = {named[name]: use for name, use in standing.uses.items() if name in named}
    return judge(told, policy, SITES, replace(standing, uses=uses))


GOOD = answer("good")


def test_a_good_version_passes_everywhere_and_is_told_that_nothing_is_there_to_compare_it_with():
    verdict = judged(GOOD)
    assert verdict.network.passed
    assert verdict.approvable == list(PLACES)
    assert "no other version was approved here before, to be compared with" in verdict.network.reasons
    assert verdict.network.comparisons == ()


@pytest.mark.parametrize("use", [1, 5])
def test_the_bound_is_the_end_of_an_interval_at_the_confidence_that_is_left(use):
    rows = [{"sha256": str(i), "subject": str(i), "site": PLACES[i % 4], "split": "test", "truth": 1 - i % 2,
             "probability": 0.2 if i % 20 == 0 else 0.9 - 0.8 * (i % 2)} for i in range(800)]  # fmt: skip
    told = evidence("x", rows)
    del told.statements["evaluation"]["sets"]["external"]
    sure = 1 - 0.1 / use / (137 / 60)
    low, _ = proportion_confint(360, 400, 1 - sure, "wilson")
    for asked, passed in ((low - 1e-6, True), (low + 1e-6, False)):
        bounds = {"subjects": 1, "low": {"auc": 0.5, "sensitivity": asked}, "margin": MARGIN}
        verdict = judged(told, stand(use=use), ask(network=bounds))
        assert verdict.network.passed == passed
        assert verdict.uses["test"].confidence == pytest.approx(sure)
    (reason,) = verdict.network.reasons
    assert reason.startswith(f"sensitivity may be as low as {math.floor(low * 1000) / 1000:.3f}, and ")


def test_each_site_is_its_own_decision():
    verdict = judged(answer("weak at one", west=0.8))
    assert verdict.approvable == ["north", "east", "south", "harbour"]
    assert any(reason.startswith("sensitivity may be as low as") for reason in verdict.sites["west"].reasons)


def test_no_site_passes_when_the_network_fails():
    verdict = judged(answer("weak", skill=0.3, north=9.0))
    assert verdict.approvable == []
    assert verdict.sites["north"].reasons[0] == "the network's bounds are not met"


def test_the_external_site_has_its_own_rule():
    told = answer("weak outside", harbour=1.5)
    lenient = ask(external={"subjects": 30, "low": {"sensitivity": 0.3}})
    strict = ask(external={"subjects": 30, "low": {"sensitivity": 0.99}})
    assert "harbour" in judged(told, policy=lenient).approvable
    assert judged(told, policy=strict).approvable == ["north", "east", "south", "west"]


def test_what_is_better_overall_but_worse_at_one_site_is_refused_there_only():
    better = answer("better", skill=5.0, west=2.2)
    verdict = judged(better, stand(answer("champion"), answer("champion")))
    assert verdict.network.passed
    assert max(one.low for one in verdict.network.comparisons) > 0
    assert verdict.approvable == ["north", "east", "south", "harbour"]
    assert any("may be worse than champion v2 by up to" in reason for reason in verdict.sites["west"].reasons)


def test_an_equal_version_passes_beside_the_champion_and_the_first():
    verdict = judged(GOOD, stand(answer("champion"), answer("first")))
    assert verdict.approvable == list(PLACES)
    against = {one.against for one in verdict.sites["north"].comparisons}
    assert against == {"champion v2", "first approved v1"}
    for one in verdict.network.comparisons:
        assert set(one.model_dump()) == {"metric", "against", "low", "margin", "passed"}
        assert one.low >= -one.margin


def test_an_equal_version_on_a_set_that_was_used_up_is_refused():
    champion = answer("champion")
    bounds = []
    for use in range(1, 6):
        verdict = judged(GOOD, stand(champion, champion, use))
        bounds.append(verdict.network.comparisons[0].low)
    assert bounds == sorted(bounds, reverse=True)
    verdict = judged(GOOD, stand(champion, champion, 6))
    assert verdict.approvable == []
    (reason,) = verdict.network.reasons
    assert reason.startswith("it is package 6 that was scored on the test set sha256:")
    assert reason.endswith(", and the policy allows 5; lock a new set")
    assert (verdict.uses["test"].use, verdict.uses["test"].of) == (6, 5)


def test_only_the_places_whose_set_is_used_up_are_refused():
    standing = Standing({}, {}, {"test": 1, "external": 9}, [])
    assert judged(GOOD, standing).approvable == ["north", "east", "south", "west"]


def test_a_set_whose_use_the_ledger_does_not_know_says_nothing():
    verdict = judged(GOOD, Standing())
    assert "the ledger does not know that it was scored on the test set" in verdict.network.reasons[0]
    assert verdict.approvable == []


def test_a_set_is_known_by_its_images_whatever_the_statement_calls_them():
    asked = stand(use=5)
    renamed = spoil(lambda e: [told.update(digest="another") for told in e["sets"].values()])
    assert judged(renamed, asked).uses == judged(GOOD, asked).uses
    rows = GOOD.statements["evaluation"]["predictions"]
    images = sorted(row["sha256"] for row in rows if row["split"] == "test")
    digests = digest_images({"predictions": rows[::-1]})
    assert digests["test"] == "sha256:" + hashlib.sha256("\n".join(images).encode()).hexdigest()
    assert set(digests) == {"test", "external"}
    assert digest_images({"predictions": rows[1:]})["test"] != digests["test"]
    assert digest_images({}) == digest_images({"predictions": []}) == {}
    with pytest.raises(DataError, match="names no image or no locked set"):
        digest_images({"predictions": [{"split": "test"}]})


def test_a_slow_decline_is_stopped_by_the_first_approved_version():
    first = champion = answer("v0", subjects=300)
    passed, stopped = 0, None
    for step in range(1, 21):
        candidate = answer(f"v{step}", skill=3.5 - 0.12 * step, subjects=300)
        alone = judged(candidate, stand(champion, champion))
        both = judged(candidate, stand(champion, first))
        if alone.network.passed and not both.network.passed:
            stopped = both
            break
        assert both.network.passed
        passed, champion = passed + 1, candidate
    assert passed >= 2
    assert all("first approved v1" in reason for reason in stopped.network.reasons)


def test_a_new_site_is_held_to_the_bounds_alone():
    old = answer("champion")
    standing = stand(old, old, places=("*", "north", "east", "south", "harbour"))
    verdict = judged(answer("new", west=2.9), standing)
    assert "west" in verdict.approvable
    assert verdict.sites["west"].comparisons == ()
    assert len(verdict.sites["north"].comparisons) == 2


def test_the_champion_itself_is_not_compared_with_itself():
    assert judged(GOOD, stand(GOOD, GOOD)).network.comparisons == ()
    once = judged(GOOD, stand(answer("first"), answer("first"))).network.comparisons
    assert {one.against for one in once} == {"champion v2"}


def test_the_same_answers_in_another_package_are_not_worse():
    copy = evidence("copy", GOOD.statements["evaluation"]["predictions"])
    assert judged(copy, stand(GOOD, GOOD)).approvable == list(PLACES)


def test_each_version_is_held_to_its_own_threshold():
    champion, moved = answer("champion"), answer("champion")
    for row in moved.statements["evaluation"]["predictions"]:
        row["probability"] /= 2
    moved.statements["evaluation"]["threshold"] = 0.25
    moved = Evidence("moved", moved.statements, {})
    verdict = judged(moved, stand(champion))
    assert all(one.low > -0.03 for one in verdict.network.comparisons)  # the same answers
    moved.statements["evaluation"]["threshold"] = 0.49
    assert judged(moved, stand(champion)).approvable == []


def test_a_truth_that_was_mended_holds_for_both_versions():
    champion = answer("champion")
    mended = answer("champion")
    for row in mended.statements["evaluation"]["predictions"][:40]:
        row["truth"] = 1 - row["truth"]
    verdict = judged(Evidence("mended", mended.statements, {}), stand(champion))
    assert all(one.low > -0.03 for one in verdict.network.comparisons)  # the same answers


def test_versions_that_were_scored_on_other_images_cannot_be_compared():
    verdict = judged(answer("new set", locked=1), stand(answer("champion")))
    assert verdict.approvable == []
    assert ("AUC of champion v2 and of this version rest on 0 common subjects, fewer than 100; "
            "score v2 again: formulary training rescore") in verdict.network.reasons  # fmt: skip


def test_a_version_without_predictions_has_to_be_scored_again():
    old = answer("champion")
    del old.statements["evaluation"]["predictions"]
    reasons = judged(GOOD, stand(old)).network.reasons
    assert reasons == ("champion v2: The evaluation lists no predictions, or no threshold; "
                       "score v2 again: formulary training rescore",)  # fmt: skip


def test_what_lies_outside_the_change_control_plan_is_refused_everywhere():
    verdict = judged(GOOD, stand(change=["fit.architecture.name (architecture) changed from cnn to unet"]))
    assert verdict.approvable == []
    assert "cnn to unet" in verdict.network.reasons[0]


def spoil(change):
    """A good version whose evaluation was changed."""
    told = answer("spoiled")
    change(told.statements["evaluation"])
    return told


def at(site, evaluation):
    return [row for row in evaluation["predictions"] if row["site"] == site]


def leave(keep):
    def change(evaluation):
        kept = [row for row in evaluation["predictions"] if keep(row)]
        evaluation["predictions"] = kept
        counts = {name: sum(row["split"] == name for row in kept) for name in evaluation["sets"]}
        evaluation["sets"] = {name: {"digest": f"{name} set", "images": count}
                              for name, count in counts.items() if count}  # fmt: skip

    return change


def put(place, **values):
    def change(evaluation):
        for row in at(place, evaluation):
            row.update(values)

    return change


@pytest.mark.parametrize(("change", "told"), [
    (lambda e: e.update(predictions=[]), "lists no predictions"),
    (lambda e: e.pop("threshold"), "no threshold"),
    (lambda e: e["predictions"].append(dict(e["predictions"][0])), "1 predictions are of an image that has"),
    (lambda e: e["predictions"].pop(), "were scored"),
    (lambda e: e["sets"].pop("external"), "were scored"),
    (lambda e: e.pop("sets"), "not a table of numbers"),
    (lambda e: e["predictions"][3].pop("probability"), "not a table of numbers"),
    (lambda e: e["predictions"][3].update(probability="high"), "not a table of numbers"),
    (lambda e: e["predictions"][3].update(probability=[0.5]), "not a table of numbers"),
    (lambda e: e["predictions"][3].update(probability=None), "a probability is none"),
    (lambda e: e["predictions"][3].update(probability=math.nan), "a probability is none"),
    (lambda e: e["predictions"][3].update(probability=1.5), "a probability is none"),
    (lambda e: e["predictions"][3].update(truth=2), "A truth is neither 0 nor 1"),
    (lambda e: e["predictions"][3].update(truth=0.5), "truth is no whole number"),
    (put("west", site="moon"), "moon was scored, and sites.yaml lists no such site"),
    (lambda e: e.update(engine="torch/f32"), "torch/f32 did not pass qualification"),
    (leave(lambda row: row["split"] == "external"), "no image of it was scored"),
])  # fmt: skip
def test_evidence_that_is_not_whole_is_refused_everywhere_with_the_reason(change, told):
    verdict = judged(spoil(change), stand(GOOD, answer("first")))
    assert verdict.approvable == []
    assert told in " ".join(verdict.network.reasons)
    assert judged(GOOD, stand(spoil(change))).network.reasons  # nor does such a champion break the gate


@pytest.mark.parametrize(("change", "told"), [
    (leave(lambda row: row["site"] != "west"), "no image of it was scored"),
    (put("west", truth=0), "sensitivity rests on 0 subjects, fewer than 30"),
    (leave(lambda row: row["site"] != "west" or int(row["subject"][5:]) < 58),
     "sensitivity rests on 29 subjects, fewer than 30"),
])  # fmt: skip
def test_a_site_that_says_too_little_is_refused_alone(change, told):
    assert judged(spoil(change)).approvable == ["north", "east", "south", "harbour"]
    verdict = judged(spoil(change), stand(answer("champion")))
    assert told in verdict.sites["west"].reasons
    assert verdict.network.passed


def test_an_auc_needs_both_classes():
    negative = spoil(lambda e: [row.update(truth=0) for row in e["predictions"]])
    verdict = judged(negative, stand(answer("champion")))
    assert "AUC rests on 0 subjects, fewer than 100" in verdict.network.reasons
    assert "AUC of champion v2 and of this version rest on 0 common subjects, fewer than 100" in (
        verdict.network.reasons
    )


def test_an_auc_rests_on_the_rarer_class():
    def thin(evaluation):
        for row in evaluation["predictions"]:
            row["truth"] *= int(row["subject"].split("-")[1]) < 40

    verdict = judged(spoil(thin), stand(spoil(thin)))
    assert "AUC rests on 80 subjects, fewer than 100" in verdict.network.reasons
    other = Evidence("other", spoil(thin).statements, {})
    told = judged(spoil(thin), stand(other)).network.reasons
    assert "AUC of champion v2 and of this version rest on 80 common subjects, fewer than 100" in told


@pytest.mark.parametrize("kind", ["package", "evaluation", "qualification"])
def test_nothing_passes_without_a_statement_that_the_policy_asks_for(kind):
    gap = answer("gap")
    del gap.statements[kind]
    verdict = judged(gap)
    assert verdict.approvable == []
    assert verdict.network.reasons == (f"no {kind} statement",)


LIMITS = {"latency_ms": 5, "size_bytes": 2000, "robustness": {"drop": 0.3}}


def measure_all(told, ms=1.5, size=1000, drop=0.2):
    told.statements["qualification"]["measured"] = {"ms_per_batch": {"openvino/f32": {"1": ms}}}
    told.statements["evaluation"]["model_bytes"] = size
    worst = {"estimate": 0.1, "low": 0.0, "high": drop}
    told.statements["evaluation"]["robustness"] = {"groups": {"held_out": {"drop": worst}}}
    return told


@pytest.mark.parametrize(("values", "told"), [
    ({"ms": 6.25}, "the time of one image on openvino/f32, in ms, is 6.25, and 5 is the limit"),
    ({"ms": None}, "the time of one image on openvino/f32, in ms, was not measured"),
    ({"size": 2001}, "the model's size in bytes is 2001, and 2000 is the limit"),
    ({"drop": 0.31}, "the relative drop under corruptions never trained on is 0.31, and 0.3 is the limit"),
    ({"drop": math.nan}, "the relative drop under corruptions never trained on was not measured"),
])  # fmt: skip
def test_speed_size_and_robustness_have_limits(values, told):
    policy = ask(**LIMITS)
    assert judged(measure_all(answer("fit")), policy=policy).network.passed
    assert len(judged(answer("bare"), policy=policy).network.reasons) == 2
    verdict = judged(measure_all(answer("fit"), **values), policy=policy)
    assert verdict.approvable == []
    assert told in verdict.network.reasons[0]


@pytest.mark.parametrize(("what", "found", "bounds", "told"), [
    ("crossings", 0.02, {}, "what openvino/f32 changes, in crossings, is 0.02, and 0.01 is the limit"),
    ("flips", 0.006, {"flips": 0.005}, "openvino/f32 changes, in flips, is 0.006, and 0.005 is the limit"),
    ("edges", 0.3, {"edges": 0.2}, "what openvino/f32 changes, in edges, is 0.3, and 0.2 is the limit"),
    ("dice", None, {}, "what openvino/f32 changes, in dice, was not measured"),
    ("difference", math.nan, {}, "what openvino/f32 changes, in difference, was not measured"),
])  # fmt: skip
def test_an_engine_may_change_so_much_and_no_more(what, found, bounds, told):
    version = answer("fit")
    version.statements["qualification"]["engines"]["openvino/f32"]["crossings"] = 0.01
    policy = ask(engines=bounds)
    assert judged(version, policy=policy).network.passed
    version.statements["qualification"]["engines"]["openvino/f32"][what] = found
    verdict = judged(version, policy=policy)
    assert verdict.approvable == []
    assert told in verdict.network.reasons[0]


def segment(digest, level, spread=0.03):
    """Dice of two images of each of 60 subjects at each site; None where there is nothing to score."""
    own, shared = np.random.default_rng([*digest.encode()]), np.random.default_rng(0)
    rows = []
    for site in PLACES:
        ease = shared.normal(0, spread, 60)
        for i, j in np.ndindex(60, 2):
            value = min(1.0, level + ease[i] + own.normal(0, spread / 3))
            rows.append({"sha256": f"{site} {i} {j}", "subject": f"{site}-{i}", "site": site,
                         "split": "external" if site == "harbour" else "test",
                         "dice": None if (i, j) == (3, 1) else value,
                         "surface_mm": 10 * (1 - value)})  # fmt: skip
    return evidence(digest, rows)


OVERLAP = {"subjects": 50, "low": {"dice": 0.8}, "high": {"surface_mm": 2.0},
           "margin": {"dice": 0.01, "surface_mm": 0.1}}  # fmt: skip


def test_overlap_and_distance_are_compared_by_subject():
    policy = ask(primary="dice", network=OVERLAP, internal=OVERLAP, external=OVERLAP)
    champion = segment("champion", 0.9)
    assert judged(segment("equal", 0.9), stand(champion), policy).approvable == list(PLACES)
    worse = judged(segment("worse", 0.885), stand(champion), policy)
    assert worse.approvable == []
    assert [one.passed for one in worse.network.comparisons] == [False, False]
    assert all(one.low < -one.margin for one in worse.network.comparisons)


def blank(told, metric, subjects=10):
    """The same package where some subjects at each site have no value of a metric."""
    rows = [row | {metric: None} if int(row["subject"].split("-")[1]) < subjects else row
            for row in told.statements["evaluation"]["predictions"]]  # fmt: skip
    return evidence(f"blank {told.digest}", rows)


@pytest.mark.parametrize("metric", ["dice", "surface_mm"])
def test_what_is_not_scored_does_not_count_for_nothing(metric):
    policy = ask(primary="dice", network=OVERLAP, internal=OVERLAP, external=OVERLAP)
    champion, name = segment("champion", 0.9), metric.replace("_", " ")
    blanked = blank(segment("equal", 0.9), metric)
    alone = judged(blanked, policy=policy)
    assert alone.approvable == []
    assert (f"{name} is missing on 80 of 480 images, where no other version tells why; 5% may be, by the "
            "policy's `unscored`",) == alone.network.reasons  # fmt: skip
    beside = judged(blanked, stand(champion), policy)
    had = 20 - (metric == "dice")  # subject 3 has an image that the champion has no Dice of either
    assert beside.sites["north"].reasons[1] == f"{name} is missing on {had} images where champion v2 has it"
    assert judged(blanked, stand(blank(champion, metric)), policy).approvable == list(PLACES)
    rare = OVERLAP | {"unscored": 0.2}
    rare = ask(primary="dice", network=rare, internal=rare, external=rare)
    assert judged(blanked, policy=rare).approvable == list(PLACES)


def test_what_another_version_called_by_mistake_need_not_be_scored():
    policy = ask(primary="dice", network=OVERLAP, internal=OVERLAP, external=OVERLAP)
    called = segment("champion", 0.9)
    for row in called.statements["evaluation"]["predictions"]:
        row["dice"] = (
            row["dice"] or 0.0
        )  # of the image that neither truth nor the new answer has the class in
    assert judged(segment("equal", 0.9), stand(called), policy).approvable == list(PLACES)


def test_a_class_that_is_missing_is_seen_behind_the_mean_over_classes():
    policy = ask(primary="dice", network=OVERLAP, internal=OVERLAP, external=OVERLAP)
    pair = segment("champion", 0.9), segment("equal", 0.9)
    for told in pair:
        for row in told.statements["evaluation"]["predictions"]:
            row["surface_mm_nerve"] = row["surface_mm"]
    verdict = judged(blank(pair[1], "surface_mm_nerve"), stand(pair[0]), policy)
    assert verdict.network.reasons == ("surface mm nerve is missing on 80 images where champion v2 has it",)


def detect(digest, found, false=0.2):
    own = np.random.default_rng([*digest.encode()])
    rows = [
        {"sha256": f"{site} {i}", "subject": f"{site}-{i}", "site": site,
         "split": "external" if site == "harbour" else "test", "lesions": (lesions := i % 4),
         "found": int(own.binomial(lesions, found)), "false_positives": int(own.poisson(false)),
         "truth": int(lesions > 0), "probability": 0.6}
        for site in PLACES for i in range(200)
    ]  # fmt: skip
    return evidence(digest, rows)


def test_lesions_and_false_alarms_are_compared_by_subject():
    asked = {"subjects": 100, "low": {"lesion_sensitivity": 0.7}, "high": {"false_positives": 0.9},
             "margin": {"lesion_sensitivity": 0.1, "false_positives": 0.3}}  # fmt: skip
    policy = ask(primary="lesion_sensitivity", network=asked, internal=asked, external=asked)
    champion = detect("champion", 0.9)
    assert judged(detect("equal", 0.9), stand(champion), policy).approvable == list(PLACES)
    assert not judged(detect("blind", 0.78), stand(champion), policy).network.passed
    loud = judged(detect("loud", 0.9, 0.7), stand(champion), policy)
    assert [one.passed for one in loud.network.comparisons] == [True, False]


def test_a_version_that_lies_on_the_margin_passes_as_seldom_as_was_asked():
    """The candidate is right on 85 %, the champion on 90 %, and 5 points are allowed."""
    asked = {"subjects": 100, "low": {"accuracy": 0.5}, "margin": {"accuracy": 0.05}}
    policy = ask(primary="accuracy", network=asked, internal={"subjects": 999, "low": {"auc": 1}})
    rng, passed = np.random.default_rng(0), 0
    for _ in range(REPEATS):
        ease = np.repeat(rng.normal(0, 0.8, 300), 2)
        pair = [ease + rng.normal(0, 0.6, 600) < norm.ppf(share) for share in (0.9, 0.85)]
        told = [evidence(name, [
            {"sha256": str(i), "subject": str(i // 2), "site": "north", "split": "test", "truth": i // 2 % 2,
             "probability": float(right == i // 2 % 2)} for i, right in enumerate(answers.tolist())])
            for name, answers in zip(("champion", "candidate"), pair, strict=True)]  # fmt: skip
        for one in told:
            del one.statements["evaluation"]["sets"]["external"]
        passed += judged(told[1], stand(told[0]), policy).network.passed
    alpha = (1 - policy.confidence_at(1)) / 2
    assert passed / REPEATS < alpha + 3 * math.sqrt(alpha * (1 - alpha) / REPEATS)
    assert passed > 0 or REPEATS < 500


def test_power_is_that_of_the_gate_itself():
    bounds = {"subjects": 30, "low": {"auc": 0.7, "sensitivity": 0.8}, "margin": {"sensitivity": 0.1}}
    places = {"network": bounds, "internal": bounds, "external": bounds | {"subjects": 500}}
    policy = ask(primary="sensitivity", **places)
    told = estimate_power(policy, GOOD, SITES)
    assert told["sites"]["harbour"] == {"subjects": 120, "bounds": 0.0, "margins": 0.0}
    assert told["family"] == pytest.approx(1 - (1 - 0.05 / (137 / 60)) ** 5)
    rows = at("north", GOOD.statements["evaluation"])
    by_subject = [rows[2 * i : 2 * i + 2] for i in range(120)]
    rng, passed = np.random.default_rng(0), 0
    for _ in range(REPEATS):
        drawn = [
            dict(row, sha256=f"{i} {j}", subject=str(i))
            for i, one in enumerate(rng.integers(0, 120, 120))
            for j, row in enumerate(by_subject[one])
        ]
        again = evidence("again", drawn)
        del again.statements["evaluation"]["sets"]["external"]
        passed += judged(again, policy=policy).network.passed
    assert told["sites"]["north"]["bounds"] == pytest.approx(passed / REPEATS, abs=0.12)
    assert "keeps the margins in" in explain_power(told)[0]
