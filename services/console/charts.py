"""The console's drawings: SVG that stands inside a page, takes its colours from console.css and tells itself.

Numbers become attributes, never styles: the console's Content-Security-Policy forbids inline styles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup, escape

from imaging.vocabulary import Unit

SHOWN = 400  # values of a control chart
ROW = 24  # height of a row of a forest plot
LEFT, RIGHT = 150, 170  # room for names and for numbers
WIDE = 340  # of its axis


class Scale:
    """A linear axis from values to pixels.

    Args:
        low: value at the start.
        high: value at the end.
        start: pixel of `low`.
        end: pixel of `high`.
    """

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        span = high - low or 1.0
        self.low, self.high = low, high
        self._offset, self._factor = start - low * (end - start) / span, (end - start) / span

    def __call__(self, value: float) -> float:
        """The pixel, to a tenth."""
        return round(self._offset + self._factor * value, 1)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values on the axis."""
        rough = (self.high - self.low) / count or 1.0
        power = 10.0 ** math.floor(math.log10(abs(rough)))
        step = next(power * one for one in (1, 2, 5, 10) if power * one >= rough)
        first = math.ceil(self.low / step)
        return [round(n * step, 10) for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def tell(value: float) -> str:
    """A number in three digits."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def sparkline(points: Sequence[Sequence[Any]], limit: float = 1.0) -> Markup:
    """What was nearest to a limit on each day, against it; the last day is marked.

    Args:
        points: (day, value), oldest first.
        limit: where the charts alarm.
    """
    if len(points) < 2:  # the number stands beside it
        return Markup("")
    values = [float(value) for _, value in points]
    y = Scale(0, max(*values, limit, 1e-9) * 1.08, 23, 1)
    x = Scale(0, max(len(points) - 1, 1), 2, 94)
    line = " ".join(f"{x(n)},{y(value)}" for n, value in enumerate(values))
    over = "over" if values[-1] >= limit else ""
    days = f"{len(points)} days to {points[-1][0]}"
    told = f"nearest to a limit, {days}: now {tell(values[-1])}, limit {tell(limit)}"
    return _svg(96, 24, told, _line("limit", (0, y(limit)), (96, y(limit)))
                + f'<polyline class="line" points="{line}"/><circle class="dot {over}" r="2" '
                f'cx="{x(len(values) - 1)}" cy="{y(values[-1])}"/>', "spark")  # fmt: skip


def control_chart(stream: Any) -> Markup:
    """The newest values of a stream, above the two sums of its chart against their limit.

    Args:
        stream: name, unit, days, values, up, down, limit, enough, reference, as `monitoring.overview` has it.
    """
    whole = stream.first == 1
    stream = _cut(stream, max(0, len(stream.values) - SHOWN))
    values = [(n, float(v)) for n, v in enumerate(stream.values) if math.isfinite(v)]
    if not values:
        return Markup("")
    x = Scale(0, max(len(stream.values) - 1, 1), 46, 430)
    band = [v for v in stream.reference or () if math.isfinite(v)]
    ends = [*(value for _, value in values), *band]
    y = Scale(min(ends), max(ends), 78, 8)
    parts = _axis(y, 46, 430)
    if len(band) == 3:
        top, middle, bottom = (y(end) for end in reversed(band))
        parts += f'<rect class="band" x="46" width="384" y="{top}" height="{bottom - top:.1f}"/>'
        parts += _line("median", (46, middle), (430, middle))
    parts += "".join(f'<circle class="dot" r="1.4" cx="{x(n)}" cy="{y(value)}"/>' for n, value in values)
    parts += _sums(stream, x)
    edges = (0, len(stream.days) - 1)
    first, last = (f"case {stream.first + n}, {day}" if stream.unit is Unit.SUBJECT else day
                   for n, day in ((n, stream.days[n]) for n in edges))  # fmt: skip
    height = 178 if stream.enough else 126
    parts += _text(46, height - 6, first, "small") + _text(430, height - 6, last, "small end")
    return _svg(436, height, _tell_stream(stream, values, whole), parts, "chart")


def _cut(stream: Any, left: int) -> Any:
    """The stream without its oldest `left` values."""
    kept = {name: getattr(stream, name)[left:] for name in ("days", "values", "up", "down")}
    return replace(stream, first=stream.first + left, **kept)


def _sums(stream: Any, x: Scale) -> str:
    if not stream.enough:
        return _text(52, 102, "not enough cases for a chart", "small soft")
    sums = {name: [float(one) for one in getattr(stream, name)] for name in ("up", "down")}
    top = max([*sums["up"], *sums["down"], stream.limit]) * 1.06
    y = Scale(0, top, 158, 96)
    parts = _axis(y, 46, 430, 2)
    parts += _line("limit", (46, y(stream.limit)), (430, y(stream.limit)))
    for name, told in sums.items():
        line = " ".join(f"{x(n)},{y(value)}" for n, value in enumerate(told) if math.isfinite(value))
        parts += f'<polyline class="line {name}" points="{line}"/>'
        over = [(n, value) for n, value in enumerate(told) if value >= stream.limit]
        parts += "".join(
            f'<path class="over" d="M{x(n) - 4} {y(v) - 2}h8l-4 -7z"/>' for n, v in over[:1] + over[-1:]
        )
    return parts


def _tell_stream(stream: Any, values: list[tuple[int, float]], whole: bool) -> str:
    told = f"{stream.name}: {len(values)} values by {stream.unit}, the last {tell(values[-1][1])}"
    if not stream.enough:
        return f"{told}; not enough cases for a chart"
    highest = max([*map(float, stream.up), *map(float, stream.down)], default=0.0)
    side = "reached" if highest >= stream.limit else "stayed below"
    anew = "" if whole else ", drawn anew from the values that are kept,"
    return f"{told}; its sums{anew} {side} the limit of {tell(stream.limit)}, at most {tell(highest)}"


def forest(
    rows: Mapping[str, Mapping[str, Any] | None], bounds: Mapping[str, Sequence[float]], title: str
) -> Markup:
    """Estimates with their intervals, a row a place, and the policy's bounds as bars.

    Args:
        rows: name -> {estimate, low, high[, subjects]}; None where nothing was estimated.
        bounds: name -> where the policy's bounds lie.
        title: what is shown.
    """
    told = [one for one in rows.values() if one]
    if not told:
        return Markup("")
    ends = [one[side] for one in told for side in ("low", "high")] + [
        b for two in bounds.values() for b in two
    ]
    x = Scale(max(min(ends) - 0.02, min(0, *ends)), max(ends) + 0.01, LEFT, LEFT + WIDE)
    bottom = ROW * len(rows) + 8
    parts = "".join(
        _line("grid", (x(t), 4), (x(t), bottom)) + _text(x(t), bottom + 14, tell(t), "small middle")
        for t in x.ticks()
    )
    for n, (name, one) in enumerate(rows.items()):
        parts += _row(name, one, bounds.get(name, ()), (x, ROW * n + ROW / 2 + 2))
    line = "; ".join(f"{name} {_interval(one)}" for name, one in rows.items() if one)
    return _svg(LEFT + WIDE + RIGHT, bottom + 20, f"{title}. {line}", parts, "forest")


def _row(
    name: str, one: Mapping[str, Any] | None, bounds: Sequence[float], place: tuple[Scale, float]
) -> str:
    x, y = place
    parts = _text(LEFT - 10, y + 4, name, "end")
    if one is None:
        return parts + _text(LEFT + 6, y + 4, "not enough cases", "soft")
    missed = any(bound > one["low"] for bound in bounds)
    for bound in bounds:
        parts += _line("bound", (x(bound), y - 9), (x(bound), y + 9))
    parts += _line("interval", (x(one["low"]), y), (x(one["high"]), y))
    kind, left = "point missed" if missed else "point", x(one["estimate"]) - 4
    shape = f'<rect class="{kind}" x="{left:.1f}" y="{y - 4}" width="8" height="8"/>'
    many = f"  n={one['subjects']}" if "subjects" in one else ""
    return parts + shape + _text(LEFT + WIDE + 10, y + 4, _interval(one) + many, "number")


def _interval(one: Mapping[str, Any]) -> str:
    return f"{one['estimate']:.3f} [{one['low']:.3f} {one['high']:.3f}]"


def curve(points: Sequence[tuple[float, float]], names: tuple[str, str], title: str) -> Markup:
    """A curve in the unit square with its diagonal: reliability.

    Args:
        points: (x, y), each 0 to 1.
        names: of the axes.
        title: what is shown.
    """
    if not points:
        return Markup("")
    x, y = Scale(0, 1, 46, 236), Scale(0, 1, 206, 16)
    parts = "".join(
        _line("grid", (x(t), 16), (x(t), 206)) + _line("grid", (46, y(t)), (236, y(t)))
        + _text(x(t), 220, f"{t:g}", "small middle") + _text(40, y(t) + 4, f"{t:g}", "small end")
        for t in (0, 0.25, 0.5, 0.75, 1)
    )  # fmt: skip
    parts += _line("median", (x(0), y(0)), (x(1), y(1)))
    line = " ".join(f"{x(a)},{y(b)}" for a, b in points)
    parts += f'<polyline class="line" points="{line}"/>'
    parts += "".join(f'<circle class="dot" r="3" cx="{x(a)}" cy="{y(b)}"/>' for a, b in points)
    parts += _text(141, 238, names[0], "small middle") + _text(46, 10, names[1], "small")
    told = "; ".join(f"{a:.2f} said, {b:.2f} true" for a, b in points)
    return _svg(250, 244, f"{title}. {told}", parts, "square")


def steps(cells: Sequence[tuple[int, Mapping[str, Any]]], ends: tuple[float, float], title: str) -> Markup:
    """A score by severity of a corruption, with intervals.

    Args:
        cells: (severity, {estimate, low, high}).
        ends: of the axis of scores, the same for every family.
        title: the family.
    """
    x, y = Scale(0, max(n for n, _ in cells) + 0.4, 34, 150), Scale(*ends, 92, 22)
    parts = _text(34, 12, title, "small") + _axis(y, 34, 150)
    for severity, one in cells:
        parts += _text(x(severity), 106, str(severity), "small middle")
        parts += _line("interval", (x(severity), y(one["low"])), (x(severity), y(one["high"])))
    line = " ".join(f"{x(n)},{y(one['estimate'])}" for n, one in cells)
    parts += f'<polyline class="line" points="{line}"/>'
    told = ", ".join(f"severity {n} {_interval(one)}" for n, one in cells)
    return _svg(156, 112, f"{title}: {told}", parts, "steps")


def _axis(y: Scale, left: float, right: float, count: int = 3) -> str:
    return "".join(
        _line("grid", (left, y(t)), (right, y(t))) + _text(left - 5, y(t) + 4, tell(t), "small end")
        for t in y.ticks(count)
    )


def _line(kind: str, start: tuple[float, float], end: tuple[float, float]) -> str:
    return f'<line class="{kind}" x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}"/>'


def _text(x: float, y: float, told: object, kind: str) -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(told)}</text>'


def _svg(width: float, height: float, told: str, parts: str, kind: str) -> Markup:
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(told)}">{parts}</svg>'
    )
