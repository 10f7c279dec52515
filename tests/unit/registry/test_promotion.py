"""A version is registered, asked for, approved by somebody else, rolled back; each step can be refused."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from imaging.errors import Conflict, DataError, Forbidden, Refused, RegistryError, TrustError
from registry.access import Acting, admit, revoke
from registry.decisions import roll_back
from registry.events import NETWORK
from registry.evidence import verify_package
from registry.ledger import open_ledger
from registry.package import shelf, statements_folder
from registry.promotion import approve, judge_version, request
from registry.registration import register

TASK = "brain-tissue"


@pytest.fixture
def promoted(ledger, build, acting, author, approver):
    """Register, ask and approve a package with this content."""

    def promote(content, **values):
        made = register(build(content, **values), ledger, TASK, author)
        request(acting(author), TASK, made.version)
        return made, approve(acting(approver), TASK, made.version)

    return promote


def test_registering_twice_changes_nothing(ledger, build, author):
    first = register(build("one"), ledger, TASK, author)
    before = ledger.generation()
    again = register(build("one"), ledger, TASK, author)
    assert (first.version, first.did) == (1, "registered")
    assert (again.version, again.did) == (1, "known already")
    assert ledger.generation() == before


def test_another_package_gets_the_next_number(ledger, build, author):
    register(build("one"), ledger, TASK, author)
    assert register(build("two"), ledger, TASK, author).version == 2


def test_stages_that_speak_of_another_package_are_refused(ledger, build, places, author):
    build("one")
    (places.stage(TASK, "package") / "model.onnx").write_text("changed since")
    with pytest.raises(DataError, match="another package"):
        register(places, ledger, TASK, author)


def test_nobody_trusts_a_version_because_it_is_registered(ledger, build, author):
    register(build("one"), ledger, TASK, author)
    assert ledger.champions(TASK) == {}


def test_an_approved_version_serves_where_it_passed_and_nowhere_else(ledger, promoted):
    _, where = promoted("one", harbour=0.5, west=0.7)
    assert sorted(where) == ["east", "north", "south"]
    assert sorted(ledger.champions(TASK)) == ["east", "north", "south"]
    assert ledger.slots(TASK)[NETWORK]["champion"].version == 1


def test_a_site_that_fails_keeps_what_it_has(ledger, promoted):
    promoted("one")
    promoted("two", west=0.7)
    served = {site: placement.version for site, placement in ledger.champions(TASK).items()}
    assert served == {"north": 2, "east": 2, "south": 2, "west": 1, "harbour": 2}
    assert ledger.slots(TASK)["north"]["previous"].version == 1
    assert "previous" not in ledger.slots(TASK)["west"]


def test_a_version_that_fails_the_network_is_refused_with_reasons_and_changes_nothing(
    ledger, build, acting, author
):
    made = register(build("bad", overall=0.5), ledger, TASK, author)
    with pytest.raises(Refused, match=r"dice may be as low as 0\.499, and 0\.8 is asked for"):
        request(acting(author), TASK, made.version)
    assert ledger.champions(TASK) == {}
    assert ledger.events(TASK)[-1].kind == "refused"


def test_neither_author_nor_asker_approves(ledger, build, acting, author, approver):
    made = register(build("one"), ledger, TASK, author)
    request(acting(approver), TASK, made.version)
    for person in (author, approver):
        with pytest.raises(Forbidden, match="Another person"):
            approve(acting(person), TASK, made.version)
    assert ledger.champions(TASK) == {}


def test_only_the_policys_approvers_may_approve(ledger, change_policy, build, acting, author, approver):
    change_policy(approvers=["committee@test"])
    made = register(build("one"), ledger, TASK, author)
    request(acting(author), TASK, made.version)
    with pytest.raises(Forbidden, match="committee@test"):
        approve(acting(approver), TASK, made.version)


def test_what_nobody_asked_for_cannot_be_approved(ledger, build, author, approver, acting):
    made = register(build("one"), ledger, TASK, author)
    with pytest.raises(Conflict, match="Nothing is open"):
        approve(acting(approver), TASK, made.version)


def test_an_approval_cannot_be_replayed(promoted, approver, acting):
    made, _ = promoted("one")
    with pytest.raises(Conflict, match="the last decision is approved"):
        approve(acting(approver), TASK, made.version)


def test_of_eight_approvers_at_once_exactly_one_wins(ledger, places, build, acting, author, approver):
    made = register(build("one"), ledger, TASK, author)
    request(acting(author), TASK, made.version)

    def try_it(number):
        try:
            approve(Acting(places, open_ledger(places.var), approver, f"{number}"), TASK, made.version)
        except Conflict as error:
            return str(error)
        return "won"

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(try_it, range(8)))
    assert told.count("won") == 1
    assert all("approver@test" in line for line in told if line != "won")
    ledger.verify()


def test_asking_for_what_serves_already_writes_nothing(ledger, promoted, acting, author):
    made, _ = promoted("one")
    before = ledger.generation()
    _, asked = request(acting(author), TASK, made.version)
    assert asked is None
    assert ledger.generation() == before


def test_rollback_puts_the_previous_champion_back(ledger, promoted, author, acting):
    promoted("one")
    promoted("two")
    moved = roll_back(acting(author), TASK, ("north",))
    assert moved == {"north": 1}
    assert ledger.champions(TASK)["north"].version == 1
    assert ledger.champions(TASK)["east"].version == 2
    moved = roll_back(acting(author), TASK)
    assert moved == dict.fromkeys(("east", "south", "west", "harbour", NETWORK), 1)
    assert {placement.version for placement in ledger.champions(TASK).values()} == {1}
    with pytest.raises(RegistryError, match="no previous version"):
        roll_back(acting(author), TASK)


def test_what_was_rolled_back_returns_only_when_it_is_approved_again(
    ledger, promoted, acting, author, approver
):
    promoted("one")
    made, _ = promoted("two")
    roll_back(acting(author), TASK)
    request(acting(author), TASK, made.version)
    approve(acting(approver), TASK, made.version)
    assert {placement.version for placement in ledger.champions(TASK).values()} == {2}


def test_new_facts_about_a_known_package_are_signed_under_its_number(ledger, places, build, acting, author):
    register(build("one", overall=0.5), ledger, TASK, author)
    made = register(build("one", overall=0.9), ledger, TASK, author)
    assert (made.version, made.did) == (1, "renewed")
    assert request(acting(author), TASK, made.version)[0].network.passed
    old = statements_folder(shelf(places.var, made.digest)) / "superseded"
    told = {path.stem for path in old.glob("*.json")}
    assert set(ledger.versions(TASK)[0][3].body["evidence"].values()) == {f"sha256:{name}" for name in told}


def test_an_approval_of_evidence_that_was_signed_again_is_refused(ledger, build, acting, author, approver):
    made = register(build("one"), ledger, TASK, author)
    request(acting(author), TASK, made.version)
    register(build("one", overall=0.95), ledger, TASK, author)
    with pytest.raises(Conflict, match="is another one since the gate judged it"):
        approve(acting(approver), TASK, made.version)


def test_who_signed_the_evidence_again_does_not_approve_it(ledger, build, acting, author, approver):
    register(build("one", overall=0.5), ledger, TASK, author)
    made = register(build("one", overall=0.99), ledger, TASK, approver)
    request(acting(author), TASK, made.version)
    with pytest.raises(Forbidden, match="Another person"):
        approve(acting(approver), TASK, made.version)
    assert ledger.champions(TASK) == {}


def test_a_version_outlives_the_key_that_signed_it(ledger, places, build, promoted, author, approver):
    made, _ = promoted("one")
    revoke(ledger, author.key_id, approver, "left the hospital")
    again = register(build("one"), ledger, TASK, admit(places.var, ledger, "successor@test"))
    assert (again.version, again.did) == (1, "known already")
    verify_package(shelf(places.var, made.digest), ledger)
    ledger.verify()


def test_the_verdict_cites_the_evidence(ledger, places, build, acting, author):
    made = register(build("one"), ledger, TASK, author)
    _, asked = request(acting(author), TASK, made.version)
    folder = statements_folder(shelf(places.var, made.digest))
    assert asked.body["evidence"] == {
        path.stem: f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in folder.glob("*.json")
    }
    assert len(asked.body["evidence"]) == 4


def test_there_is_nothing_to_roll_back_to_at_first(promoted, author, acting):
    promoted("one")
    with pytest.raises(RegistryError, match="no previous version"):
        roll_back(acting(author), TASK)


def test_rollback_refuses_a_previous_version_that_was_changed(ledger, places, promoted, author, acting):
    first, _ = promoted("one")
    promoted("two")
    (shelf(places.var, first.digest) / "model.onnx").write_text("other weights")
    with pytest.raises(TrustError, match=r"model\.onnx changed"):
        roll_back(acting(author), TASK)
    assert ledger.champions(TASK)["north"].version == 2


def test_moves_wait_for_mlflow_in_the_outbox(ledger, promoted):
    promoted("one", harbour=0.1)
    told = {(task, site, version) for _, task, site, version in ledger.pending()}
    assert told == {(TASK, site, 1) for site in (NETWORK, "north", "east", "south", "west")}
    for row, *_ in ledger.pending():
        ledger.settle(row)
    assert ledger.pending() == []


def test_an_approved_record_that_answers_no_request_moves_nothing(ledger, build, author, approver):
    made = register(build("one"), ledger, TASK, author)
    body = {"version": 1, "digest": made.digest, "because": "mine", "asked": 0, "sites": ["north"]}
    for signer in (author, approver):
        with ledger.writing() as writer:
            writer.append("approved", TASK, body, signer)
    assert ledger.champions(TASK) == {}


def test_a_request_that_the_gate_never_passed_is_not_approved(ledger, build, acting, author, approver):
    made = register(build("bad", overall=0.5), ledger, TASK, author)
    with pytest.raises(Refused):
        request(acting(author), TASK, made.version)
    told = dict(ledger.events(TASK)[-1].body, sites=["north"])
    with ledger.writing() as writer:
        writer.append("requested", TASK, told, author)
    with pytest.raises(Forbidden, match="did not pass any site"):
        approve(acting(approver), TASK, made.version)


def test_a_policy_that_changed_after_the_request_asks_for_a_new_one(
    ledger, build, acting, change_policy, author, approver
):
    made = register(build("one"), ledger, TASK, author)
    request(acting(author), TASK, made.version)
    change_policy(approvers=["committee@test"])
    with pytest.raises(Conflict, match="The policy"):
        approve(acting(approver), TASK, made.version)


def test_a_verdict_is_not_written_when_slots_moved_while_the_gate_worked(
    ledger, build, acting, promoted, author, approver, monkeypatch
):
    promoted("one")
    for content in ("two", "three"):
        register(build(content), ledger, TASK, author)
    request(acting(author), TASK, 3)

    def judge_slowly(places, its_ledger, task, version):
        told = judge_version(places, its_ledger, task, version)
        if version == 2:
            approve(acting(approver), TASK, 3)
        return told

    monkeypatch.setattr("registry.promotion.judge_version", judge_slowly)
    with pytest.raises(Conflict, match="approver@test moved the slots"):
        request(acting(author), TASK, 2)


def test_an_approved_versions_answers_stand(ledger, build, promoted, author):
    promoted("one")
    with pytest.raises(Refused, match="answers dice otherwise"):
        register(build("one", overall=0.7), ledger, TASK, author)
