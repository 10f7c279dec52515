"""A stop loses nothing, a rollback is there within a second, swaps under load refuse nobody."""

import os
import threading
import time
from collections import Counter

import httpx
import pytest

from imaging.vocabulary import Kind
from registry.access import Acting, admit
from registry.decisions import roll_back
from registry.ledger import open_ledger
from tests.tiny import promote, train, train_another, write_root
from tests.tiny_gateway import Gateway

SWAPS = 100 if os.environ.get("FORMULARY_SOAK") else 6
CLIENTS = 4


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Version 1 serves; version 2 is registered."""
    places = write_root(tmp_path_factory.mktemp("stopping"), nodes=Kind.CLASSIFICATION)
    promote(places, "nodes", train(places, "nodes"))
    train_another(places, 100)
    return places


class Traffic:
    """Clients that ask without a pause until they are stopped, or nobody listens any more."""

    def __init__(self, gateway, clients=CLIENTS):
        self._gateway, self.told, self.lost = gateway, [], []
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def stop(self):
        self._stopped.set()

    def __exit__(self, *_):
        self.stop()
        for thread in self._threads:
            thread.join()

    def _ask(self):
        while not self._stopped.is_set():
            try:
                answer = self._gateway.post()
            except httpx.ConnectError:  # nobody took the connection, so nothing was asked
                return
            except httpx.TransportError as error:
                self.lost.append(error)
                return
            self.told.append((time.monotonic(), answer.status_code, answer.json().get("version")))


def newest(traffic):
    """Versions of the last answers."""
    return {version for _, _, version in traffic.told[-2 * CLIENTS :]}


def test_a_stop_under_load_loses_nothing(places):
    with Gateway(places) as gateway, Traffic(gateway, 8) as traffic:
        gateway.wait(lambda: len(traffic.told) > 100)
        gateway.process.terminate()
        stopped = time.monotonic()
        gateway.wait(lambda: gateway.client.get("/readyz").status_code == 503)
        traffic.stop()  # whoever balances the load sends nobody any more; what was sent is answered
        gateway.process.wait(30)
    assert not traffic.lost
    assert max(at for at, *_ in traffic.told) > stopped
    assert Counter(status for _, status, _ in traffic.told).keys() == {200}


def test_a_rollback_is_there_within_a_second(places):
    ledger = open_ledger(places.var)
    with Gateway(places) as gateway, Traffic(gateway, 1) as traffic:
        gateway.wait(lambda: len(traffic.told) > 5)
        promote(places, "nodes", 2)
        gateway.wait(lambda: traffic.told[-1][2] == 2)
        acting = Acting(places, ledger, admit(places.var, ledger, "author@test"), "It was a trial.")
        roll_back(acting, "nodes")
        decided = time.monotonic()
        gateway.wait(lambda: traffic.told[-1][2] == 1)
        first = next(at for at, _, version in traffic.told if at > decided and version == 1)
    assert first - decided < 1.0
    assert {status for _, status, _ in traffic.told} == {200}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_swaps_under_load_refuse_nobody(places, workers):
    ledger = open_ledger(places.var)
    acting = Acting(places, ledger, admit(places.var, ledger, "author@test"), "To and fro.")
    with Gateway(places, FORMULARY_WORKERS=workers) as gateway, Traffic(gateway) as traffic:
        for _ in range(SWAPS // 2):
            promote(places, "nodes", 2)
            gateway.wait(lambda: newest(traffic) == {2})
            roll_back(acting, "nodes")
            gateway.wait(lambda: newest(traffic) == {1})
    assert not traffic.lost
    assert {status for _, status, _ in traffic.told} == {200}
    assert not gateway.errors()
