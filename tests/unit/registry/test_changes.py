"""The change-control plan of docs/changes.md, held to updates as they come: real statements and contracts."""

import hashlib
import itertools
import json
import re

import numpy as np
import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from imaging.config import Places, read_params
from imaging.intervals import Estimate
from imaging.manifest import COLUMNS
from registry.changes import (
    ChangeKind,
    Clause,
    describe_changes,
    describe_population,
    judge_changes,
    name_kind,
)
from registry.evidence import Evidence, describe_provenance
from registry.package import write_contract
from tests.tiny import ROOT
from training.datasets import Dataset
from training.exporting import _contract

TASK = "lung-nodule"
PAGE = (ROOT / "docs" / "changes.md").read_text()
PLAN = TypeAdapter(tuple[Clause, ...]).validate_python(
    yaml.safe_load(re.search(r"```yaml\n(changes:.*?)```", PAGE, re.DOTALL).group(1))["changes"]
)
INSIDE = {"train": 40, "validation": 8, "test": 16}
SITES = {"north": INSIDE, "east": INSIDE, "south": INSIDE, "harbour": {"external": 24}}
SCORES = {"sensitivity": 0.9, "specificity": 0.85, "auc": 0.94, "calibration_error": 0.04}
RESNET = {"fit.architecture.name": "resnet"}
SAFE = "build/backbones/mobilenetv2.safetensors"
TOLERANCE = {"openvino/f32": 0.001, "openvino/bf16": 0.1, "onnxruntime/f32": 0.001, "torch/f32": 0.001}
NONE = "since the first approved version: no clause allows it"


def draw_rows(sites, label):
    """One image a subject; more subjects keep those of fewer."""
    for site, splits in sites.items():
        for split, count in splits.items():
            for number in range(count):
                subject = f"{site}-{split}-{number:03d}"
                usual = dict.fromkeys(COLUMNS, "drawn")
                yield usual | {"row": number, "sha256": hashlib.sha256(subject.encode()).hexdigest(),
                               "subject": subject, "site": site, "split": split,
                               "scanner": f"Meridian {site}", "sex": "FM"[number % 2],
                               "age_band": ("40-59", "60-74")[number % 2],
                               "label": label(subject, number), "redistributable": True,
                               "simulated": True}  # fmt: skip


def by_turns(subject, number):
    return number % 2


def mended(split):
    return lambda subject, number: 1 - number % 2 if subject == f"north-{split}-001" else number % 2


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A version as stages and registration make it: its contract, and what departments say of it."""
    import pandas as pd

    def version(params=(), sites=SITES, label=by_turns, point=(0.4845, 1.184), **told):
        root = tmp_path_factory.mktemp("version")
        places = Places(root=root, build=root / "build", var=root / "var")
        decisions = yaml.safe_load((ROOT / "params.yaml").read_text())
        for path, value in dict(params).items():
            *parents, name = path.split(".")
            section = decisions["tasks"][TASK]
            for parent in parents:
                section = section.setdefault(parent, {})
            section[name] = value
        (root / "params.yaml").write_text(yaml.safe_dump(decisions))
        (root / "requirements.lock").write_text(told.get("lock", "torch==2.13.0"))
        for stage in ("cohort", "split", "fit", "calibrate"):
            places.stage(TASK, stage).mkdir(parents=True)
        table = pd.DataFrame([row | told.get("row", {}) for row in draw_rows(sites, label)])
        for change in told.get("extra", ()):
            table.loc[0, list(change)] = list(change.values())
        table.to_parquet(places.stage(TASK, "split") / "manifest.parquet")
        calibration = {"threshold": point[0], "temperature": point[1]}
        (places.stage(TASK, "calibrate") / "calibration.json").write_text(json.dumps(calibration))
        limits = yaml.safe_dump({"simulation": "All of it.", "limits": told.get("limits", [])})
        (places.stage(TASK, "cohort") / "cohort.yaml").write_text(limits)
        (places.stage(TASK, "fit") / "history.json").write_text('{"epochs": []}')
        shape = told.get("shape", (1, 64, 64))
        data = Dataset(np.zeros((1, *shape), np.float32), np.zeros(1, np.int64), table)
        contract = _contract(places, TASK, read_params(places).task(TASK), data)
        places.stage(TASK, "package").mkdir()
        write_contract(contract, places.stage(TASK, "package"))
        body = {**describe_provenance(places, TASK), **told.get("statement", {})}
        return contract, Evidence(told.get("digest", "sha256:1"), {
            "package": json.loads(json.dumps(body)), "evaluation": evaluate(table, told.get("scores", {})),
        }, {})  # fmt: skip

    return version


def evaluate(table, scores):
    locked = table[table["split"].isin(["test", "external"])]
    rows = locked[["sha256", "subject", "site", "split"]].assign(truth=locked["label"]).to_dict("records")
    overall = {
        name: Estimate(estimate=value, low=value - 0.03, high=value + 0.03, subjects=72, confidence=0.95,
                       method="told").model_dump()
        for name, value in {**SCORES, **scores}.items() if value is not None
    }  # fmt: skip
    return {"overall": overall, "predictions": rows}


@pytest.fixture(scope="module")
def first(make):
    return make()


def grown(**splits):
    return {"sites": {**SITES, "north": {**INSIDE, **splits}}}


def set_params(**values):
    return {"params": {name.replace("__", "."): value for name, value in values.items()}}


NOTHING = {
    "the same again": {},
    "another seed of training": set_params(fit__seed=12),
    "another seed of the bootstrap and of the alarms": set_params(evaluate__seed=4, reference__seed=6),
    "other threads on another device": set_params(fit__threads=8, fit__device="cuda"),
    "another commit, with changes": {"statement": {"commit": "f" * 40, "modified": True}},
    "other weights, so another digest": {"digest": "sha256:2"},
    "another name for the size of the cohort": set_params(cohort__profile="full"),
    "another history of training": {"statement": {"history": {"epochs": [1, 2]}}},
}
ALLOWED = {
    "two fifths more training subjects at a known site": ("more-subjects", grown(train=60)),
    "fewer training subjects at a known site": ("more-subjects", grown(train=30)),
    "more locked subjects, all former ones kept": ("more-subjects", grown(test=20)),
    "a label of training corrected": ("corrected-labels", {"label": mended("train")}),
    "twice the epochs": ("epochs", set_params(fit__epochs=20)),
    "a lower learning rate": ("learning-rate", set_params(fit__learning_rate=0.001)),
    "larger batches": ("batch-size", set_params(fit__batch_size=64)),
    "rotation in augmentation": ("augmentation", set_params(fit__augmentation__rotate_deg=10)),
    "no flips in augmentation": ("augmentation", set_params(fit__augmentation__flip=False)),
    "the threshold a little higher": ("threshold", {"point": (0.6, 1.184)}),
    "the threshold at its limit": ("threshold", {"point": (0.7, 1.184)}),
    "another temperature": ("temperature", {"point": (0.4845, 1.7)}),
    "a library mended": ("libraries", {"lock": "torch==2.13.1"}),
    "one engine fewer": ("engines", set_params(qualify__engines=["openvino/f32"])),
    "longer windows of the drift test": ("alarm-window", set_params(reference__window=400)),
}
REFUSED = {
    "a ResNet": (f"fit.architecture changed from cnn to resnet {NONE}", {"params": RESNET}),
    "a wider network": ("fit.architecture.channels (width)",
                        set_params(fit__architecture__channels=[16, 32, 64, 96])),
    "a deeper network": ("(width)", set_params(fit__architecture__channels=[12, 24, 48, 96, 96])),
    "attention": ("fit.architecture.attention", set_params(fit__architecture__attention="se")),
    "a pretrained backbone": ("fit.architecture.pretrained (initial-weights) changed from None to build/back",
                              set_params(fit__architecture__pretrained=SAFE)),
    "weights to go on from": ("fit.start (initial-weights)", set_params(fit__start="build/w.safetensors")),
    "an ensemble": ("fit.architecture.members", set_params(
        fit__architecture__name="ensemble", fit__architecture__members=[{"name": "cnn"}, {"name": "vit"}])),
    "another dropout": (f"fit.architecture.dropout (retraining) changed from 0.1 to 0.5 {NONE}",
                        set_params(fit__architecture__dropout=0.5)),
    "larger images": (f"rows (input) changed from 64 to 96 {NONE}", {"shape": (1, 96, 96)}),
    "colour": (f"channels (input) changed from 1 to 3 {NONE}", {"shape": (3, 64, 64)}),
    "volumes": (f"depth (input) changed from 0 to 32 {NONE}", {"shape": (1, 32, 64, 64)}),
    "coarser pixels": ("spacing_high_mm (input)", set_params(check__spacing_high_mm=5.0)),
    "another range of pixels": ("check.pixel_high (input)", set_params(check__pixel_high=65535)),
    "another window": ("preparation.low_hu changed from -1000 to -1350",
                       set_params(preparation__low_hu=-1350.0)),
    "percentiles in place of a window": ("preparation.kind changed from window to percentiles", set_params(
        preparation={"kind": "percentiles", "low": 1.0, "high": 99.0})),
    "another offset of PNG": ("png_offset (preparation)", set_params(package__png_offset=0.0)),
    "another modality": (f"modality (input) changed from CT to MR {NONE}", set_params(modality="MR")),
    "another kind of task": ("kind (label-set)", set_params(kind="detection")),
    "a class more": ("classes (label-set)", set_params(classes=["no nodule", "nodule", "mass"])),
    "the classes in another order": ("classes (label-set)", set_params(
        classes=["nodule", "no nodule"], calibrate__positive=["nodule"])),
    "another positive class": ("positive (label-set)", set_params(calibrate__positive=["no nodule"])),
    "a new internal site": (f"site river changed from absent to internal {NONE}",
                            {"sites": {**SITES, "river": INSIDE}}),
    "a new external site": (f"site river changed from absent to external {NONE}",
                            {"sites": {**SITES, "river": {"external": 30}}}),
    "a site that left": (f"site south changed from internal to absent {NONE}",
                         {"sites": {name: SITES[name] for name in SITES if name != "south"}}),
    "an external site that became internal": (f"site harbour changed from external to internal {NONE}",
                                              {"sites": {**SITES, "harbour": INSIDE}}),
    "an internal site left out": ("split.left_out", set_params(split__left_out=["south"])),
    "local training at an external site": ("site harbour changed from external to external and internal", {
        "sites": {**SITES, "harbour": {"external": 24, "train": 9, "validation": 3}}}),
    "a new scanner": (f"scanner Aurora 3T changed from absent to present {NONE}",
                      {"extra": [{"scanner": "Aurora 3T"}]}),
    "children": (f"age band 0-17 (population) changed from absent to present {NONE}",
                 {"extra": [{"age_band": "0-17"}]}),
    "one sex only": (f"sex M (population) changed from present to absent {NONE}", {"row": {"sex": "F"}}),
    "another cohort": ("cohort.source (population)", set_params(cohort__source="data/elsewhere")),
    "twice the training subjects": (
        "training subjects at north (data) changed from 48 to 88 since the first approved version: "
        "clause more-subjects allows data by 50% at most", grown(train=80)),
    "a third of the training subjects": ("clause more-subjects", grown(train=10)),
    "the threshold far higher": (
        "threshold changed from 0.4845 to 0.75 since the first approved version: "
        "clause threshold allows threshold from 0.3 to 0.7", {"point": (0.75, 1.184)}),
    "the threshold far lower": ("clause threshold", {"point": (0.1, 1.184)}),
    "a temperature out of range": ("clause temperature", {"point": (0.4845, 3.0)}),
    "too many epochs": ("clause epochs allows fit.epochs from 5 to 40", set_params(fit__epochs=100)),
    "too high a learning rate": ("clause learning-rate", set_params(fit__learning_rate=0.1)),
    "another schedule": (f"fit.schedule (retraining) changed from one-cycle to cosine {NONE}",
                         set_params(fit__schedule="cosine")),
    "mixed precision": ("fit.mixed_precision (retraining)", set_params(fit__mixed_precision=True)),
    "another rule of the operating point": ("calibrate.sensitivity (operating-point)",
                                            set_params(calibrate__sensitivity=0.8)),
    "another intended use": ("intended_use (intended-use)",
                             set_params(package__intended_use="First reader.")),
    "another title": ("title (intended-use)", set_params(title="Nodules")),
    "limits unsaid": ("limits (intended-use)", {"limits": ["Adults only."]}),
    "a wider tolerance": ("tolerance.openvino/f32 (engine) changed from 0.001 to 0.1", set_params(
        package__tolerance={**TOLERANCE, "openvino/f32": 0.1})),
    "another precision": (f"evaluate.precision (engine) changed from f32 to bf16 {NONE}",
                          set_params(evaluate__precision="bf16")),
    "fewer golden cases": ("package.golden (engine)", set_params(package__golden=2)),
    "locked images dropped": (f"locked images kept (test-set) changed from 72 to 68 {NONE}", grown(test=12)),
    "a locked label corrected": (f"locked images kept (test-set) changed from 72 to 71 {NONE}",
                                 {"label": mended("test")}),
    "another seed of the split": (f"split.seed (test-set) changed from 1 to 2 {NONE}",
                                  set_params(split__seed=2)),
    "other shares of the split": ("split.train (test-set)", set_params(split__train=0.75)),
    "another confidence": ("evaluate.confidence (evaluation)", set_params(evaluate__confidence=0.9)),
    "robustness not measured": ("evaluate.robustness.subjects", set_params(evaluate__robustness={})),
    "heat maps not audited": ("evaluate.explanation.images", set_params(evaluate__explanation={})),
    "more false alarms allowed": ("reference.alpha (monitoring)", set_params(reference__alpha=0.05)),
    "a sensitivity that fell": (
        "sensitivity moved by -0.040 since the first approved version (0.900 to 0.860): clause scores allows",
        {"scores": {"sensitivity": 0.86}}),
    "a calibration that got worse": ("calibration_error moved by +0.040",
                                     {"scores": {"calibration_error": 0.08}}),
    "a score that is missing": ("auc was not evaluated in both versions: clause scores",
                                {"scores": {"auc": None}}),
    "parameters that the package was not made from": ("params (other)", {"statement": {"params": {}}}),
    "no word of whom it was made from": (f"population (other) changed from told to absent {NONE}",
                                         {"statement": {"population": {}}}),
    "training labels corrected, and worse": (
        "auc moved by -0.015 since the first approved version (0.940 to 0.925): "
        "clause corrected-labels allows images or labels, auc -0.01",
        {"label": mended("train"), "scores": {"auc": 0.925}}),
}  # fmt: skip


def without(clause):
    return tuple(one for one in PLAN if one.id != clause)


@pytest.mark.parametrize("label", NOTHING)
def test_what_never_matters_needs_no_clause(make, first, label):
    assert describe_changes(first, make(**NOTHING[label])) == []


@pytest.mark.parametrize("label", ALLOWED)
def test_a_change_is_inside_by_the_clause_that_allows_it_and_by_no_other(make, first, label):
    clause, told = ALLOWED[label]
    new = make(**told)
    assert judge_changes(first, new, PLAN) == []
    assert judge_changes(first, new, without(clause))


@pytest.mark.parametrize("label", REFUSED)
def test_a_change_outside_the_plan_is_refused_by_name(make, first, label):
    reason, told = REFUSED[label]
    new = make(**told)
    assert reason in "\n".join(judge_changes(first, new, PLAN))
    assert judge_changes(first, new, ()) == [], "without a plan the gate alone judges"


def test_the_table_has_both_sides_and_enough_of_each():
    assert len(NOTHING) + len(ALLOWED) >= 20
    assert len(REFUSED) >= 50


def test_a_refusal_names_every_change_and_not_what_is_allowed(make, first):
    told = judge_changes(first, make(params={**RESNET, "fit.epochs": 20}, point=(0.75, 1.184)), PLAN)
    assert [reason.split(" changed")[0] for reason in told] == ["threshold", "fit.architecture"]


def test_the_refusals_on_the_page_are_those_of_the_code(make, first):
    told = judge_changes(first, make(params=RESNET, point=(0.75, 1.184)), PLAN)
    assert sorted(told) == sorted(
        re.findall(r"^.* since the first approved version: .*$", PAGE, re.MULTILINE)
    )


def test_small_steps_do_not_add_up(make, first):
    steps = [first, make(**grown(train=56)), make(**grown(train=80))]
    assert [judge_changes(old, new, PLAN) for old, new in itertools.pairwise(steps)] == [[], []]
    assert judge_changes(first, steps[2], PLAN)


def test_the_bound_on_scores_holds_whatever_changed_and_a_clauses_own_only_where_it_is_used(make, first):
    assert judge_changes(first, make(scores={"auc": 0.925}), PLAN) == []
    assert judge_changes(first, make(scores={"sensitivity": 0.87}), PLAN) == [], "exactly at the bound"
    assert len(judge_changes(first, make(scores={"auc": 0.91, "sensitivity": 0.86}), PLAN)) == 2


def test_a_clause_may_name_the_sites_that_may_come(make, first):
    clause = Clause(id="river", allow="site", what=("site river",), why="w", protocol="p")
    scanner = Clause(id="its-scanner", allow="scanner", why="w", protocol="p")
    plan = (*PLAN, clause, scanner)
    assert judge_changes(first, make(sites={**SITES, "river": INSIDE}), plan) == []
    (reason,) = judge_changes(first, make(sites={**SITES, "hill": INSIDE}), plan)
    assert reason == ("site hill changed from absent to internal since the first approved version: "
                      "no clause allows it")  # fmt: skip


def test_a_bound_on_what_is_no_number_allows_nothing(make, first):
    clause = Clause(id="bounded", allow="architecture", high=3, why="w", protocol="p")
    assert "clause bounded" in judge_changes(first, make(params=RESNET), (clause,))[0]


def test_a_key_that_nobody_knows_is_a_change_that_only_its_name_allows(make, first):
    contract, evidence = make()
    evidence.statements["package"]["params"]["fit"]["ema"] = 0.99
    made_from = {name: section for name, section in evidence.statements["package"]["params"].items()
                 if name not in ("qualify", "reference")}  # fmt: skip
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    new = (
        contract.model_copy(update={"lineage": {**contract.lineage, "params": f"sha256:{digest}"}}),
        evidence,
    )
    assert judge_changes(first, new, PLAN) == [f"fit.ema (other) changed from absent to 0.99 {NONE}"]
    clause = Clause(id="average", allow="other", what=("fit.ema",), why="w", protocol="p")
    assert judge_changes(first, new, (*PLAN, clause)) == []


def test_every_parameter_and_promise_of_today_has_a_kind(first):
    def leaves(value, path):
        inner = (
            [leaf for key in value for leaf in leaves(value[key], f"{path}.{key}")]
            if isinstance(value, dict)
            else []
        )
        return inner or [path]

    params = read_params(Places(root=ROOT, build=ROOT / "build", var=ROOT / "var"))
    known = {
        leaf for task in params.tasks.values() for leaf in leaves(task.model_dump(mode="json"), "params")
    }
    known |= set(leaves(first[0].model_dump(mode="json"), "contract")) - {"contract.task"}
    assert len(known) > 80
    assert not [leaf for leaf in known if name_kind(leaf) is ChangeKind.OTHER], (
        "give it a kind in registry/changes.py"
    )


def test_the_population_is_counted_by_subject(tmp_path):
    import pandas as pd

    rows = [row for row in draw_rows(SITES, by_turns) for _ in range(2)]
    pd.DataFrame(rows).to_parquet(tmp_path / "manifest.parquet")
    told = describe_population(tmp_path / "manifest.parquet")
    assert told["sites"] == SITES
    assert told["age_band"] == ["40-59", "60-74"]
    assert told["sex"] == ["F", "M"]
    assert json.loads(json.dumps(told)) == told, "it goes into a statement"
    assert describe_population(tmp_path / "elsewhere.parquet") == {}


@pytest.mark.parametrize("wrong", [
    {"allow": "other"}, {"allow": "performance"}, {"low": 2, "high": 1}, {"metric": {"auc": 0}}, {"share": 0},
    {"allow": "anything"}, {"protocol": ""}, {"shares": 0.5}, {"high": float("inf")}, {"id": "Two words"},
])  # fmt: skip
def test_a_clause_that_means_nothing_is_refused(wrong):
    told = {"id": "c", "allow": "data", "why": "w", "protocol": "p"}
    Clause.model_validate(told)
    with pytest.raises(ValidationError):
        Clause.model_validate({**told, **wrong})


def test_the_page_lists_every_kind_of_change():
    table = PAGE.split("## What is a change")[1]
    assert re.findall(r"^\| `([a-z-]+)` \| .", table, re.MULTILINE)[1:] == [kind.value for kind in ChangeKind]
