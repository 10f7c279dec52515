"""Signatures hold for exactly the files that were signed, by exactly the keys that are trusted."""

import json
import random

import pytest

from imaging.errors import TrustError
from registry.evidence import read_evidence, verify_package
from registry.package import FILES, shelf, statements_folder
from registry.registration import register
from registry.signing import create_signer, seal, state, unseal

TASK = "brain-tissue"


@pytest.fixture
def package(ledger, build, author, places):
    made = register(build("one"), ledger, TASK, author)
    return shelf(places.var, made.digest)


def test_a_registered_package_verifies(package, ledger):
    evidence = verify_package(package, ledger)
    assert set(evidence.statements) == {"package", "evaluation", "qualification", "alarms"}
    assert set(evidence.signed_by.values()) == {"author@test"}


def test_a_flipped_bit_anywhere_is_refused(package, ledger):
    generator = random.Random(0)
    for name in FILES:
        whole = (package / name).read_bytes()
        for place in generator.sample(range(len(whole)), 5):
            broken = bytearray(whole)
            broken[place] ^= 1 << generator.randrange(8)
            (package / name).write_bytes(broken)
            with pytest.raises(TrustError, match=name.replace(".", r"\.")):
                verify_package(package, ledger)
        (package / name).write_bytes(whole)
    verify_package(package, ledger)


@pytest.mark.parametrize("name", [".hidden", "model.py", ".git"])
def test_an_added_file_is_refused(package, ledger, name):
    (package / name).write_text("x")
    with pytest.raises(TrustError, match="added"):
        verify_package(package, ledger)


def test_a_link_is_refused(package, ledger, tmp_path):
    (tmp_path / "copy").write_bytes((package / "model.onnx").read_bytes())
    (package / "model.onnx").unlink()
    (package / "model.onnx").symlink_to(tmp_path / "copy")
    with pytest.raises(TrustError, match="link"):
        verify_package(package, ledger)


def test_a_statement_signed_by_a_stranger_is_refused(package, ledger, tmp_path):
    path = statements_folder(package) / "evaluation.json"
    stranger = create_signer(tmp_path / "elsewhere", "stranger@test")
    envelope = json.loads(path.read_text())
    files = verify_package(package, ledger)
    path.write_text(json.dumps(seal(state({}, "evaluation", files.statements["evaluation"]), stranger)))
    with pytest.raises(TrustError, match="that the ledger cites is not there"):
        verify_package(package, ledger)
    with pytest.raises(TrustError, match="No trusted key"):
        read_evidence(package, ledger.trusted_keys())
    path.write_text(json.dumps({**envelope, "payload": envelope["payload"][:-8] + "AAAAAAA="}))
    with pytest.raises(TrustError):
        verify_package(package, ledger)


def test_a_statement_of_another_kind_does_not_pass_for_this_one(package, ledger):
    folder = statements_folder(package)
    (folder / "evaluation.json").write_bytes((folder / "qualification.json").read_bytes())
    with pytest.raises(TrustError, match="that the ledger cites is not there"):
        verify_package(package, ledger)
    with pytest.raises(TrustError, match="is a formulary/qualification/v1 statement"):
        read_evidence(package, ledger.trusted_keys())


def test_a_package_the_ledger_does_not_know_is_refused(package, places, tmp_path, author):
    from registry.ledger import open_ledger

    other = open_ledger(tmp_path / "other")
    with other.writing() as writer:
        body = {"identity": author.identity, "key": author.key_id, "public": author.public_pem}
        writer.append("key-trusted", "", body, author)
    with pytest.raises(TrustError, match="not in the ledger"):
        verify_package(package, other)


def test_an_envelope_opens_to_what_was_sealed(author):
    statement = state({"a": "00"}, "package", {"n": 1})
    opened, key = unseal(seal(statement, author), {author.key_id: author.public_pem})
    assert opened == statement
    assert key == author.key_id


@pytest.mark.parametrize(
    "broken", [{}, {"payload": 3}, {"payloadType": "x", "payload": "!", "signatures": []}]
)
def test_what_is_no_envelope_is_refused(broken):
    with pytest.raises(TrustError):
        unseal(broken, {})
