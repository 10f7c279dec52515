"""An alarm is worked off once: told, and where the policy says so its one site is stopped or falls back."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from imaging.errors import Conflict, Forbidden
from imaging.vocabulary import Contained, Decision
from monitoring import containment
from monitoring.containment import contain_new, open_alarms
from monitoring.records import Alarm, open_records
from registry.access import Acting, admit
from registry.actions import ACTIONS, perform
from registry.custody import back_up, restore
from registry.decisions import acknowledge, resume, suspend
from registry.events import digest_event
from registry.ledger import open_ledger
from registry.package import shelf
from registry.promotion import approve, request
from registry.registration import register
from tests.tiny_registry import TASK, make_places, write_policy, write_stages

ROOT = Path(__file__).parents[3]


@pytest.fixture
def places(tmp_path):
    """Version 1 serves at every site."""
    places = make_places(tmp_path)
    ledger = open_ledger(places.var)
    author, approver = (admit(places.var, ledger, f"{who}@test") for who in ("author", "approver"))
    promote(places, "one", author, approver)
    return places


def promote(places, content, author, approver):
    ledger = open_ledger(places.var)
    version = register(write_stages(places, content), ledger, TASK, author).version
    request(Acting(places, ledger, author), TASK, version)
    approve(Acting(places, ledger, approver, "It was read."), TASK, version)


@pytest.fixture
def ledger(places):
    return open_ledger(places.var)


@pytest.fixture
def records(places):
    return open_records(places.var)


@pytest.fixture
def raise_alarm(places, records, ledger):
    """Write an alarm's row under a policy, and work it off."""

    def make(contain="suspend", parts=None, key=True, **told):
        surveillance = {"contain": contain} | ({"parts": parts} if parts else {})
        write_policy(places, surveillance=surveillance)
        if key:
            admit(places.var, ledger, "monitor")
        records.append([draw_alarm(**told)])
        return contain_new(places, records, ledger)

    return make


def draw_alarm(**told):
    usual = {"task": TASK, "site": "north", "version": 1, "kind": "chart", "statistic": "noise",
             "part": "pixels", "direction": "up", "value": 9.5, "bound": 8.25, "since": "subject 41",
             "budget_days": 180.0, "last_seq": 44, "detail": "Noise is higher than before."}  # fmt: skip
    return Alarm(**{**usual, **told})


@pytest.fixture
def person(places, ledger):
    return Acting(places, ledger, admit(places.var, ledger, "author@test"), "Looked into.")


def kinds(ledger, *wanted):
    return [event.kind for event in ledger.events(TASK) if event.kind in (wanted or ("alarmed", "suspended"))]


def test_an_alarm_suspends_its_site_alone_and_the_record_says_why_and_how_to_go_on(raise_alarm, ledger):
    (told,) = raise_alarm()
    assert told.outcome is Contained.SUSPENDED
    alarmed, suspended = ledger.events(TASK)[-2:]
    assert (alarmed.kind, suspended.kind) == (Decision.ALARMED, Decision.SUSPENDED)
    assert suspended.body["sites"] == ["north"]
    assert {alarmed.actor, suspended.actor} == {"monitor"}
    for part in ("noise", "since subject 41", f"record {alarmed.seq}", "registry resume", "--site north"):
        assert part in suspended.body["because"]
    facts = {"alarm": 1, "statistic": "noise", "part": "pixels", "value": 9.5, "bound": 8.25, "version": 1,
             "since": "subject 41", "budget_days": 180.0, "asked": "suspend",
             "contained": "suspended"}  # fmt: skip
    assert facts.items() <= alarmed.body.items()
    assert alarmed.body["digest"] == ledger.version(TASK, 1)[0]
    assert set(ledger.champions(TASK)) == {"east", "south", "west", "harbour"}


def test_an_alarm_is_only_told_where_the_policy_says_so(raise_alarm, ledger):
    (told,) = raise_alarm("notify")
    assert told.outcome is Contained.NOTIFIED
    assert kinds(ledger) == ["alarmed"]
    assert [event.body["alarm"] for event in open_alarms(ledger, TASK)["north"]] == [1]


def test_an_alarm_of_a_part_that_the_policy_leaves_out_contains_nothing(raise_alarm, ledger):
    (told,) = raise_alarm(parts=["scores", "truth"])
    assert told.outcome is Contained.NOTIFIED
    assert kinds(ledger) == ["alarmed"]


def test_a_site_falls_back_to_the_champion_before(raise_alarm, places, ledger):
    admit(places.var, ledger, "author@test")
    promote(places, "two", *(admit(places.var, ledger, f"{who}@test") for who in ("author", "approver")))
    (told,) = raise_alarm("fallback", version=2)
    assert told.outcome is Contained.FELL_BACK
    served = {site: held.version for site, held in ledger.champions(TASK).items()}
    assert served == {"north": 1, "east": 2, "south": 2, "west": 2, "harbour": 2}
    assert ledger.pending()[-1][1:] == (TASK, "north", 1)


def test_a_site_without_a_champion_before_is_suspended_instead(raise_alarm, ledger):
    (told,) = raise_alarm("fallback")
    assert told.outcome is Contained.SUSPENDED
    assert "north" not in ledger.champions(TASK)


def test_a_site_whose_champion_before_does_not_hold_is_suspended_instead(raise_alarm, places, ledger):
    promote(places, "two", *(admit(places.var, ledger, f"{who}@test") for who in ("author", "approver")))
    (shelf(places.var, ledger.version(TASK, 1)[0]) / "model.onnx").write_text("changed")
    (told,) = raise_alarm("fallback", version=2)
    assert told.outcome is Contained.SUSPENDED


def test_an_alarm_of_a_version_that_serves_there_no_more_stops_nobody(raise_alarm, ledger):
    (told,) = raise_alarm(version=2)
    assert told.outcome is Contained.OTHER
    assert kinds(ledger) == ["alarmed"]


def test_a_second_alarm_of_a_suspended_site_is_only_told(raise_alarm, ledger):
    raise_alarm()
    (told,) = raise_alarm(statistic="median")
    assert told.outcome is Contained.ALREADY
    assert kinds(ledger) == ["alarmed", "suspended", "alarmed"]


def test_a_network_that_was_suspended_by_somebody_stays_as_it_is(raise_alarm, person, ledger):
    suspend(person, TASK)
    (told,) = raise_alarm()
    assert told.outcome is Contained.ALREADY
    assert set(ledger.state(TASK).suspended) == {"*"}


def test_without_a_key_nothing_is_contained_and_that_is_said_loudly(raise_alarm, ledger, caplog):
    (told,) = raise_alarm(key=False)
    assert told.outcome is Contained.NO_KEY
    (alarmed,) = (event for event in ledger.events(TASK) if event.kind == Decision.ALARMED)
    assert (alarmed.body["contained"], alarmed.key) == ("no key", "")
    assert "keys create --identity monitor" in caplog.text
    assert {record.levelname for record in caplog.records} >= {"ERROR"}
    assert "north" in ledger.champions(TASK)
    assert ledger.verify() == ledger.generation()


def test_what_could_not_be_contained_is_when_the_key_is_there(raise_alarm, places, records, ledger):
    raise_alarm(key=False)
    assert contain_new(places, records, ledger) == []
    admit(places.var, ledger, "monitor")
    (told,) = contain_new(places, records, ledger)
    assert told.outcome is Contained.SUSPENDED
    assert [event.body["alarm"] for event in open_alarms(ledger, TASK)["north"]] == [1]
    assert contain_new(places, records, ledger) == []


def test_an_alarm_that_somebody_acknowledged_is_not_contained_later(
    raise_alarm, places, records, ledger, person
):
    raise_alarm(key=False)
    acknowledge(person, TASK, ("north",))
    admit(places.var, ledger, "monitor")
    assert contain_new(places, records, ledger) == []
    assert "north" in ledger.champions(TASK)


def test_an_unsigned_record_of_a_stranger_hides_no_alarm(raise_alarm, records, ledger):
    at = "2026-01-01T00:00:00.000+00:00"
    with ledger.writing() as writer:
        body = {"alarm": 1, "raised": at, "sites": ["north"], "fact": "nothing", "contained": "notified"}
        writer.append(Decision.ALARMED, TASK, body, "stranger")
    (told,) = raise_alarm(at=at)
    assert told.outcome is Contained.SUSPENDED


def test_a_record_without_its_facts_is_refused(ledger):
    with pytest.raises(Forbidden), ledger.writing() as writer:
        writer.append(Decision.ALARMED, TASK, {"sites": ["north"], "fact": "no number"}, "stranger")


def test_another_identity_may_be_named_and_roles_may_forbid_it(raise_alarm, places, ledger, monkeypatch):
    monkeypatch.setenv("FORMULARY_MONITOR", "watcher")
    admit(places.var, ledger, "watcher")
    (places.root / "roles.yaml").write_text(yaml.safe_dump({"identities": {"watcher": ["promote"]}}))
    (told,) = raise_alarm(key=False)
    assert told.outcome is Contained.NO_KEY
    (places.root / "roles.yaml").write_text(yaml.safe_dump({"identities": {"watcher": ["contain"]}}))
    (told,) = raise_alarm(key=False, site="east")[-1:]
    assert told.outcome is Contained.SUSPENDED
    assert ledger.state(TASK).suspended["east"].actor == "watcher"


def test_alarms_are_worked_off_once_whoever_looks(raise_alarm, places, records, ledger):
    raise_alarm()
    assert contain_new(places, records, open_ledger(places.var)) == []
    records.append([draw_alarm(site=site) for site in ("east", "south")])
    assert [told.alarm for told in contain_new(places, records, ledger)] == [2, 3]
    assert kinds(ledger) == ["alarmed", "suspended"] * 3


def test_a_new_journal_whose_numbers_begin_again_hides_no_alarm(raise_alarm, places, records, ledger, person):
    raise_alarm()
    resume(person, TASK, ("north",))
    records.engine.dispose()
    for path in places.var.glob("journal.db*"):
        path.unlink()
    fresh = open_records(places.var)
    fresh.append([replace(draw_alarm(), at="2027-01-01T00:00:00.000+00:00")])
    (told,) = contain_new(places, fresh, ledger)
    assert (told.alarm, told.outcome) == (1, Contained.SUSPENDED)


DYING = """
import os, signal
from imaging.config import read_places
from monitoring.containment import contain_new
from monitoring.records import open_records
from registry import decisions
from registry.ledger import open_ledger

real = decisions.stop
def die(*told):
    if os.environ["DIE"] == "late":
        real(*told)
    os.kill(os.getpid(), signal.SIGKILL)
decisions.stop = die
places = read_places()
contain_new(places, open_records(places.var), open_ledger(places.var))
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_process_that_is_killed_on_the_way_loses_nothing_and_doubles_nothing(places, records, ledger, when):
    write_policy(places, surveillance={"contain": "suspend"})
    admit(places.var, ledger, "monitor")
    records.append([draw_alarm()])
    told = {"FORMULARY_ROOT": str(places.root), "FORMULARY_VAR": str(places.var), "DIE": when}
    done = subprocess.run([sys.executable, "-c", DYING], cwd=ROOT, env={**os.environ, **told}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert kinds(ledger) == []
    contain_new(places, records, ledger)
    assert kinds(ledger) == ["alarmed", "suspended"]
    assert ledger.verify() == ledger.generation()


def test_what_fails_at_one_alarm_keeps_no_other_from_its_site(places, records, ledger, caplog, monkeypatch):
    real = containment.contain

    def fail(places, acting, alarm):
        if alarm.seq == 1:
            raise Conflict("Somebody holds the ledger.", "")
        return real(places, acting, alarm)

    monkeypatch.setattr(containment, "contain", fail)
    records.append([draw_alarm(), draw_alarm(site="east")])
    assert [told.alarm for told in contain_new(places, records, ledger)] == [2]
    assert f"alarm 1 of {TASK} at north could not be worked off" in caplog.text


@pytest.fixture
def unread(raise_alarm, places, records, ledger):
    """An alarm that came while the task's policy could not be read, and how to mend the policy."""

    def make(content=b"surveillance: {parst: [pixels]}", key=True):
        if key:
            admit(places.var, ledger, "monitor")
        path = places.policies / f"{TASK}.yaml"
        path.unlink() if content is None else path.write_bytes(content)
        records.append([draw_alarm()])
        (told,) = contain_new(places, records, ledger)
        assert told.outcome == Contained.NO_POLICY
        return lambda: write_policy(places, surveillance={"contain": "suspend"})

    return make


@pytest.mark.parametrize("content", [b"surveillance: {parst: [pixels]}", b"a: [", b"\xff", None])
def test_an_alarm_is_told_though_no_policy_says_what_it_does(unread, ledger, caplog, content):
    unread(content)
    (alarmed,) = open_alarms(ledger, TASK)["north"]
    assert (alarmed.actor, alarmed.body["asked"], alarmed.body["contained"]) == (
        "monitor",
        None,
        Contained.NO_POLICY,
    )
    assert {record.levelname for record in caplog.records} >= {"ERROR"}
    assert f"alarm 1 of {TASK} at north cannot contain anything" in caplog.text
    assert kinds(ledger) == ["alarmed"]
    assert ledger.verify() == ledger.generation()


@pytest.mark.parametrize("key", [True, False])
def test_it_is_contained_once_when_the_policy_can_be_read(unread, places, records, ledger, key):
    mend = unread(key=key)
    assert contain_new(places, records, ledger) == []
    mend()
    assert [told.outcome for told in contain_new(places, records, ledger)] == [
        Contained.SUSPENDED if key else Contained.NO_KEY]  # fmt: skip
    assert [event.body["alarm"] for event in open_alarms(ledger, TASK)["north"]] == [1]
    assert contain_new(places, records, ledger) == []
    admit(places.var, ledger, "monitor")
    contain_new(places, records, ledger)
    assert kinds(ledger) == ["alarmed"] * (2 if key else 3) + ["suspended"]


def test_nor_is_it_contained_when_somebody_acknowledged_it_before(unread, places, records, ledger, person):
    mend = unread()
    acknowledge(person, TASK, ("north",))
    mend()
    assert contain_new(places, records, ledger) == []
    assert "north" in ledger.champions(TASK)


def test_acknowledging_closes_the_alarms_of_a_site_and_resumes_nothing(raise_alarm, person, ledger):
    raise_alarm()
    raise_alarm(site="east")
    action = ACTIONS["acknowledge"]
    told = perform(action, person, action.arguments(task=TASK, sites=("north",), because="A new scanner."))
    assert told["alarms"] == [1]
    assert set(open_alarms(ledger, TASK)) == {"east"}
    assert "north" in ledger.state(TASK).suspended
    with pytest.raises(Conflict, match="open: east"):
        acknowledge(person, TASK, ("north",))
    resume(person, TASK, ("north",))
    assert "north" in ledger.champions(TASK)


def test_alarms_move_no_version_and_close_no_request(raise_alarm, places, ledger, person):
    raise_alarm("notify")
    made = register(write_stages(places, "two"), ledger, TASK, person.signer)
    request(person, TASK, made.version)
    raise_alarm("notify")
    approver = admit(places.var, ledger, "approver@test")
    assert approve(Acting(places, ledger, approver, "Read."), TASK, made.version)


def test_a_backup_holds_alarms_and_what_they_did(raise_alarm, person, places, ledger, tmp_path):
    raise_alarm(key=False)
    raise_alarm(site="east")
    acknowledge(person, TASK, ("east",))
    backup = back_up(person)
    fresh = replace(places, var=tmp_path / "elsewhere")
    fresh.var.mkdir()
    other = open_ledger(fresh.var)
    restore(fresh, other, backup)
    assert other.verify() == ledger.generation()
    assert set(open_alarms(other, TASK)) == {"north"}
    assert set(other.state(TASK).suspended) == {"north", "east"}
    assert all(digest_event(event) == event.hash for event in other.events(TASK))
