"""A new site: how many cases it takes, whether they look as they should, and what becomes its own."""

import csv
import json
import shlex
import uuid
from math import comb

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.optimize import minimize

from imaging.config import Params, read_params
from imaging.errors import DataError
from imaging.vocabulary import Decision, Judged, Kind
from monitoring.acceptance import Acceptance, Wishes, read_sample, size
from monitoring.conformal import calibrate, find_lowest
from monitoring.journal import Prediction, open_journal
from monitoring.recalibration import LOGISTIC, NOTHING, TEMPERATURE, choose_line, fit_line
from monitoring.records import Assessment, open_records
from monitoring.retraining import request_retraining
from registry.access import admit
from registry.ledger import open_ledger
from registry.package import shelf, write_contract
from registry.profiles import SiteProfile
from registry.projection import AXES
from tests.tiny import promise
from tests.tiny_registry import ROOT, make_places

TASK, SITE, DIGEST = "lung-nodule", "harbour", "sha256:" + "1" * 64


@pytest.fixture
def places(tmp_path):
    """Version 1 is registered and serves harbour; its reference has 300 subjects of other sites."""
    places = make_places(tmp_path)
    ledger, package = open_ledger(places.var), shelf(places.var, DIGEST)
    author, approver = (admit(places.var, ledger, f"{who}@test") for who in ("author", "approver"))
    body = {"version": 1, "digest": DIGEST}
    with ledger.writing() as writer:
        writer.append(Decision.REGISTERED, TASK, body, author)
        asked = writer.append(Decision.REQUESTED, TASK, {**body, "sites": [SITE]}, author)
        writer.append(Decision.APPROVED, TASK, {**body, "sites": [SITE], "asked": asked.seq}, approver)
    package.mkdir(parents=True)
    write_contract(promise(Kind.CLASSIFICATION, task=TASK, classes=("none", "nodule")), package)
    table = pd.DataFrame(np.random.default_rng(1).normal(size=(300, 8)), columns=list(AXES))
    table["subject"] = [f"n{number}" for number in range(300)]
    table.assign(site="north", sha256="0", split="validation").to_parquet(package / "reference.parquet")
    policy = (ROOT / "registry" / "policies" / f"{TASK}.yaml").read_text()
    (places.policies / f"{TASK}.yaml").write_text(policy)
    return places


@pytest.fixture
def answered(places):
    """Write answers, and the truth of some: scores are probabilities bent by a line in logits."""

    def write(positives, negatives, line=(0.0, 1.0), labelled=None, shift=0.0, seed=2):
        rng = np.random.default_rng(seed)
        truth = rng.permutation(np.repeat([1, 0], [positives, negatives]))
        honest = rng.normal(
            np.where(truth == 1, 2.5, -2.5), np.sqrt(5)
        )  # log odds of the truth at a prevalence of a half
        scores = 1 / (1 + np.exp(-(line[0] + line[1] * honest)))
        rows = []
        for number, score in enumerate(scores.tolist()):
            axes = dict(zip(AXES, rng.normal(shift, 1, 8).tolist(), strict=True))
            rows.append(Prediction(
                id=str(uuid.UUID(int=rng.integers(2**62).item())), request_id="r", task=TASK, site=SITE,
                version=1, package=DIGEST, engine="openvino/f32", subject=f"{seed}{number:063x}",
                image=f"{number + 7:064x}", columns={"probability": score, **axes}, stages_ms={"engine": 1.0},
            ))  # fmt: skip
        open_journal(places.var).append(rows)
        told = [Assessment(task=TASK, site=SITE, version=1, prediction=row.id, source="csv",
                           verdict=Judged.LABELLED, truth=int(one))
                for row, one in zip(rows, truth, strict=True)]  # fmt: skip
        open_records(places.var).append(told[:labelled])
        return scores, truth

    return write


@pytest.fixture
def accept(places):
    def look(**wishes):
        place = (TASK, SITE, 1)
        return Acceptance(places, open_records(places.var), open_ledger(places.var), place).draft(
            Wishes(**wishes)
        )

    return look


@pytest.mark.parametrize(("truth", "bound", "cases"), [(0.9, 0.8, 82), (0.92, 0.8, 57), (0.95, 0.9, 179)])
def test_the_sample_size_is_the_smallest_with_power_by_the_exact_binomial_test(truth, bound, cases):
    def tail(n, least, share):
        return sum(comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(least, n + 1))

    def power(n):
        least = next(k for k in range(n + 2) if tail(n, k, bound) <= 0.05)
        return tail(n, least, truth)

    assert size(truth, bound) == cases
    assert power(cases) >= 0.8
    assert all(power(n) < 0.8 for n in range(5, cases))


def test_alike_images_ask_for_more_and_what_cannot_be_shown_is_refused():
    assert size(0.9, 0.8, effect=1.5) == 123
    with pytest.raises(DataError, match="does not exceed"):
        size(0.8, 0.8)


def test_first_cases_that_look_otherwise_are_told_apart_from_those_that_do_not(answered, accept):
    answered(30, 70)
    told = accept().evidence["reference"]
    assert (told["compared"], told["differs"], told["of"], told["reference"]) == (
        True,
        False,
        "all sites",
        300,
    )
    answered(30, 70, shift=0.5, seed=3)
    assert accept(subjects=1000).evidence["reference"]["differs"]


def test_a_package_without_embeddings_is_not_compared_and_that_is_said(places, answered, accept):
    answered(30, 70)
    path = shelf(places.var, DIGEST) / "reference.parquet"
    pd.read_parquet(path).drop(columns=list(AXES)).to_parquet(path)
    told = accept().evidence["reference"]
    assert (told["compared"], told["why"]) == (False, "the package keeps no embeddings")


def test_a_subject_is_one_row_and_a_later_profile_is_made_from_the_score_before_the_first(places):
    usual = {"request_id": "r", "task": TASK, "site": SITE, "version": 1, "package": DIGEST,
             "engine": "e", "stages_ms": {}}  # fmt: skip
    columns = {"probability": 0.9, "raw_probability": 0.4, "profile": 1.0}
    open_journal(places.var).append([
        Prediction(id="a", subject="1", image="a", columns={"probability": 0.2}, **usual),
        Prediction(id="b", subject="1", image="b", columns={"probability": 0.3}, **usual),
        Prediction(id="c", subject="2", image="c", columns=columns, **usual),
    ])  # fmt: skip
    records = open_records(places.var)
    records.append([Assessment(task=TASK, site=SITE, version=1, prediction="b", source="csv",
                               verdict=Judged.LABELLED, truth=1)])  # fmt: skip
    sample = read_sample(records, TASK, SITE, 1)
    assert sample.ids.tolist() == ["b", "c"]
    assert sample.raw.tolist() == [0.3, 0.4]
    assert sample.truth[0] == 1
    assert np.isnan(sample.truth[1])


@pytest.mark.parametrize("method", [TEMPERATURE, LOGISTIC])
def test_the_fitted_line_is_that_of_a_general_optimiser(method):
    rng = np.random.default_rng(5)
    x = rng.normal(0, 2, 400)
    truth = (rng.random(400) < 1 / (1 + np.exp(-(0.8 + 0.5 * x)))).astype(int)
    score = 1 / (1 + np.exp(-x))

    def loss(w):
        z = (w[-1] * x) + (w[0] if len(w) == 2 else 0)
        return np.logaddexp(0, -z * (2 * truth - 1)).sum()

    start = [0.0, 1.0] if method == LOGISTIC else [1.0]
    asked = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x
    wanted = tuple(asked) if method == LOGISTIC else (0.0, asked[0])
    assert fit_line(score, truth, method) == pytest.approx(wanted, abs=1e-4)


def test_recalibration_is_chosen_only_where_held_out_subjects_confirm_it():
    rng = np.random.default_rng(6)
    honest = rng.beta(1, 1, 400)
    truth = (rng.random(400) < honest).astype(int)
    logits = np.log(honest / (1 - honest))
    assert choose_line(honest, truth)[1]["chosen"] == NOTHING
    line, told = choose_line(1 / (1 + np.exp(-(2 * logits - 1.5))), truth)
    assert told["chosen"] == LOGISTIC
    assert line == pytest.approx((0.75, 0.5), abs=0.25)
    line, told = choose_line(honest[:80], truth[:80])
    assert (line, told["chosen"]) == ((0.0, 1.0), NOTHING)
    assert "fewer than 50" in told["why"]


def test_classes_that_do_not_overlap_have_no_line():
    score = np.concatenate([np.linspace(0.01, 0.4, 60), np.linspace(0.6, 0.99, 60)])
    assert fit_line(score, np.repeat([0, 1], 60), LOGISTIC) == (0.0, 1.0)


def test_a_bent_score_is_recalibrated_and_by_that_alone_no_decision_changes(answered, accept):
    scores, _ = answered(120, 180, line=(-1.5, 2.0))
    draft = accept()
    assert draft.evidence["recalibration"]["chosen"] == LOGISTIC
    profile = draft.profile
    assert profile.slope < 1
    before, after = scores >= 0.5, profile.recalibrate(scores) >= profile.threshold
    assert (before == after).all()
    told = draft.evidence["recalibration"]["held_out_log_loss"]
    assert told[LOGISTIC] < told[NOTHING]
    assert draft.evidence["contract"]["sensitivity"] == draft.evidence["profile"]["sensitivity"]


def test_a_threshold_keeps_the_sensitivity_and_held_out_subjects_say_so(answered, accept):
    scores, truth = answered(120, 180, line=(-2.5, 1.0), seed=3)
    draft = accept(sensitivity=0.9, recalibrate=False)
    share = (scores[truth == 1] >= draft.profile.threshold).mean()
    assert 0.9 <= share < 0.92
    told = draft.evidence
    assert told["contract"]["sensitivity"] < 0.7
    assert abs(told["profile"]["sensitivity"] - 0.9) < 0.06
    assert not told["contract"]["passed"]
    assert "and 0.7 is asked for" in told["contract"]["reasons"][0]
    assert told["profile"]["passed"]


def test_too_few_labels_are_counted_and_nothing_is_guessed(answered, accept):
    answered(60, 90, labelled=40)
    told = accept().evidence
    assert told["recalibration"]["chosen"] == NOTHING
    assert "rests on" in told["contract"]["reasons"][0]
    assert not told["contract"]["passed"]
    with pytest.raises(DataError, match=r"more positive subjects and .* more negative subjects are missing"):
        accept(alpha=0.1)
    with pytest.raises(DataError, match=r"rests on 20 labelled positives; \d are missing"):
        accept(sensitivity=0.9)


def test_without_any_label_the_evidence_says_so(answered, accept):
    answered(20, 30, labelled=0)
    draft = accept()
    assert draft.evidence["contract"]["reasons"] == ["no labels"]
    assert draft.profile == SiteProfile(site=SITE)


def test_abstention_is_calibrated_on_the_site_and_its_sets_are_told(answered, accept):
    answered(120, 180, line=(-1.5, 2.0))
    draft = accept(alpha=0.1)
    assert (draft.profile.abstention.positives, draft.profile.abstention.negatives) == (120, 180)
    told = draft.evidence["sets_on_calibration_subjects"]
    assert 0.89 <= told["positive"] <= 0.93
    assert 0.93 <= told["negative"] <= 0.96  # more than asked: a set that is not the answer has both classes


@pytest.mark.parametrize("sensitivity", [0.99, 0.4])
def test_the_evidence_of_the_sets_is_of_the_rule_that_answers(answered, accept, sensitivity):
    scores, truth = answered(120, 180)
    draft = accept(alpha=0.2, sensitivity=sensitivity, recalibrate=False)
    limits, told = draft.profile.abstention, draft.evidence["sets_on_calibration_subjects"]
    positive, negative = scores >= limits.positive_from, scores <= limits.negative_to
    answer, plain = scores >= draft.profile.threshold, (positive == negative).mean()
    positive, negative = positive | (negative & answer), negative | (positive & ~answer)
    assert told == {"positive": positive[truth == 1].mean(), "negative": negative[truth == 0].mean(),
                    "abstained": (positive == negative).mean()}  # fmt: skip
    assert told["abstained"] > plain
    served = [draft.profile.tell(one, one >= draft.profile.threshold) for one in scores.tolist()]
    assert told["abstained"] == np.mean([one["abstained"] for one in served])


@pytest.mark.parametrize("kept", [0.99, 0.9, 0.5])
def test_coverage_of_each_class_stays_at_or_above_nominal_wherever_the_threshold_lies(kept):
    rng, held, alpha = np.random.default_rng(4), [], 0.1
    for _ in range(400):
        known, new = (np.concatenate([rng.beta(3, 2, 100), rng.beta(2, 6, 150)]) for _ in range(2))
        truth = np.repeat([1, 0], [100, 150])
        threshold = find_lowest(known[truth == 1], 1 - kept)
        profile = SiteProfile(site=SITE, abstention=calibrate(known, truth, alpha))
        told = [profile.tell(one, one >= threshold) for one in new.tolist()]
        for one, answer in zip(told, new >= threshold, strict=True):
            assert one["abstained"] or one["prediction_set"] == ["positive" if answer else "negative"]
        held.append(["positive" in one["prediction_set"] for one in told[:100]])
        held.append(["negative" in one["prediction_set"] for one in told[100:]])
    for of_class in (held[::2], held[1::2]):
        assert np.mean(of_class) >= 1 - alpha - 0.003  # the simulation's


def test_a_draft_is_signed_with_its_evidence_and_survives_the_file(places, answered, accept, tmp_path):
    from registry.profiles import read_draft, write_draft

    answered(60, 60)
    draft = accept(alpha=0.2).sign(admit(places.var, open_ledger(places.var), "author@test"))
    write_draft(draft, tmp_path / "draft.json")
    assert read_draft(tmp_path / "draft.json") == draft


def test_masks_have_no_operating_point(places):
    write_contract(promise(Kind.SEGMENTATION, task=TASK), shelf(places.var, DIGEST))
    with pytest.raises(DataError, match="no operating point"):
        Acceptance(places, open_records(places.var), open_ledger(places.var), (TASK, SITE, 1))


def test_a_retraining_request_names_rows_command_and_what_is_missing(places, answered):
    answered(20, 30, labelled=10)
    split = places.stage(TASK, "split")
    split.mkdir(parents=True)
    usual = {"image": "i", "mask": "m", "row": 0, "site_kind": "external", "scanner": "s", "acquired": "2024",
             "age_band": "40-59", "sex": "F", "modality": "CT", "spacing_mm": 2.0, "label": 1,
             "licence": "none", "redistributable": True, "simulated": True}  # fmt: skip
    rows = [{**usual, "sha256": f"{number}", "subject": f"h{number // 2}", "site": SITE, "split": "external"}
            for number in range(12)]  # fmt: skip
    pd.DataFrame([*rows, {**rows[0], "site": "north"}]).to_parquet(split / "manifest.parquet")
    folder, body = request_retraining(places, open_records(places.var), open_ledger(places.var), (TASK, SITE),
                                      {"because": "The scanner is another one.", "since": ""})  # fmt: skip
    assert body == json.loads((folder / "request.json").read_text())
    assert (body["version"], body["package"]) == (1, DIGEST)
    assert (body["rows"]["count"], body["rows"]["labelled"]) == (50, 10)
    assert (body["cohort"]["images"], body["cohort"]["subjects"]) == (12, 6)
    assert body["missing"][0].startswith("the pixels of all 50 answers")
    assert body["missing"][1] == "the truth of 40 of 50 answers"
    with (folder / "rows.csv").open() as file:
        told = list(csv.DictReader(file))
    assert [row["truth"] for row in told[9:11]] == [told[9]["truth"], ""]
    assert len({row["image"] for row in told}) == 50
    hold_command_to_the_pipeline(body["command"])


def hold_command_to_the_pipeline(command):
    """DVC itself takes the overrides, the parameters stay typed, and the stage is one of dvc.yaml."""
    from dvc.utils.hydra import to_hydra_overrides

    head, parts = shlex.split(command)[:5], shlex.split(command)[5:]
    assert head[:4] == ["dvc", "exp", "run", "--name"]
    changes = [parts[at + 1] for at, part in enumerate(parts) if part == "--set-param"]
    to_hydra_overrides(changes)  # raises on what Hydra cannot read
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for change in changes:
        *path, last = change.removeprefix("+").partition("=")[0].split(".")
        section = params
        for name in path:
            section = section.setdefault(name, {}) if change.startswith("+") else section[name]
        assert (last in section) is not change.startswith("+")
        section[last] = int(change.partition("=")[2])
    typed = Params.model_validate(params).task(TASK)
    assert typed.split.local == {SITE: 3}
    assert typed.fit.seed == read_params_of(ROOT).task(TASK).fit.seed + 1
    stage, _, key = parts[-1].partition("@")
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert "foreach" in stages[stage]
    assert key in params["tasks"]


def read_params_of(root):
    from imaging.config import Places

    return read_params(Places(root, root / "build", root / "var"))


def test_a_retraining_request_without_rows_is_refused(places, answered):
    answered(5, 5)
    with pytest.raises(DataError, match="answered nothing"):
        request_retraining(places, open_records(places.var), open_ledger(places.var), (TASK, SITE),
                           {"because": "Why not.", "since": "2999-01-01"})  # fmt: skip
