"""The gateway is killed, its disk fills, its journal is locked: no answer is ever without its row."""

import os
import resource
import sqlite3
import threading
import time

import psutil
import pytest

from imaging.vocabulary import Kind
from tests.tiny import promote, train, write_root
from tests.tiny_gateway import Gateway

KILLS = 20 if os.environ.get("FORMULARY_SOAK") else 2
CLIENTS = 4


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    places = write_root(tmp_path_factory.mktemp("faults"), nodes=Kind.CLASSIFICATION)
    promote(places, "nodes", train(places, "nodes"))
    return places


def journalled(places):
    with sqlite3.connect(places.var / "journal.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return {row[0] for row in database.execute("SELECT id FROM predictions")}


@pytest.mark.parametrize("kill", range(KILLS))
def test_every_answered_prediction_is_in_the_journal_after_kill_9(places, kill):
    answered = []

    def ask(gateway):
        try:
            while True:
                response = gateway.post()
                if response.status_code == 200:
                    answered.append(response.json()["id"])
        except Exception:  # the connection broke: it was killed
            return

    with Gateway(places) as gateway:
        clients = [threading.Thread(target=ask, args=(gateway,)) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        gateway.wait(lambda: len(answered) > 50)
        time.sleep(0.05 * kill)
        gateway.kill()
        for client in clients:
            client.join()
    assert set(answered) <= journalled(places)
    assert len(set(answered)) == len(answered) > 50


def test_no_worker_outlives_a_killed_supervisor(places):
    with Gateway(places) as gateway:
        assert gateway.post().status_code == 200
        workers = psutil.Process(gateway.process.pid).children(recursive=True)
        gateway.process.kill()
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert workers
        assert not alive


def limit_files(gateway, size):
    """No process of the gateway can write a file beyond `size` bytes: a disk that is full, to them."""
    root = psutil.Process(gateway.process.pid)
    for process in [root, *root.children(recursive=True)]:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_is_a_503_without_a_row_and_the_service_recovers(places):
    with Gateway(places) as gateway:
        first = gateway.post()
        assert first.status_code == 200
        before = journalled(places)
        limit_files(gateway, 4096)
        told = gateway.post()
        assert (told.status_code, told.json()["type"]) == (503, "/problems/journal-down"), told.text
        assert told.headers["retry-after"]
        assert journalled(places) == before
        limit_files(gateway, resource.RLIM_INFINITY)
        again = gateway.post()
        assert again.status_code == 200
        assert journalled(places) == before | {again.json()["id"]}
        assert gateway.client.get("/livez").status_code == 200


def test_a_locked_journal_is_a_503_and_the_service_recovers(places):
    with Gateway(places) as gateway:
        assert gateway.post().status_code == 200
        before = journalled(places)
        blocker = sqlite3.connect(places.var / "journal.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        told = gateway.post()
        assert (told.status_code, told.json()["type"]) == (503, "/problems/journal-down")
        blocker.execute("ROLLBACK")
        assert gateway.post().status_code == 200
        assert len(journalled(places)) == len(before) + 1


def test_a_stop_finishes_what_was_begun(places):
    statuses = []
    with Gateway(places) as gateway:
        clients = [
            threading.Thread(target=lambda: statuses.append(gateway.post().status_code)) for _ in range(8)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert statuses == [200] * 8
    assert gateway.process.returncode in (0, -15)
