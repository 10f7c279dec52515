"""How often the drift test cries wolf, and how small a shift it sees: measured beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.recipe import ReferenceSection
from monitoring.drift import SMALLEST_REFERENCE
from monitoring.reference import name_columns, read_reference
from registry.package import digest_package, read_contract

METHOD = (
    "Each repeat draws a reference of its size and a window of its size, with replacement, from the site's "
    "own reference subjects, and asks the Kolmogorov-Smirnov test at alpha / columns. Both come from the "
    "same subjects, so the share is that of the test, not of a hospital that changes from day to day."
)


def calibrate_alarms(section: ReferenceSection, package: Path) -> dict[str, Any]:
    """Measure the share of null windows that alarm, and the smallest shift seen with power .8, at each site.

    Args:
        section: alpha, window, repeats and seed.
        package: whose reference.parquet is asked.

    Returns:
        The body of the alarm statement; the same in every run.
    """
    import pandas as pd

    contract = read_contract(package)
    columns = name_columns(contract)
    names = sorted(pd.read_parquet(package / "reference.parquet", columns=["site"])["site"].unique())
    sites = {}
    for number, site in enumerate(names):
        values = read_reference(package, site, columns).to_numpy()
        sites[site] = _measure(values, section, np.random.default_rng([section.seed, number]))
    return {
        "package": digest_package(package),
        "test": "Kolmogorov-Smirnov, Evidently",
        "alpha": section.alpha,
        "window": section.window,
        "columns": list(columns),
        "repeats": section.repeats,
        "method": METHOD,
        "sites": sites,
    }


def write_alarms(body: dict[str, Any], folder: Path) -> None:
    """Write alarms.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "alarms.json").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")


def _measure(
    values: NDArray[Any], section: ReferenceSection, generator: np.random.Generator
) -> dict[str, Any]:
    from statsmodels.stats.proportion import proportion_confint

    if len(values) < SMALLEST_REFERENCE:
        return {"subjects": len(values), "judged": False, "reason": "too few subjects in the reference"}
    level = section.alpha / values.shape[1]
    alarms = sum(_null_alarm(values, section.window, level, generator) for _ in range(section.repeats))
    low, high = proportion_confint(alarms, section.repeats, method="wilson")
    return {
        "subjects": len(values),
        "judged": True,
        "null_alarm_share": [alarms / section.repeats, round(float(low), 6), round(float(high), 6)],
        "shift_seen_sd": _smallest_shift(len(values), section.window, level, generator),
    }


def _null_alarm(values: NDArray[Any], window: int, level: float, generator: np.random.Generator) -> bool:
    """Whether one null window alarms; a tiny jitter breaks the ties that drawing with replacement makes."""
    from scipy.stats import ks_2samp

    spread = values.std(axis=0) * 1e-3
    rows = generator.integers(0, len(values), len(values) + window)
    drawn = values[rows] + spread * generator.standard_normal((len(rows), values.shape[1]))
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
