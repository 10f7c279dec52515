"""A version is registered, asked for, approved by somebody else, rolled back; each step can be refused."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from imaging.errors import Conflict, DataError, Forbidden, Refused, RegistryError, TrustError
from registry.access import admit, revoke
from registry.events import NETWORK
from registry.evidence import verify_package
from registry.ledger import open_ledger
from registry.package import shelf, statements_folder
from registry.promotion import approve, register, request, roll_back

TASK = "brain-tissue"


@pytest.fixture
def promoted(ledger, places, build, author, approver, judged):
    """Register, ask and approve a package with this content."""

    def promote(content, **lows):
        made = register(build(content, **lows), ledger, TASK, author)
        _, event = ledger.version(TASK, made.version)
        request(ledger, places.var, event, judged, author)
        return made, approve(ledger, places.var, TASK, made.version, (approver, "read it"))

    return promote


def ask(ledger, places, judged, made, signer):
    _, event = ledger.version(TASK, made.version)
    return request(ledger, places.var, event, judged, signer)


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
    ledger, places, build, judged, author
):
    made = register(build("bad", overall=0.5), ledger, TASK, author)
    with pytest.raises(Refused, match=r"dice lower bound 0\.500 < 0\.8"):
        ask(ledger, places, judged, made, author)
    assert ledger.champions(TASK) == {}
    assert ledger.events(TASK)[-1].kind == "refused"


def test_neither_author_nor_asker_approves(ledger, places, build, judged, author, approver):
    made = register(build("one"), ledger, TASK, author)
    ask(ledger, places, judged, made, approver)
    for person in (author, approver):
        with pytest.raises(Forbidden, match="Another person"):
            approve(ledger, places.var, TASK, made.version, (person, "mine"))
    assert ledger.champions(TASK) == {}


def test_only_the_policys_approvers_may_approve(ledger, places, build, judged, author, approver):
    named = judged[0].model_copy(update={"approvers": ("committee@test",)})
    made = register(build("one"), ledger, TASK, author)
    ask(ledger, places, (named, *judged[1:]), made, author)
    with pytest.raises(Forbidden, match="committee@test"):
        approve(ledger, places.var, TASK, made.version, (approver, "me"))


def test_what_nobody_asked_for_cannot_be_approved(ledger, places, build, author, approver):
    made = register(build("one"), ledger, TASK, author)
    with pytest.raises(Conflict, match="Nothing is open"):
        approve(ledger, places.var, TASK, made.version, (approver, "eager"))


def test_an_approval_cannot_be_replayed(ledger, places, promoted, approver):
    made, _ = promoted("one")
    with pytest.raises(Conflict, match="the last decision is approved"):
        approve(ledger, places.var, TASK, made.version, (approver, "again"))


def test_of_eight_approvers_at_once_exactly_one_wins(ledger, places, build, judged, author, approver):
    made = register(build("one"), ledger, TASK, author)
    ask(ledger, places, judged, made, author)

    def try_it(number):
        try:
            approve(open_ledger(places.var), places.var, TASK, made.version, (approver, f"{number}"))
        except Conflict as error:
            return str(error)
        return "won"

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(try_it, range(8)))
    assert told.count("won") == 1
    assert all("approver@test" in line for line in told if line != "won")
    ledger.verify()


def test_asking_for_what_serves_already_writes_nothing(ledger, places, promoted, judged, author):
    made, _ = promoted("one")
    before = ledger.generation()
    _, asked = ask(ledger, places, judged, made, author)
    assert asked is None
    assert ledger.generation() == before


def test_rollback_puts_the_previous_champion_back(ledger, places, promoted, author):
    promoted("one")
    promoted("two")
    moved = roll_back(ledger, places.var, TASK, "north", (author, "it misses small ones"))
    assert moved == {"north": 1}
    assert ledger.champions(TASK)["north"].version == 1
    assert ledger.champions(TASK)["east"].version == 2
    moved = roll_back(ledger, places.var, TASK, None, (author, "all"))
    assert moved == dict.fromkeys(("east", "south", "west", "harbour", NETWORK), 1)
    assert {placement.version for placement in ledger.champions(TASK).values()} == {1}
    with pytest.raises(RegistryError, match="no previous version"):
        roll_back(ledger, places.var, TASK, None, (author, "once more"))


def test_what_was_rolled_back_returns_only_when_it_is_approved_again(
    ledger, places, promoted, judged, author, approver
):
    promoted("one")
    made, _ = promoted("two")
    roll_back(ledger, places.var, TASK, None, (author, "it misses small ones"))
    ask(ledger, places, judged, made, author)
    approve(ledger, places.var, TASK, made.version, (approver, "they were artefacts"))
    assert {placement.version for placement in ledger.champions(TASK).values()} == {2}


def test_new_facts_about_a_known_package_are_signed_under_its_number(ledger, places, build, judged, author):
    register(build("one", overall=0.5), ledger, TASK, author)
    made = register(build("one", overall=0.9), ledger, TASK, author)
    assert (made.version, made.did) == (1, "renewed")
    assert ask(ledger, places, judged, made, author)[0].network.passed
    old = statements_folder(shelf(places.var, made.digest)) / "superseded"
    told = {path.stem for path in old.glob("*.json")}
    assert set(ledger.versions(TASK)[0][3].body["evidence"].values()) == {f"sha256:{name}" for name in told}


def test_an_approval_of_evidence_that_was_signed_again_is_refused(
    ledger, places, build, judged, author, approver
):
    made = register(build("one"), ledger, TASK, author)
    ask(ledger, places, judged, made, author)
    register(build("one", overall=0.95), ledger, TASK, author)
    with pytest.raises(Conflict, match="signed again"):
        approve(ledger, places.var, TASK, made.version, (approver, "read it"))


def test_who_signed_the_evidence_again_does_not_approve_it(ledger, places, build, judged, author, approver):
    register(build("one", overall=0.5), ledger, TASK, author)
    made = register(build("one", overall=0.99), ledger, TASK, approver)
    ask(ledger, places, judged, made, author)
    with pytest.raises(Forbidden, match="Another person"):
        approve(ledger, places.var, TASK, made.version, (approver, "mine"))
    assert ledger.champions(TASK) == {}


def test_a_version_outlives_the_key_that_signed_it(ledger, places, build, promoted, author, approver):
    made, _ = promoted("one")
    revoke(ledger, author.key_id, approver, "left the hospital")
    with pytest.raises(TrustError):
        verify_package(shelf(places.var, made.digest), ledger)
    again = register(build("one"), ledger, TASK, admit(places.var, ledger, "successor@test"))
    assert (again.version, again.did) == (1, "renewed")
    verify_package(shelf(places.var, made.digest), ledger)
    ledger.verify()


def test_the_verdict_cites_the_evidence(ledger, places, build, judged, author):
    made = register(build("one"), ledger, TASK, author)
    _, asked = ask(ledger, places, judged, made, author)
    folder = statements_folder(shelf(places.var, made.digest))
    assert asked.body["evidence"] == {
        path.stem: f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in folder.glob("*.json")
    }
    assert len(asked.body["evidence"]) == 4


def test_there_is_nothing_to_roll_back_to_at_first(ledger, places, promoted, author):
    promoted("one")
    with pytest.raises(RegistryError, match="no previous version"):
        roll_back(ledger, places.var, TASK, None, (author, "why"))


def test_rollback_refuses_a_previous_version_that_was_changed(ledger, places, promoted, author):
    first, _ = promoted("one")
    promoted("two")
    (shelf(places.var, first.digest) / "model.onnx").write_text("other weights")
    with pytest.raises(TrustError, match=r"model\.onnx changed"):
        roll_back(ledger, places.var, TASK, None, (author, "why"))
    assert ledger.champions(TASK)["north"].version == 2


def test_moves_wait_for_mlflow_in_the_outbox(ledger, promoted):
    promoted("one", harbour=0.1)
    told = {(task, site, version) for _, task, site, version in ledger.pending()}
    assert told == {(TASK, site, 1) for site in (NETWORK, "north", "east", "south", "west")}
    for row, *_ in ledger.pending():
        ledger.settle(row)
    assert ledger.pending() == []
