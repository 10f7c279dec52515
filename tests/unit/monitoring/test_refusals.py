"""Requests without an answer become rows: all of them, soon, few, and nobody waits for them."""

import time

import pytest

from monitoring.records import Refusal, open_records
from monitoring.refusals import KINDS, Refusals


@pytest.fixture
def refusals(tmp_path):
    refusals = Refusals(tmp_path)
    yield refusals
    refusals.close()


def read(var):
    records = open_records(var)
    rows = records.read(Refusal)
    records.engine.dispose()
    return rows


def wait(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_first_one_is_written_at_once_and_what_follows_is_counted_into_the_next_row(refusals, tmp_path):
    refusals.count("brain", "north", "wrong-shape")
    wait(lambda: read(tmp_path))
    for _ in range(1000):
        refusals.count("brain", "north", "wrong-shape")
    refusals.count("brain", "east", "overloaded")
    refusals.close()
    told = [(row.task, row.site, row.reason, row.count) for row in read(tmp_path)]
    assert told[0] == ("brain", "north", "wrong-shape", 1)
    assert ("brain", "east", "overloaded", 1) in told
    assert sum(count for *place, count in told if place == ["brain", "north", "wrong-shape"]) == 1001
    assert len(told) <= 4


def test_who_names_no_known_task_or_site_leaves_no_row(refusals, tmp_path):
    refusals.count("other", "north", "unknown-task")
    refusals.count("brain", "other", "unknown-site")
    refusals.close()
    assert read(tmp_path) == []


def test_more_kinds_than_are_kept_apart_are_counted_by_their_place(refusals, tmp_path):
    for number in range(5 * KINDS):
        refusals.count("brain", "north", f"reason-{number}")
        refusals.count("brain", "north", f"reason-{number}")
    refusals.close()
    rows = read(tmp_path)
    assert len({row.reason for row in rows}) == KINDS + 1
    assert sum(row.count for row in rows) == 10 * KINDS
    assert sum(row.count for row in rows if row.reason == "other") == 8 * KINDS


def test_nobody_waits_while_the_disk_is_away_and_nothing_is_lost(refusals, tmp_path, monkeypatch):
    monkeypatch.setattr(refusals, "retry_s", 0.1)
    (tmp_path / "journal.db").mkdir()
    begun = time.perf_counter()
    for _ in range(1000):
        refusals.count("brain", "north", "journal-down")
    assert time.perf_counter() - begun < 1  # a disk that is locked takes 2 s to say so, each time
    time.sleep(0.3)
    (tmp_path / "journal.db").rmdir()
    wait(lambda: sum(row.count for row in read(tmp_path)) == 1000)
