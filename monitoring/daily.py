"""What only a day has: requests that were refused for their image, and what readers and late truths say."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text

from imaging.errors import TrustError
from imaging.vocabulary import Judged
from registry.package import read_contract, shelf

IMAGE = ("too-large", "wrong-type", "unreadable", "wrong-modality", "wrong-shape", "not-finite")
ANSWERED = text(
    "SELECT version, substr(at, 1, 10) AS day, COUNT(*) FROM predictions WHERE task = :task AND site = :site "
    "AND at >= :floor GROUP BY version, day"
)
Key = tuple[str, str]


@dataclass
class Days:
    """Counts of days, by their ordinals.

    Attributes:
        refused: (task, site) -> day -> requests whose image was refused.
        judged: (task, site, version) -> day -> for each assessment whether it objects, and whether the
            answer was wrong, None where nobody knows.
        newest: (task, site) -> the version that answered last.
        answered: (task, site) -> day -> version -> answers. Refusals name no version: they belong to the one
            with the most answers of the day, of a day without any to the newest.
    """

    refused: dict[Key, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    judged: dict[tuple[str, str, int], dict[int, list[tuple[bool, bool | None]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    newest: dict[Key, int] = field(default_factory=dict)
    answered: dict[Key, dict[int, dict[int, int]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )

    def list_days(self, place: tuple[str, str, int]) -> set[int]:
        """Days of which there is anything but answers."""
        return {*self.refused[place[:2]], *self.judged[place]}

    def tell(self, place: tuple[str, str, int], day: int, answered: int) -> dict[str, float]:
        """The daily streams of a version at a site; what there is nothing of is left out."""
        told: dict[str, float] = {}
        refused = self.refused[place[:2]].get(day, 0)
        answers = self.answered[place[:2]].get(day) or {place[2]: answered}
        most = max(answers, key=lambda version: (answers[version], -version))
        owner = most if answers[most] else self.newest.get(place[:2], place[2])
        if owner == place[2] and (total := refused + sum(answers.values())):
            told["refusals"] = refused / total
        if judged := self.judged[place].get(day):
            told["discordance"] = sum(objects for objects, _ in judged) / len(judged)
            if known := [wrong for _, wrong in judged if wrong is not None]:
                told["error"] = sum(known) / len(known)
        return told


def read_days(connection: Connection, since: dict[tuple[str, str, int], str], var: Path) -> Days:
    """The counts of the days that are not over yet at some places.

    Args:
        connection: to the journal's database.
        since: (task, site, version) -> the day (ISO 8601) from which its days may still be open.
        var: holds the packages, for their operating points.
    """
    days, floor = Days(), min(since.values(), default="")
    refused = text(
        "SELECT task, site, substr(at, 1, 10) AS day, SUM(count) AS count FROM refusals WHERE at >= :floor "
        f"AND reason IN {IMAGE} GROUP BY task, site, day"
    )
    for row in connection.execute(refused, {"floor": floor}).mappings():
        days.refused[(row["task"], row["site"])][_ordinal(row["day"])] = int(row["count"])
    judged = text(
        "SELECT a.task, a.site, a.version, a.at, a.verdict, a.truth, p.columns ->> '$.probability' AS "
        "probability, p.columns ->> '$.threshold' AS threshold, p.columns ->> '$.abstained' AS abstained, "
        "p.package FROM assessments a JOIN predictions p ON p.id = a.prediction WHERE a.at >= :floor"
    )
    for row in connection.execute(judged, {"floor": floor}).mappings():
        place = (row["task"], row["site"], row["version"])
        days.judged[place][_ordinal(row["at"])].append(_judge(dict(row), var))
    for task, site in {place[:2] for place in since} & set(days.refused):
        asked = {"task": task, "site": site, "floor": floor}
        for version, day, count in connection.execute(ANSWERED, asked):
            days.answered[(task, site)][_ordinal(day)][version] = count
    newest = text("SELECT task, site, version, MAX(last_seq) FROM streams GROUP BY task, site")
    days.newest = {(row[0], row[1]): row[2] for row in connection.execute(newest)}
    return days


def _judge(row: dict[str, Any], var: Path) -> tuple[bool, bool | None]:
    objects = row["verdict"] in (Judged.REJECTED, Judged.CORRECTED)
    if row["truth"] is None or row["probability"] is None or row["abstained"]:  # no answer was made
        return objects, None
    try:
        bound = read_threshold(var, row["package"]) if row["threshold"] is None else row["threshold"]
    except TrustError:  # serving says so; until it is there again nobody knows
        return objects, None
    wrong = (row["probability"] >= bound) != bool(row["truth"])
    return objects or wrong, wrong


@lru_cache(256)
def read_threshold(var: Path, package: str) -> float:
    """The operating point of a package."""
    return read_contract(shelf(var, package)).threshold


def _ordinal(day: str) -> int:
    return date.fromisoformat(day[:10]).toordinal()
