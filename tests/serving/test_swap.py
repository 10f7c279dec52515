"""A new version is swapped in under traffic; one whose package was changed is refused, the old one stays."""

import signal
import threading

import pytest

from imaging.vocabulary import Kind
from registry.ledger import open_ledger
from registry.package import shelf
from tests.tiny import promote, train, train_another, write_root
from tests.tiny_gateway import Gateway


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    places = write_root(tmp_path_factory.mktemp("swap"), nodes=Kind.CLASSIFICATION)
    promote(places, "nodes", train(places, "nodes"))
    return places


@pytest.fixture(scope="module")
def gateway(places):
    with Gateway(places) as running:
        yield running


def test_a_new_version_answers_without_a_refusal_on_the_way(places, gateway):
    number, seen, stopped = train_another(places, 100), [], threading.Event()

    def ask():
        while not stopped.is_set():
            response = gateway.post()
            seen.append(
                (response.status_code, response.json().get("version"), response.json().get("package"))
            )

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        gateway.wait(lambda: len(seen) > 20)
        promote(places, "nodes", number)
        gateway.wait(lambda: seen[-1][1] == number)
    finally:
        stopped.set()
        asking.join()
    assert {status for status, *_ in seen} == {200}
    versions = [version for _, version, _ in seen]
    assert versions == sorted(versions)
    assert len({(version, package) for _, version, package in seen}) == 2


def test_a_flipped_byte_in_the_model_is_refused_and_the_old_version_stays(places, gateway):
    before, number = gateway.post().json(), train_another(places, 200)
    gateway.signal(signal.SIGSTOP)  # so that it reads the ledger after the byte is flipped
    try:
        promote(places, "nodes", number)
        digest = open_ledger(places.var).champions("nodes")["north"].digest
        model = shelf(places.var, digest) / "model.onnx"
        content = bytearray(model.read_bytes())
        content[len(content) // 2] ^= 1
        model.chmod(0o644)
        model.write_bytes(content)
    finally:
        gateway.signal(signal.SIGCONT)
    gateway.wait(lambda: gateway.count("formulary_load_failures_total", task="nodes") == 1)
    assert gateway.post().json()["package"] == before["package"]
    incidents = open_ledger(places.var).events("nodes", "incident")
    assert [event.body["version"] for event in incidents] == [number]
    assert gateway.count("formulary_serving_version", task="nodes", site="north") == before["version"]
    check_a_fresh_process_serves_nothing_rather_than_that(places, number)
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    gateway.wait(lambda: gateway.post().json()["version"] == number)
    assert len(open_ledger(places.var).events("nodes", "incident")) == 2  # of the two processes, one each


def check_a_fresh_process_serves_nothing_rather_than_that(places, number):
    with Gateway(places) as fresh:
        told = fresh.post()
        assert (told.status_code, told.json()["type"]) == (503, "/problems/trust-error")
        assert f"v{number}" in told.json()["detail"]
        assert fresh.client.get("/readyz").status_code == 503
