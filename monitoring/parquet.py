"""The journal as a parquet file, for other tools. No pixels, no identities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
from sqlalchemy import Connection, text

from imaging.errors import DataError
from monitoring.records import open_records

CHUNK = 20_000
WHOLE = ("seq", "version")
WORDS = ("id", "at", "request_id", "task", "site", "package", "engine", "subject", "image", "answer", "batch")
JSON = {"columns": "", "stages_ms": "ms_", "acquisition": "acquired_"}  # column -> prefix of what is in it
CHOSEN = "(:task IS NULL OR task = :task) AND (:site IS NULL OR site = :site)"
QUERY = text(f"SELECT * FROM predictions WHERE {CHOSEN} AND seq > :after ORDER BY seq LIMIT :most")


def export_journal(var: Path, path: Path, task: str | None = None, site: str | None = None) -> int:
    """Write predictions, oldest first; what stands in JSON becomes columns, NULL where a row has none.

    The file is whole or not there: it is written beside its place and moved. Memory holds 20,000 rows.

    Args:
        var: holds the journal.
        path: of the file; its folder exists.
        task: only this one.
        site: only this one.

    Returns:
        How many.

    Raises:
        DataError: there is none.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    asked: dict[str, Any] = {"task": task, "site": site, "after": 0, "most": CHUNK}
    draft, count = path.with_name(path.name + ".draft"), 0
    with open_records(var).engine.connect() as connection:
        schema = _make_schema(arrow, connection, asked)
        with parquet.ParquetWriter(draft, schema) as writer:
            while rows := [dict(row) for row in connection.execute(QUERY, asked).mappings()]:
                writer.write_table(arrow.Table.from_pylist([_spread(row) for row in rows], schema=schema))
                count += len(rows)
                asked["after"] = rows[-1]["seq"]
    if not count:
        draft.unlink()
        raise DataError("The journal has no such predictions.", "See `formulary monitoring journal`.")
    draft.rename(path)
    return count


def _make_schema(arrow: Any, connection: Connection, asked: dict[str, Any]) -> Any:
    """Every column that a row has: what is measured is a number, how an image was acquired is words."""
    fields = [(name, arrow.int64()) for name in WHOLE] + [(name, arrow.string()) for name in WORDS]
    for column, prefix in JSON.items():
        names = text(f"SELECT DISTINCT key FROM predictions, json_each({column}) WHERE {CHOSEN} ORDER BY key")
        kind = arrow.string() if column == "acquisition" else arrow.float64()
        fields += [(f"{prefix}{name}", kind) for name in connection.execute(names, asked).scalars()]
    return arrow.schema(fields)


def _spread(row: dict[str, Any]) -> dict[str, Any]:
    for column, prefix in JSON.items():
        row |= {f"{prefix}{name}": value for name, value in orjson.loads(row.pop(column)).items()}
    return row
