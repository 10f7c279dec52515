"""Tables in a terminal, the same in every department."""

from __future__ import annotations

import sys


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
