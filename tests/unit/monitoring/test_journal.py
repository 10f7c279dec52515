"""What the journal took it holds, whatever happens to the process, the disk or the database."""

import os
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import pytest
from sqlalchemy import event

from imaging.errors import JournalDown
from imaging.greedy import GreedyWorker
from monitoring.journal import VerdictRow, open_journal, pseudonym
from monitoring.telemetry import METRICS

ROOT = Path(__file__).parents[3]
VERDICT = VerdictRow("2024-01-01T00:00:00+00:00", "brain", "north", 1, 5, 3, "drift", "noise +41 %", 0.002,
                     {"noise": 1e-9}, "report.html")  # fmt: skip
APPEND_FOR_EVER = """
import sys, uuid
from pathlib import Path
from monitoring.journal import Prediction, open_journal
journal = open_journal(Path(sys.argv[1]))
while True:
    row = Prediction(str(uuid.uuid4()), "r", "t", "s", 1, "sha256:1", "e", None, "i", {"noise": 1.0}, {})
    journal.append([row])
    print(row.id, flush=True)
"""
NAME_PEOPLE = """
import sys
from pathlib import Path
from monitoring.journal import pseudonym
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    print(pseudonym(Path(sys.argv[1]), f"site{number}", "patient"))
"""


def commit_in_groups(journal):
    """A writer whose groups are what waited, as the gateway's."""

    def commit(rows):
        journal.append(rows)
        return [None] * len(rows)

    return GreedyWorker("journal", commit, 256)


def ids(var):
    """What another process reads of the journal."""
    with sqlite3.connect(var / "journal.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return [row[0] for row in database.execute("SELECT id FROM predictions ORDER BY seq")]


def start(script, var):
    command = [sys.executable, "-c", script, str(var)]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextmanager
def full_disk():
    """No file of this process can grow beyond a page: what a full disk is to SQLite."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def locked(var):
    """Somebody else holds the write lock."""
    other = sqlite3.connect(var / "journal.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


def test_rows_are_read_back_whole_and_in_order(journal, predict):
    rows = [
        predict(subject="a", columns={"noise": 0.1 + 0.2, "median": -1e-300}),
        predict(),
        predict(site="east"),
    ]
    journal.append(rows[:2])
    journal.append(rows[2:])
    told = journal.newest(None, None, 10)
    assert [row["seq"] for row in told] == [1, 2, 3]
    assert [{name: row[name] for name in asdict(rows[0])} for row in told] == [asdict(row) for row in rows]
    assert told[0]["at"] == told[1]["at"] <= told[2]["at"]
    assert abs(datetime.now().astimezone() - datetime.fromisoformat(told[2]["at"])).total_seconds() < 60


def test_the_newest_rows_are_those_of_the_task_and_site_that_were_asked_for(journal, predict):
    places = [(task, site) for task in ("brain", "lung") for site in ("north", "east")]
    journal.append(
        [predict(id=f"{task}-{site}-{i}", task=task, site=site) for i in range(3) for task, site in places]
    )
    assert [row["id"] for row in journal.newest("lung", "east", 2)] == ["lung-east-1", "lung-east-2"]
    assert len(journal.newest("lung", None, 10)) == 6


def test_the_last_row_is_told_by_task_and_site(journal, predict):
    assert journal.last_seq() == 0
    journal.append([predict(), predict(site="east"), predict(task="lung"), predict(task="lung", site="east")])
    journal.append([predict()])
    assert [journal.last_seq("brain", "north"), journal.last_seq("brain", "east")] == [5, 2]
    assert [journal.last_seq("lung"), journal.last_seq(site="east"), journal.last_seq()] == [4, 4, 5]
    assert journal.last_seq("brain", "west") == 0


def test_a_window_is_the_newest_image_of_each_of_the_newest_subjects(journal, predict):
    names = ["a", "b", "a", "c", "b", None, None, "d", "a"]
    journal.append([predict(subject=name, columns={"noise": float(i)}) for i, name in enumerate(names)])
    window = journal.read_window("brain", "north", 1, 5)
    assert [row["noise"] for row in window] == [4.0, 5.0, 6.0, 7.0, 8.0]
    assert [row["subject"] for row in window] == ["b", None, None, "d", "a"]
    assert [row["seq"] for row in window] == [5, 6, 7, 8, 9]


def test_a_window_is_filled_however_many_images_a_subject_has(journal, predict):
    journal.append([predict(subject=str(n // 20), columns={"noise": float(n)}) for n in range(600)])
    window = journal.read_window("brain", "north", 1, 25)
    assert [row["noise"] for row in window] == [float(n) for n in range(119, 600, 20)]


def test_a_windows_probabilities_are_the_networks_own(journal, predict):
    profile = {"probability": 0.9, "raw_probability": 0.4}
    journal.append([predict(columns=profile), predict(columns={"probability": 0.3})])
    assert [row["probability"] for row in journal.read_window("brain", "north", 1, 5)] == [0.4, 0.3]


def test_a_window_holds_one_task_one_site_and_one_version(journal, predict):
    journal.append([predict(id="mine"), predict(task="lung"), predict(site="east"), predict(version=2)])
    assert [row["seq"] for row in journal.read_window("brain", "north", 1, 9)] == [1]


def test_the_newest_verdict_of_each_place_is_read_back(journal):
    rows = [VERDICT, replace(VERDICT, site="east"), replace(VERDICT, verdict="in bounds", last_seq=9)]
    for row in rows:
        journal.write_verdict(row)
    assert journal.newest_verdicts() == rows[1:]


@pytest.mark.parametrize("table", ["predictions", "verdicts"])
@pytest.mark.parametrize("change", ["UPDATE {} SET task = 'x'", "DELETE FROM {}"])
def test_what_was_written_cannot_be_changed_or_deleted(journal, predict, tmp_path, table, change):
    journal.append([predict()])
    journal.write_verdict(VERDICT)
    with (
        sqlite3.connect(tmp_path / "journal.db") as database,
        pytest.raises(sqlite3.IntegrityError, match="append-only"),
    ):
        database.execute(change.format(table))


def test_a_commit_waits_for_the_disk(journal):
    with journal._engine.connect() as connection:
        told = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
        ]
    assert told == ["wal", 2]  # 2 is FULL


def test_every_row_that_was_acknowledged_survives_kill_9(tmp_path):
    process = start(APPEND_FOR_EVER, tmp_path)
    printed = [process.stdout.readline() for _ in range(50)]
    process.kill()
    printed += process.communicate()[0].splitlines(keepends=True)
    acknowledged = [line.strip() for line in printed if line.endswith("\n")]
    assert len(acknowledged) >= 50
    assert ids(tmp_path)[: len(acknowledged)] == acknowledged


def test_a_full_disk_is_told_and_costs_no_row(journal, predict, tmp_path):
    journal.append([predict(id="before")])
    with full_disk(), pytest.raises(JournalDown, match="cannot be used"):
        journal.append([predict(id="meanwhile")])
    assert ids(tmp_path) == ["before"]
    journal.append([predict(id="after")])
    assert ids(tmp_path) == ["before", "after"]


def test_a_group_is_written_whole_or_not_at_all(journal, predict, tmp_path):
    journal.append([predict(id="taken")])
    with pytest.raises(JournalDown):
        journal.append([predict(id="new"), predict(id="taken")])
    assert ids(tmp_path) == ["taken"]


def test_a_journal_that_was_removed_takes_no_rows_until_it_is_restored(journal, predict, tmp_path):
    journal.append([predict(id="before")])
    moved = [path.rename(tmp_path / f"{path.name}.moved") for path in tmp_path.glob("journal.db*")]
    with pytest.raises(JournalDown):
        journal.append([predict(id="meanwhile")])
    for path in moved:
        path.rename(path.with_suffix(""))
    journal.append([predict(id="after")])
    assert {"before", "after"} <= set(ids(tmp_path))


def test_rows_go_to_the_journal_that_lies_there_and_not_to_the_one_that_did(journal, predict, tmp_path):
    for path in tmp_path.glob("journal.db*"):
        path.unlink()
    open_journal(tmp_path).append([predict(id="restored")])
    with pytest.raises(JournalDown, match="replaced"):
        journal.append([predict(id="meanwhile")])
    journal.append([predict(id="after")])
    assert ids(tmp_path) == ["restored", "after"]


def test_a_journal_that_cannot_be_opened_is_down(tmp_path):
    (tmp_path / "journal.db").write_text("This is no database. " * 100)
    with pytest.raises(JournalDown):
        open_journal(tmp_path)


def test_what_waits_shares_a_commit_and_nobody_is_answered_before_it(journal, predict, tmp_path):
    commits, worker = [], commit_in_groups(journal)
    event.listen(journal._engine, "commit", lambda _: commits.append(1))
    counted = METRICS.get_sample_value("formulary_journal_rows_total")
    rows = [predict() for _ in range(300)]
    with locked(tmp_path):
        waiting = [worker.submit(row) for row in rows]
        time.sleep(0.05)
        assert not any(future.done() for future in waiting)
    assert [future.result(timeout=10) for future in waiting] == [None] * 300
    assert ids(tmp_path) == [row.id for row in rows]
    assert len(commits) <= 3  # the first takes at least one row, a group at most 256
    assert METRICS.get_sample_value("formulary_journal_rows_total") - counted == 300


def test_each_of_many_clients_finds_its_row_once_it_is_answered(journal, predict, tmp_path):
    worker, start_together = commit_in_groups(journal), threading.Barrier(16)

    def ask(_):
        start_together.wait()
        for _ in range(10):
            row = predict()
            worker.submit(row).result()
            with sqlite3.connect(tmp_path / "journal.db") as database:
                assert database.execute("SELECT 1 FROM predictions WHERE id = ?", [row.id]).fetchone()

    with ThreadPoolExecutor(16) as clients:
        list(clients.map(ask, range(16)))
    assert len(set(ids(tmp_path))) == journal.last_seq() == 160


def test_a_locked_journal_fails_those_who_wait_and_nobody_later(journal, predict, tmp_path):
    worker, asked = commit_in_groups(journal), [predict() for _ in range(20)]
    worker.submit(predict(id="before")).result()
    with locked(tmp_path):
        waiting = [worker.submit(row) for row in asked]
        assert isinstance(waiting[0].exception(timeout=10), JournalDown)
    reasons = [future.exception(timeout=10) for future in waiting]
    worker.submit(predict(id="after")).result(timeout=10)
    assert {type(reason) for reason in reasons} <= {JournalDown, type(None)}
    answered = [row.id for row, reason in zip(asked, reasons, strict=True) if reason is None]
    assert ids(tmp_path) == ["before", *answered, "after"]


def test_a_pseudonym_is_stable_and_differs_by_site_and_subject(tmp_path):
    told = pseudonym(tmp_path, "north", "DOE^JANE")
    assert told == pseudonym(tmp_path, "north", "DOE^JANE")
    assert len({told, pseudonym(tmp_path, "east", "DOE^JANE"), pseudonym(tmp_path, "north", "DOE^JOHN")}) == 3
    assert len(told) == len(pseudonym(tmp_path, "north", "")) == 64
    assert set(told) <= set("0123456789abcdef")


def test_without_the_key_nobody_finds_the_pseudonym_again(tmp_path):
    told = pseudonym(tmp_path, "north", "0042")
    (tmp_path / "keys" / "subjects-north.key").unlink()
    assert pseudonym(tmp_path, "north", "0042") != told


def test_a_key_is_read_by_its_owner_alone_and_nothing_else_is_left(tmp_path):
    before = os.umask(0)
    try:
        pseudonym(tmp_path, "north", "0042")
    finally:
        os.umask(before)
    (key,) = (tmp_path / "keys").iterdir()
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.stat().st_size == 32


def test_who_comes_second_takes_the_key_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert pseudonym(tmp_path, "north", "0042") == pseudonym(tmp_path, "north", "0042")


def test_two_processes_that_race_name_people_alike(tmp_path):
    pair = [start(NAME_PEOPLE, tmp_path) for _ in range(2)]
    assert [process.stdout.readline() for process in pair] == ["ready\n"] * 2
    for process in pair:
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate(timeout=60)[0].split() for process in pair]
    assert told[0] == told[1]
    assert len(set(told[0])) == 100
