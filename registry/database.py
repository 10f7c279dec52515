"""One way to open a database: durable, bounded in waiting, its schema brought to the newest migration."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, ProgrammingError

from imaging.errors import ConfigError, Conflict, FormularyError, RegistryError

BUSY_S = 2
MIGRATION_S = 30  # a schema is made once, on a slow disk perhaps
WRITER = 0x464F524D  # the advisory lock that stands for PostgreSQL's one writer


def open_database(
    place: Path | str, department: str, explain: Callable[[DatabaseError], FormularyError] | None = None
) -> Engine:
    """Open, or make, a department's database: a SQLite file, or PostgreSQL by its URL.

    A commit that returned survives kill -9 and loss of power: WAL with synchronous=FULL, or
    synchronous_commit. There is one writer at a time, who waits at most 2 s for another one; readers go on.

    Args:
        place: the file, whose folder is made; or a URL, e.g. postgresql://formulary@db.local/formulary.
        department: whose `migrations/versions` hold the schema.
        explain: makes an error of the house of what the database refuses; None lets SQLAlchemy's through.

    Returns:
        An engine whose transactions take the write lock at once when they are opened by `writing`.

    Raises:
        ConfigError: the URL is not one of PostgreSQL.
    """
    engine = _open_file(place) if isinstance(place, Path) else _open_server(place)
    if explain:
        event.listen(engine, "handle_error", lambda told: _translate(told, explain))
    _bring_to_newest(engine, department)
    return engine


def writing(engine: Engine) -> Engine:
    """The same engine for transactions that write: they take the write lock at once, never late."""
    return engine.execution_options(writing=True)


def explain_ledger(error: DatabaseError) -> RegistryError:
    """What a database said of the ledger, as an error of the house."""
    if getattr(error.orig, "sqlstate", "") == "55P03" or _is_busy(error.orig):
        fact = f"The ledger cannot be written: another writer has held it for {BUSY_S} s."
        return Conflict(fact, "Nothing was changed; try again.")
    told = str(error.orig).strip().splitlines()[0]
    fix = "See that it runs and has room; `formulary registry history` has what was written."
    return RegistryError(f"The ledger's database refuses: {told}.", fix)


def _is_busy(error: Any) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def _translate(told: Any, explain: Callable[[DatabaseError], FormularyError]) -> FormularyError | None:
    """SQLAlchemy's hook: of what a constraint or a mistake in the SQL causes nothing is made."""
    error = told.sqlalchemy_exception
    ours = not isinstance(error, DatabaseError) or isinstance(error, IntegrityError | ProgrammingError)
    return None if ours or told.is_pre_ping else explain(error)


def _open_file(path: Path) -> Engine:
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(URL.create("sqlite", database=str(path)), connect_args={"timeout": BUSY_S})
    event.listen(engine, "connect", _configure_file)
    event.listen(engine, "begin", _begin_file)
    return engine


def _configure_file(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late for IMMEDIATE
    connection.text_factory = lambda raw: str(
        raw, "utf-8", "surrogateescape"
    )  # a broken row is read, and named
    for pragma in (f"busy_timeout = {int(BUSY_S * 1000)}", "journal_mode = WAL", "synchronous = FULL",
                   "foreign_keys = ON", "recursive_triggers = ON"):  # fmt: skip
        connection.execute(f"PRAGMA {pragma}")


def _begin_file(connection: Any) -> None:
    wanted = connection.get_execution_options().get("writing")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if wanted else "BEGIN")


def _open_server(place: str) -> Engine:
    try:
        url = make_url(place)
    except ArgumentError:
        raise ConfigError("FORMULARY_DATABASE is not a URL.", "postgresql://user@host/database") from None
    if url.get_backend_name() != "postgresql":
        raise ConfigError(f"FORMULARY_DATABASE names {url.get_backend_name()}.", "Only PostgreSQL is served.")
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"), pool_pre_ping=True,
        isolation_level="READ COMMITTED",  # a writer that waited must see what the other one wrote
        connect_args={"connect_timeout": BUSY_S, "client_encoding": "utf8"},
    )  # fmt: skip
    event.listen(engine, "connect", _configure_server)
    event.listen(engine, "begin", _begin_server)
    return engine


def _configure_server(connection: Any, _: Any) -> None:
    connection.execute(f"SET lock_timeout = '{BUSY_S}s'; SET synchronous_commit = on")
    connection.commit()


def _begin_server(connection: Any) -> None:
    if connection.get_execution_options().get("writing"):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITER})")


def _bring_to_newest(engine: Engine, department: str) -> None:
    """Make or change the schema where it is not the newest; who opens beside another waits for his schema."""
    deadline = time.monotonic() + MIGRATION_S
    while True:
        try:
            if _revision(engine) != _newest(department):
                _migrate(engine, department)
            return
        except (Conflict, DatabaseError) as error:
            busy = isinstance(error, Conflict) or _is_busy(error.orig)
            if not busy or time.monotonic() > deadline:
                raise


def _versions(department: str) -> Path:
    return Path(__file__).parent.parent / department / "migrations" / "versions"


def _newest(department: str) -> str:
    """Migrations are numbered files, 0001_name.py; the number is the revision."""
    return max(path.name.split("_")[0] for path in _versions(department).glob("[0-9]*_*.py"))


def _revision(engine: Engine) -> str | None:
    if not inspect(engine).has_table("alembic_version"):
        return None
    with engine.connect() as connection:
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _migrate(engine: Engine, department: str) -> None:
    """Upgrade to head; of two processes that try at once the second waits and finds nothing to do."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("version_locations", str(_versions(department)))
    config.set_main_option("path_separator", "os")
    with writing(engine).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
