"""False alarms and delays of the surveillance, beside Evidently's presets on the same streams. Simulated.

Null streams: sites at which nothing happens, for months, by the policy's defaults but for what is named:
charts, and the window test on eight coordinates with a reference of 200, drawn anew for each site. `mixed`
streams are correlated normals, exponential, heavy-tailed (t of 2 degrees), counts and yes-or-no; in `day
effect` each day adds a number of .2 standard deviations to all its subjects. Told: days between alarms,
pooled over all site-days, with 95 % by sites, and the ratio to what the budget asks; for single sites the
5th and 95th percentile of alarms within a budget's time (1 is asked; a Poisson count scatters from 0 to 3).

Shifts: the phantom of the task lung-nodule, at site east, is drawn and answered by the packaged engine;
cases are such subjects, drawn with replacement. After 60 days of 20 cases something changes: brightness,
noise, blur or contrast by training/corruption.py (severity 1), the scanner by the cohort's own change at
this site, one coordinate of the embedding by .8 sd, or prevalence from .42 to .7; `gradual` is brightness
that more and more cases have over 30 days. In `label` 30 % of the truths turn and no pixel changes: only
late truth can show it, here on the same day. Delays are cases from the change to the first alarm, the
median over repeats; null where half saw nothing within 60 days.

- charts_subject, charts_day: our charts, a value a subject or a day; window_subject, window_day: our test.
- evidently_preset: DataDriftPreset as it comes (half of the columns at p < .05, KS), windows of 200 in turn.
- evidently_ks: its Kolmogorov-Smirnov test at .01 / columns, as `formulary monitoring check` uses it.

Evidently itself runs on null windows, and its p-values are held against scipy's; delays then use scipy's.
`evidently_null_alarm_share`: null windows in which the preset calls at least one column drifted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ks_2samp

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.simulated.clinic import (
    A_DAY,
    AXES,
    CLEAN_DAYS,
    COLUMNS,
    EFFECT,
    KINDS,
    REFERENCE,
    SHIFTS,
    Clinic,
    Values,
)
from imaging.vocabulary import Unit
from monitoring.alarms import find_crossings, find_windows
from registry.surveillance import Surveillance

STREAMS, WINDOW, ALPHA = 10, 200, 0.01

METHODS = ("wasserstein", "psi", "jensenshannon")


MARKS = ("<!-- figures: benchmarks/alarms.py --page -->", "<!-- end of detection delays -->")
WORDS = """
## Detection delays

Cases from a change to the first alarm, the median over {repeats} simulated streams; "never" where half of
them saw nothing within 1,200 cases. The surveillance has a budget of one false alarm in {budget:g} days at a
site with one task: on null streams it raised one in {days:g} (days that differ by .2 sd, daily charts and
windows), and single sites {low:g} to {high:g} in a budget's time (5th and 95th percentile). Evidently's
preset calls at least one of eight columns drifted in {share:.0%} of null windows of 200; with Wasserstein,
PSI or JS in {worst}.

| change | {names} |
|{rules}
{rows}

The phantom of `lung-nodule` and its packaged engine; 20 cases a day. `benchmarks/alarms.py` says what is
changed and what the detectors are. `label` turns truths and no pixel: only the chart of late truth can see
it, and here every truth comes on the same day. The embedding of this network hardly tells how an image was
acquired: the window test sees whom it shows. `charts_subject` keeps its budget only where days do not
differ: with .2 sd it alarmed {times:.0f} times too often.

`python benchmarks/alarms.py {how}--page docs/study.md`, {seconds:.0f} s of one core
"""

SCENES = [  # unit, kind, streams, sites with charts, of these with windows too, days
    (Unit.DAY, "day effect", STREAMS, 600, 120, 360), (Unit.DAY, "mixed", STREAMS, 400, 0, 360),
    (Unit.DAY, "correlated", STREAMS, 600, 0, 360), (Unit.DAY, "heavy-tailed", STREAMS, 200, 0, 360),
    (Unit.DAY, "yes or no", STREAMS, 200, 0, 360), (Unit.SUBJECT, "mixed", 5, 160, 40, 180),
    (Unit.SUBJECT, "independent", 2, 300, 0, 180), (Unit.SUBJECT, "day effect", 5, 12, 0, 180),
]  # fmt: skip


def watch_nothing(scene: tuple[Any, ...], budget_days: float, more: float, seed: int) -> dict[str, Any]:
    """Pooled days between false alarms of a scene, and how its sites scatter."""
    unit, kind, streams, sites, compared, days = scene
    sites, compared = round(sites * more), round(compared * more)
    asked = Surveillance(budget_days=budget_days, unit=unit, per_day=A_DAY)
    charts: list[int] = []
    for start in range(0, sites, 40):
        rng, size = np.random.default_rng([seed, start]), min(40, sites - start)
        values = KINDS[kind](rng, (size, days, A_DAY, streams))
        crossings = find_crossings(values, asked, streams, seed + start)
        charts += np.bincount([one[0] for one in crossings], minlength=size).tolist()
    windows = [watch_windows(kind, days, asked, site) for site in range(compared)]
    rate = sum(np.mean(one) / days for one in (charts, windows) if one)
    error = np.sqrt(sum(np.var(one) / len(one) / days**2 for one in (charts, windows) if one))
    asked_days = budget_days / (1.0 if compared else 1 - asked.window_share)
    sums = np.add(charts[:compared], windows) if compared else np.array(charts)
    return {
        "unit": unit, "kind": kind, "streams": streams, "days": days, "sites": sites,
        "sites_with_windows": compared, "asked_days": asked_days,
        "days_between_alarms": [round(float(1 / max(one, 1e-9)), 1)
                                for one in (rate, rate + 1.96 * error, rate - 1.96 * error)],
        "ratio": round(float(1 / rate / asked_days), 3),
        "scatter_p5_p95": [round(float(one), 2) for one in np.percentile(sums, (5, 95)) * asked_days / days],
    }  # fmt: skip


def watch_windows(kind: str, days: int, asked: Surveillance, site: int) -> int:
    """False alarms of the window test at one site; each subject of its reference is of another day."""
    rng = np.random.default_rng([9, site])
    effect = EFFECT if kind == "day effect" else 0.0
    reference = rng.standard_normal((REFERENCE, AXES)) * np.sqrt(1 + effect**2)
    axes = rng.standard_normal((days, A_DAY, AXES)) + effect * rng.standard_normal((days, 1, AXES))
    return sum(alarmed for _, alarmed in find_windows(axes, reference, asked, site))


def measure_delays(clinic: Clinic, shift: str, budget_days: float, repeats: int) -> dict[str, float | None]:
    """Median cases from a change to the first alarm of every detector."""
    rngs = [np.random.default_rng([7, len(shift), ord(shift[0]), one]) for one in range(repeats)]
    columns, axes, wrong = map(np.stack, zip(*(clinic.stream(shift, rng) for rng in rngs), strict=True))
    distance = np.sqrt((axes**2).mean(axis=3, keepdims=True))
    streams = np.concatenate([columns, distance], axis=3)
    told: dict[str, list[float]] = {}
    for unit in Unit:
        asked = Surveillance(budget_days=budget_days, unit=unit, per_day=A_DAY)
        told[f"charts_{unit}"] = chart(streams, wrong, asked)
        told[f"window_{unit}"] = [first_window(axes[one], clinic.reference(rng)[1], asked, rng)
                                  for one, rng in enumerate(rngs)]  # fmt: skip
    for name, judge in (("evidently_preset", preset), ("evidently_ks", corrected)):
        told[name] = [first_test(columns[one], clinic.reference(rng)[0], judge, rng)
                      for one, rng in enumerate(rngs)]  # fmt: skip
    middle = {name: float(np.median(delays)) for name, delays in told.items()}
    return {name: one if np.isfinite(one) else None for name, one in middle.items()}


def chart(streams: Values, wrong: Values, asked: Surveillance) -> list[float]:
    """Cases to the first crossing after the change; the share of wrong answers is charted by days always."""
    shared, first = streams.shape[3] + 1, np.full(len(streams), np.inf)
    by_day = asked.model_copy(update={"unit": Unit.DAY})
    for values, how in ((streams, asked), (wrong[..., None].astype(float), by_day)):
        a_row = A_DAY if how.unit is Unit.DAY else 1
        for site, row, _ in find_crossings(values, how, shared, 1):
            cases = (row + 1) * a_row - CLEAN_DAYS * A_DAY
            if cases > 0:
                first[site] = min(first[site], cases)
    return first.tolist()


def first_window(axes: Values, reference: Values, asked: Surveillance, rng: np.random.Generator) -> float:
    """Cases to the end of the first window that alarms; the change comes on any day of a window."""
    length = asked.window_days if asked.unit is Unit.DAY else asked.window // A_DAY
    before = int(rng.integers(0, length))
    told = find_windows(axes[CLEAN_DAYS - before :], reference, asked, before)
    return next((row + 1 - before * A_DAY for row, alarmed in told if alarmed), np.inf)


def compare_columns(window: Values, reference: Values) -> Values:
    """Evidently's p-values of two samples of at most 1,000: Kolmogorov-Smirnov, a column each."""
    return np.array([ks_2samp(reference[:, one], window[:, one]).pvalue for one in range(window.shape[1])])


def preset(p: Values) -> bool:
    return bool((p < 0.05).mean() >= 0.5)


def corrected(p: Values) -> bool:
    return bool((p < ALPHA / len(p)).any())


def first_test(columns: Values, reference: Values, judge: Any, rng: np.random.Generator) -> float:
    """Cases to the end of the first window of 200 that a rule calls drifted."""
    rows, start = columns.reshape(-1, columns.shape[2]), CLEAN_DAYS * A_DAY - int(rng.integers(0, WINDOW))
    for end in range(start + WINDOW, len(rows) + 1, WINDOW):
        if judge(compare_columns(rows[end - WINDOW : end], reference)):
            return end - CLEAN_DAYS * A_DAY
    return np.inf


def run_evidently(clinic: Clinic, windows: int) -> dict[str, Any]:
    """Shares of null windows that alarm by Evidently's own code, at its defaults."""
    os.environ["DO_NOT_TRACK"] = "1"
    import pandas as pd
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift
    from evidently.presets import DataDriftPreset

    rng, definition = np.random.default_rng(3), DataDefinition(numerical_columns=list(COLUMNS))
    found: list[dict[str, bool]] = []
    apart = 0.0
    for _ in range(windows):
        pair = [clinic.reference(rng)[0] for _ in range(2)]
        old, new = (Dataset.from_pandas(pd.DataFrame(one, columns=list(COLUMNS)), definition) for one in pair)
        own = Report([DataDriftPreset()]).run(new, old).dict()["metrics"]
        p = np.array([one["value"] for one in own if "ValueDrift" in one["metric_name"]], float)
        apart = max(apart, float(np.abs(p - compare_columns(pair[1], pair[0])).max()))
        rules = {"any_column": bool((p < 0.05).any()), "dataset": preset(p), "corrected": corrected(p)}
        more = [ValueDrift(column=name, method=method) for method in METHODS for name in COLUMNS]
        values = [float(one["value"]) for one in Report(more).run(new, old).dict()["metrics"]]
        largest = np.reshape(values, (len(METHODS), -1)).max(axis=1)
        found.append(rules | dict(zip(METHODS, (largest >= 0.1).tolist(), strict=True)))
    shares = pd.DataFrame(found).mean().round(3).to_dict()
    return {"windows": windows, "largest_difference_of_p": apart, "shares": shares}


def measure(budget_days: float, more: float) -> dict[str, Any]:
    """Everything, with `more` times the sites and repeats of a quick run."""
    null = [watch_nothing(scene, budget_days, more, number) for number, scene in enumerate(SCENES)]
    clinic, repeats = Clinic(round(400 * min(more, 2))), round(15 * more)
    evidently = run_evidently(clinic, round(12 * more))
    delays = {shift: measure_delays(clinic, shift, budget_days, repeats) for shift in SHIFTS}
    return {
        "budget_days": budget_days,
        "null_days_between_alarms": null[0]["days_between_alarms"][0],
        "scatter_p5_p95": null[0]["scatter_p5_p95"],
        "delays": delays,
        "evidently_null_alarm_share": evidently["shares"]["any_column"],
        "context": {"null": null, "evidently": evidently, "repeats": repeats, "cases_a_day": A_DAY},
    }


def write_page(told: dict[str, Any], path: Path, quick: bool) -> None:
    """The delays as Markdown, between the page's two marks, at its end where it has none."""
    null, shares = told["context"]["null"], told["context"]["evidently"]["shares"]
    names = list(told["delays"][SHIFTS[0]])
    rows = []
    for shift, delays in told["delays"].items():
        cells = ("never" if one is None else f"{one:g}" for one in delays.values())
        rows.append(f"| {shift} | {' | '.join(cells)} |")
    text = WORDS.format(
        repeats=told["context"]["repeats"], budget=told["budget_days"], days=told["null_days_between_alarms"],
        low=told["scatter_p5_p95"][0], high=told["scatter_p5_p95"][1], share=shares["any_column"],
        worst=" / ".join(f"{shares[method]:.0%}" for method in METHODS), names=" | ".join(names),
        rules="---|" * (1 + len(names)), rows="\n".join(rows), times=1 / null[-1]["ratio"],
        how="--quick " * quick, seconds=told["context"]["seconds"],
    )  # fmt: skip
    before, _, rest = path.read_text().partition(MARKS[0])
    path.write_text(
        f"{before.rstrip()}\n\n{MARKS[0]}\n{text}\n{MARKS[1]}{rest.partition(MARKS[1])[2] or chr(10)}"
    )


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the sites and repeats")
    parser.add_argument("--budget-days", type=float, default=180, help="one false alarm in so many days")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    page = "renew the delays of docs/study.md, and of the template that it comes from"
    parser.add_argument("--page", type=Path, metavar="FILE", action="append", default=[], help=page)
    asked, started = parser.parse_args(), time.process_time()
    told = measure(asked.budget_days, 1 if asked.quick else 10)
    told["context"]["seconds"] = round(time.process_time() - started, 1)
    print(json.dumps(told, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n")
    for page in asked.page:
        write_page(told, page, asked.quick)


if __name__ == "__main__":
    main()
