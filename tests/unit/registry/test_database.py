"""SQLite or PostgreSQL, the ledger's database keeps the same promises."""

import os
import sqlite3
import threading

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from imaging.errors import ConfigError, Conflict, RegistryError
from registry import database as opened
from registry.access import admit
from registry.audit import verify_ledger
from registry.database import explain_ledger, open_database, writing
from registry.ledger import open_ledger


@pytest.fixture
def place(database, tmp_path):
    return os.environ.get("FORMULARY_DATABASE") or tmp_path / "ledger.db"


@pytest.fixture
def engine(place):
    return open_database(place, "registry", explain_ledger)


def run(engine, statement):
    with writing(engine).begin() as connection:
        return connection.execute(text(statement))


def show(engine, query):
    with engine.connect() as connection:
        return connection.execute(text(query)).scalar()


ROW = "INSERT INTO events VALUES (1, 'at', 'kind', 'task', 'actor', '{}', 'key', 'before', 'hash', 'signed')"


def test_a_database_has_the_newest_schema_and_is_opened_again_as_it_is(engine, place):
    run(engine, ROW)
    again = open_database(place, "registry")
    assert show(again, "SELECT version_num FROM alembic_version") == "0001"
    assert show(again, "SELECT COUNT(*) FROM events") == 1


def test_events_are_never_updated_deleted_replaced_or_truncated(engine):
    run(engine, ROW)
    ways = ["UPDATE events SET actor = 'x'", "DELETE FROM events"]
    ways += (["TRUNCATE events CASCADE"] if engine.dialect.name == "postgresql"
             else [ROW.replace("INSERT", "INSERT OR REPLACE").replace("'actor'", "'x'")])  # fmt: skip
    for way in ways:
        with pytest.raises(IntegrityError, match="append-only"):
            run(engine, way)
    assert show(engine, "SELECT actor FROM events") == "actor"


def test_rows_of_the_outbox_number_themselves(engine):
    run(engine, ROW)
    for _ in range(2):
        run(engine, "INSERT INTO outbox (event, task, site, version) VALUES (1, 'task', '*', 1)")
    assert show(engine, "SELECT MAX(seq) FROM outbox") == 2


def test_readers_go_on_while_a_writer_holds_the_ledger_and_see_nothing_of_it_yet(engine):
    with writing(engine).begin() as connection:
        connection.execute(text(ROW))
        assert show(engine, "SELECT COUNT(*) FROM events") == 0
        with pytest.raises(Conflict, match="another writer"):
            run(engine, ROW)
    assert show(engine, "SELECT COUNT(*) FROM events") == 1


def test_what_was_committed_is_on_disk(tmp_path):
    engine = open_database(tmp_path / "ledger.db", "registry")
    assert show(engine, "PRAGMA journal_mode") == "wal"
    assert show(engine, "PRAGMA synchronous") == 2  # FULL


def test_what_was_committed_is_on_disk_whatever_the_server_defaults_to(postgres):
    place = postgres.make()
    postgres.execute(f"ALTER DATABASE {place.split('/')[3].split('?')[0]} SET synchronous_commit = off")
    assert show(open_database(place, "registry"), "SHOW synchronous_commit") == "on"


@pytest.mark.parametrize("place", ["mysql://me:secret@host/db", "postgresql", "sqlite:///secret.db"])
def test_only_a_url_of_postgresql_is_taken_and_no_password_is_told(place):
    with pytest.raises(ConfigError, match="FORMULARY_DATABASE") as told:
        open_database(place, "registry")
    assert "secret" not in str(told.value)


def test_a_ledger_outlives_its_server(postgres, monkeypatch, tmp_path):
    monkeypatch.setenv("FORMULARY_DATABASE", postgres.make())
    ledger = open_ledger(tmp_path)
    admit(tmp_path, ledger, "author@test")
    postgres.stop()
    for ask in (
        ledger.generation,
        lambda: ledger.record_incident("away", "", {}),
        lambda: open_ledger(tmp_path),
    ):
        with pytest.raises(RegistryError, match="database refuses"):
            ask()
    postgres.start()
    ledger.record_incident("it was away", "", {})
    assert verify_ledger(ledger._engine) == 2


def test_two_that_open_a_new_database_at_once_make_its_schema_once(database, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        ledgers = list(pool.map(open_ledger, [tmp_path] * 2))
    assert [ledger.generation() for ledger in ledgers] == [0, 0]


def test_who_opens_while_another_makes_the_schema_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(opened, "BUSY_S", 0.1)  # making the schema takes longer than a writer may wait
    place = tmp_path / "ledger.db"
    maker = sqlite3.connect(place, isolation_level=None, check_same_thread=False)
    maker.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.6, maker.rollback).start()
    engine = open_database(place, "registry", explain_ledger)
    assert show(engine, "SELECT COUNT(*) FROM events") == 0
