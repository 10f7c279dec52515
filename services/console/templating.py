"""The templates of the console, opened once, and how they write times, numbers and intervals."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "templates"
SHAPES = {"alarm": "▲", "suspended": "■", "accuracy not valid": "◆", "drift": "◆", "approved": "●",
          "not approved": "○"}  # fmt: skip


@cache
def open_templates() -> Any:
    """The environment: everything is escaped, and what is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True,
                       undefined=StrictUndefined)  # fmt: skip
    made.filters.update(when=tell_time, interval=tell_interval, short=tell_short, fact=tell_fact)
    made.globals.update(shapes=SHAPES)
    return made


def render(name: str, **told: Any) -> str:
    """A template with what it tells."""
    return str(open_templates().get_template(f"{name}.html").render(told))


def tell_time(told: str) -> str:
    """ISO 8601 as people read it: to the minute, with its zone."""
    return f"{told[:10]} {told[11:16]} UTC" if len(told) > 15 else told


def tell_interval(told: Any) -> str:
    """An estimate and its interval; a dash where there is none."""
    if not told or told.get("estimate") is None:
        return "–"
    return f"{told['estimate']:.2f} [{told['low']:.2f} {told['high']:.2f}]"


def tell_short(digest: str) -> str:
    """A digest as far as people compare it."""
    return digest.removeprefix("sha256:")[:12]


def tell_fact(value: Any) -> str:
    """A number in four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
