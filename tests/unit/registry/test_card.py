"""A card says what signed statements and the ledger say, each fact with its source, or it is not built."""

import copy
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from referencing import Registry, Resource

from imaging.errors import DataError, TrustError
from imaging.vocabulary import Decision, Kind
from registry.card import TEMPLATES, Sources, build_card, check_schema, check_sources, gather, present
from registry.card_plots import render_card
from registry.evidence import Evidence, digest_statements, sign_statements
from registry.package import FILES, digest_package, shelf, write_contract
from registry.policy import Policy
from tests.tiny import promise

DIGEST = "sha256:" + "7" * 64
CHAI = {  # element names of the Applied Model Card's schema, version 0.2
    "BasicInfo": "ModelName ModelDeveloper DeveloperContact",
    "ReleaseInfo": "ReleaseStage ReleaseDate ReleaseVersion GlobalAvailability RegulatoryApproval",
    "ModelSummary": "Summary Keywords",
    "UsesAndDirections": "IntendedUseAndWorkflow PrimaryIntendedUsers HowToUse TargetedPatientPopulation "
    "CautionedOutOfScopeSettings",
    "Warnings": "KnownRisksAndLimitations KnownBiasesOrEthicalConsiderations ClinicalRiskLevel",
    "TrustIngredients": "AISystemFacts TransparencyInformation",
    "KeyMetrics": "UsefulnessUsabilityEfficacy FairnessEquity SafetyReliability",
    "Resources": "EvaluationReferences ClinicalTrial PeerReviewedPublications ReimbursementStatus "
    "PatientConsentOrDisclosure",
}
TRIPOD = {"3": "abc", "5": "ab", "6": "abc", "8": "abc", "9": "abc", "12": "abcdefg", "18": "abcdef",
          "20": "abc", "23": "ab", "27": "abc"}  # fmt: skip


def told(value, subjects=60):
    return {"estimate": value, "low": value - 0.05, "high": value + 0.04, "subjects": subjects,
            "confidence": 0.95, "method": "told"}  # fmt: skip


def interval(value):
    return {"estimate": value, "low": value - 0.1, "high": value + 0.1}


def evaluation(passed=True):
    scores = {"auc": told(0.91), "sensitivity": told(0.83, 31), "hausdorff95_mm": told(7.5)}
    bins = [{"said": 0.12, "share": 0.09, "count": 70}, {"said": 0.85, "share": 0.9, "count": 50}]
    cells = [{"family": "blur", "group": "seen", "severity": s, "value": interval(0.9 - s / 10),
              "drop": interval(s / 10)} for s in (1, 3)]  # fmt: skip
    return {
        "package": DIGEST, "engine": "openvino/f32", "confidence": 0.95, "threshold": 0.5,
        "model_bytes": 1234, "overall": scores,
        "sites": {"north": {**scores, "auc": told(0.93)}, "harbour": {"auc": told(0.72)}},
        "subgroups": {"sex": {"F": scores, "M": {"auc": told(0.9)}}},
        "gap": {"auc": {**told(0.21), "best": "north", "worst": "harbour", "by_chance": 0.03}},
        "sets": {"test": {"digest": "sha256:aa", "images": 120, "subjects": 60}},
        "curves": {"overall": {"reliability": bins}, "harbour": {"reliability": bins}, "north": {}},
        "robustness": {"cells": cells, "clean": {"value": interval(0.95)}, "score": "right", "subjects": 20,
                       "groups": {"held_out": {"drop": interval(0.2), "cells": 1}}, "not_applicable": []},
        "explanation": {"passed": passed, "applies": True, "reasons": ["Hits less those of chance: 0.02."]},
        "predictions": [{"site": "north", "split": "test"}, {"site": "harbour", "split": "external"}],
    }  # fmt: skip


def make_evidence(**changed):
    package = {"commit": "c0ffee", "params": {"fit": {"architecture": {"name": "cnn", "pretrained": None}}}}
    north = {"null_alarm_share": [0.01, 0.003, 0.04], "shift_seen_sd": 0.8, "subjects": 45}
    alarms = {"alpha": 0.01, "window": 200, "test": "KS", "method": "Drawn again.", "sites": {"north": north}}
    engines = {"openvino/f32": {"difference": 1e-06, "tolerance": 0.001, "passed": True}}
    statements = {"package": package, "evaluation": evaluation(), "alarms": alarms,
                  "qualification": {"passed": ["openvino/f32"], "golden": 8, "engines": engines},
                  **changed}  # fmt: skip
    return Evidence(DIGEST, statements, dict.fromkeys(statements, "author@test"))


CONTRACT = promise(
    Kind.CLASSIFICATION, ("none", "nodule"), simulated="Everything is drawn.", intended_use="To test."
)
BOUNDS = {"subjects": 30, "low": {"auc": 0.8}, "margin": {"auc": 0.03}}
POLICY = Policy.model_validate({"task": "t", "why": "A test.", "primary": "auc",
                                "network": BOUNDS, "internal": BOUNDS, "external": BOUNDS,
                                "statements": ["evaluation"]})  # fmt: skip


@pytest.fixture
def decide(ledger, author, approver):
    """Write a version's life into a real ledger, and more decisions after it; its events."""

    def write(*more):
        own = {"version": 3, "digest": DIGEST}
        finding = {"passed": True, "reasons": ["auc lower bound 0.86 reaches 0.8"]}
        failed = {"passed": False, "reasons": ["auc lower bound 0.67 < 0.8"]}
        verdict = {"network": finding, "sites": {"north": finding, "harbour": failed}}
        asked = {**own, "verdict": verdict, "sites": ["north"], "policy": "sha256:bb"}
        with ledger.writing() as writer:
            writer.use("t", DIGEST, {"test": "sha256:aa"}, "evaluate")
            writer.append(Decision.REGISTERED, "t", {**own, "evidence": {"package": "sha256:cc"}}, author)
            for body in (asked, *(body for kind, body in more if kind == Decision.APPROVED)):
                wanted = {"sites": ["north"], **asked, **body}
                request = writer.append(Decision.REQUESTED, "t", wanted, author)
                told = {"sites": ["north"], "because": "<i>read</i>", **own, **body, "asked": request.seq}
                writer.append(Decision.APPROVED, "t", told, approver)
            for kind, body in more:
                if kind != Decision.APPROVED:
                    writer.append(kind, "t", body, approver)
        return [event for event in ledger.signed() if event.task == "t"]

    return write


@pytest.fixture
def made(decide):
    """A card and what it may cite."""
    events = decide()
    card = build_card(make_evidence(), CONTRACT, events, POLICY)
    table = {"bibliography": read_table()["bibliography"]}
    return card, gather(table, make_evidence(), CONTRACT, POLICY, events)


def read_table():
    import yaml

    return yaml.safe_load((TEMPLATES / "card.yaml").read_text())


def numbers(node, path=()):
    """Paths to every number of a card, and to every text with a figure in it."""
    parts = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = [where for key, part in parts for where in numbers(part, (*path, key)) if key != "source"]
    is_leaf = isinstance(node, int | float | str) and not isinstance(node, bool)
    return [*found, path] if is_leaf and re.search(r"\d", str(node)) else found


def replace(card, path, change):
    """A copy of the card with one leaf changed."""
    changed = copy.deepcopy(card)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = change(node[path[-1]])
    return changed


def facts(node):
    """Every {value, source} of a card."""
    if isinstance(node, dict) and "source" in node:
        return [node] if "value" in node else []
    parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [fact for part in parts for fact in facts(part)]


def test_every_fact_stands_where_another_resolver_of_pointers_finds_it(made):
    card, sources = made
    assert len(facts(card)) > 150
    for fact in facts(card):
        name, _, pointer = fact["source"].partition("#")
        resource = Resource.opaque(json.loads(json.dumps(sources.documents[name])))
        found = resource.pointer(pointer, resolver=Registry().resolver()).contents
        expected = found["estimate"] if isinstance(found, dict) else found
        assert fact["value"] == expected, fact
        assert fact.get("low") == (found.get("low") if isinstance(found, dict) else None)


def test_each_number_that_is_corrupted_is_found(made):
    card, sources = made
    check_sources(card, sources)
    paths = numbers(card)
    assert len(paths) > 180
    for path in paths:
        with pytest.raises(DataError, match="source"):
            check_sources(
                replace(card, path, lambda old: f"{old}9" if isinstance(old, str) else old + 1), sources
            )


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"text": "It is right in 97 of 100."}, "without a source"),
        ({"value": 0.91}, "without a source"),
        ({"label": "auc of 0.99", "value": "t", "source": "contract#/task"}, "without a source"),
        ({"value": 0.91, "source": "evaluation#/overall/f1"}, "leads nowhere"),
        ({"value": 0.91, "source": "rumour#/overall/auc"}, "leads nowhere"),
        ({"value": 0.91, "low": 0.9, "high": 0.92, "source": "evaluation#/overall/auc"}, "its source"),
        ({"value": True, "source": "evaluation#/sets/test/subjects"}, "its source"),
    ],
)
def test_a_number_without_a_source_that_says_it_fails_the_build(made, entry, why):
    card, sources = made
    card["Warnings"]["ClinicalRiskLevel"] = [entry]
    with pytest.raises(DataError, match=why):
        check_sources(card, sources)


def test_keys_with_slashes_and_tildes_are_cited(made):
    sources = Sources({"evaluation": {"a/b": {"c~d": told(0.5)}}}, {})
    cited = sources.cite("evaluation#")
    assert cited["a/b"]["c~d"]["source"] == "evaluation#/a~1b/c~0d"
    check_sources(cited, sources)


def test_the_card_has_the_fields_of_the_applied_model_card(made):
    card, _ = made
    assert {section: set(card[section]) for section in CHAI} == {k: set(v.split()) for k, v in CHAI.items()}
    assert card["BasicInfo"]["DeveloperContact"][0]["open"]
    for section, fields in CHAI.items():
        for name in fields.split():
            lacking = copy.deepcopy(card)
            del lacking[section][name]
            with pytest.raises(DataError, match=r"Mend card\.yaml"):
                check_schema(lacking)


def test_scores_carry_intervals_subjects_and_source(made):
    card, _ = made
    auc = card["Figures"]["Sites"]["north"]["auc"]
    assert {key: auc[key] for key in ("value", "low", "high", "subjects", "source")} == {
        "value": 0.93, "low": 0.93 - 0.05, "high": 0.93 + 0.04, "subjects": 60,
        "source": "evaluation#/sites/north/auc"}  # fmt: skip
    assert card["Figures"]["Bounds"]["network"]["low"]["auc"]["source"] == "policy#/network/low/auc"


def test_checklists_have_the_numbers_that_were_published(made):
    card, _ = made
    claim, tripod = card["Checklists"]["CLAIM 2024"], card["Checklists"]["TRIPOD+AI"]
    assert list(claim) == [str(number) for number in range(1, 45)]
    assert list(tripod) == [f"{n}{letter}" for n in range(1, 28) for letter in TRIPOD.get(str(n), [""])]
    assert len(tripod) == 52


def test_an_item_is_filled_only_where_a_run_says_it(made, decide):
    card, _ = made
    assert card["Checklists"]["CLAIM 2024"]["30"]["by"] == [{"source": "evaluation#/robustness"}]
    assert card["Checklists"]["CLAIM 2024"]["44"] == {"name": "funding", "filled": False}
    body = evaluation()
    del body["robustness"], body["explanation"]
    poorer = build_card(make_evidence(evaluation=body), CONTRACT, decide(), POLICY)
    assert not poorer["Checklists"]["CLAIM 2024"]["30"]["filled"]
    assert "Robustness" not in poorer["Figures"]


def test_the_card_tells_where_it_serves_and_who_decided(decide):
    stopped = (Decision.SUSPENDED, {"sites": ["north"], "because": "An alarm."})
    card = build_card(make_evidence(), CONTRACT, decide(stopped), POLICY)
    assert card["Standing"]["north"]["suspended"] is True
    assert set(card["Standing"]) == {"north"}
    decided = [(event["kind"]["value"], event["actor"]["value"]) for event in card["Decisions"]]
    assert decided == [("test-set-used", "evaluate"), ("registered", "author@test"),
                       ("requested", "author@test"), ("approved", "approver@test"),
                       ("suspended", "approver@test")]  # fmt: skip
    assert card["Uses"][0]["use"]["value"] == 1


def test_a_version_that_another_displaced_serves_nowhere(decide):
    other = {"version": 4, "digest": "sha256:" + "8" * 64, "sites": ["north"], "because": "Better."}
    card = build_card(make_evidence(), CONTRACT, decide((Decision.APPROVED, other)), POLICY)
    assert card["Standing"]["north"]["slot"] == "previous"
    assert card["ReleaseInfo"]["ReleaseStage"][0]["text"].startswith("Registered")


def test_the_card_says_that_the_author_could_see_the_scores(made, decide):
    assert "its author could see the scores" in made[0]["Notices"][-1]["text"]
    apart = make_evidence()
    apart.signed_by["evaluation"] = "registry@test"
    assert "different identities" in build_card(apart, CONTRACT, decide(), POLICY)["Notices"][-1]["text"]


def test_a_package_that_the_ledger_does_not_know_gets_no_card():
    with pytest.raises(TrustError, match="not in the ledger"):
        build_card(make_evidence(), CONTRACT, [], POLICY)


@pytest.fixture
def folder(tmp_path):
    """A package with golden images and a network that looks where it is bright."""
    from onnx import TensorProto, checker, helper, save

    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 32, 32])
    shapes = {"logits": ["n", 2], "heat": ["n", 32, 32], "embedding": ["n", 1]}
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()
    ]
    axes = {"one": [1], "all": [1, 2]}
    constants = [helper.make_tensor(name, TensorProto.INT64, [len(a)], a) for name, a in axes.items()]
    nodes = [helper.make_node("Squeeze", ["image", "one"], ["heat"]),
             helper.make_node("ReduceMean", ["heat", "all"], ["flat"], keepdims=0),
             helper.make_node("Unsqueeze", ["flat", "one"], ["embedding"]),
             helper.make_node("Neg", ["embedding"], ["against"]),
             helper.make_node("Concat", ["against", "embedding"], ["logits"], axis=1)]  # fmt: skip
    model = helper.make_model(helper.make_graph(nodes, "t", [image], outputs, constants),
                              opset_imports=[helper.make_opsetid("", 18)], ir_version=10)  # fmt: skip
    checker.check_model(model)
    package = tmp_path / "package"
    package.mkdir()
    save(model, package / "model.onnx")
    write_contract(CONTRACT, package)
    images = np.random.default_rng(1).normal(0, 1, (4, 1, 32, 32)).astype(np.float32)
    means = images.mean(axis=(2, 3))
    np.savez(package / "golden.npz", images=images, logits=np.concatenate([-means, means], axis=1))
    return package


class Page(HTMLParser):
    """Tags that stand open, and every address of the page."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.remove(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_no_network_and_says_first_what_is_simulated(made, folder):
    text = render_card(made[0], folder)
    page = Page()
    page.feed(text)
    assert not page.open
    assert all(address.startswith(("#", "data:image/png")) for address in page.addresses)
    assert page.tags.count("svg") == 4
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", text)
    assert text.index("Research use only") < text.index("Everything is drawn.") < text.index("<h2>")
    assert "&lt;i&gt;read&lt;/i&gt;" in text
    assert 'title="evaluation#/sites/north/auc; told"' in text
    assert text == render_card(made[0], folder)


def test_heat_is_shown_only_where_its_audit_passed(made, decide, folder):
    assert "Red shows where the network looked" in render_card(made[0], folder)
    (folder / "model.onnx").unlink()  # withheld heat is not even computed
    card = build_card(make_evidence(evaluation=evaluation(passed=False)), CONTRACT, decide(), POLICY)
    assert "Heat maps are withheld: Hits less those of chance: 0.02." in render_card(card, folder)


@pytest.fixture
def registered(folder, ledger, places, author):
    """The package on the shelf, its statements signed and cited by the ledger; where it lies."""
    for name in set(FILES) - {"contract.json", "golden.npz", "model.onnx"}:
        (folder / name).write_text(name)
    digest = digest_package(folder)
    package = shelf(places.var, digest)
    package.parent.mkdir(parents=True)
    folder.rename(package)
    sign_statements(package, make_evidence().statements, author)
    body = {"version": 1, "digest": digest, "evidence": digest_statements(package)}
    with ledger.writing() as writer:
        writer.append(Decision.REGISTERED, "t", body, author)
    return package


def test_a_card_is_made_of_statements_whose_signatures_hold(registered, ledger, places):
    page = present(ledger, places.var, POLICY, 1)
    card = json.loads(present(ledger, places.var, POLICY, 1, as_json=True))
    assert "Nobody has asked for this version" in page
    assert card["Figures"]["Overall"]["auc"]["value"] == 0.91
    assert card["ReleaseInfo"]["ReleaseStage"][0]["text"].startswith("Registered")
    (registered / "golden.npz").write_bytes(b"other images")
    with pytest.raises(TrustError, match=r"golden\.npz changed"):
        present(ledger, places.var, POLICY, 1)
