"""From an alarm's row to the first request that meets it: one site stops or falls back, no other notices."""

import time

import pytest
import yaml

from imaging.vocabulary import Contained, Kind
from monitoring.containment import contain_new
from monitoring.records import Alarm, open_records
from registry.access import Acting, admit
from registry.decisions import acknowledge, resume
from registry.ledger import open_ledger
from tests.tiny import promote, train, train_another, write_root
from tests.tiny_gateway import Gateway

WITHIN_S = 5.0


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Version 2 serves at both sites, and version 1 did before it."""
    places = write_root(tmp_path_factory.mktemp("contained"), nodes=Kind.CLASSIFICATION)
    promote(places, "nodes", train(places, "nodes"))
    promote(places, "nodes", train_another(places, 100))
    admit(places.var, open_ledger(places.var), "monitor")
    return places


@pytest.fixture(scope="module")
def gateway(places):
    with Gateway(places) as running:
        yield running


def ask(gateway, site="east"):
    """The whole answer but for what names the request."""
    told = gateway.post(site=site).json()
    return {name: value for name, value in told.items() if name not in ("id", "request_id")}


def ask_for_containment(places, word):
    path = places.policies / "nodes.yaml"
    policy = yaml.safe_load(path.read_text()) | {"surveillance": {"contain": word}}
    path.write_text(yaml.safe_dump(policy))


def raise_alarm(places):
    told = {"task": "nodes", "site": "north", "version": 2, "kind": "chart", "statistic": "noise",
            "part": "pixels", "direction": "up", "value": 9.5, "bound": 8.25, "since": "subject 41",
            "budget_days": 180.0, "last_seq": 44, "detail": "Noise is higher."}  # fmt: skip
    open_records(places.var).append([Alarm(**told)])


def contain(places, gateway, is_contained, others):
    """Raise an alarm, work it off, ask until it shows; ms until then, the first such answer, the outcome."""
    start = time.monotonic()
    raise_alarm(places)
    (told,) = contain_new(places, open_records(places.var), open_ledger(places.var))
    while not is_contained(answer := gateway.post(site="north")):
        others.append(ask(gateway))
        assert time.monotonic() - start < WITHIN_S
    return 1000 * (time.monotonic() - start), answer, told.outcome


def test_the_site_is_answered_503_with_the_reason_and_others_bit_identically(
    places, gateway, record_property, capsys
):
    ask_for_containment(places, "suspend")
    others = [ask(gateway)]
    assert gateway.post(site="north").status_code == 200
    spent_ms, answer, outcome = contain(places, gateway, lambda told: told.status_code == 503, others)
    others += [ask(gateway) for _ in range(5)]
    record_property("alarm_to_first_contained_request_ms", spent_ms)
    with capsys.disabled():
        print(f"\nfrom the alarm's row to the first 503: {spent_ms:.0f} ms")
    assert spent_ms < 1000 * WITHIN_S
    assert outcome is Contained.SUSPENDED
    assert answer.json()["type"] == "/problems/suspended"
    for part in ("suspended at north", "by monitor", "noise left its limit", "since subject 41", "resume"):
        assert part in answer.json()["detail"]
    assert all(one == others[0] for one in others)
    assert others[0]["version"] == 2


def test_it_goes_on_when_somebody_has_looked_and_resumed(places, gateway):
    ledger = open_ledger(places.var)
    person = Acting(places, ledger, admit(places.var, ledger, "author@test"), "A new scanner; it is fine.")
    assert acknowledge(person, "nodes", ("north",)) == [1]
    resume(person, "nodes", ("north",))
    gateway.wait(lambda: gateway.post(site="north").status_code == 200)


def test_or_the_site_falls_back_to_the_version_before_and_others_do_not(
    places, gateway, record_property, capsys
):
    ask_for_containment(places, "fallback")
    others, before = [ask(gateway)], gateway.post(site="north")
    assert before.json()["version"] == 2

    def is_contained(told):
        assert told.status_code == 200  # nobody is left without an answer on the way
        return told.json()["version"] == 1

    spent_ms, answer, outcome = contain(places, gateway, is_contained, others)
    others += [ask(gateway) for _ in range(5)]
    record_property("alarm_to_first_fallback_ms", spent_ms)
    with capsys.disabled():
        print(f"\nfrom the alarm's row to the first answer of the version before: {spent_ms:.0f} ms")
    assert spent_ms < 1000 * WITHIN_S
    assert outcome is Contained.FELL_BACK
    assert answer.json()["package"] != before.json()["package"]
    assert all(one == others[0] for one in others)
    assert not gateway.errors()
