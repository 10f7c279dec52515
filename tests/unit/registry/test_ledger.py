"""The ledger only grows, and whoever changes it is found out."""

import shutil
import sqlite3
from dataclasses import replace

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from imaging.errors import Conflict, Forbidden, TrustError
from registry.access import act, admit, revoke
from registry.events import canonical, digest_event
from registry.ledger import open_ledger
from registry.signing import Signer


def tamper(places, statement):
    """Change the database behind the platform's back, triggers removed."""
    with sqlite3.connect(places.var / "formulary.db") as connection:
        connection.execute("DROP TRIGGER events_no_update")
        connection.execute("DROP TRIGGER events_no_delete")
        connection.execute(statement)


def test_events_cannot_be_updated_or_deleted(ledger, author):
    for statement in ("UPDATE events SET actor = 'x'", "DELETE FROM events"):
        with pytest.raises(IntegrityError, match="append-only"), ledger.writing() as writer:
            writer._connection.execute(text(statement))


def test_a_whole_ledger_verifies(ledger, author, approver):
    ledger.record_incident("a file changed", "brain-tissue", {"digest": "sha256:0"})
    assert ledger.verify() == 3


@pytest.mark.parametrize(
    "change",
    ["UPDATE events SET actor = 'mallory' WHERE seq = 2", "UPDATE events SET body = '{}' WHERE seq = 2",
     "DELETE FROM events WHERE seq = 2", "UPDATE events SET at = '2020-01-01' WHERE seq = 2",
     "UPDATE events SET signature = '' WHERE seq = 2"],
)  # fmt: skip
def test_a_changed_record_is_named(ledger, places, author, approver, change):
    ledger.record_incident("later", "", {})
    tamper(places, change)
    with pytest.raises(TrustError, match="record 2"):
        ledger.verify()


def test_a_copied_key_makes_nobody_somebody_else(ledger, places, author, approver):
    keys = places.var / "keys"
    shutil.copy(keys / "author@test.pem", keys / "chief@test.pem")
    for pretend, where in ((act, places), (admit, places.var)):
        with pytest.raises(Forbidden, match="is author@test's"):
            pretend(where, ledger, "chief@test")
    with pytest.raises(Forbidden, match="does not trust"), ledger.writing() as writer:
        writer.append("approved", "brain-tissue", {}, Signer("chief@test", author.private))
    assert ledger.verify() == 2


@pytest.mark.parametrize("kind", ["key-trusted", "approved", "registered", "rolled-back"])
def test_a_decision_without_a_signature_is_neither_written_nor_believed(ledger, places, author, kind):
    body = {"identity": "mallory", "key": "k", "public": author.public_pem, "version": 1,
            "digest": "sha256:0", "sites": ["north"]}  # fmt: skip
    with pytest.raises(Forbidden, match="does not trust"), ledger.writing() as writer:
        writer.append(kind, "brain-tissue", body, "author@test")
    first = ledger.events()[0]
    draft = replace(first, seq=2, kind=kind, body=body, key="", previous=first.hash, signature="",
                    task="brain-tissue")  # fmt: skip
    forged = replace(draft, hash=digest_event(draft))
    with sqlite3.connect(places.var / "formulary.db") as database:
        row = {**vars(forged), "body": canonical(forged.body)}
        names = ", ".join(f":{name}" for name in row)
        database.execute(f"INSERT INTO events VALUES ({names})", row)
    for look in (
        ledger.verify,
        ledger.trusted_keys,
        ledger.versions,
        lambda: ledger.champions("brain-tissue"),
    ):
        with pytest.raises(TrustError, match="record 2"):
            look()


def test_a_decision_that_was_taken_out_is_missed_by_every_reader(ledger, places, author, approver):
    revoke(ledger, approver.key_id, author, "it was copied")
    ledger.record_incident("later", "", {})
    tamper(places, "DELETE FROM events WHERE seq = 3")
    for look in (ledger.verify, ledger.trusted_keys, ledger.versions):
        with pytest.raises(TrustError, match="record 3"):
            look()


def test_a_second_key_needs_a_trusted_one(ledger, places, author):
    (places.var / "keys" / "author@test.pem").unlink()
    with pytest.raises(Forbidden, match="vouch"):
        admit(places.var, ledger, "stranger@test")


def test_without_a_key_nobody_acts(ledger, places, author):
    with pytest.raises(TrustError, match="has no key"):
        act(places, ledger, "stranger@test")


def test_a_revoked_key_acts_no_more(ledger, places, author, approver):
    revoke(ledger, approver.key_id, author, "left the hospital")
    with pytest.raises(Forbidden, match="not trusted"):
        act(places, ledger, "approver@test")
    ledger.verify()


def test_a_revoked_key_is_never_trusted_again_and_a_new_one_takes_its_place(ledger, places, author, approver):
    revoke(ledger, approver.key_id, author, "it was copied")
    with pytest.raises(Forbidden, match="was revoked"):
        admit(places.var, ledger, "approver@test")
    (places.var / "keys" / "approver@test.pem").unlink()
    again = admit(places.var, ledger, "approver@test")
    assert again.key_id != approver.key_id
    assert act(places, ledger, "approver@test").key_id == again.key_id


def test_the_last_key_cannot_be_revoked(ledger, author):
    with pytest.raises(Forbidden, match="last"):
        revoke(ledger, author.key_id, author, "oops")


def test_keys_are_readable_by_their_owner_alone(places, author):
    assert (places.var / "keys" / "author@test.pem").stat().st_mode & 0o777 == 0o600


def test_a_locked_ledger_answers_within_seconds(ledger, places, author):
    with sqlite3.connect(places.var / "formulary.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Conflict, match="cannot be written"), open_ledger(places.var).writing():
            pass
        other.execute("ROLLBACK")
    with ledger.writing():
        pass


def test_a_failed_transaction_leaves_nothing(ledger, author):
    def fail_half_way():
        with ledger.writing() as writer:
            writer.append("incident", "", {"fact": "half"}, author)
            raise ZeroDivisionError

    before = ledger.generation()
    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert ledger.generation() == before
