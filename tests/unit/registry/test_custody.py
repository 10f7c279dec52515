"""Evidence is verified elsewhere with public keys alone; a backup gives back what was lost, and no more."""

import json
import shutil
import sqlite3
import tarfile
from dataclasses import replace
from io import BytesIO

import pytest

from imaging.errors import DataError, Forbidden, TrustError
from imaging.vocabulary import Statement
from registry.access import admit, revoke, rotate
from registry.custody import back_up, export, restore, verify_export
from registry.events import Event, canonical, digest_event
from registry.evidence import digest_statements, sign_statements, verify_package
from registry.ledger import open_ledger
from registry.package import shelf, statements_folder
from registry.promotion import approve, request
from registry.registration import register

TASK = "brain-tissue"


@pytest.fixture
def version(ledger, build, acting, author, approver):
    made = register(build("one"), ledger, TASK, author)
    request(acting(author), TASK, made.version)
    approve(acting(approver), TASK, made.version)
    return made


@pytest.fixture
def exported(acting, author, version, tmp_path):
    return export(acting(author, "for the auditor"), TASK, version.version, tmp_path / "v1.tar")


def rewrite(file, name, change):
    """The same archive with one member changed, or left out where nothing is left of it."""
    target = file.with_name("changed.tar")
    with tarfile.open(file) as old, tarfile.open(target, "w") as new:
        for member in old.getmembers():
            content = old.extractfile(member).read() if member.isfile() else b""
            if member.name == name:
                content = change(content)
                member.size = len(content)
                if not content:
                    continue
            new.addfile(member, BytesIO(content) if member.isfile() else None)
    return target


def test_exported_evidence_is_verified_with_the_public_key_alone(exported, author, approver, version):
    told = verify_export(exported, [author.public_pem])
    assert told["digest"] == version.digest
    assert told["statements"] == dict.fromkeys(
        ("package", "evaluation", "qualification", "alarms"), "author@test"
    )
    assert "approved" not in {kind for kind, _, _ in told["decisions"]}
    both = verify_export(exported, [author.public_pem, approver.public_pem])
    assert ("approved", "approver@test") in {(kind, actor) for kind, actor, _ in both["decisions"]}


def test_the_export_stands_in_the_ledger(exported, ledger):
    event = ledger.events(TASK)[-1]
    assert (event.kind, event.body["what"], event.body["because"]) == (
        "exported",
        "v1.tar",
        "for the auditor",
    )
    ledger.verify()


def test_a_foreign_key_verifies_nothing(exported, tmp_path, ledger):
    stranger = admit(tmp_path / "other", open_ledger(tmp_path / "other"), "stranger@test")
    with pytest.raises(TrustError, match="No trusted key"):
        verify_export(exported, [stranger.public_pem])


@pytest.mark.parametrize(
    "name", ["package/model.onnx", "package/contract.json", "package.statements/evaluation.json"]
)
def test_a_changed_byte_in_an_export_is_found(exported, author, name):
    changed = rewrite(exported, name, lambda content: content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    with pytest.raises(TrustError):
        verify_export(changed, [author.public_pem])


def forge(signer, kind, actor="", task="", **body):
    """A record as somebody writes it who has a key of his own and no ledger."""
    draft = Event(99, "2026-01-01", kind, task, actor or signer.identity, body, signer.key_id, "x", "", "")
    event = replace(draft, hash=digest_event(draft))
    event = replace(event, signature=signer.sign(event.hash.encode()))
    return f"{canonical(vars(event))}\n".encode()


def read_records(file):
    with tarfile.open(file) as archive:
        return archive.extractfile("events.jsonl").read()


def test_another_versions_decisions_do_not_pass_for_this_ones(
    exported, build, ledger, acting, author, approver, tmp_path
):
    second = register(build("two"), ledger, TASK, author).version
    other = export(acting(author), TASK, second, tmp_path / "v2.tar")
    keys = [author.public_pem, approver.public_pem]
    assert "approved" not in {kind for kind, _, _ in verify_export(other, keys)["decisions"]}
    with pytest.raises(TrustError, match="None of these keys signed a record"):
        verify_export(rewrite(other, "events.jsonl", lambda _: read_records(exported)), keys)
    both = rewrite(other, "events.jsonl", lambda content: content + read_records(exported))
    with pytest.raises(TrustError, match="speaks of another version"):
        verify_export(both, keys)


@pytest.mark.parametrize("kind", ["package", "evaluation", "qualification", "alarms"])
def test_an_export_without_one_of_its_statements_is_refused(exported, author, kind):
    short = rewrite(exported, f"package.statements/{kind}.json", lambda _: b"")
    with pytest.raises(TrustError, match="The statements are not those that ledger record"):
        verify_export(short, [author.public_pem])


def test_an_export_with_a_superseded_statement_is_refused(exported, build, ledger, acting, author, tmp_path):
    register(build("one", "2", overall=0.85), ledger, TASK, author)
    renewed = export(acting(author), TASK, 1, tmp_path / "renewed.tar")
    verify_export(renewed, [author.public_pem])
    with tarfile.open(exported) as archive:
        old = archive.extractfile("package.statements/evaluation.json").read()
    with pytest.raises(TrustError, match="The statements are not those that ledger record"):
        verify_export(
            rewrite(renewed, "package.statements/evaluation.json", lambda _: old), [author.public_pem]
        )


def test_an_export_without_its_records_is_refused(exported, author):
    lines = read_records(exported).splitlines(keepends=True)
    keys = b"".join(line for line in lines if b'"kind":"key-' in line)
    with pytest.raises(TrustError, match="None of these keys signed a record"):
        verify_export(rewrite(exported, "events.jsonl", lambda _: keys), [author.public_pem])


def test_nobody_is_named_by_a_stranger_or_by_himself(exported, author, tmp_path):
    stranger = admit(tmp_path / "other", open_ledger(tmp_path / "other"), "stranger@test")
    told = {"identity": "professor@test", "key": author.key_id, "public": author.public_pem}
    for signer in (stranger, author):
        line = forge(signer, "key-trusted", **told)
        named = verify_export(
            rewrite(exported, "events.jsonl", lambda content, line=line: content + line), [author.public_pem]
        )
        assert set(named["statements"].values()) == {"author@test"}
    lines = read_records(exported).splitlines(keepends=True)
    about = b"".join(line for line in lines if b'"kind":"key-' not in line)
    unnamed = verify_export(rewrite(exported, "events.jsonl", lambda _: about), [author.public_pem])
    assert set(unnamed["statements"].values()) == {author.key_id}


def test_nobody_decides_in_anothers_name(exported, author, approver, version):
    line = forge(author, "approved", "approver@test", TASK, version=1, digest=version.digest)
    with pytest.raises(TrustError, match="names another person than its key's"):
        verify_export(
            rewrite(exported, "events.jsonl", lambda content: content + line),
            [author.public_pem, approver.public_pem],
        )


def test_what_a_revoked_key_signed_is_refused_in_an_export_as_in_the_ledger(
    ledger, acting, author, approver, version, tmp_path
):
    revoke(ledger, author.key_id, approver, "it was copied")
    exported = export(acting(approver), TASK, 1, tmp_path / "revoked.tar")
    keys = [author.public_pem, approver.public_pem]
    assert verify_export(exported, keys)["statements"]["package"] == "author@test"
    facts = {"version": 1, "digest": version.digest}
    evidence = digest_statements(shelf(acting(author).places.var, version.digest))
    for line, told in (
        (forge(approver, "renewed", task=TASK, **facts, evidence=evidence), "statement was signed by a key"),
        (forge(author, "approved", task=TASK, **facts), "record 99 is by a key that had been revoked"),
    ):
        with pytest.raises(TrustError, match=told):
            verify_export(rewrite(exported, "events.jsonl", lambda content, line=line: content + line), keys)


@pytest.mark.parametrize("kind", ["key-trusted", "key-revoked", "registered", "approved"])
def test_a_record_without_its_facts_is_refused(exported, author, kind):
    line = forge(author, kind, task="" if kind.startswith("key") else TASK)
    with pytest.raises(TrustError):
        verify_export(rewrite(exported, "events.jsonl", lambda content: content + line), [author.public_pem])


def test_a_changed_decision_in_an_export_is_found(exported, author):
    changed = rewrite(
        exported, "events.jsonl", lambda content: content.replace(b'"version":1', b'"version":2')
    )
    with pytest.raises(TrustError, match="Ledger record"):
        verify_export(changed, [author.public_pem])


def test_what_is_no_export_is_refused(tmp_path, author):
    (tmp_path / "x.tar").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        verify_export(tmp_path / "x.tar", [author.public_pem])


def test_an_export_overwrites_nothing(exported, acting, author):
    with pytest.raises(DataError, match="exists"):
        export(acting(author), TASK, 1, exported)


def test_a_backup_is_restored_into_an_empty_place(places, ledger, acting, author, version):
    kept = back_up(acting(author))
    copy = places.var.parent / "elsewhere"
    fresh = type(places)(root=places.root, build=places.build, var=copy)
    told = restore(fresh, open_ledger(copy), kept)
    assert told["packages"] == 2  # the package and its statements
    assert open_ledger(copy).verify() == len(ledger.events())
    assert verify_package(shelf(copy, version.digest), open_ledger(copy)).digest == version.digest
    assert open_ledger(copy).champions(TASK) == ledger.champions(TASK)
    assert not (copy / "keys").exists()


def test_a_cut_tail_and_a_damaged_package_come_back(places, ledger, acting, author, version):
    kept, whole = back_up(acting(author)), ledger.events()
    with sqlite3.connect(places.var / "formulary.db") as database:
        database.execute("DROP TRIGGER events_no_delete")
        database.execute("DELETE FROM outbox")
        database.execute("DELETE FROM events WHERE seq > 4")
    (shelf(places.var, version.digest) / "model.onnx").write_text("other")
    restore(places, ledger, kept)
    assert ledger.events() == whole
    verify_package(shelf(places.var, version.digest), ledger)
    assert list((places.var / "packages").glob("*.damaged-*"))


def test_a_backup_and_its_restoring_stand_in_the_ledger(places, ledger, acting, author, version):
    kept = back_up(acting(author, "every night"))
    copy = type(places)(root=places.root, build=places.build, var=places.var.parent / "elsewhere")
    restore(copy, open_ledger(copy.var), kept, author)
    told = [(event.body["what"], event.actor) for event in open_ledger(copy.var).events(kind="exported")]
    assert told == [(f"backup {kept.name}", "author@test"), (f"restored {kept.name}", "author@test")]
    assert open_ledger(copy.var).verify() == len(ledger.events()) + 1


def test_missing_statements_come_back_one_by_one_and_no_newer_one_gives_way(
    places, ledger, build, acting, author, version
):
    folder = statements_folder(package := shelf(places.var, version.digest))
    register(build("one", "2", overall=0.85), ledger, TASK, author)
    kept = back_up(acting(author))
    old = next((folder / "superseded").iterdir())
    old.unlink()
    (folder / "alarms.json").unlink()
    (folder / "package.json").write_text("{}")
    assert restore(places, ledger, kept)["packages"] == 1
    verify_package(package, ledger)
    assert old.exists()
    assert list(folder.glob("package.json.damaged-*"))
    register(build("one", "3", overall=0.86), ledger, TASK, author)
    newer = digest_statements(package)
    assert restore(places, ledger, kept)["packages"] == 0
    assert digest_statements(package) == newer


def test_what_an_older_backup_lacks_is_lost_only_where_somebody_says_why(
    places, ledger, acting, author, version
):
    kept = back_up(acting(author))
    lost = (ledger.record_incident("later", TASK, {}), ledger.head())[1]
    for part in ("", "-wal", "-shm"):
        (places.var / f"formulary.db{part}").unlink(missing_ok=True)
    shutil.rmtree(places.var / "packages")
    fresh = open_ledger(places.var)
    with pytest.raises(TrustError, match=rf"knows record {lost[0]} .* would be lost\. Nothing") as raised:
        restore(places, fresh, kept, author)
    assert "--accept-loss" in raised.value.fix
    assert (fresh.events(), (places.var / "packages").exists()) == ([], False)
    restore(places, fresh, kept, author, "the disk burnt")
    incident = fresh.events(kind="incident")[-1]
    assert (incident.body["seq"], incident.body["hash"]) == lost
    assert (incident.body["because"], incident.actor) == ("the disk burnt", "author@test")
    (head,) = places.var.glob("ledger-head.json.lost-*")
    assert json.loads(head.read_text()) == {"seq": lost[0], "hash": lost[1]}
    assert fresh.verify() == fresh.head()[0]


def test_restoring_loses_nothing_that_was_decided_since(places, ledger, acting, author, version):
    kept = back_up(acting(author))
    ledger.record_incident("later", TASK, {})
    assert restore(places, ledger, kept)["events"] == 0
    assert ledger.events()[-1].body["fact"] == "later"


def test_a_ledger_with_other_records_is_not_overwritten(places, ledger, acting, author, version, tmp_path):
    kept = back_up(acting(author))
    other = type(places)(root=places.root, build=places.build, var=tmp_path / "other")
    admit(other.var, open_ledger(other.var), "somebody@test")
    with pytest.raises(TrustError, match="other records"):
        restore(other, open_ledger(other.var), kept)


def test_a_backup_with_a_changed_event_is_refused(places, acting, author, version, tmp_path):
    kept = back_up(acting(author))
    changed = rewrite(kept, "events.jsonl", lambda content: content.replace(b'"north"', b'"nroth"', 1))
    with pytest.raises(TrustError, match="record"):
        restore(places, open_ledger(tmp_path / "other"), changed)


def test_a_rotated_key_keeps_what_it_signed_and_signs_no_more(places, ledger, build, acting, author, version):
    new = rotate(places.var, ledger, "author@test", "a year is over")
    assert new.key_id != author.key_id
    verify_package(shelf(places.var, version.digest), ledger)
    with pytest.raises(Forbidden, match="does not trust"):
        register(build("two"), ledger, TASK, author)
    register(build("two"), ledger, TASK, new)


def test_what_a_revoked_key_signed_after_its_revocation_is_refused(
    places, ledger, build, author, approver, version
):
    package = shelf(places.var, version.digest)
    revoke(ledger, author.key_id, approver, "it was copied")
    verify_package(package, ledger)
    body = json.loads((places.stage(TASK, "evaluate") / "evaluation.json").read_text())
    sign_statements(package, {Statement.EVALUATION: {**body, "threshold": 0.1}}, author)
    assert (
        verify_package(package, ledger).body(Statement.EVALUATION)["threshold"] == 0.5
    )  # it is cited nowhere
    with ledger.writing() as writer:
        facts = {"version": 1, "digest": version.digest, "commit": "", "evidence": digest_statements(package)}
        writer.append("renewed", TASK, facts, approver)
    with pytest.raises(TrustError, match="had been revoked"):
        verify_package(package, ledger)


def test_an_older_signed_statement_does_not_take_the_place_of_a_newer(places, ledger, build, author, version):
    package = shelf(places.var, version.digest)
    folder = statements_folder(package)
    shutil.copytree(folder, old := folder.with_name("old"))
    register(build("one", "2", overall=0.85), ledger, TASK, author)
    now = verify_package(package, ledger).statements["evaluation"]
    shutil.rmtree(folder)
    old.rename(folder)
    with pytest.raises(TrustError, match="that the ledger cites is not there"):
        verify_package(package, ledger)
    assert now["predictions"][0]["dice"] < 0.87
