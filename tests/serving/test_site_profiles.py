"""A site's profile, from its first cases to its answers: one drafts it, another stores it, and only there."""

import csv
import json

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

from imaging.vocabulary import Kind, Modality
from monitoring.journal import open_journal
from monitoring.site_commands import accept, retrain, size
from registry.access import Acting, admit
from registry.actions import ACTIONS, perform
from registry.engines import Answers
from registry.ledger import open_ledger
from registry.profiles import SiteProfile
from services.findings import encode, find, take
from services.offline import predict_file, replay
from tests.tiny import draw_case, promise, promote, train, write_root
from tests.tiny_gateway import NPY, Gateway, draw_pixels

CASES = 160


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    places = write_root(tmp_path_factory.mktemp("profiled"), nodes=Kind.CLASSIFICATION)
    promote(places, "nodes", train(places, "nodes"))
    return places


@pytest.fixture(scope="module")
def gateway(places):
    with Gateway(places) as running:
        yield running


def draw(number):
    pixels, _, label = draw_case(Kind.CLASSIFICATION, np.random.default_rng([9, number]))
    return encode(pixels, NPY, 2.0, Modality.CT), label


def ask(gateway, number, site="north"):
    told = gateway.post(body=draw(number)[0], site=site, X_Subject=f"person {number}")
    assert told.status_code == 200, told.text
    return told.json()


def strip(told):
    return {name: value for name, value in told.items() if name not in ("id", "request_id")}


def run(places, command, *arguments):
    environment = {"FORMULARY_ROOT": str(places.root), "FORMULARY_VAR": str(places.var)}
    done = CliRunner().invoke(command, [*arguments, "--json"], env=environment, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def store(places, draft):
    ledger, action = open_ledger(places.var), ACTIONS["profile"]
    approver = Acting(places, ledger, admit(places.var, ledger, "approver@test"), "Read with the site.")
    return perform(
        action, approver, action.arguments(task="nodes", draft=draft, because="Read with the site.")
    )


@pytest.fixture(scope="module")
def profiled(places, gateway, tmp_path_factory):
    """North's first cases, their late labels as a file, and the profile that came of them."""
    first = [ask(gateway, number) for number in range(CASES)]
    east = [strip(ask(gateway, number, "east")) for number in range(5)]
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prediction", "truth"])
        writer.writerows([told["id"], draw(number)[1]] for number, told in enumerate(first))
    told = run(places, accept, "nodes", "1", "--site", "north", "--labels", str(path), "--threshold",
               "--abstain", "0.1", "--identity", "author@test")  # fmt: skip
    assert store(places, told["draft"])["number"] == 1
    gateway.wait(lambda: "profile" in ask(gateway, 0))
    return first, east, told


def test_answers_of_the_site_follow_its_profile_and_say_so(places, gateway, profiled):
    first, _, draft = profiled
    profile, before = draft["profile"], first[1]
    after = ask(gateway, 1)
    assert (after["profile"], after["threshold"]) == (1, profile["threshold"])
    assert before["threshold"] != after["threshold"]
    assert after["package"] == before["package"]
    assert after["uncertainty"] == before["uncertainty"]
    raw = before["probabilities"]["disc"]
    logit = profile["intercept"] + profile["slope"] * np.log(raw / (1 - raw))
    assert after["probabilities"]["disc"] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
    assert sum(after["probabilities"].values()) == pytest.approx(1)
    row = open_journal(places.var).newest("nodes", "north", 1)[0]
    assert row["id"] == after["id"]
    assert row["columns"]["probability"] == pytest.approx(after["probabilities"]["disc"])
    assert row["columns"]["raw_probability"] == pytest.approx(raw)
    assert row["columns"]["threshold"] == profile["threshold"]


def test_an_answer_that_abstains_says_so_decides_nothing_and_is_counted(places, gateway, profiled):
    schema = gateway.client.get("/openapi.json").json()
    answer = jsonschema.Draft202012Validator(
        {"$ref": "#/components/schemas/Answer", "components": schema["components"]}
    )
    count = gateway.count("formulary_abstentions_total", task="nodes", site="north")
    told = [ask(gateway, number) for number in range(CASES)]
    for one in told:
        answer.validate(one)
        assert one["abstained"] is (len(one["prediction_set"]) != 1)
        assert (one["positive"] is None) is one["abstained"]
        alone = ["positive" if one["positive"] else "negative"]
        assert one["abstained"] or one["prediction_set"] == alone
        assert "90 % of the prediction sets hold the truth" in one["guarantee"]
    abstained = sum(one["abstained"] for one in told)
    assert 0 < abstained < CASES / 2
    assert gateway.count("formulary_abstentions_total", task="nodes", site="north") == count + abstained
    rows = open_journal(places.var).newest("nodes", "north", CASES)
    assert sum(row["columns"]["abstained"] for row in rows) == abstained


def test_the_sets_hold_the_truth_of_each_class_as_promised(gateway, profiled):
    told = [(ask(gateway, number), draw(number)[1]) for number in range(1000, 1300)]
    for label, name in enumerate(("negative", "positive")):
        held = [name in one["prediction_set"] for one, truth in told if truth == label]
        assert np.mean(held) > 0.9 - 0.09  # of one calibration sample; its mean stands in the unit tests


def test_another_site_is_answered_as_before_bit_by_bit(gateway, profiled):
    _, east, _ = profiled
    assert [strip(ask(gateway, number, "east")) for number in range(5)] == east
    assert all("profile" not in told for told in east)


def test_rows_from_before_and_after_replay_by_the_profile_that_held_then(places, gateway, profiled, tmp_path):
    path = tmp_path / "case.npy"
    path.write_bytes(draw(3)[0])
    for told in (profiled[0][3], after := ask(gateway, 3)):
        again = replay(places, told["id"], path)
        assert again["equal"]
        assert again["answer"].get("profile") == told.get("profile")
    alone = predict_file(places, path, "nodes", "north", None)
    assert alone["prediction_set"] == after["prediction_set"]
    assert alone["threshold"] == after["threshold"]
    assert "profile" not in predict_file(places, path, "nodes", "east", None)


def test_lesions_of_a_detector_follow_the_profile_as_its_image_does():
    contract = promise(Kind.DETECTION, classes=("background", "lesion"), threshold=0.5)
    logits = np.full((1, 3, 8, 8), -6.0, np.float32)
    logits[0, 0, 2, 2], logits[0, 0, 6, 6] = 1.0, -0.5  # scores .731 and .378
    taken = take(encode(draw_pixels(), NPY, 2.0, Modality.CT), NPY, contract)
    answers = Answers(logits, np.zeros((1, 32, 32), np.float32), np.zeros((1, 4), np.float32))
    plain = find(taken, answers, contract).answer
    profile = SiteProfile(number=2, site="north", intercept=1.0, threshold=0.6)
    told = find(taken, answers, contract, None, profile)
    assert [one["score"] for one in plain["lesions"]] == [0.7311]
    assert [one["score"] for one in told.answer["lesions"]] == [0.8808, 0.6225]  # logits 2 and .5
    assert told.answer["probability"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert (told.answer["threshold"], told.answer["profile"], told.positive) == (0.6, 2, True)
    assert told.columns["raw_probability"] == pytest.approx(1 / (1 + np.exp(-1)))


@pytest.mark.parametrize(("kind", "width"), [(Kind.CLASSIFICATION, 2), (Kind.DETECTION, 3)])
@pytest.mark.parametrize(("threshold", "limits"), [(0.6, (0.9, 0.95)), (0.8, (0.5, 0.6))])
def test_where_the_set_has_the_other_class_alone_answer_and_row_abstain(kind, width, threshold, limits):
    contract = promise(kind, classes=("background", "lesion"), threshold=0.5)
    logits = np.full((1, width, 8, 8), -6.0, np.float32)
    logits[0, 0, 2, 2] = 1.0  # a score of .731
    logits = logits if kind is Kind.DETECTION else np.array([[0.0, 1.0]], np.float32)
    abstention = {"alpha": 0.1, "positive_from": limits[0], "negative_to": limits[1],
                  "positives": 60, "negatives": 70}  # fmt: skip
    profile = SiteProfile(number=1, site="north", threshold=threshold, abstention=abstention)
    taken = take(encode(draw_pixels(), NPY, 2.0, Modality.CT), NPY, contract)
    answers = Answers(logits, np.zeros((1, 32, 32), np.float32), np.zeros((1, 4), np.float32))
    told = find(taken, answers, contract, None, profile)
    assert told.columns["abstained"] == 1
    assert told.answer["prediction_set"] == ["negative", "positive"]
    assert (told.answer["abstained"], told.answer["positive"]) == (True, None)
    assert told.positive is (threshold < 0.7)  # what the evidence keeps


def test_who_drafted_it_may_not_store_it_and_another_package_has_none(places, profiled):
    ledger, action = open_ledger(places.var), ACTIONS["profile"]
    author = Acting(places, ledger, admit(places.var, ledger, "author@test"), "Mine.")
    with pytest.raises(Exception, match="author@test made this profile"):
        perform(action, author, action.arguments(task="nodes", draft=profiled[2]["draft"], because="Mine."))
    assert ledger.verify() == ledger.generation()


def test_a_request_to_train_again_has_the_site_s_rows(places, profiled):
    told = run(places, retrain, "nodes", "--site", "north", "--because", "Its scanner is another one.")
    assert told["rows"]["labelled"] >= CASES
    assert told["cohort"]["images"] == 48
    assert "reference@nodes" in told["command"]


def test_a_sample_size_is_told():
    done = CliRunner().invoke(size, ["--truth", ".9", "--bound", ".8", "--share", ".3", "--json"])
    assert json.loads(done.stdout) == {"cases": 82, "total": 274}


def test_it_is_taken_back_like_it_came(places, gateway, profiled):
    ledger, action = open_ledger(places.var), ACTIONS["drop-profile"]
    approver = Acting(places, ledger, admit(places.var, ledger, "approver@test"), "No more.")
    perform(action, approver, action.arguments(task="nodes", sites=("north",), because="No more."))
    gateway.wait(lambda: "profile" not in ask(gateway, 1))
    assert strip(ask(gateway, 1)) == strip(profiled[0][1])
    assert not gateway.errors()
