"""Rows of who came in and who was turned away: durable, append-only, few."""

import sqlite3
import time
from collections import Counter

import pytest

from imaging.errors import JournalDown
from imaging.vocabulary import Entry
from monitoring.logins import Login, Logins, name_network, read_logins, write_logins
from monitoring.tally import KINDS


@pytest.fixture
def book(tmp_path):
    book = Logins(tmp_path)
    yield book
    book.close()


def wait(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def refusal(who="", address="10.0.0.0/24", outcome=Entry.NOT_BELIEVED):
    return Login(who, "", outcome, address)


@pytest.mark.parametrize(
    ("address", "told"),
    [("127.0.0.1", "loopback"), ("127.9.9.9", "loopback"), ("::1", "loopback"), ("10.1.2.3", "10.1.2.0/24"),
     ("::ffff:10.1.2.3", "10.1.2.0/24"), ("::ffff:127.0.0.1", "loopback"), ("fe80::1%eth0", "fe80::/48"),
     ("2001:db8:7:8:9::1", "2001:db8:7::/48"), ("", "here"), ("testclient", "here")],
)  # fmt: skip
def test_an_address_is_told_by_its_network(address, told):
    assert name_network(address) == told


def test_a_first_one_is_written_at_once_and_the_rest_of_its_minute_counted(book, tmp_path):
    book.note(refusal())
    wait(lambda: read_logins(tmp_path, 9))
    for _ in range(1000):
        book.note(refusal())
    time.sleep(0.3)
    assert [row["count"] for row in read_logins(tmp_path, 9)] == [1]
    book.close()
    assert [row["count"] for row in read_logins(tmp_path, 9)] == [1, 1000]


def test_after_a_minute_there_is_another_row(book, tmp_path, monkeypatch):
    monkeypatch.setattr(book, "every_s", 0.2)
    monkeypatch.setattr(book, "retry_s", 0.1)
    for _ in range(3):
        book.note(refusal())
    wait(lambda: sum(row["count"] for row in read_logins(tmp_path, 9)) == 3)
    time.sleep(0.3)
    book.note(refusal())
    wait(lambda: sum(row["count"] for row in read_logins(tmp_path, 9)) == 4)


def test_strangers_from_everywhere_do_not_fill_the_disk_and_hide_nobody_who_came_in(book, tmp_path):
    for number in range(5000):
        book.note(refusal(address=f"10.{number >> 8}.{number & 255}.0/24"))
    for number in range(100):
        book.note(refusal(f"fk_{number}", outcome=Entry.ADMITTED))
    book.close()
    rows = read_logins(tmp_path, 9999)
    refused = [row for row in rows if row["outcome"] == "not believed"]
    assert len({row["address"] for row in refused}) == KINDS + 1
    assert len(refused) <= 2 * KINDS + 2
    assert sum(row["count"] for row in refused) == 5000
    assert max(refused, key=lambda row: row["count"])["address"] == "elsewhere"
    assert {row["who"] for row in rows if row["outcome"] == "admitted"} == {f"fk_{n}" for n in range(100)}


def test_what_cannot_be_written_is_kept_and_written_when_it_can(book, tmp_path, monkeypatch):
    monkeypatch.setattr(book, "retry_s", 0.1)
    (tmp_path / "journal.db").mkdir()
    for _ in range(5):
        book.note(refusal())
    time.sleep(0.5)
    (tmp_path / "journal.db").rmdir()
    wait(lambda: sum(row["count"] for row in read_logins(tmp_path, 9)) == 5)


def test_a_database_that_is_not_there_is_an_error_of_the_house(tmp_path):
    (tmp_path / "journal.db").mkdir()
    with pytest.raises(JournalDown, match="audit of logins"):
        write_logins(tmp_path, Counter([refusal()]))
    with pytest.raises(JournalDown, match="audit of logins"):
        read_logins(tmp_path, 1)


def test_rows_are_not_changed_and_not_removed(tmp_path):
    write_logins(tmp_path, Counter([refusal()]))
    with sqlite3.connect(tmp_path / "journal.db") as connection:
        for change in ("UPDATE access SET count = 0", "DELETE FROM access"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                connection.execute(change)
