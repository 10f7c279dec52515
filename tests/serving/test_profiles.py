"""Profile gpu, on devices that every machine has: runners in processes of their own, one hop a batch."""

import contextlib
import os
import signal
import socket
import threading

import httpx
import numpy as np
import psutil
import pytest

from imaging.errors import ConfigError, TrustError
from imaging.vocabulary import Kind
from registry.engines import open_engine
from registry.ledger import open_ledger
from registry.package import read_contract, shelf
from services.placement import Devices, read_devices
from services.remote import RemoteEngine
from tests.tiny import promote, train, train_another, write_root
from tests.tiny_gateway import Gateway

GPU = {"FORMULARY_PROFILE": "gpu", "FORMULARY_DEVICES": "cpu:0,cpu:1"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    places = write_root(tmp_path_factory.mktemp("profiles"), nodes=Kind.CLASSIFICATION)
    promote(places, "nodes", train(places, "nodes"))
    return places


@pytest.fixture(scope="module")
def gateway(places):
    with Gateway(places, **GPU) as running:
        yield running


def find_runners(gateway):
    """Device -> process, of a gateway's runners; one that was killed is none."""
    found = {}
    for process in psutil.Process(gateway.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "services.device:Device" in process.cmdline():
                found[process.environ()["FORMULARY_DEVICE"]] = process
    return found


def ask_all_along(gateway, seen, stopped):
    while not stopped.is_set():
        response = gateway.post()
        seen.append((response.status_code, response.json()))


@pytest.fixture
def traffic(gateway):
    """Answers as they come, (status, body), of four clients."""
    seen, stopped = [], threading.Event()
    asking = [threading.Thread(target=ask_all_along, args=(gateway, seen, stopped)) for _ in range(4)]
    for thread in asking:
        thread.start()
    yield seen
    stopped.set()
    for thread in asking:
        thread.join()


def read_answer(body):
    assert "version" in body, body
    return {name: body[name] for name in ("version", "package", "engine", "probabilities", "positive")}


def test_both_profiles_answer_alike(places, gateway):
    with Gateway(places) as inside:
        assert read_answer(inside.post().json()) == read_answer(gateway.post().json())
        assert not find_runners(inside)


def test_each_device_has_one_process_and_each_of_them_answers(gateway, traffic):
    runners = find_runners(gateway)
    assert set(runners) == {"cpu:0", "cpu:1"}
    before = {device: sum(process.cpu_times()[:2]) for device, process in runners.items()}
    gateway.wait(lambda: len(traffic) > 400)
    assert all(sum(process.cpu_times()[:2]) > before[device] for device, process in runners.items())


def test_no_runner_listens_to_the_network(gateway):
    for runner in find_runners(gateway).values():
        assert not runner.net_connections("inet")


def test_kill_9_of_a_runner_gives_no_wrong_answer_and_it_comes_back(gateway, traffic):
    right = read_answer(gateway.post().json())
    for _ in range(3):
        seen = len(traffic)
        gateway.wait(lambda seen=seen: len(traffic) > seen + 20)
        killed = find_runners(gateway)["cpu:0"]
        killed.kill()
        gateway.wait(lambda old=killed: find_runners(gateway).get("cpu:0", old).pid != old.pid)
    seen = len(traffic)
    gateway.wait(lambda: len(traffic) > seen + 50)
    assert {status for status, _ in traffic} <= {200, 503}
    assert {status for status, _ in traffic[seen + 10 :]} == {200}
    assert all(read_answer(body) == right for status, body in traffic if status == 200)
    assert sum(status == 503 for status, _ in traffic) <= 4 * 3  # what was on its way, no more


def test_a_new_version_is_swapped_in_without_a_refusal_or_a_mixture(places, gateway, traffic):
    number = train_another(places, 300)
    promote(places, "nodes", number)
    gateway.wait(lambda: traffic and traffic[-1][1].get("version") == number)
    assert {status for status, _ in traffic} == {200}
    told = {(body["version"], body["package"], body["probabilities"]["disc"]) for _, body in traffic}
    assert len(told) == len({version for version, *_ in told}) == 2


def test_a_missing_device_fails_readiness_with_the_reason(places):
    with Gateway(places, FORMULARY_PROFILE="gpu", FORMULARY_DEVICES="cuda:7") as gateway:
        gateway.wait(lambda: gateway.client.get("/readyz").status_code == 503)
        told = gateway.client.get("/readyz").json()["detail"]
        assert "cuda:7" in told
        assert gateway.post().status_code == 503


def test_no_runner_outlives_a_killed_gateway(places):
    with Gateway(places, **GPU) as gateway:
        assert gateway.post().status_code == 200
        runners = list(find_runners(gateway).values())
        gateway.process.kill()
        _, alive = psutil.wait_procs(runners, timeout=20)
        assert runners
        assert not alive


def test_two_gateway_workers_share_the_runners_and_one_takes_over_from_the_other(places):
    with Gateway(places, FORMULARY_WORKERS="2", **GPU) as gateway:
        gateway.wait(lambda: len(find_runners(gateway)) == 2 and gateway.post().status_code == 200)
        below = psutil.Process(gateway.process.pid).children(recursive=True)
        assert sum("services.device:Device" in process.cmdline() for process in below) == 2
        owner = find_runners(gateway)["cpu:0"].parent()
        owner.kill()

        def are_taken_over():
            runners = find_runners(gateway)
            return len(runners) == 2 and all(one.parent().pid != owner.pid for one in runners.values())

        gateway.wait(are_taken_over, 60)
        gateway.client.close()  # a new connection goes to a worker that lives
        gateway.client = httpx.Client(base_url=gateway.client.base_url, timeout=60)
        gateway.wait(lambda: gateway.post().status_code == 200)


@pytest.fixture
def devices(places, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FORMULARY_ROOT", str(places.root))
    monkeypatch.delenv("FORMULARY_VAR", raising=False)
    held = Devices(("cpu:0", "cpu:1"), tmp_path_factory.mktemp("d"))
    yield held
    held.stop()


def find_digest(places):
    return open_ledger(places.var).champions("nodes")["north"].digest


def test_a_remote_engine_answers_bit_for_bit_what_one_in_this_process_does(places, devices):
    digest = find_digest(places)
    remote = RemoteEngine(devices, digest, "openvino/f32")
    folder = shelf(places.var, digest)
    here = open_engine(folder, "openvino", "f32")
    for count in (1, 3, 16):
        batch = np.random.default_rng(count).random((count, *read_contract(folder).shape), np.float32)
        told, expected = remote.run(batch), here.run(batch)
        for part in ("logits", "heat", "embedding"):
            np.testing.assert_array_equal(getattr(told, part), getattr(expected, part))
    assert (remote.name, remote.lanes) == ("openvino/f32", 4)


def test_a_batch_that_comes_while_every_runner_starts_again_waits_for_one(places, devices):
    remote = RemoteEngine(devices, find_digest(places), "openvino/f32")
    batch = np.zeros((2, 1, 32, 32), np.float32)
    before = remote.run(batch)
    for child in devices.children:
        os.kill(child.process.pid, signal.SIGKILL)
    np.testing.assert_array_equal(remote.run(batch).logits, before.logits)


def test_a_runner_opens_only_what_the_ledger_knows(devices):
    with pytest.raises(TrustError, match=r"cpu:0.*not in the ledger"):
        RemoteEngine(devices, "sha256:" + "0" * 64, "openvino/f32")


def test_a_runner_takes_no_pickle_and_has_no_page_of_bentoml(places, devices):
    RemoteEngine(devices, find_digest(places), "openvino/f32")
    for path in ("/", "/predict", "/docs.json", "/schema.json", "/metrics", "/healthz"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(devices.children[0].path))
            head = f"POST {path} HTTP/1.1\r\nHost: r\r\nContent-Length: 1\r\nConnection: close\r\n"
            connection.sendall(f"{head}Content-Type: application/vnd.bentoml+pickle\r\n\r\nN".encode())
            assert b" 404 " in connection.recv(4096).split(b"\r\n")[0]


def test_another_user_cannot_reach_the_sockets(devices, tmp_path):
    assert devices.children[0].path.parent.stat().st_mode & 0o077 == 0
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="open to others"):
        Devices(("cpu:0",), tmp_path / "open")


@pytest.mark.parametrize("told", ["", "cpu", "cpu:0,cpu:0", "cpu:0,cuda:0", "tpu:0", "cpu:0,tpu:1"])
def test_a_list_of_devices_that_is_none_is_refused(told, monkeypatch):
    monkeypatch.setenv("FORMULARY_DEVICES", told)
    with pytest.raises(ConfigError, match="no list of devices"):
        read_devices()
