"""A policy says what it means, and refuses what cannot be meant."""

import jsonschema
import pytest
import yaml

from imaging.errors import ConfigError
from registry.policy import POLICIES, Policy, digest_policy, explain_policy, policy_schema, read_policy

SHIPPED = sorted(path.stem for path in POLICIES.glob("*.yaml"))
GOOD = {
    "task": "t", "why": "A test.", "primary": "auc",
    "network": {"subjects": 50, "low": {"auc": 0.8}, "margin": {"auc": 0.03}},
    "internal": {"subjects": 30, "low": {"sensitivity": 0.6}, "high": {"brier": 0.2}},
    "external": {"subjects": 30, "low": {"sensitivity": 0.6}},
    "statements": ["package", "evaluation", "qualification"],
}  # fmt: skip
MORE = {"id": "more", "allow": "data", "why": "w", "protocol": "p"}


def change(path, value):
    """The good policy with something else at a path of keys; None takes it out."""
    told = yaml.safe_load(yaml.safe_dump(GOOD))
    *parents, last = path.split(".")
    place = told
    for key in parents:
        place = place.setdefault(key, {})
    place[last] = value
    if value is None:
        del place[last]
    return told


def read(tmp_path, told):
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(told))
    return read_policy("t", tmp_path)


@pytest.mark.parametrize(("path", "value", "told"), [
    ("netwrk", {"subjects": 1}, "unknown key 'netwrk', did you mean 'network'"),
    ("network.margins", {"auc": 0.03}, "unknown key 'network.margins', did you mean 'margin'"),
    ("network", None, "network: Field required"),
    ("primary", None, "primary: Field required"),
    ("why", "", "why: String should have at least 1 character"),
    ("task", "other", "the policy of other"),
    ("internal.low", {"sensitivty": 0.6}, r"no metric 'sensitivty'. Did you mean 'sensitivity'\?"),
    ("internal.low", {"froc": 0.5}, "no metric 'froc'"),
    ("internal.low", {"recall": 0.5}, "no metric 'recall'. Metrics: accuracy, auc, brier"),
    ("network.low", {"auc": "high"}, "valid number"),
    ("network.low", {"auc": float("nan")}, "finite number"),
    ("network.low", {"auc": 85}, "auc 85 is not between 0 and 1"),
    ("network.low", {"brier": 0.1}, "low: brier is the better the less it is"),
    ("internal.low", {"surface_mm_liver": 1}, "low: surface_mm_liver is the better the less it is"),
    ("internal.high", {"sensitivity": 0.9}, "high: sensitivity is the better the more it is"),
    ("external", {"subjects": 30}, "ask for something"),
    ("external.subjects", 0, "greater than or equal to 1"),
    ("network.margin", {"auc": 0}, "auc 0 is not above 0"),
    ("network.margin", {"auc": -0.03}, "auc -0.03 is not between 0 and 1"),
    ("network.margin", {"false_positives": -1}, "false_positives -1 is not above 0"),
    ("network.margin", {"calibration_error": 0.1}, "cannot be compared by calibration_error"),
    ("network.margin", {"calibration_slope": 0.1}, "cannot be compared by calibration_slope"),
    ("primary", "sensitivity", "primary: the network has no bound on sensitivity"),
    ("primary", "f1", "no metric 'f1'"),
    ("network.margin", None, "network.margin: say by how much auc, the primary metric, may be worse than in"),
    ("network.margin", {"sensitivity": 0.1}, "network.margin: say by how much auc, the primary metric,"),
    ("internal.unscored", 1, "internal.unscored: Input should be less than 1"),
    ("alpha", 0.5, "alpha: Input should be less than or equal to 0.2"),
    ("test_set", {"uses": 21}, "less than or equal to 20"),
    ("test_set", {"uses": 0}, "greater than or equal to 1"),
    ("test_set", {"spending": "all"}, "test_set.spending: Input should be 'harmonic' or 'equal'"),
    ("robustness", {"drop": 30}, "robustness.drop: Input should be less than or equal to 1"),
    ("latency_ms", 0, "latency_ms: Input should be greater than 0"),
    ("size_bytes", "small", "size_bytes: Input should be a valid integer"),
    ("statements", ["package"], "the gate judges by the evaluation"),
    ("statements", ["evaluation", "opinion"], "statements.1: Input should be"),
    ("foreign_alias", "ignore", "Input should be 'revert' or 'report'"),
    ("changes", [MORE] * 2, "two clauses are called more"),
    ("changes", [MORE | {"allow": "anything"}], "changes.0.allow"),
])  # fmt: skip
def test_a_policy_that_cannot_be_meant_is_refused_with_the_reason(tmp_path, path, value, told):
    assert read(tmp_path, GOOD).task == "t"
    with pytest.raises(ConfigError, match=told):
        read(tmp_path, change(path, value))


def test_latency_without_qualification_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="latency_ms needs the qualification"):
        read(tmp_path, change("latency_ms", 10) | {"statements": ["package", "evaluation"]})


def test_a_policy_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_policy("t", tmp_path)


@pytest.mark.parametrize("spending", ["harmonic", "equal"])
@pytest.mark.parametrize("uses", [1, 5, 20])
def test_the_errors_of_all_uses_of_a_set_add_up_to_alpha(spending, uses):
    policy = Policy.model_validate(change("test_set", {"uses": uses, "spending": spending}))
    errors = [(1 - policy.confidence_at(use)) / 2 for use in range(1, uses + 1)]
    assert sum(errors) == pytest.approx(0.05)
    assert errors == sorted(errors, reverse=True)
    assert policy.confidence_at(uses + 1) == 1


def test_the_first_of_five_harmonic_uses_is_near_the_usual_interval():
    policy = Policy.model_validate(GOOD)
    assert policy.confidence_at(1) == pytest.approx(1 - 0.1 / (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5))
    assert policy.confidence_at(5) == pytest.approx(1 - 0.1 / 5 / (137 / 60))


@pytest.mark.parametrize("task", SHIPPED)
def test_the_shipped_policies_read_as_sentences_and_follow_the_schema(task):
    policy, text = read_policy(task), (POLICIES / f"{task}.yaml").read_text()
    told = " ".join(explain_policy(policy))
    for part in (
        "lower bound must reach",
        "not worse than the champion",
        "serves 5 packages",
        "within 100 ms",
    ):
        assert part in told
    jsonschema.Draft202012Validator.check_schema(policy_schema())
    jsonschema.validate(yaml.safe_load(text), policy_schema())
    assert digest_policy(task).startswith("sha256:")
    assert policy.surveillance.tasks == len(SHIPPED)  # each spends an equal part of a site's budget


def test_an_editor_with_the_schema_sees_a_misspelt_key_and_metric():
    for wrong in (change("netwrk", {}), change("internal.low", {"sensitivty": 0.6})):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, policy_schema())
    jsonschema.validate(change("internal.low", {"dice_white_matter": 0.6}), policy_schema())


def test_everything_that_a_policy_asks_stands_in_its_sentences():
    more = {"robustness": {"drop": 0.2}, "size_bytes": 5_000_000, "approvers": ["ada"],
            "foreign_alias": "report", "changes": [MORE]}  # fmt: skip
    told = " ".join(explain_policy(Policy.model_validate(GOOD | more)))
    overlap = {"subjects": 30, "low": {"dice": 0.8}}
    told += " ".join(explain_policy(Policy.model_validate(GOOD | {"internal": overlap})))
    parts = ("at most 5 % of the images may have no value",
             "AUC 0.8", "AUC 0.03", "brier 0.2", "at least 30 subjects",
             "95.6 % at the first, 99.1 % at the last", "20 % of itself",
             "5 MB", "approves: ada", "clause more", "left as it is")  # fmt: skip
    assert [part for part in parts if part not in told] == []
