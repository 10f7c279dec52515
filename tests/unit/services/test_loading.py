"""Packages are opened aside; what serves is never closed, whatever the ledger wants next."""

import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from imaging.errors import RegistryError, TrustError
from registry.state import Placement, State
from services import loading
from services.loading import Loader, Wanted
from services.slots import Slots


@dataclass
class Runner:
    closed: bool = False

    def close(self):
        self.closed = True


@dataclass
class Served:
    version: int
    engine: str = "fake/f32"
    runner: Runner = field(default_factory=Runner)

    @property
    def digest(self):
        return f"sha256:{self.version}"

    def at(self, *_):
        return self


class Evidence:
    def __init__(self, *_):
        self.statements = {}


class Ledger:
    """Takes incidents, or refuses them."""

    def __init__(self):
        self.incidents, self.away = [], False

    def record_incident(self, fact, task, body):
        if self.away:
            raise RegistryError("The database is away.")
        self.incidents.append(body["version"])


BAD, ODD = 13, 14


def open_fake(folder, named, engine, evaluation):
    if named[0] == BAD:
        raise TrustError("It does not hold.")
    if named[0] == ODD:
        raise MemoryError
    return Served(named[0])


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture
def loader(ledger, places, monkeypatch):
    monkeypatch.setattr(loading, "load_package", open_fake)
    monkeypatch.setattr(loading, "verify_package", Evidence)
    monkeypatch.setattr(Loader, "_choose", lambda *_: "fake/f32")
    monkeypatch.setattr(loading, "GRACE_S", 0.0)
    return Loader(places, ledger, "")


@pytest.fixture
def places(tmp_path):
    from imaging.config import Places

    return Places(tmp_path, tmp_path / "build", tmp_path / "var")


def wish(version, renewed=0):
    return Wanted("nodes", version, f"sha256:{version}", renewed)


def test_one_package_that_fails_in_whatever_way_fails_alone(loader, ledger):
    loader.want([wish(BAD), wish(ODD), wish(1)], [])
    loader.open_all()
    assert loader.find(wish(1)).version == 1
    assert [loader.is_refused(wish(number)) for number in (BAD, ODD, 1)] == [True, True, False]
    assert ledger.incidents == [BAD]  # an engine's own error is no question of trust
    assert loader.changes == 3


def test_what_was_refused_is_looked_at_again_and_is_one_incident(loader, ledger, monkeypatch):
    monkeypatch.setattr(loading, "RETRY_S", 0.0)
    loader.want([wish(BAD)], [])
    loader.open_all()
    time.sleep(0.01)
    loader.open_all()
    assert (loader.changes, ledger.incidents) == (2, [BAD])
    monkeypatch.setattr(loading, "load_package", lambda *_: Served(BAD))
    time.sleep(0.01)
    loader.open_all()
    assert loader.find(wish(BAD)).version == BAD
    assert not loader.is_refused(wish(BAD))


def test_evidence_that_is_renewed_opens_a_version_anew(loader):
    loader.want([wish(1)], [])
    loader.open_all()
    first = loader.find(wish(1))
    loader.want([wish(1, renewed=7)], [first])
    assert loader.find(wish(1, renewed=7)) is None
    loader.open_all()
    assert loader.find(wish(1, renewed=7)) is not first


def test_what_serves_in_place_of_what_does_not_hold_is_not_closed(loader):
    loader.want([wish(1)], [])
    loader.open_all()
    first = loader.find(wish(1))
    loader.want([wish(BAD)], [first])
    for _ in range(2):
        loader.open_all()
        loader._close_unused()
        time.sleep(0.01)
    assert not first.runner.closed
    loader.want([wish(2)], [])
    for _ in range(2):
        loader._close_unused()
        time.sleep(0.01)
    assert first.runner.closed
    assert loader.find(wish(1)) is None


class OneLedger(Ledger):
    """One task, one site, and the version that it wants there."""

    def __init__(self):
        super().__init__()
        self.version, self.generation = 1, 1

    def head(self):
        return self.generation, "hash"

    def events(self, *_):
        return []

    def state(self, task):
        placed = Placement(self.version, f"sha256:{self.version}", "2026-01-01")
        trail = {"north": [Placement(1, "sha256:1", "2026-01-01"), placed]}
        return State(trail=trail)


def test_what_another_worker_opened_between_two_looks_is_swapped_in(places, loader, monkeypatch):
    """This one opens it first, looks, and the other has it before the next look."""
    others, ledger = {"sha256:1#0"}, OneLedger()
    monkeypatch.setattr("services.slots.open_ledger", lambda _: ledger)
    monkeypatch.setattr("services.slots.read_params", lambda _: SimpleNamespace(tasks={"nodes": None}))
    monkeypatch.setattr(loader._workers, "all_have", lambda name: name in others)
    slots = Slots(places)
    slots.loader = loader
    serves = []
    for step in (slots.refresh, loader.open_all, slots.refresh):
        step()
    ledger.version, ledger.generation = 2, 2
    for step in (slots.refresh, loader.open_all, slots.refresh, slots.refresh):
        step()
        serves.append(slots.find("nodes", "north").version)
    others.add("sha256:2#0")
    slots.refresh()
    assert [*serves, slots.find("nodes", "north").version] == [1, 1, 1, 1, 2]


def test_a_ledger_that_is_away_does_not_end_the_opening(loader, ledger, monkeypatch):
    ledger.away = True
    loader.want([], [])
    loader.start()
    loader.want([wish(BAD)], [])
    time.sleep(0.3)
    ledger.away = False
    loader.want([wish(1)], [])
    deadline = time.monotonic() + 60
    while loader.find(wish(1)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loader.find(wish(1)).version == 1
    loader.stop()
