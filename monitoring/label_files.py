"""Late labels as a CSV file: all of it is kept, or nothing, and every wrong row is named."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from imaging.errors import DataError, FormularyError, WrongLabel
from imaging.vocabulary import Judged
from monitoring.labels import Door, Judgement
from monitoring.records import Assessment

SHOWN = 50  # wrong rows that are named
NEEDED, OPTIONAL = {"prediction", "truth"}, {"reader", "reason"}
FIX = "Nothing was kept; mend the rows and send the file again."


def import_labels(door: Door, path: Path, site: str, dry_run: bool = False) -> tuple[int, int]:
    """Keep the labels of a CSV file: prediction, truth (0 or 1), and if wanted reader and reason.

    Returns:
        How many labels the file has, and how many of them are new.

    Raises:
        DataError: it is no such file, or some rows are wrong; each is named, and none is kept.
    """
    told, wrong, seen = list[Assessment](), list[str](), dict[str, int]()
    for number, row in enumerate(_read_rows(path), 2):
        try:
            one = _read_judgement(row)
            if seen.setdefault(one.prediction, number) != number:
                raise WrongLabel(f"The prediction stands in line {seen[one.prediction]}, too.")
            told.append(door.examine(site, one))
        except FormularyError as error:
            wrong.append(f"line {number}: {error.fact}")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise DataError(f"{len(wrong)} rows of {path.name} are wrong: {'; '.join(wrong[:SHOWN])}{more}", FIX)
    return len(told), door.write(told, dry_run)[1]


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or []
            if not NEEDED <= set(names) <= NEEDED | OPTIONAL or len(set(names)) != len(names):
                fact = f"{path.name} has the columns {', '.join(names)[:200] or 'none'}."
                raise DataError(fact, "Columns: prediction, truth (0 or 1), and if wanted reader, reason.")
            return list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error!s:.80}).",
                        "Send CSV in UTF-8.") from error  # fmt: skip


def _read_judgement(row: dict[Any, Any]) -> Judgement:
    if None in row or None in row.values():
        raise WrongLabel("It has more or fewer fields than the head.")
    told = {name: value.strip() for name, value in row.items()}
    if told.pop("truth") not in ("0", "1"):
        raise WrongLabel(f"The truth is {row['truth'][:20]!r}, neither 0 nor 1.")
    return Judgement(verdict=Judged.LABELLED, truth=int(row["truth"]), source="csv", **told)
