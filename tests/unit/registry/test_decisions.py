"""Rejected, challenged, rolled back, suspended, retired: each by a person, each can be refused."""

import pytest

from imaging.errors import Conflict, Forbidden, RegistryError, TrustError, UnknownSite, UnknownTask
from registry.access import admit
from registry.actions import ACTIONS, perform
from registry.decisions import challenge, reject, renew_scores, resume, retire, roll_back, suspend
from registry.events import NETWORK
from registry.ledger import open_ledger
from registry.package import shelf
from registry.promotion import approve, request
from registry.registration import register
from tests.tiny_registry import evaluation

TASK = "brain-tissue"


@pytest.fixture
def promoted(ledger, build, acting, author, approver):
    """Register, ask and approve a package with this content."""

    def promote(content, sites=(), **values):
        made = register(build(content, **values), ledger, TASK, author)
        request(acting(author), TASK, made.version)
        approve(acting(approver), TASK, made.version, sites)
        return made

    return promote


def served(ledger):
    return {site: held.version for site, held in ledger.champions(TASK).items()}


def test_a_rejected_request_is_closed_and_may_be_asked_again(ledger, build, acting, author, approver):
    made = register(build("one"), ledger, TASK, author)
    request(acting(author), TASK, made.version)
    reject(acting(approver, "too few old patients"), TASK, made.version)
    with pytest.raises(Conflict, match="the last decision is rejected v1 by approver@test"):
        approve(acting(approver), TASK, made.version)
    request(acting(author), TASK, made.version)
    approve(acting(approver), TASK, made.version)
    assert set(served(ledger).values()) == {1}


def test_what_is_asked_for_already_names_who_asked(ledger, build, acting, author, approver):
    made = register(build("one"), ledger, TASK, author)
    request(acting(author), TASK, made.version)
    with pytest.raises(Conflict, match="author@test asked for brain-tissue v1 already"):
        request(acting(approver), TASK, made.version)


def test_a_request_is_stale_once_another_approval_moved_the_slots(ledger, build, acting, author, approver):
    for content in ("one", "two"):
        made = register(build(content), ledger, TASK, author)
        request(acting(author), TASK, made.version)
    approve(acting(approver), TASK, 1)
    with pytest.raises(Conflict, match="the last decision is approved v1 by approver@test"):
        approve(acting(approver), TASK, 2)
    assert set(served(ledger).values()) == {1}


def test_an_approval_may_be_for_some_sites(ledger, promoted):
    promoted("one")
    promoted("two", sites=("north", "east"))
    assert served(ledger) == {"north": 2, "east": 2, "south": 1, "west": 1, "harbour": 1}


def test_an_approval_for_a_site_that_failed_is_refused(ledger, build, acting, author, approver):
    made = register(build("one", west=0.7), ledger, TASK, author)
    request(acting(author), TASK, made.version)
    with pytest.raises(Forbidden, match="did not pass west"):
        approve(acting(approver), TASK, made.version, ("west",))
    assert served(ledger) == {}


def test_a_challenger_stands_beside_the_champion_until_it_is_promoted(
    ledger, build, acting, promoted, author, approver
):
    promoted("one")
    made = register(build("two"), ledger, TASK, author)
    assert challenge(acting(author), TASK, made.version, ("north",)) == ["north"]
    assert served(ledger)["north"] == 1
    assert ledger.slots(TASK)["north"]["challenger"].version == 2
    request(acting(author), TASK, made.version)
    approve(acting(approver), TASK, made.version)
    assert "challenger" not in ledger.slots(TASK)["north"]
    with pytest.raises(Conflict, match="cannot challenge at north"):
        challenge(acting(author), TASK, made.version, ("north",))


def test_a_suspended_site_serves_nothing_until_it_is_resumed(ledger, acting, promoted, author):
    promoted("one")
    suspend(acting(author, "the scanner drifts"), TASK, ("east",))
    assert "east" not in served(ledger)
    assert ledger.state(TASK).stopped("east").body["because"] == "the scanner drifts"
    with pytest.raises(Conflict, match="already"):
        suspend(acting(author), TASK, ("east",))
    assert resume(acting(author), TASK) == ["east"]
    assert served(ledger)["east"] == 1
    with pytest.raises(Conflict, match="nowhere"):
        resume(acting(author), TASK)


def test_a_suspended_network_serves_nowhere_and_resuming_a_site_does_not_lift_it(
    ledger, acting, promoted, author
):
    promoted("one")
    assert suspend(acting(author), TASK) == [NETWORK]
    suspend(acting(author), TASK, ("east",))
    assert served(ledger) == {}
    resume(acting(author), TASK, ("east",))
    assert served(ledger) == {}
    resume(acting(author), TASK, (NETWORK,))
    assert len(served(ledger)) == 5


def test_rollback_goes_to_the_last_version_with_valid_evidence(ledger, places, acting, promoted, author):
    for content in ("one", "two", "three"):
        promoted(content)
    second = ledger.version(TASK, 2)[0]
    (shelf(places.var, second) / "model.onnx").write_text("other weights")
    roll_back(acting(author), TASK)
    assert set(served(ledger).values()) == {1}


def test_rollback_tells_why_no_earlier_version_holds(ledger, places, acting, promoted, author):
    for content in ("one", "two"):
        promoted(content)
    (shelf(places.var, ledger.version(TASK, 1)[0]) / "model.onnx").write_text("other weights")
    with pytest.raises(TrustError, match=r"Nothing before the champion .* model\.onnx changed"):
        roll_back(acting(author), TASK, ("north",))
    assert set(served(ledger).values()) == {2}


def test_a_retired_version_never_serves_again(ledger, build, acting, promoted, author):
    promoted("one")
    with pytest.raises(Conflict, match="serves at"):
        retire(acting(author), TASK, 1)
    promoted("two")
    retire(acting(author, "its cohort was withdrawn"), TASK, 1)
    assert "previous" not in ledger.slots(TASK)["north"]
    with pytest.raises(RegistryError, match="no previous version"):
        roll_back(acting(author), TASK)
    for again in (lambda: challenge(acting(author), TASK, 1), lambda: request(acting(author), TASK, 1)):
        with pytest.raises(Forbidden, match="retired"):
            again()
    with pytest.raises(Conflict, match="retired before"):
        retire(acting(author), TASK, 1)


def test_a_site_that_does_not_exist_is_refused(ledger, acting, promoted, author):
    promoted("one")
    for decide in (suspend, roll_back, resume):
        with pytest.raises(UnknownSite, match="nroth"):
            decide(acting(author), TASK, ("nroth",))


def test_a_package_counts_once_for_each_locked_set(ledger, build, author):
    for content in ("one", "two", "one"):
        register(build(content), ledger, TASK, author)
    register(build("three", locked="2"), ledger, TASK, author)
    events = ledger.events(kind="test-set-used")
    assert [(event.body["set"], event.body["use"]) for event in events] == [
        ("test", 1), ("external", 1), ("test", 2), ("external", 2), ("test", 1), ("external", 1),
    ]  # fmt: skip
    assert len({event.body["set_digest"] for event in events}) == 4


def test_a_use_that_a_training_process_records_needs_no_key(places, monkeypatch):
    monkeypatch.delenv("FORMULARY_DATABASE", raising=False)  # it opens a ledger of its own
    empty = open_ledger(places.var / "fresh")
    assert empty.record_uses(TASK, "sha256:1", {"test": "sha256:a"}, "evaluate") == {"sha256:a": 1}
    assert empty.record_uses(TASK, "sha256:1", {"test": "sha256:a"}, "evaluate") == {"sha256:a": 1}
    assert empty.record_uses(TASK, "sha256:2", {"test": "sha256:a"}, "evaluate") == {"sha256:a": 2}
    assert len(empty.events()) == 2
    admit(places.var / "fresh", empty, "first@test")
    assert empty.verify() == 3


def test_every_action_explains_itself_and_reads_change_nothing():
    for action in ACTIONS.values():
        assert action.help.endswith(".")
        for name, field in action.arguments.model_fields.items():
            assert field.description, (action.name, name)
    reading = {name for name, action in ACTIONS.items() if action.reads}
    assert reading == {"history", "diff", "verify", "trial-report"}


def test_scoring_a_version_again_spends_a_use_unless_it_was_approved(ledger, build, acting, promoted, author):
    promoted("one")
    register(build("two"), ledger, TASK, author)
    new = evaluation("", {}, locked="new")
    parts = {name: new[name] for name in ("sets", "predictions", "overall", "sites")}
    for version, uses in ((1, 0), (2, 2)):
        before = len(ledger.events(kind="test-set-used"))
        renew_scores(acting(author), TASK, version, parts)
        assert len(ledger.events(kind="test-set-used")) - before == uses
    verdict, _ = request(acting(author), TASK, 2)
    assert verdict.uses["test"].use == 1
    assert verdict.network.passed


def test_rollback_passes_over_the_version_that_serves(ledger, places, acting, promoted, author, approver):
    for content in ("one", "two"):
        promoted(content)
    request(acting(author), TASK, 1)
    approve(acting(approver), TASK, 1)
    (shelf(places.var, ledger.version(TASK, 2)[0]) / "model.onnx").write_text("other weights")
    with pytest.raises(TrustError, match="Nothing before the champion"):
        roll_back(acting(author), TASK, ("north",))


def test_a_task_that_nobody_knows_is_refused_before_anything_happens(ledger, acting, author):
    action, before = ACTIONS["suspend"], ledger.generation()
    asked = action.arguments(task="nope", because="a typo")
    with pytest.raises(UnknownTask, match="nope"):
        perform(action, acting(author), asked)
    assert ledger.generation() == before


def test_two_versions_are_compared_in_facts_and_scores(ledger, build, acting, author):
    register(build("one"), ledger, TASK, author)
    register(build("two", locked="2", north=0.8), ledger, TASK, author)
    told = perform(ACTIONS["diff"], acting(author), ACTIONS["diff"].arguments(task=TASK, first=1, second=2))
    assert told["facts"]["contract.title"] == ["one", "two"]
    assert told["facts"]["sets.test.digest"] == ["sha256:test1", "sha256:test2"]
    assert "contract.rows" not in told["facts"]
    assert [score["estimate"] for score in told["scores"]["north"]["dice"]] == [0.9, 0.8]
