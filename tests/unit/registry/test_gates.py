"""The gate compares lower ends of intervals with the policy, for the network and for each site by itself."""

import math

import pytest

from imaging.errors import ConfigError
from registry.evidence import Evidence
from registry.gates import explain_policy, judge, read_policy


def score(low):
    return {"estimate": 0.95, "low": low, "high": 1.0, "subjects": 100, "confidence": 0.95, "method": "told"}


def make(**lows):
    sites = ("north", "east", "south", "west", "harbour")
    body = {"engine": "openvino/f32", "overall": {"dice": score(lows.get("overall", 0.9))},
            "sites": {site: {"dice": score(lows.get(site, 0.9))} for site in sites}}  # fmt: skip
    engines = {"engines": {"openvino/f32": {"passed": True}}}
    return Evidence(
        "sha256:0", {"package": {}, "evaluation": body, "qualification": engines, "alarms": {}}, {}
    )


def test_a_good_version_passes_everywhere(policy, sites):
    verdict = judge(make(), policy, sites)
    assert verdict.network.passed
    assert verdict.approvable == ["north", "east", "south", "west", "harbour"]


def test_each_site_is_its_own_decision(policy, sites):
    verdict = judge(make(west=0.79), policy, sites)
    assert verdict.approvable == ["north", "east", "south", "harbour"]
    assert verdict.sites["west"].reasons == ("dice lower bound 0.790 < 0.8",)


def test_no_site_passes_when_the_network_fails(policy, sites):
    verdict = judge(make(overall=0.5), policy, sites)
    assert verdict.approvable == []


def test_the_external_site_has_its_own_rule(policy, sites):
    lenient = policy.model_copy(
        update={"external": policy.external.model_copy(update={"low": {"dice": 0.5}})}
    )
    assert "harbour" not in judge(make(harbour=0.6), policy, sites).approvable
    assert "harbour" in judge(make(harbour=0.6), lenient, sites).approvable


def test_too_few_subjects_cannot_be_judged(policy, sites):
    few = make()
    few.statements["evaluation"]["sites"]["south"]["dice"]["subjects"] = 49
    assert judge(few, policy, sites).sites["south"].reasons == ("dice rests on 49 subjects, fewer than 50",)


def test_a_site_or_metric_that_was_not_evaluated_fails(policy, sites):
    gap = make()
    del gap.statements["evaluation"]["sites"]["east"]
    assert not judge(gap, policy, sites).sites["east"].passed


def test_nan_fails(policy, sites):
    assert not judge(make(north=math.nan), policy, sites).sites["north"].passed


@pytest.mark.parametrize("kind", ["package", "evaluation", "qualification", "alarms"])
def test_nothing_passes_without_a_statement_that_the_policy_asks_for(policy, sites, kind):
    gap = make()
    del gap.statements[kind]
    verdict = judge(gap, policy, sites)
    assert verdict.approvable == []
    assert f"no {kind} statement" in verdict.network.reasons


def test_the_scored_engine_must_have_passed_parity(policy, sites):
    bad = make()
    bad.statements["qualification"]["engines"]["openvino/f32"]["passed"] = False
    assert judge(bad, policy, sites).network.reasons == ("openvino/f32 did not pass qualification",)


@pytest.mark.parametrize("task", ["brain-tissue", "lung-nodule"])
def test_the_shipped_policies_read_as_sentences(task):
    sentences = explain_policy(read_policy(task))
    assert any("lower end" in sentence for sentence in sentences)


def test_a_misspelt_key_of_a_policy_is_refused_by_name(tmp_path):
    text = "task: t\nwhy: w\nnetwrk: {subjects: 1, low: {dice: 0.5}}\n"
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"unknown key 'netwrk', did you mean 'network'"):
        read_policy("t", tmp_path)
