"""Who acts, by key or by token, and what they may do."""

import json
import time
from dataclasses import replace

import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from imaging.errors import Forbidden, NotAuthenticated
from imaging.vocabulary import Scope
from registry.access import Acting, act, act_by_token, admit
from registry.promotion import approve, request
from registry.registration import register
from registry.signing import create_signer

TASK, ISSUER, AUDIENCE = "brain-tissue", "https://idp.hospital.test", "formulary"


@pytest.fixture
def issuer(places):
    """An identity provider's key; its public half lies beside roles.yaml."""
    private = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(ECAlgorithm.to_jwk(private.public_key()))
    (places.root / "jwks.json").write_text(json.dumps({"keys": [{**public, "kid": "1", "use": "sig"}]}))
    roles = {"identities": {"author@test": ["register", "promote"], "auditor@test": ["read-audit"]},
             "issuers": [{"issuer": ISSUER, "audience": AUDIENCE, "keys": "jwks.json"}]}  # fmt: skip
    (places.root / "roles.yaml").write_text(yaml.safe_dump(roles))
    return private


def make_token(private, subject="committee@test", algorithm="ES256", key_id="1", **claims):
    now = int(time.time())
    told = {"sub": subject, "iss": ISSUER, "aud": AUDIENCE, "iat": now, "exp": now + 60,
            "scope": "approve read-audit", **claims}  # fmt: skip
    told = {name: value for name, value in told.items() if value is not None}
    return jwt.encode(told, private, algorithm, headers={"kid": key_id})


def test_without_roles_everybody_with_a_trusted_key_may_act(places, ledger, author):
    for scope in Scope:
        assert act(places, ledger, "author@test", scope).identity == "author@test"


def test_a_role_limits_what_an_identity_may_do(places, ledger, author, approver, issuer):
    act(places, ledger, "author@test", Scope.PROMOTE)
    with pytest.raises(Forbidden, match="may not approve"):
        act(places, ledger, "author@test", Scope.APPROVE)
    with pytest.raises(Forbidden, match="may not read-audit"):
        act(places, ledger, "approver@test", Scope.READ_AUDIT)  # trusted, and named nowhere


def test_a_token_names_the_person_and_an_attesting_key_signs(places, ledger, build, author, issuer):
    admit(places.var, ledger, "registry", attests=True)
    made = register(build("one"), ledger, TASK, author)
    request(Acting(places, ledger, author), TASK, made.version)
    signer = act_by_token(places, ledger, make_token(issuer), Scope.APPROVE)
    approve(Acting(places, ledger, signer, "read it"), TASK, made.version)
    event = ledger.events(TASK)[-1]
    assert (event.kind, event.actor) == ("approved", "committee@test")
    assert ledger.trusted_keys()[event.key].identity == "registry"
    ledger.verify()


def test_a_token_does_not_make_an_author_a_second_person(places, ledger, build, author, issuer):
    admit(places.var, ledger, "registry", attests=True)
    roles = yaml.safe_load((places.root / "roles.yaml").read_text())
    roles["identities"]["author@test"].append("approve")
    (places.root / "roles.yaml").write_text(yaml.safe_dump(roles))
    made = register(build("one"), ledger, TASK, author)
    request(Acting(places, ledger, author), TASK, made.version)
    signer = act_by_token(places, ledger, make_token(issuer, "author@test"), Scope.APPROVE)
    with pytest.raises(Forbidden, match="made or asked"):
        approve(Acting(places, ledger, signer, "mine"), TASK, made.version)


def test_a_plain_key_does_not_sign_for_others(places, ledger, author, issuer):
    with pytest.raises(Forbidden, match="No trusted key here signs for committee@test"):
        act_by_token(places, ledger, make_token(issuer), Scope.APPROVE)
    with pytest.raises(Forbidden, match="does not trust"), ledger.writing() as writer:
        writer.append("suspended", TASK, {"sites": ["*"]}, replace(author, speaks_for="committee@test"))


@pytest.mark.parametrize(
    "change",
    [{"exp": 1}, {"exp": None}, {"aud": "another"}, {"iss": "https://evil.test"}, {"sub": None},
     {"key_id": "2"}, {"iat": None}],
)  # fmt: skip
def test_a_token_that_is_not_ours_or_over_is_refused(places, ledger, author, issuer, change):
    admit(places.var, ledger, "registry", attests=True)
    with pytest.raises(NotAuthenticated):
        act_by_token(places, ledger, make_token(issuer, **change), Scope.APPROVE)


def test_forged_tokens_are_refused(places, ledger, author, issuer):
    admit(places.var, ledger, "registry", attests=True)
    stranger = ec.generate_private_key(ec.SECP256R1())
    symmetric = make_token("s" * 32, algorithm="HS256")
    bare = jwt.encode({"sub": "committee@test"}, None, "none", headers={"kid": "1"})
    for token in (make_token(stranger), symmetric, bare, "x", "a.b.c", ""):
        with pytest.raises(NotAuthenticated):
            act_by_token(places, ledger, token, Scope.APPROVE)


def test_a_token_without_the_scope_is_refused_and_grants_no_more_than_the_role(
    places, ledger, author, issuer
):
    admit(places.var, ledger, "registry", attests=True)
    with pytest.raises(Forbidden, match="no scope promote"):
        act_by_token(places, ledger, make_token(issuer), Scope.PROMOTE)
    with pytest.raises(Forbidden, match="auditor@test may not approve"):
        act_by_token(places, ledger, make_token(issuer, "auditor@test"), Scope.APPROVE)


def test_without_an_issuer_no_token_is_believed(places, ledger, author, issuer):
    (places.root / "roles.yaml").unlink()
    with pytest.raises(NotAuthenticated, match="not configured"):
        act_by_token(places, ledger, make_token(issuer), Scope.APPROVE)


def test_the_command_line_takes_a_token_from_the_environment(places, ledger, author, issuer, monkeypatch):
    admit(places.var, ledger, "registry", attests=True)
    monkeypatch.setenv("FORMULARY_TOKEN", make_token(issuer))
    assert act(places, ledger, "author@test", Scope.APPROVE).actor == "committee@test"


def test_nobody_gets_a_second_key_for_somebody_else(places, ledger, author, approver):
    (places.var / "keys" / "approver@test.pem").unlink()
    for name in ("approver@test", "Approver@Test"):
        with pytest.raises(Forbidden, match="has the trusted key"):
            admit(places.var, ledger, name)
    stolen = create_signer(places.var / "other", "approver@test")
    with ledger.writing() as writer:
        body = {"identity": "approver@test", "key": stolen.key_id, "public": stolen.public_pem}
        writer.append("key-trusted", "", body, author)
    assert stolen.key_id not in ledger.trusted_keys()


def test_a_name_in_other_letters_is_the_same_person(places, ledger, author):
    assert act(places, ledger, "Author@TEST").identity == "author@test"
