"""What is kept of a version at a site, so that new rows can be judged by themselves: its streams.

A stream is one number of each subject, in the order of the journal, or one number of each day. The newest
`MOST` subjects and days are kept; sums of charts and counts go on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from imaging.vocabulary import Part, Unit
from monitoring.charts import HISTORY, Chart
from registry.projection import AXES

MOST = HISTORY
RECENT_DAYS = 30
FIRST = 100  # subjects whose scanners are the site's own
DAILY = ("latency_ms", "refusals", "discordance", "error")
SILENT = ("profile", "threshold")  # of a row's columns: what is no measurement
SHOWN = "shown_probability"  # of a site with a profile; its chart is of the network's own, which goes on
BOUND = "bound"  # the threshold that a profile put in the contract's place
KEPT = ("abstained", SHOWN, BOUND)  # what is kept, but not charted
PARTS = {
    "spacing_mm": Part.ACQUISITION, "scanner": Part.ACQUISITION, "embedding": Part.EMBEDDING,
    "probability": Part.SCORES, "uncertainty": Part.UNCERTAINTY, "latency_ms": Part.LATENCY,
    "refusals": Part.REFUSALS, "discordance": Part.DISCORDANCE, "error": Part.TRUTH,
}  # fmt: skip
Floats = NDArray[np.float32]


def part_of(name: str) -> Part:
    """The part that a stream belongs to."""
    return PARTS.get(name, Part.SCORES if name.startswith("share_") else Part.PIXELS)


@dataclass
class Table:
    """Rows of numbers, each of a day; columns that come later are NaN before.

    Attributes:
        names: of the columns.
        days: ordinals of days, int32 (n,).
        values: float32 (n, names).
        dropped: rows that were here before and are not kept.
        chart: sums of the columns that are charted.
        charted: which those are.
        quiet: column and direction -> row (counted with those that were dropped) up to which a crossing is
            the same event as the alarm before it.
    """

    names: list[str] = field(default_factory=list)
    days: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    values: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    dropped: int = 0
    charted: list[str] = field(default_factory=list)
    chart: Chart = field(default_factory=lambda: Chart.start(0))
    quiet: dict[str, int] = field(default_factory=dict)

    def column(self, name: str) -> Floats:
        """One column, (n,)."""
        return self.values[:, self.names.index(name)]

    def select(self, names: Iterable[str]) -> Floats:
        """Some columns, (n, names)."""
        return self.values[:, [self.names.index(name) for name in names]]

    def append(self, days: list[int], rows: list[dict[str, float]]) -> int:
        """Append rows; their names may be new. Returns the number of rows that were there before."""
        before = len(self.days)
        self._add(sorted({name for row in rows for name in row} - set(self.names)))
        told = np.array([[row.get(name, math.nan) for name in self.names] for row in rows], np.float32)
        told = told.reshape(len(rows), len(self.names))
        self.values = np.concatenate([self.values, told])
        self.days = np.concatenate([self.days, np.array(days, np.int32)])
        return before

    def _add(self, names: list[str]) -> None:
        empty = np.full((len(self.days), len(names)), np.nan, np.float32)
        self.values = np.concatenate([self.values, empty], axis=1)
        self.names += names

    def active(self) -> int:
        """How many of the charted columns ever differ: those alone can alarm, and share the budget."""
        values = self.select(self.charted)
        return int((np.fmax.reduce(values, initial=-np.inf) > np.fmin.reduce(values, initial=np.inf)).sum())

    def watch(self, names: list[str]) -> None:
        """Chart these columns and no others; they may have no value yet, and sums that there are go on."""
        self._add([name for name in names if name not in self.names])
        if names == self.charted:
            return
        old, kept = self.chart, [self.charted.index(name) if name in self.charted else -1 for name in names]
        known = np.array(kept, int) >= 0
        up, down = (np.where(known, np.append(sums, 0.0)[kept], 0.0) for sums in (old.up, old.down))
        here = np.append(old.begun, np.full((2, 1), len(self.days)), axis=1)[:, kept]
        self.chart = Chart(up, down, here, self.dropped)
        self.charted = list(names)

    def trim(self) -> None:
        """Forget the oldest rows beyond `MOST`."""
        excess = len(self.days) - MOST
        if excess > 0:
            self.days, self.values = self.days[excess:], self.values[excess:]
            self.dropped += excess
            self.chart.begun -= excess
            self.chart.dropped = self.dropped


@dataclass
class Streams:
    """The streams of one version at one site.

    Attributes:
        task, site, version: the place.
        rows: rows of the journal that were counted.
        last_seq: the newest of them.
        subjects: that were seen, ever.
        keys: uint64 (n,), one for each row of `cases`: who it was of.
        cases: one row a subject.
        daily: one row a day; of days that are over.
        closed: ordinal of the last day that is over.
        tested: subjects that had been seen when the newest were put into the open window.
        labels: make, model and kernel -> how many of the first subjects.
        window: the last comparison of a window with the reference: p, level, day.
        combined: the combined score: score, parts.
        recent: [day, combined score, value nearest to a limit] of the newest days.
        estimated: subjects and labels that the last estimate of accuracy rests on, and when it was made (s).
        package: digest of the version.
        own: embeddings of the first window, where the package has no reference of the site.
        own_days: ordinals of the days of its subjects.
        opened: float32 (n, 1 + axes), embeddings of the open window, each after the draw that thins them.
        opened_days: int32 (n,), ordinals of their days.
    """

    task: str
    site: str
    version: int
    rows: int = 0
    last_seq: int = 0
    subjects: int = 0
    keys: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    cases: Table = field(default_factory=Table)
    daily: Table = field(default_factory=Table)
    closed: int = 0
    tested: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    window: dict[str, Any] = field(default_factory=dict)
    combined: dict[str, Any] = field(default_factory=dict)
    recent: list[list[Any]] = field(default_factory=list)
    estimated: list[int] = field(default_factory=lambda: [0, 0, 0])
    package: str = ""
    own: list[list[float]] = field(default_factory=list)
    own_days: list[int] = field(default_factory=list)
    opened: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    opened_days: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))

    def take(self, rows: list[dict[str, Any]]) -> None:
        """Count rows of the journal, and keep the values of subjects that were not seen before.

        A row that is late belongs to the day that is open; one from before the subjects that are kept has no
        value. Where all are older, and of days that nobody has seen, a clock was put back, or an old journal
        is fed: then days go on from there.
        """
        told = [date.fromisoformat(row["at"][:10]).toordinal() for row in rows]
        late = bool(told) and max(told) < self.closed
        if late and not np.isin(told, self.daily.days).any():
            self.closed = min(told) - 1
        seen, days, values, keys = set(self.keys.tolist()), [], [], []
        for row, day in zip(rows, told, strict=True):
            key = _name(row["subject"] or row["image"] or row["id"])
            forgotten = self.cases.dropped and day <= self.closed and day < int(self.cases.days[0])
            if key not in seen and not forgotten:
                seen.add(key)
                keys.append(key)
                days.append(max(day, self.closed + 1))
                values.append(self._measure(row))
        self.rows += len(rows)
        if rows:
            self.last_seq, self.package = rows[-1]["seq"], rows[-1]["package"]
        self.subjects += len(keys)
        self.cases.append(days, values)
        self.keys = np.concatenate([self.keys, np.array(keys, np.uint64)])

    def _measure(self, row: dict[str, Any]) -> dict[str, float]:
        columns = _read_numbers(row["columns"])
        told = {name: value for name, value in columns.items() if name not in SILENT}
        if "raw_probability" in told:
            told[SHOWN], told["probability"] = told["probability"], told.pop("raw_probability")
        if "threshold" in columns:
            told[BOUND] = columns["threshold"]
        told["latency_ms"] = sum(_read_numbers(row["stages_ms"]).values())
        if axes := [told[name] for name in AXES if name in told]:
            told["embedding"] = math.sqrt(sum(value * value for value in axes) / len(axes))
        made = orjson.loads(row["acquisition"] or "{}")
        if label := "|".join(str(made.get(name) or "") for name in ("make", "model", "kernel")).strip("|"):
            told["scanner"] = self._surprise(label)
        return told

    def _surprise(self, label: str) -> float:
        """How unusual a scanner is among those of the first subjects, in nats; NaN for these.

        Their counts stay as they are: while nothing changes, shares that run would still go somewhere.
        """
        known = sum(self.labels.values())
        if known < FIRST:
            self.labels[label] = self.labels.get(label, 0) + 1
            return math.nan
        return math.log((known + 1) / (self.labels.get(label, 0) + 1))

    def trim(self) -> None:
        """Forget the oldest beyond `MOST`."""
        self.keys = self.keys[-MOST:]
        self.cases.trim()
        self.daily.trim()

    def choose(self, unit: Unit) -> None:
        """Chart what the unit asks for; of days always what only days have."""
        names = sorted(name for name in self.cases.names if name not in (*AXES, *DAILY, *KEPT))
        self.cases.watch(names if unit is Unit.SUBJECT else [])
        self.daily.watch([*(names if unit is Unit.DAY else []), *DAILY])


def _name(who: str) -> int:
    """64 bits of whom a row is of: a pseudonym or a digest is hexadecimal, an older name may be anything."""
    try:
        return int(who[:16], 16)
    except ValueError:
        return int(hashlib.sha256(who.encode()).hexdigest()[:16], 16)


def _read_numbers(told: str) -> dict[str, float]:
    """The finite numbers of a JSON object; whatever else stands in it is no measurement."""
    return {name: float(value) for name, value in orjson.loads(told or "{}").items()
            if isinstance(value, int | float) and math.isfinite(value)}  # fmt: skip


def pack(streams: Streams) -> dict[str, Any]:
    """A row of the table `streams`."""
    state = {name: getattr(streams, name) for name in STATE} | {"opened": streams.opened.shape}
    for name, table in (("cases", streams.cases), ("daily", streams.daily)):
        chart = table.chart
        state[name] = {
            "names": table.names, "rows": len(table.days), "dropped": table.dropped,
            "charted": table.charted, "up": chart.up.tolist(), "down": chart.down.tolist(),
            "begun": chart.begun.tolist(), "quiet": table.quiet,
        }  # fmt: skip
    arrays = (streams.keys, *(part for table in (streams.cases, streams.daily)
                              for part in (table.days, table.values)),
              streams.opened_days, streams.opened)  # fmt: skip
    return {
        "task": streams.task, "site": streams.site, "version": streams.version, "rows": streams.rows,
        "last_seq": streams.last_seq, "state": json.dumps(state, sort_keys=True),
        "history": b"".join(np.ascontiguousarray(one).tobytes() for one in arrays),
    }  # fmt: skip


STATE = (
    "subjects", "closed", "tested", "labels", "window", "combined", "recent", "estimated", "package",
    "own", "own_days",
)  # fmt: skip


def unpack(row: dict[str, Any]) -> Streams:
    """The streams of a row of the table."""
    state, at = json.loads(row["state"]), 0

    def read(kind: Any, *shape: int) -> Any:
        nonlocal at
        count = math.prod(shape)
        found = np.frombuffer(row["history"], kind, count, at).reshape(shape)
        at += found.nbytes
        return found.copy()

    keys = read(np.uint64, state["cases"]["rows"])
    tables: dict[str, Table] = {}
    for name in ("cases", "daily"):
        told = state[name]
        up, down, begun = (np.array(told[name], float) for name in ("up", "down", "begun"))
        chart = Chart(up, down, begun.astype(np.int64).reshape(2, -1), told["dropped"])
        tables[name] = Table(
            told["names"], read(np.int32, told["rows"]), read(np.float32, told["rows"], len(told["names"])),
            told["dropped"], told["charted"], chart, told["quiet"],
        )  # fmt: skip
        if "opened" not in state and "scanner" in told["names"]:
            tables[name].column("scanner")[:] = math.nan  # of shares that ran: what comes now is not like it
    shape = state.get("opened", [0, 0])
    place = {name: row[name] for name in ("task", "site", "version", "rows", "last_seq")}
    rest: dict[str, Any] = {name: state[name] for name in STATE}
    rest |= {"opened_days": read(np.int32, shape[0]), "opened": read(np.float32, *shape)}
    return Streams(**place, keys=keys, cases=tables["cases"], daily=tables["daily"], **rest)
