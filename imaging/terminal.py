"""What a terminal shows: the house's logs and tables."""

from __future__ import annotations

import logging
import os
import sys
import warnings

QUOTING = ("pydicom", "nibabel")  # their warnings repeat what stands in a file, a patient's name among it


def configure_logs(departments: tuple[str, ...]) -> None:
    """Let the given departments speak at FORMULARY_LOG (INFO unless told); libraries stay at WARNING."""
    if not logging.getLogger().handlers:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.WARNING)
    for library in QUOTING:
        logging.getLogger(library).propagate = False  # not its level, which pydicom sets when it is imported
        logging.getLogger(library).addHandler(logging.NullHandler())
        warnings.filterwarnings("ignore", module=library)
    for department in departments:
        logging.getLogger(department).setLevel(os.environ.get("FORMULARY_LOG", "INFO").upper())


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print rows under a title; without rows, say so."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")  # a table may grow, but it leaves nothing out
    for row in rows:
        table.add_row(*row)
    # Where no terminal tells its width (a pipe, a log), 80 columns would fold most tables.
    Console(width=None if sys.stdout.isatty() else 160).print(table if rows else f"{title}: none yet")
