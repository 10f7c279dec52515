"""Decisions over HTTP: by token alone, with the meaning and the errors of the command line."""

import json
import time

import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from imaging.vocabulary import Kind
from registry.access import Acting, admit
from registry.actions import ACTIONS
from registry.ledger import open_ledger
from registry.promotion import request
from tests.tiny import train, train_another, write_root
from tests.tiny_gateway import Gateway

SCOPES = "approve promote read-audit"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Version 1 is registered and asked for; nobody approved it."""
    places = write_root(tmp_path_factory.mktemp("registry"), nodes=Kind.CLASSIFICATION)
    number, ledger = train(places, "nodes"), open_ledger(places.var)
    request(Acting(places, ledger, admit(places.var, ledger, "author@test")), "nodes", number)
    admit(places.var, ledger, "registry", attests=True)
    return places


@pytest.fixture(scope="module")
def issuer(places):
    private = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(ECAlgorithm.to_jwk(private.public_key()))
    (places.root / "jwks.json").write_text(json.dumps({"keys": [{**public, "kid": "1", "use": "sig"}]}))
    told = {"issuers": [{"issuer": "https://idp.test", "audience": "formulary", "keys": "jwks.json"}]}
    (places.root / "roles.yaml").write_text(yaml.safe_dump(told))
    return private


@pytest.fixture(scope="module")
def gateway(places, issuer):
    with Gateway(places) as running:
        yield running


@pytest.fixture
def ask(gateway, issuer):
    """Call an action with a token of somebody."""

    def call(name, /, who="committee@test", scope=SCOPES, **given):
        now = int(time.time())
        claims = {"sub": who, "iss": "https://idp.test", "aud": "formulary", "iat": now, "exp": now + 60,
                  "scope": scope}  # fmt: skip
        token = jwt.encode(claims, issuer, "ES256", headers={"kid": "1"})
        headers, path = {"Authorization": f"Bearer {token}"}, f"/v1/registry/{name}"
        if ACTIONS[name].reads:
            return gateway.client.get(path, params=given, headers=headers)
        return gateway.client.post(path, json=given, headers=headers)

    return call


@pytest.mark.parametrize("name", ACTIONS)
def test_every_action_answers_401_without_a_token(gateway, name):
    for headers in ({}, {"Authorization": "Bearer x.y.z"}, {"Authorization": "Basic YTpi"}):
        if ACTIONS[name].reads:
            answer = gateway.client.get(f"/v1/registry/{name}", headers=headers)
        else:
            answer = gateway.client.post(f"/v1/registry/{name}", json={}, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["type"] == "/problems/not-authenticated"


def test_a_version_is_approved_suspended_and_resumed_over_http_and_serving_follows(ask, gateway):
    assert gateway.post().json()["type"] == "/problems/not-approved"
    done = ask("approve", task="nodes", version=1, because="The committee read it.")
    assert (done.status_code, done.json()["sites"]) == (200, ["north", "east"])
    gateway.wait(lambda: gateway.post().status_code == 200)
    assert ask("suspend", task="nodes", sites=["north"], because="drift").status_code == 200
    gateway.wait(lambda: gateway.post().status_code == 503)
    told = gateway.post().json()
    assert told["type"] == "/problems/suspended"
    assert "committee@test: drift" in told["detail"]
    assert gateway.post(site="east").status_code == 200
    ask("resume", task="nodes", because="it was a loose cable")
    gateway.wait(lambda: gateway.post().status_code == 200)
    again = ask("approve", task="nodes", version=1, because="again")
    assert (again.status_code, again.json()["type"]) == (409, "/problems/conflict")
    history = ask("history", task="nodes").json()["events"]
    assert [event["actor"] for event in history if event["kind"] in ("approved", "suspended", "resumed")] == (
        ["committee@test"] * 3
    )


def test_a_scope_that_the_token_lacks_is_refused(ask):
    answer = ask("suspend", scope="read-audit", task="nodes", because="no")
    assert (answer.status_code, answer.json()["type"]) == (403, "/problems/forbidden")


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [({}, 400, "because"),
     ({"task": "nodes", "because": "why", "site": "north"}, 400, "did you mean 'sites'"),
     ({"task": "nodes", "because": "why", "sites": ["nroth"]}, 403, "nroth")],
)  # fmt: skip
def test_wrong_arguments_are_told_by_name(ask, given, status, words):
    answer = ask("suspend", **given)
    assert answer.status_code == status
    assert words in answer.json()["detail"]


def test_the_ledger_verifies_and_is_backed_up_over_http(ask, places):
    assert ask("verify").json()["packages"] == 1
    name = ask("backup").json()["name"]
    assert (places.var / "backups" / name).exists()
    restored = ask("restore", name=name, because="a drill")
    assert restored.json()["events"] == 0
    assert ask("restore", name="../formulary.db", because="no").status_code == 400
    assert ask("restore", name="a" * 300, because="no").status_code == 400


def test_each_other_decision_is_taken_over_http_too(ask, places):
    """After the tests above: version 1 serves; a second one is tried, promoted, rolled back and retired."""
    train_another(places, 7)
    reasoned = {"task": "nodes", "because": "the committee said so"}
    assert ask("diff", task="nodes", first=1, second=2).json()["facts"]["params.fit.seed"]
    assert ask("challenge", version=2, **reasoned).json()["sites"] == ["*", "north", "east"]
    for name in ("request", "promote"):  # asking again oneself changes nothing
        assert ask(name, who="asker@test", task="nodes", version=2).json()["sites"]["north"]["passed"]
    assert ask("reject", version=2, **reasoned).status_code == 200
    assert ask("request", who="asker@test", task="nodes", version=2).json()["asked"]
    assert ask("approve", version=2, **reasoned).json()["sites"] == ["north", "east"]
    assert ask("retire", version=2, **reasoned).json()["type"] == "/problems/conflict"
    assert ask("rollback", **reasoned).json()["sites"] == {"*": 1, "north": 1, "east": 1}
    assert ask("retire", version=2, **reasoned).status_code == 200
    assert ask("challenge", version=2, **reasoned).json()["type"] == "/problems/forbidden"


def test_every_action_stands_in_the_openapi_document(gateway):
    paths = gateway.client.get("/openapi.json").json()["paths"]
    assert {f"/v1/registry/{name}" for name in ACTIONS} <= set(paths)
