"""What the streams of a place say: crossings of charts, a window that differs, and one number for the eye."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.vocabulary import Part, Unit
from monitoring import charts, windows
from monitoring.charts import Crossing, Setting, find_change
from monitoring.daily import Days
from monitoring.records import Alarm
from monitoring.reference import SMALLEST_REFERENCE
from monitoring.streams import RECENT_DAYS, Streams, Table, part_of
from registry.projection import AXES
from registry.surveillance import Surveillance

TINY = 1e-6  # a limit is above 0, however large the budget
QUIET = 60  # values after a crossing in which another one of the stream, in its direction, is no new alarm


@dataclass
class Judge:
    """Judges streams by a policy.

    Attributes:
        surveillance: of the task's policy.
        today: ordinal of a day; those before it are over.
        days: what only days have.
        axes: embeddings of the site's reference, float64 (subjects, axes); None where the package has none.
    """

    surveillance: Surveillance
    today: int
    days: Days
    axes: NDArray[Any] | None

    def judge(self, streams: Streams, before: int) -> list[Alarm]:
        """Judge the subjects after the first `before` ones that are kept, and the days that are over.

        Returns:
            The alarms; sums, days and windows of the streams go on.
        """
        cases, daily = streams.cases, streams.daily
        days_before = len(daily.days)
        self._close_days(streams)
        streams.choose(self.surveillance.unit)
        settings = self.settings(streams)
        found = [
            self._tell(streams, table, crossing, setting)
            for table, start, setting in ((cases, before, settings[0]), (daily, days_before, settings[1]))
            for crossing in _cross(table, start, setting)
        ]
        self._gather(streams)
        found += [alarm for window in self._windows(streams) for alarm in self._compare(streams, *window)]
        self._combine(streams, settings)
        return found

    def settings(self, streams: Streams) -> tuple[Setting, Setting]:
        """Of the charts of subjects, and of those of days: each stream spends an equal part of the budget."""
        asked, active = self.surveillance, streams.cases.active() + streams.daily.active()
        seed = zlib.crc32(f"{streams.task} {streams.site} {streams.version}".encode())
        by_day = asked.model_copy(update={"unit": Unit.DAY})
        limits = (charts.limit(one, max(1, active)) for one in (asked, by_day))
        subjects, days = (Setting(max(limit, TINY), asked.allowance, asked.least, seed) for limit in limits)
        return subjects, days

    def _close_days(self, streams: Streams) -> None:
        """Means of the days that are over, in their order; a day without anything is no row."""
        cases = streams.cases
        if not streams.closed:
            streams.closed = (int(cases.days[0]) if len(cases.days) else self.today) - 1
        place, days, rows = (streams.task, streams.site, streams.version), [], []
        seen = {*cases.days.tolist(), *self.days.list_days(place)} - {*streams.daily.days.tolist()}
        for day in sorted(one for one in seen if streams.closed < one < self.today):
            of_day = cases.days == day
            told = self.days.tell(place, day, int(of_day.sum()))
            if of_day.any():
                told |= _average(cases, of_day)
            if told:
                days.append(day)
                rows.append(told)
        streams.closed = max(streams.closed, self.today - 1)
        streams.daily.append(days, rows)

    def _gather(self, streams: Streams) -> None:
        """Put the new embeddings into the open window; of a day at random so many that any volume fits."""
        asked, cases = self.surveillance, streams.cases
        names = [name for name in AXES if name in cases.names]
        start, streams.tested = max(0, streams.tested - cases.dropped), streams.subjects
        drawn = np.random.PCG64(0).advance(cases.dropped + start)  # so that a subject's is always the same
        draws = np.random.Generator(drawn).random(len(cases.days) - start)
        rows = np.column_stack([draws, cases.select(names)[start:]]).astype(np.float32)
        known = np.isfinite(rows).all(axis=1) & bool(names)
        rows, days = rows[known], cases.days[start:][known]
        if streams.opened.shape[1] == rows.shape[1]:
            rows = np.concatenate([streams.opened, rows])
            days = np.concatenate([streams.opened_days, days])
        if asked.unit is Unit.DAY:
            last = date.fromisoformat(streams.window.get("day", date.min.isoformat())).toordinal()
            if last <= streams.closed:  # else a clock was put back
                days = np.maximum(days, last + 1)  # no window begins before the last one ended
            order = np.lexsort((rows[:, 0], days))
            of_day = np.arange(len(days)) - np.searchsorted(days[order], days[order])
            kept = order[of_day < 2 * math.ceil(asked.window / asked.window_days)]
            rows, days = rows[kept], days[kept]
        streams.opened, streams.opened_days = rows, days

    def _windows(self, streams: Streams) -> Iterator[tuple[NDArray[Any], NDArray[np.int32]]]:
        """Embeddings and days of each window that is whole; windows do not overlap."""
        asked = self.surveillance
        while asked.window <= len(days := streams.opened_days):
            end = asked.window
            if asked.unit is Unit.DAY:  # enough of them, and of enough days that are over
                last = max(int(days[0]) + asked.window_days - 1, int(days[end - 1]))
                if last > streams.closed:
                    return
                end = int(np.searchsorted(days, last, "right"))
            yield streams.opened[:end, 1:].astype(float), days[:end]
            streams.opened, streams.opened_days = streams.opened[end:], days[end:]

    def _compare(self, streams: Streams, window: NDArray[Any], days: NDArray[np.int32]) -> list[Alarm]:
        """Compare a window with the reference. Until one is in bounds again, it is the same event."""
        asked = self.surveillance
        reference = self._reference(streams, window, days)
        if reference is None or reference.shape[1] != window.shape[1]:
            return []
        span, daily = max(asked.window_days, int(days.max() - days.min()) + 1), asked.unit is Unit.DAY
        level = windows.level(asked, span if daily else len(days) / asked.per_day)
        told = np.concatenate([np.array(streams.own_days, int), days]) if daily else None
        statistic, p = windows.judge_window(reference, window, level, zlib.crc32(window.tobytes()), told)
        first, last = (date.fromordinal(int(day)).isoformat() for day in (days.min(), days.max()))
        known = streams.window.get("p", 1.0) <= streams.window.get("level", 0.0)
        streams.window = {
            "p": p,
            "level": level,
            "statistic": statistic,
            "subjects": len(window),
            "day": last,
        }
        if p > level or known:
            return []
        return [self._alarm(streams, {
            "kind": "window", "statistic": "embedding", "part": Part.EMBEDDING, "direction": "both",
            "value": p, "bound": level, "since": first,
            "detail": f"the embeddings of {len(window)} subjects since {first} are not those of the "
                      f"{len(reference)} of the reference (p = {p:.2g}, level {level:.2g})",
        })]  # fmt: skip

    def _reference(self, streams: Streams, window: NDArray[Any], days: NDArray[Any]) -> NDArray[Any] | None:
        """The package's, else the site's first window: then there is nothing to compare that one with."""
        if self.axes is not None and len(self.axes) >= SMALLEST_REFERENCE:
            return self.axes
        if streams.own:
            return np.array(streams.own)
        streams.own, streams.own_days = np.round(window, 3).tolist(), days.tolist()
        return None

    def _tell(self, streams: Streams, table: Table, crossing: Crossing, setting: Setting) -> Alarm:
        """An alarm of a crossing: what moved, by how much, since when."""
        name = table.charted[crossing.stream]
        values = table.column(name).astype(float)
        start = _date(values, crossing)
        before, after = values[:start], values[start : crossing.row + 1]
        old, new = (float(np.nanmedian(part)) if np.isfinite(part).any() else math.nan
                    for part in (before, after))  # fmt: skip
        day = date.fromordinal(int(table.days[start])).isoformat()
        since = day if table is streams.daily else f"case {table.dropped + start + 1}, {day}"
        moved = f"{name} went {crossing.direction}" + (
            f" from {old:.4g} to {new:.4g}" if math.isfinite(old) and math.isfinite(new) else ""
        )
        return self._alarm(streams, {
            "kind": "chart", "statistic": name, "part": part_of(name), "direction": crossing.direction,
            "value": crossing.value, "bound": setting.limit, "since": since,
            "detail": f"{moved}, since {since} (chart {crossing.value:.1f}, limit {setting.limit:.1f})",
        })  # fmt: skip

    def _alarm(self, streams: Streams, told: dict[str, Any]) -> Alarm:
        return Alarm(
            task=streams.task, site=streams.site, version=streams.version, last_seq=streams.last_seq,
            budget_days=self.surveillance.budget_days, **told,
        )  # fmt: skip

    def _combine(self, streams: Streams, settings: tuple[Setting, Setting]) -> None:
        """The combined score: of each part its stream nearest to a limit (1), weighted; and the nearest."""
        parts: dict[Part, float] = {}
        for table, setting in zip((streams.cases, streams.daily), settings, strict=True):
            for name, up, down in zip(table.charted, table.chart.up, table.chart.down, strict=True):
                part, row = part_of(name), table.dropped + len(table.days) - 1
                alarmed = any(table.quiet.get(f"{name} {side}", -2) >= row for side in charts.DIRECTIONS)
                near = max(float(max(up, down)) / setting.limit, float(alarmed))  # sums start again at 0
                parts[part] = max(parts.get(part, 0.0), near)
        if told := streams.window:
            near = math.log(told["p"]) / math.log(told["level"])
            parts[Part.EMBEDDING] = max(parts.get(Part.EMBEDDING, 0.0), near)
        weights = {part: self.surveillance.weights.get(part, 0.0) for part in parts}
        whole = sum(weights.values()) or 1.0
        shown = {str(part): {"value": round(value, 4), "weight": round(weights[part] / whole, 4),
                             "share": round(value * weights[part] / whole, 4)}
                 for part, value in sorted(parts.items())}  # fmt: skip
        score = round(sum(one["share"] for one in shown.values()), 4)
        enough = max(len(streams.cases.days) if streams.cases.charted else 0, len(streams.daily.days))
        nearest = max(parts, key=lambda part: parts[part], default=Part.PIXELS)
        near = round(parts.get(nearest, 0.0), 4)
        streams.combined = {"score": score, "parts": shown, "enough": enough >= self.surveillance.least,
                            "nearest": {"part": nearest, "value": near}}  # fmt: skip
        day = date.fromordinal(int(streams.cases.days[-1]) if len(streams.cases.days) else streams.closed)
        kept = [one for one in streams.recent if one[0] != day.isoformat()]
        streams.recent = [*kept, [day.isoformat(), score, near]][-RECENT_DAYS:]


def _average(cases: Table, rows: NDArray[np.bool_]) -> dict[str, float]:
    """Means of some rows, of each column over those that have it; embeddings have none."""
    values = cases.values[rows].astype(float)
    known = np.isfinite(values)
    counts, sums = known.sum(axis=0), np.where(known, values, 0.0).sum(axis=0)
    return {name: float(total / count) for name, total, count in zip(cases.names, sums, counts, strict=True)
            if count and name not in AXES}  # fmt: skip


def _cross(table: Table, before: int, setting: Setting) -> Iterator[Crossing]:
    """Carry the charts over the rows after the first `before`; what a shift goes on to do is one event."""
    if not table.charted or before == len(table.days):
        return
    values = table.select(table.charted).astype(float)
    for crossing in charts.advance(table.chart, values[:before], values[before:], setting):
        key, row = f"{table.charted[crossing.stream]} {crossing.direction}", table.dropped + crossing.row
        if row > table.quiet.get(key, -1):
            yield crossing
        table.quiet[key] = row + QUIET


def _date(values: NDArray[Any], crossing: Crossing) -> int:
    """The row from which the values are others; a sum often leaves 0 by chance, before the change."""
    start = max(0, crossing.since - QUIET)
    known = start + np.flatnonzero(np.isfinite(values[start : crossing.row + 1]))
    return int(known[find_change(values[known]) - 1]) if len(known) > 2 else crossing.since
