"""What the console's pages show and how they are drawn: one at a time, cards by a process of their own."""

import asyncio
import socket
import stat
import threading
import time
import uuid
from dataclasses import replace

import pytest
from sqlalchemy import event
from starlette.requests import Request
from starlette.responses import Response

from imaging.errors import NotReady
from monitoring.journal import Prediction, open_journal
from monitoring.overview import Overview
from monitoring.records import Alarm, EstimateRow, open_records
from registry.access import admit
from registry.ledger import open_ledger
from registry.registration import register
from registry.state import Placement, State
from services.console import dossier
from services.console.cells import find_first, judge_place
from services.console.charts import sparkline
from services.console.doors import COOKIE, WAITING, Doors
from services.console.dossier import Cards
from services.console.sessions import Sessions
from services.console.views import CASES, Books, Neighbours
from tests.tiny_registry import TASK, make_places, write_stages

ALARM = Alarm(task=TASK, site="north", version=1, kind="chart", statistic="noise", part="pixels",
              direction="up", value=9.0, bound=8.0, since="", budget_days=180, last_seq=0,
              detail="noise went up")  # fmt: skip


@pytest.fixture
def places(tmp_path):
    return make_places(tmp_path)


@pytest.fixture
def ledger(places):
    """Versions 1 and 2 are registered."""
    opened = open_ledger(places.var)
    author = admit(places.var, opened, "author@test")
    for content in ("one", "two"):
        write_stages(places, content)
        register(places, opened, TASK, author)
    return opened


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """`nice` as a script of the test: it notes that it was asked, takes its time, and draws the card."""

    def make(seconds, code=0):
        script = tmp_path / "bin" / "nice"
        script.parent.mkdir(exist_ok=True)
        drawing = f'echo "$@" >> {tmp_path}/asked; sleep {seconds}; for last; do :; done; echo card > "$last"'
        script.write_text(f"#!/bin/sh\n{drawing}; exit {code}\n")
        script.chmod(stat.S_IRWXU)
        monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
        return tmp_path / "asked"

    return make


def wait(find, seconds=60):
    """Ask until a card is there."""
    deadline = time.monotonic() + seconds
    while (card := find()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return card


def test_a_card_is_drawn_once_whoever_asks_and_nobody_waits_for_it(places, ledger, slow):
    asked, cards, told = slow(0.6), Cards(places), []
    threads = [threading.Thread(target=lambda: told.append(cards.find(ledger, TASK, 1))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [None] * 6
    other = Cards(places)  # another worker
    assert other.find(ledger, TASK, 1) is None
    assert wait(lambda: cards.find(ledger, TASK, 1)) == wait(lambda: other.find(ledger, TASK, 1)) == "card\n"
    assert len(asked.read_text().splitlines()) == 1
    folder = places.var / "console"
    (kept,) = folder.glob("card-*.html")
    assert not list(folder.glob("*.draft"))
    kept.rename(old := kept.with_name(f"{kept.stem.rsplit('-', 1)[0]}-1.html"))  # as of an earlier decision
    wait(lambda: cards.find(ledger, TASK, 1))
    assert not old.exists()


@pytest.mark.parametrize(("seconds", "code"), [(0, 1), (30, 0)])
def test_a_card_that_cannot_be_drawn_says_so_and_is_tried_again(
    places, ledger, slow, monkeypatch, seconds, code
):
    monkeypatch.setattr(dossier, "DRAW_S", 0.3)
    slow(seconds, code)
    cards = Cards(places)
    with pytest.raises(NotReady, match="could not be drawn"):
        wait(lambda: cards.find(ledger, TASK, 1))
    slow(0)
    assert wait(lambda: cards.find(ledger, TASK, 1)) == "card\n"


def test_one_page_is_drawn_at_a_time_and_whoever_waits_holds_no_thread_of_others(places, ledger):
    drawn, most = [], []

    def draw(_):
        drawn.append(1)
        most.append(len(drawn))
        time.sleep(0.03)
        drawn.pop()
        return Response("page")

    sessions = Sessions(places, ledger)
    cookie = sessions.cookie(sessions.begin_by_link(sessions.make_link("author@test")))
    page = Doors(sessions, lambda _, status: Response("problem", status)).page(draw)
    scope = {"type": "http", "method": "GET", "path": "/console", "query_string": b"", "scheme": "http",
             "headers": [(b"cookie", f"{COOKIE}={cookie}".encode())]}  # fmt: skip

    async def go():
        asked = [asyncio.create_task(page(Request(dict(scope)))) for _ in range(WAITING + 5)]
        await asyncio.sleep(0.005)
        await asyncio.gather(*(asyncio.to_thread(int) for _ in range(20)))  # what a scrape of metrics needs
        left = sum(not one.done() for one in asked)
        return [one.status_code for one in await asyncio.gather(*asked)], left

    statuses, left = asyncio.run(go())
    assert max(most) == 1
    assert left > 0, "the scrape waited for every page"
    assert (statuses.count(200), statuses.count(429)) == (WAITING, 5)


def test_the_window_test_is_named_first_only_where_nothing_else_alarmed():
    window, late = ("window", "2026-11-01"), ("chart", "case 90, 2026-11-20")
    early = ("chart", "case 80, 2026-11-19")
    for alarms, first in (
        ([window, late, early], early),
        ([late, window], late),
        ([window], window),
        ([], None),
    ):
        assert find_first(alarms, lambda one: one) == first


def test_a_sparkline_marks_a_day_beyond_the_limit():
    assert 'class="dot over"' in sparkline([("2026-11-01", 0.2), ("2026-11-02", 1.0)])
    told = sparkline([("2026-11-01", 0.2), ("2026-11-02", 0.9)])
    assert 'class="dot "' in told
    assert "nearest to a limit, 2 days to 2026-11-02: now 0.9, limit 1" in told


@pytest.fixture
def books(places, ledger):
    return Books(places, ledger, open_journal(places.var), open_records(places.var))


@pytest.fixture
def answers(books, monkeypatch):
    """Put answers of a day into the journal: their version, how many, and of whom."""

    def make(day, version, count, site="north"):
        monkeypatch.setattr("monitoring.journal.now", lambda: f"2026-11-{day:02}T12:00:00+00:00")
        rows = [Prediction(id=str(uuid.uuid4()), request_id="x", task=TASK, site=site, version=version,
                           package="sha256:1", engine="openvino/f32", subject=None, image=f"{day}-{n}",
                           columns={}, stages_ms={}) for n in range(count)]  # fmt: skip
        books.journal.append(rows)
        return [row.id for row in rows]

    return make


def test_the_newest_cases_are_those_of_every_version_and_are_found_by_the_index(books, answers):
    answers(1, 1, 20)
    told = [number for day in range(2, 8) for version in (2, 1) for number in answers(day, version, 2)]
    asked = []
    engine = books.records.engine
    event.listen(engine, "before_cursor_execute", lambda *told: asked.append(told[2:4]))
    assert [row["id"] for row in books.cases(TASK, "north")] == told[::-1][:CASES]
    queries = [one for one in asked if "predictions" in one[0]]
    assert queries
    with engine.connect() as connection:
        for statement, parameters in queries:
            plan = str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall())
            assert "predictions_by_place (task=? AND site=? AND version=?" in plan
            assert "TEMP B-TREE" not in plan


def test_the_cases_behind_an_alarm_are_those_where_the_change_began_and_its_last(books, answers):
    before = answers(1, 1, 40)
    for count in (500, 30):  # of other places, between
        answers(1, 1, count, "east")
        answers(2, 2, count)
    after = answers(2, 1, 40)
    answers(2, 1, 100, "east")
    last, later = answers(3, 1, 20), answers(4, 1, 20)
    rests_on = (
        books.records.engine.connect()
        .exec_driver_sql("SELECT seq FROM predictions WHERE id = ?", (last[-1],))
        .scalar()
    )
    alarm = replace(ALARM, last_seq=rests_on)
    for since, plain, number in (("case 61, 2026-11-02", True, 20), ("case 61, 2026-11-02", False, 0),
                                 ("2026-11-02", True, 0)):  # fmt: skip
        told = books.cases_behind(replace(alarm, since=since), plain)
        around, ends = ([row["id"] for row in rows] for rows in told.values())
        assert next(iter(told)) == f"around {since}"
        every = before + after
        middle = len(before) + number
        assert around == every[middle - 3 : middle + 3]
        assert ends == last[::-1][:6]
        assert not {*around, *ends} & {*later}
    first = books.cases_behind(replace(alarm, since="case 1, 2026-11-01"), True)
    assert [row["id"] for row in next(iter(first.values()))] == before[:6]


def test_a_page_beside_is_linked_where_it_runs_and_only_there(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        monkeypatch.setenv("EVIDENTLY_PORT", str(port))
        monkeypatch.setenv("MLFLOW_PORT", "1")
        assert Neighbours().find() == {"Evidently": f"http://127.0.0.1:{port}"}
    assert Neighbours().find() == {}


def test_what_served_before_does_not_stand_under_the_number_of_what_serves_now():
    placed = [Placement(number, f"sha256:{number}", "2026-11-01") for number in (1, 2)]
    estimate = EstimateRow(task=TASK, site="north", version=1, last_seq=1, body={"verdict": "not valid"})
    seen = Overview(TASK, "north", 1, rows=200, subjects=200, last_at="", estimate=estimate)
    first = judge_place(State(trail={"north": placed[:1]}), (TASK, "north"), seen)
    now = judge_place(State(trail={"north": placed}), (TASK, "north"), seen)
    assert (first.state, first.version, first.seen) == ("accuracy not valid", 1, seen)
    assert (now.state, now.version, now.seen) == ("approved", 2, None)
