"""How often the drift test, the charts and the window test cry wolf, measured beforehand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.recipe import ReferenceSection
from imaging.vocabulary import Unit
from monitoring.charts import Chart, Setting, advance, limit
from monitoring.reference import SMALLEST_REFERENCE, name_columns, read_axes, read_reference
from monitoring.windows import judge_window, level
from registry.package import digest_package, read_contract
from registry.surveillance import Surveillance

METHOD = (
    "Each repeat draws a reference of its size and a window of its size, with replacement, from the site's "
    "own reference subjects, and asks the Kolmogorov-Smirnov test at alpha / columns. Both come from the "
    "same subjects, so the share is that of the test, not of a hospital that changes from day to day."
)
PROMISE = (
    "Simulated: every repeat is a site at which nothing happens. Each day so many subjects are drawn, with "
    "replacement, from the site's own reference subjects, and a reference of its size for the window test. "
    "These days do not differ from each other. A chart is silent until it has its least number of values."
)
LEFT_OUT = "The reference has no embeddings, so the window test, and its share of the budget, are left out."
DAYS = 360
REPEATS = {Unit.DAY: 8, Unit.SUBJECT: 40}
"""The section's repeats are divided by this; charts of subjects take longer."""

USUAL = Surveillance()


def calibrate_alarms(
    section: ReferenceSection, package: Path, surveillance: Surveillance = USUAL
) -> dict[str, Any]:
    """Measure the share of null windows that alarm, and the smallest shift seen with power .8, at each site.

    And hold the false alarms of charts and window test at simulated sites against the task's part of the
    policy's budget.

    Args:
        section: alpha, window, repeats and seed.
        package: whose reference.parquet is asked.
        surveillance: of the task's policy: the budget that is set, and held against simulated sites.

    Returns:
        The body of the alarm statement; the same in every run.
    """
    import pandas as pd

    contract = read_contract(package)
    columns = name_columns(contract)
    names = sorted(pd.read_parquet(package / "reference.parquet", columns=["site"])["site"].unique())
    sites, watched = {}, {}
    for number, site in enumerate(names):
        values = read_reference(package, site, columns).to_numpy()
        axes = read_axes(package, site)
        tests = values.shape[1] + (axes is not None)  # embeddings share the level
        sites[site] = _measure(values, section, tests, np.random.default_rng([section.seed, number]))
        if sites[site]["judged"]:
            watched[site] = _watch((values, axes), surveillance, section, number)
    return {
        "package": digest_package(package),
        "test": "Kolmogorov-Smirnov, Evidently",
        "alpha": section.alpha,
        "window": section.window,
        "columns": list(columns),
        "repeats": section.repeats,
        "method": METHOD,
        "sites": sites,
        "surveillance": _promise(watched, surveillance),
    }


def write_alarms(body: dict[str, Any], folder: Path) -> None:
    """Write alarms.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "alarms.json").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")


def find_crossings(
    values: NDArray[Any], surveillance: Surveillance, streams: int, seed: int
) -> list[tuple[int, int, int]]:
    """Carry the charts over many sites at once.

    Args:
        values: (sites, days, subjects a day, columns).
        surveillance: the unit decides whether a value is a subject or the mean of a day.
        streams: that share the task's part of a site's budget.
        seed: of the draws within ranks.

    Returns:
        Site, row and column of every crossing; a row is a subject or a day.
    """
    sites, columns = values.shape[0], values.shape[-1]
    rows = values.mean(axis=2) if surveillance.unit is Unit.DAY else values.reshape(sites, -1, columns)
    table = np.moveaxis(rows, 0, 1).reshape(rows.shape[1], sites * columns)
    setting = Setting(limit(surveillance, streams), surveillance.allowance, surveillance.least, seed)
    found = advance(Chart.start(table.shape[1]), table[:0], table, setting)
    return [(one.stream // columns, one.row, one.stream % columns) for one in found]


def find_windows(
    axes: NDArray[Any], reference: NDArray[Any], surveillance: Surveillance, seed: int
) -> list[tuple[int, bool]]:
    """Compare one window of a site's embeddings after the other.

    Args:
        axes: (days, subjects a day, axes).
        reference: (subjects, axes).
        surveillance: how long a window is, and its level.
        seed: of the permutations.

    Returns:
        Last row of every whole window, counted in subjects, and whether it alarms.
    """
    days, a_day = axes.shape[:2]
    by_day, rows = surveillance.unit is Unit.DAY, axes.reshape(days * a_day, -1)
    least = max(surveillance.window_days, math.ceil(surveillance.window / a_day)) * a_day
    size = least if by_day else surveillance.window
    alpha, told = level(surveillance, size / a_day), []
    for start in range(0, len(rows) - size + 1, size):
        window = rows[start : start + size]
        of_day = np.arange(size) // a_day if by_day else None
        _, p = judge_window(reference, window, alpha, seed + start, of_day)
        told.append((start + size - 1, p <= alpha))
    return told


def _watch(
    reference: tuple[NDArray[Any], NDArray[Any] | None],
    surveillance: Surveillance,
    section: ReferenceSection,
    number: int,
) -> dict[str, int]:
    """Alarms of repeats of a site at which nothing happens; `windows` that were compared."""
    values, axes = reference
    if axes is not None:
        values = np.column_stack([values, np.sqrt((axes**2).mean(axis=1))])
    repeats = max(1, section.repeats // REPEATS[surveillance.unit])
    a_day = max(1, round(surveillance.per_day))
    seed, columns = section.seed * 1000 + number, values.shape[1]
    generator = np.random.default_rng([section.seed, number, 1])
    drawn = _draw(values, (repeats, DAYS, a_day), generator)
    found = find_crossings(drawn, surveillance, columns, seed)
    told = {"days": repeats * DAYS, "streams": columns, "charts": len(found), "windows": 0}
    told["windows_alarmed"] = 0
    if axes is None:
        return told
    for repeat in range(repeats):
        live, fixed = (_draw(axes, shape, generator) for shape in ((DAYS, a_day), (len(axes),)))
        tests = find_windows(live, fixed, surveillance, seed + repeat)
        told["windows"] += len(tests)
        told["windows_alarmed"] += sum(alarmed for _, alarmed in tests)
    return told


def _promise(watched: dict[str, dict[str, int]], surveillance: Surveillance) -> dict[str, Any]:
    """What was set, and the pooled false alarms beside what was asked."""
    from scipy.stats import chi2

    days, charts, windows, alarmed = (
        sum(told[name] for told in watched.values())
        for name in ("days", "charts", "windows", "windows_alarmed")
    )
    alarms = charts + alarmed
    fewest = (
        float(chi2.ppf(0.025, 2 * alarms)) / 2 if alarms else 0.0
    )  # Garwood's interval of a Poisson count
    most = float(chi2.ppf(0.975, 2 * alarms + 2)) / 2
    share = 1.0 if windows else 1 - surveillance.window_share
    streams = max((told["streams"] for told in watched.values()), default=0)
    return {
        "budget_days": surveillance.budget_days,
        "tasks": surveillance.tasks,
        "asked_days": round(surveillance.task_days / share, 3),
        "unit": surveillance.unit,
        "per_day": surveillance.per_day,
        "allowance": surveillance.allowance,
        "streams": streams,
        "limit": round(limit(surveillance, streams), 6) if streams else None,
        "site_days": days,
        "alarms": {"charts": charts, "windows": alarmed},
        "windows": windows,
        "days_between_alarms": [round(days / one, 3) if one and days else None
                                for one in (alarms, most, fewest)],
        "method": PROMISE if windows else f"{PROMISE} {LEFT_OUT}",
        "sites": watched,
    }  # fmt: skip


def _draw(values: NDArray[Any], shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[Any]:
    """Rows with replacement, (*shape, columns); a tiny jitter breaks the ties that this makes."""
    rows = values[generator.integers(0, len(values), shape)]
    return np.asarray(rows + values.std(axis=0) * 1e-3 * generator.standard_normal(rows.shape))


def _measure(
    values: NDArray[Any], section: ReferenceSection, tests: int, generator: np.random.Generator
) -> dict[str, Any]:
    from statsmodels.stats.proportion import proportion_confint

    if len(values) < SMALLEST_REFERENCE:
        return {"subjects": len(values), "judged": False, "reason": "too few subjects in the reference"}
    level = section.alpha / tests
    alarms = sum(_null_alarm(values, section.window, level, generator) for _ in range(section.repeats))
    low, high = proportion_confint(alarms, section.repeats, method="wilson")
    return {
        "subjects": len(values),
        "judged": True,
        "null_alarm_share": [alarms / section.repeats, round(float(low), 6), round(float(high), 6)],
        "shift_seen_sd": _smallest_shift(len(values), section.window, level, generator),
    }


def _null_alarm(values: NDArray[Any], window: int, level: float, generator: np.random.Generator) -> bool:
    """Whether one null window alarms."""
    from scipy.stats import ks_2samp

    drawn = _draw(values, (len(values) + window,), generator)
    old, new = drawn[: len(values)], drawn[len(values) :]
    return any(ks_2samp(old[:, i], new[:, i]).pvalue < level for i in range(values.shape[1]))


def _smallest_shift(
    reference: int, window: int, level: float, generator: np.random.Generator
) -> float | None:
    """Smallest shift of one normal column, in standard deviations, that 80 of 100 windows show."""
    from scipy.stats import ks_2samp

    for shift in (0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0):
        seen = sum(
            ks_2samp(generator.normal(0, 1, reference), generator.normal(shift, 1, window)).pvalue < level
            for _ in range(100)
        )
        if seen >= 80:
            return shift
    return None
