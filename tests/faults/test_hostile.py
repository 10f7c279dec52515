"""Bodies that are meant to hurt: whoever sends them is refused, and nobody else notices."""

import contextlib
import http.client
import itertools
import json
import os
import pickle
import random
import socket
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import psutil
import pytest
from starlette.routing import Route

from imaging.vocabulary import ContentType, Modality
from services.findings import encode
from services.routes import Routes
from services.slots import Slots
from tests.tiny import SIZE
from tests.tiny_bombs import MIB, OFFSET, as_npy, make_bombs
from tests.tiny_gateway import NPY, Gateway, draw_pixels

SOAK = bool(os.environ.get("FORMULARY_SOAK"))
POISONED = 2000 if SOAK else 150
HUGE = 8 if SOAK else 1
MUTANTS = 500 if SOAK else 25
REFUSED = {400, 413, 415, 422}
MOST_MIB = 300  # 16 Mi pixels are taken: 128 MiB as they are stored, 64 MiB as float32, and a copy
NORTH = {"X-Site": "north"}


@pytest.fixture(scope="module")
def gateway(pair):
    with Gateway(pair) as running:
        yield running


class Peak:
    """How much more memory the gateway's processes took than they had, at their highest."""

    def __init__(self, gateway):
        root = psutil.Process(gateway.process.pid)
        tree = [root, *root.children(recursive=True)]
        self._status = [
            Path(f"/proc/{one.pid}") for one in tree if "services.job_worker" not in one.cmdline()
        ]
        for status in self._status:
            (status / "clear_refs").write_text("5")
        self._before = self._read("VmRSS:")

    def _read(self, name):
        lines = [line for one in self._status for line in (one / "status").read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    def mib(self):
        return self._read("VmHWM:") - self._before


def image_of(number):
    return encode(draw_pixels(number), NPY, 2.0, Modality.CT)


def poison(number):
    """An .npy that breaks the rules in one of several ways."""
    bad = draw_pixels(number).astype(np.float32)
    bad[number % SIZE, 3] = (np.nan, np.inf, -np.inf)[number % 3]
    return (
        as_npy(bad), as_npy(np.zeros((SIZE, SIZE + 1), np.int16)), image_of(number)[: -1 - number],
        as_npy(np.full((SIZE, SIZE), 1e300)), as_npy(np.full((SIZE, SIZE), 1j)), b"",
        as_npy(np.zeros((0, SIZE))), as_npy(np.array([[None]])), os.urandom(500),
    )[number % 9]  # fmt: skip


def in_threads(count, work):
    """Do `work(0)` to `work(count - 1)` at once; whatever one of them raises is raised."""
    failed = []

    def run(number):
        try:
            work(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def ask_at_once(connections, bodies):
    """Send a body on each connection before any answer is read; (status, answer) of each."""
    for connection, body in zip(connections, bodies, strict=True):
        connection.request("POST", "/v1/models/nodes/predict", body, {**NORTH, "Content-Type": NPY})
    answers = [connection.getresponse() for connection in connections]
    return [(answer.status, json.loads(answer.read())) for answer in answers]


def test_poison_beside_good_images_hurts_nobody_else(gateway):
    expected = [gateway.post(body=image_of(number)).json()["probabilities"] for number in range(8)]
    images, ran = (gateway.count(f"formulary_batch_images_{name}") for name in ("sum", "count"))
    connections = [http.client.HTTPConnection("127.0.0.1", gateway.port) for _ in range(16)]
    for turn in range(POISONED // 8):
        bodies = [one for good in range(8) for one in (image_of(good), poison(8 * turn + good))]
        told = ask_at_once(connections, bodies)
        for (status, answer), probabilities in zip(told[::2], expected, strict=True):
            assert status == 200
            assert answer["probabilities"] == pytest.approx(probabilities, abs=1e-4)
        assert {status for status, _ in told[1::2]} <= REFUSED, told
    images, ran = (gateway.count(f"formulary_batch_images_{name}") - before
                   for name, before in (("sum", images), ("count", ran)))  # fmt: skip
    assert images == POISONED // 8 * 8  # no poison reached the engine,
    assert ran < images  # and the good went in batches, as far as they came at once
    assert not gateway.errors()


def send_huge(gateway, path, headers, chunked, total):
    """Send zeros until the gateway has enough; the status, or None where it broke the connection off."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
    connection.putrequest("POST", path)
    told = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(total)}
    for name, value in {**headers, **told}.items():
        connection.putheader(name, value)
    connection.endheaders()
    block = bytes(MIB)
    part = b"%x\r\n%b\r\n" % (MIB, block) if chunked else block
    try:
        for _ in range(total // MIB):
            connection.send(part)
        if chunked:
            connection.send(b"0\r\n\r\n")
    except OSError:
        pass  # it reads no more; what it said lies in the socket
    try:
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def test_bodies_of_500_mb_are_not_kept(gateway, token):
    bearer = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    image = {**NORTH, "Content-Type": NPY}
    targets = [("/v1/models/nodes/predict", image), ("/v1/models/nodes/explanations", image),
               ("/v1/models/discs/volumes", image), ("/v1/registry/suspend", bearer),
               ("/v1/nothing", image), ("/v1/models", image)]  # fmt: skip
    asked = list(itertools.product(targets, (False, True))) * HUGE
    peak, told = Peak(gateway), []

    def ask(number):
        if number == 0:
            while len(told) < len(asked):
                assert gateway.post().status_code == 200
                time.sleep(0.02)
            return
        for (path, headers), chunked in asked[number - 1 :: 3]:
            told.append((path, chunked, send_huge(gateway, path, headers, chunked, 500 * 10**6 // MIB * MIB)))

    in_threads(4, ask)
    assert peak.mib() < MOST_MIB
    assert {status for _, _, status in told} <= {None, 400, 404, 405, 413}
    assert not gateway.errors()


def test_bodies_that_are_only_announced_keep_nobody_out(gateway):
    head = f"POST /v1/models/nodes/predict HTTP/1.1\r\nHost: x\r\nX-Site: north\r\nContent-Type: {NPY}\r\n"
    lengths = ("Content-Length: 33554432", "Content-Length: 1000000000000", "Transfer-Encoding: chunked")
    with contextlib.ExitStack() as stack:
        for length in lengths * 20:
            connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=10)
            stack.enter_context(connection).sendall(f"{head}{length}\r\n\r\n".encode())
        time.sleep(0.5)
        assert [gateway.post().status_code for _ in range(5)] == [200] * 5


@pytest.fixture(scope="module")
def bombs():
    return make_bombs()


def test_bombs_of_every_kind_are_refused_in_little_time_and_memory(gateway, bombs):
    """Each one under every content type; what is within the limits is read and fits no model."""
    for (name, body), kind in itertools.product(bombs.items(), ContentType):
        peak, start = Peak(gateway), time.perf_counter()
        told = gateway.post(body=body, kind=kind)
        assert time.perf_counter() - start < 20, (name, kind)
        assert told.status_code in REFUSED, (name, kind, told.text)
        assert peak.mib() < MOST_MIB, (name, kind)
    assert gateway.post().status_code == 200
    assert not gateway.errors()


def test_bombs_as_jobs_are_refused_at_once_or_fail_and_the_worker_goes_on(gateway, bombs):
    paths = ("discs/volumes", "nodes/explanations")
    good = as_npy(np.stack([draw_pixels(1), draw_pixels(2)]))
    taken = []
    for body, kind, path in [*itertools.product(bombs.values(), (ContentType.NIFTI, NPY), paths),
                             (good, NPY, paths[0])]:  # fmt: skip
        headers = {**NORTH, "Content-Type": kind}
        told = gateway.client.post(f"/v1/models/{path}", content=body, headers=headers)
        assert told.status_code in REFUSED | {202}, (path, kind, told.text)
        taken += [told.headers["location"]] if told.status_code == 202 else []

    def state(place):
        return gateway.client.get(place, headers=NORTH).json()["state"]

    gateway.wait(lambda: {state(place) for place in taken} <= {"failed", "done"}, 90)
    assert [state(place) for place in taken] == ["failed"] * (len(taken) - 1) + ["done"]
    assert not gateway.errors()


def test_a_damaged_file_is_never_a_fault_of_ours(gateway):
    dice = random.Random(4)
    for kind, _ in itertools.product(ContentType, range(MUTANTS)):
        body = bytearray(encode(draw_pixels(), kind, 2.0, Modality.CT, OFFSET))
        for _ in range(dice.choice((1, 4, 32))):
            body[dice.randrange(min(len(body), dice.choice((64, 512, len(body)))))] = dice.randrange(256)
        told = gateway.post(
            body=bytes(body[: dice.choice((None, None, dice.randrange(len(body))))]), kind=kind
        )
        assert told.status_code in REFUSED | {200}, told.text
    assert not gateway.errors()


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder):
        self._folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self._folder,)


PICKLES = (
    "application/vnd.bentoml+pickle", "application/python-pickle", "application/x-pickle",
    "application/octet-stream", "application/vnd.bentoml.stream_outputs", "multipart/form-data; boundary=b",
    "application/x-www-form-urlencoded", "application/json", "text/plain", "", *ContentType,
)  # fmt: skip
NOT_OURS = (
    "/docs.json", "/schema.json", "/healthz", "/health", "/predict", "/submit", "/status", "/get", "/retry",
    "/cancel", "/static_content/index.css", "/run", "/load", "/__call__", "/v1", "/v1/jobs",
)  # fmt: skip


def find_paths(places):
    routes = [
        one for one in Routes(places, Slots(places, "openvino/f32")).build().routes if isinstance(one, Route)
    ]
    named = {one.path.replace("{task}", "nodes").replace("{number}", str(uuid.uuid4())) for one in routes}
    assert {"/v1/models/nodes/predict", "/v1/registry/restore"} <= named
    return sorted({*named, *NOT_OURS})


def test_no_route_opens_a_pickle(gateway, apart, token, tmp_path):
    folder = tmp_path / "executed"
    body = pickle.dumps(Bomb(folder))
    pickle.loads(body)  # it works
    folder.rmdir()
    headers = {**NORTH, "Authorization": f"Bearer {token}", "Bentoml-Payload-Meta": "{}"}
    for path, kind in itertools.product(find_paths(apart), PICKLES):
        for method in ("POST", "PUT", "GET", "DELETE") if kind == PICKLES[0] else ("POST",):
            for sent in (body, as_npy(np.array([Bomb(folder)]))) if kind == NPY else (body,):
                told = gateway.client.request(
                    method, path, content=sent, headers={**headers, "Content-Type": kind}
                )
                assert told.status_code < 500, (method, path, kind, told.text)
                assert not folder.exists(), (method, path, kind)
    assert not gateway.errors()


@pytest.mark.parametrize("path", NOT_OURS)
def test_what_the_server_offers_of_its_own_is_not_there(gateway, path):
    for method in ("GET", "POST", "PUT"):
        told = gateway.client.request(method, path)
        assert (told.status_code, told.json()["type"]) == (404, "/problems/not-found")


NO_HTTP = {
    "a pickle": (pickle.dumps(["GET / HTTP/1.1"]) * 100, 1),
    "another version": (b"GET /livez HTTP/9.9\r\n\r\n", 1),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 1),
    "a proxy's word": (b"CONNECT 127.0.0.1:1 HTTP/1.1\r\n\r\n", 1),
    "two lengths": (b"GET / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 1),
    "a head without an end": (b"GET /livez HTTP/1.1\r\nX: " + bytes([97]) * MIB, 100),
    "a path without an end": (b"GET /" + bytes([97]) * MIB, 100),
    "headers without an end": (b"GET /livez HTTP/1.1\r\n" + b"X: aaaaaaaaaaa\r\n" * 2**16, 100),
    "trailers without an end": (
        b"POST /livez HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + bytes([97]) * MIB, 100,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_HTTP)
def test_what_is_no_http_is_cut_off_at_once(gateway, name):
    sent, times = NO_HTTP[name]
    peak, start = Peak(gateway), time.perf_counter()
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
            for _ in range(times - 1):
                connection.sendall(sent[-MIB:])
        with contextlib.suppress(ConnectionError):
            while connection.recv(MIB):  # until the other side closes
                pass
    assert gateway.post().status_code == 200
    assert time.perf_counter() - start < 5
    assert peak.mib() < 20
    assert not gateway.errors()


def test_no_websocket_is_opened(gateway):
    asked = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
             "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")  # fmt: skip
    for path in ("/", "/v1/models/nodes/predict", "/nothing"):
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
            connection.sendall("\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *asked, "", ""]).encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 403")
