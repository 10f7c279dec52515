"""A reader says over HTTP what an answer is worth; a site sees and judges its own answers alone."""

import asyncio
import json

import httpx
import pytest
from jsonschema import Draft202012Validator

from imaging.config import Sites, read_sites
from monitoring.journal import open_journal, pseudonym
from monitoring.labels import read_labels
from monitoring.records import Assessment, open_records
from services.guard import Quotas
from services.routes import Routes
from services.slots import Slots

NORTH = {"X-Site": "north"}


def path_of(number):
    return f"/v1/predictions/{number}/assessment"


def ask(gateway, number, body, **headers):
    return gateway.client.post(path_of(number), content=json.dumps(body), headers={**NORTH, **headers})


@pytest.fixture
def answer(gateway):
    """One answer of the classification at north."""
    reply = gateway.post()
    assert reply.status_code == 200
    return reply.json()


def test_an_assessment_is_kept_with_its_truth_and_read_back(gateway, places, answer):
    told = ask(gateway, answer["id"], {"verdict": "rejected", "reason": "A vessel.", "reader": "Dr. Grey"})
    assert told.status_code == 201
    kept = told.json()
    assert kept["truth"] == int(not answer["positive"])
    assert kept["reader"] == pseudonym(places.var, "north", "reader Dr. Grey")
    assert kept["notice"] == "research use only"
    seen = gateway.client.get(path_of(answer["id"]), headers=NORTH).json()
    assert seen["assessments"] == [{name: value for name, value in kept.items() if name != "notice"}]
    rows = read_labels(open_records(places.var), "nodes", "north", answer["version"])
    assert [(row["truth"], row["verdict"]) for row in rows if row["prediction"] == answer["id"]] == [
        (kept["truth"], "rejected")
    ]


def test_the_same_assessment_again_is_not_another_one(gateway, answer):
    body = {"verdict": "corrected", "truth": 1}
    assert [ask(gateway, answer["id"], body).status_code for _ in range(3)] == [201, 200, 200]
    seen = gateway.client.get(path_of(answer["id"]), headers=NORTH).json()
    assert len(seen["assessments"]) == 1


def test_an_answer_takes_a_hundred_assessments_and_tells_the_newest_fifty(gateway, places, answer):
    told = [{"verdict": "accepted", "reason": f"Look {number}."} for number in range(100)]
    assert {ask(gateway, answer["id"], body).status_code for body in told} == {201}
    reply = ask(gateway, answer["id"], {"verdict": "accepted", "reason": "One more."})
    assert (reply.status_code, "has 100 assessments" in reply.json()["detail"]) == (422, True)
    assert ask(gateway, answer["id"], told[-1]).status_code == 200  # nothing new
    seen = gateway.client.get(path_of(answer["id"]), headers=NORTH).json()["assessments"]
    assert [one["reason"] for one in seen] == [body["reason"] for body in told[50:]]
    kept = open_records(places.var).read(Assessment)
    assert sum(one.prediction == answer["id"] for one in kept) == 100


def test_assessments_count_on_their_sites_quota(places):
    routes = Routes(places, Slots(places, "openvino/f32"))
    sites = read_sites(places).sites
    routes.predictor.quotas = Quotas(Sites(sites=sites | {"north": sites["north"].model_copy(
        update={"per_second": 3.0})}))  # fmt: skip

    async def post(site, count):
        transport = httpx.ASGITransport(app=routes.build())
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            body = {"verdict": "accepted"}
            asked = [client.post(path_of("none"), json=body, headers={"X-Site": site}) for _ in range(count)]
            return [reply.status_code for reply in await asyncio.gather(*asked)]

    told = asyncio.run(post("north", 10))
    assert (told.count(404), told.count(429)) == (3, 7)
    assert asyncio.run(post("east", 10)) == [404] * 10


def test_a_label_that_comes_late_is_taken_too(gateway, answer):
    told = ask(gateway, answer["id"], {"verdict": "labelled", "truth": 0}).json()
    assert (told["verdict"], told["truth"], told["source"]) == ("labelled", 0, "http")


def test_another_sites_answer_and_no_answer_look_the_same(gateway, answer):
    shown = set()
    for number in (answer["id"], "00000000-0000-0000-0000-000000000000"):
        looked = gateway.client.get(path_of(number), headers={"X-Site": "east"})
        asked = ask(gateway, number, {"verdict": "accepted"}, **{"X-Site": "east"})
        for reply in (looked, asked):
            assert reply.status_code == 404
            told = reply.json() | {"request_id": ""}
            assert told["type"] == "/problems/unknown-prediction"
            shown.add(json.dumps(told).replace(number, "ID"))
    assert len(shown) == 1


@pytest.mark.parametrize(
    ("body", "status"),
    [('{"verdict": "accepted"', 400), ("[]", 400), ('{"verdict": "fine"}', 400), ("{}", 400),
     ('{"verdict": "corrected", "truth": 2}', 400), ('{"verdict": "corrected", "truth": true}', 400),
     ('{"verdict": "accepted", "site": "east"}', 400), ('{"verdict": "labelled"}', 422),
     ('{"verdict": "corrected"}', 422),
     ('{"verdict": "accepted", "reason": "' + "x" * 501 + '"}', 400),
     ('{"verdict": "accepted", "reason": "' + "x" * 20_000 + '"}', 413)],
)  # fmt: skip
def test_a_wrong_body_is_refused_and_nothing_is_kept(gateway, places, answer, body, status):
    before = len(open_records(places.var).read(Assessment))
    reply = gateway.client.post(path_of(answer["id"]), content=body, headers=NORTH)
    assert reply.status_code == status
    assert status != 413 or reply.json()["detail"] == "The body is over 16 KiB. Send less."
    assert reply.headers["content-type"] == "application/problem+json"
    assert len(open_records(places.var).read(Assessment)) == before


def test_without_a_site_nobody_judges(gateway, answer):
    for method in ("GET", "POST"):
        reply = gateway.client.request(method, path_of(answer["id"]), content='{"verdict": "accepted"}')
        assert reply.status_code == 400


def test_a_mask_is_judged_without_a_truth(gateway):
    number = gateway.post("discs").json()["id"]
    for verdict in ("accepted", "corrected"):
        assert ask(gateway, number, {"verdict": verdict}).json()["truth"] is None
    assert ask(gateway, number, {"verdict": "corrected", "truth": 1}).status_code == 422


def test_an_image_of_a_locked_subject_takes_no_label(gateway, places):
    evaluation = json.loads((places.stage("nodes", "evaluate") / "evaluation.json").read_text())
    locked = next(row["subject"] for row in evaluation["predictions"] if row["site"] == "north")
    number = gateway.post(X_Subject=locked).json()["id"]
    reply = ask(gateway, number, {"verdict": "accepted"})
    assert reply.status_code == 422
    assert "locked test set" in reply.json()["detail"]
    assert open_journal(places.var).find(number)["subject"] == pseudonym(places.var, "north", locked)


def test_every_answer_and_problem_fits_the_openapi_document(gateway, answer):
    document = gateway.client.get("/openapi.json").json()
    described = document["paths"]["/v1/predictions/{number}/assessment"]
    replies = {
        "post": [ask(gateway, answer["id"], {"verdict": "accepted"}) for _ in range(2)]
        + [ask(gateway, answer["id"], {}), ask(gateway, "nothing", {"verdict": "accepted"})],
        "get": [gateway.client.get(path_of(answer["id"]), headers=NORTH)],
    }
    for method, got in replies.items():
        for reply in got:
            content = described[method]["responses"][str(reply.status_code)]["content"]
            schema = next(iter(content.values()))["schema"] | {"components": document["components"]}
            Draft202012Validator(schema).validate(reply.json())
