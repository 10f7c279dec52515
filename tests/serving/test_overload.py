"""Too much, too late, too slow: a refusal that says when to come back, and a row for every answer."""

import asyncio
import socket
import sqlite3
import time
from collections import Counter

import httpx
import pytest
import yaml

from imaging.vocabulary import Kind, Modality
from services.findings import encode
from tests.tiny import promote, train, write_root
from tests.tiny_gateway import NPY, Gateway, draw_pixels

BODY = encode(draw_pixels(), NPY, 2.0, Modality.CT)
HEADERS = {"Content-Type": NPY, "X-Site": "north"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    places = write_root(tmp_path_factory.mktemp("overload"), nodes=Kind.CLASSIFICATION)
    promote(places, "nodes", train(places, "nodes"))
    sites = yaml.safe_load((places.root / "sites.yaml").read_text())
    sites["sites"]["east"]["per_second"] = 5
    (places.root / "sites.yaml").write_text(yaml.safe_dump(sites))
    return places


@pytest.fixture(scope="module")
def gateway(places):
    with Gateway(places) as running:
        running.wait(lambda: running.client.get("/readyz").status_code == 200)
        yield running


def flood(gateway, clients, rounds, **headers):
    """Answers of clients that all ask at once, again and again."""

    async def ask():
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(
            base_url=str(gateway.client.base_url), limits=limits, timeout=60
        ) as client:

            async def one():
                return [await client.post("/v1/models/nodes/predict", content=BODY, headers=HEADERS | headers)
                        for _ in range(rounds)]  # fmt: skip

            return [one for many in await asyncio.gather(*(one() for _ in range(clients))) for one in many]

    return asyncio.run(ask())


def count_rows(places):
    with sqlite3.connect(places.var / "journal.db") as database:
        return database.execute("SELECT COUNT(*) FROM predictions").fetchone()[0]


def test_who_cannot_be_answered_in_time_is_told_at_once_and_leaves_no_row(gateway, places):
    flood(gateway, 8, 3)  # the pace is learnt
    before = count_rows(places)
    told = flood(gateway, 64, 4, **{"X-Deadline-Ms": "15"})
    counts = Counter(answer.status_code for answer in told)
    assert set(counts) <= {200, 429, 504}
    assert counts[429] + counts[504] > 0
    assert count_rows(places) - before == counts[200]
    for answer in told:
        if answer.status_code == 429:
            assert (int(answer.headers["retry-after"]) >= 1, answer.json()["type"]) == (
                True,
                "/problems/overloaded",
            )
        if answer.status_code == 504:
            assert answer.json()["type"] == "/problems/expired"
    assert gateway.post().status_code == 200


def test_a_patient_crowd_is_answered_whole(gateway):
    assert Counter(answer.status_code for answer in flood(gateway, 16, 4)) == {200: 64}


def test_a_site_may_ask_as_often_as_its_quota_and_no_other_site_suffers(gateway):
    time.sleep(1.1)
    told = flood(gateway, 4, 5, **{"X-Site": "east"})
    counts = Counter(answer.status_code for answer in told)
    assert 5 <= counts[200] <= 12
    assert counts[429] == 20 - counts[200]
    refused = next(answer for answer in told if answer.status_code == 429)
    assert "5 times a second" in refused.json()["detail"]
    assert gateway.post().status_code == 200


@pytest.mark.parametrize("deadline", ["0", "-1", "soon", "1e3", "600001"])
def test_a_deadline_that_is_none_is_refused(gateway, deadline):
    told = gateway.post(X_Deadline_Ms=deadline)
    assert (told.status_code, told.json()["type"]) == (400, "/problems/unreadable")


def test_slow_clients_hold_nobody_up(gateway):
    """Two hundred connections that send a byte and wait: everybody else is answered as before."""
    head = b"POST /v1/models/nodes/predict HTTP/1.1\r\nHost: x\r\nX-Site: north\r\nContent-Type: "
    head += NPY.encode() + b"\r\nContent-Length: 2000\r\n\r\n\x93"
    slow = [socket.create_connection(("127.0.0.1", gateway.port)) for _ in range(200)]
    try:
        for connection in slow:
            connection.sendall(head)
        time.sleep(0.5)
        start = time.perf_counter()
        assert gateway.post().status_code == 200
        assert time.perf_counter() - start < 5
    finally:
        for connection in slow:
            connection.close()
