"""One way to open a database: durable, bounded in waiting, its schema brought to the newest migration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, inspect, text

BUSY_S = 2


def open_database(path: Path, department: str) -> Engine:
    """Open, or make, a department's SQLite database.

    WAL with synchronous=FULL: a commit that returned survives kill -9 and loss of power. A writer waits at
    most 2 s for another one.

    Args:
        path: the file; its folder is made.
        department: whose `migrations/versions` hold the schema.

    Returns:
        An engine whose transactions begin with BEGIN IMMEDIATE when they are opened by `writing`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(URL.create("sqlite", database=str(path)), connect_args={"timeout": BUSY_S})
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    if _revision(engine) != _newest(department):
        _migrate(engine, department)
    return engine


def writing(engine: Engine) -> Engine:
    """The same engine for transactions that write: they take the write lock at once, never late."""
    return engine.execution_options(writing=True)


def _configure(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late for IMMEDIATE
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout = 2000")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin(connection: Any) -> None:
    wanted = connection.get_execution_options().get("writing")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if wanted else "BEGIN")


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
