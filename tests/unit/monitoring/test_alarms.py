"""The share of false alarms that is measured is the share that theory gives, and the budget is kept."""

import json

import numpy as np
import pytest
from scipy.stats import binom, ks_2samp, poisson

from imaging.recipe import ReferenceSection
from imaging.vocabulary import Kind, Unit
from monitoring.alarms import DAYS, calibrate_alarms, find_crossings, find_windows, write_alarms
from monitoring.charts import limit
from monitoring.reference import name_columns, write_reference
from registry.package import FILES, digest_package, write_contract
from registry.projection import AXES
from registry.surveillance import Surveillance
from tests.tiny import promise

SECTION = ReferenceSection(alpha=0.2, window=60, repeats=200, seed=5)
CONTRACT = promise(Kind.CLASSIFICATION, ("none", "nodule"))
COLUMNS = name_columns(CONTRACT)
LEVEL = SECTION.alpha / len(COLUMNS)
QUICK = Surveillance(per_day=2)


@pytest.fixture
def package(tmp_path):
    """Write a package whose reference has these values, a site each: (subjects, columns)."""

    def make(**sites):
        for name in FILES:
            (tmp_path / name).write_text(name)
        write_contract(CONTRACT, tmp_path)
        rows = [{"sha256": f"{number}-{image}", "subject": str(number), "site": site, "split": "validation",
                 **dict(zip((*COLUMNS, *AXES), values, strict=False))}
                for site, table in sites.items() for number, values in enumerate(table)
                for image in range(2)]  # fmt: skip
        write_reference(rows, COLUMNS, tmp_path / "reference.parquet")
        return tmp_path

    return make


def draw(subjects, alike=False):
    rng = np.random.default_rng(1)
    return np.repeat(rng.normal(size=(subjects, 1)), 8, axis=1) if alike else rng.normal(size=(subjects, 8))


def test_columns_that_tell_different_things_alarm_as_often_as_that_many_tests(package):
    told = calibrate_alarms(SECTION, package(north=draw(120)), QUICK)["sites"]["north"]
    share, low, high = told["null_alarm_share"]
    expected = 1 - (1 - LEVEL) ** 8
    assert binom.ppf(0.001, 200, expected) <= share * 200 <= binom.ppf(0.999, 200, expected)
    assert low < share < high
    assert (told["subjects"], told["judged"]) == (120, True)


def test_columns_that_tell_the_same_alarm_about_as_often_as_one(package):
    told = calibrate_alarms(SECTION, package(north=draw(120, alike=True)), QUICK)["sites"]["north"]
    assert told["null_alarm_share"][0] * 200 <= binom.ppf(0.999, 200, 2 * LEVEL)


def test_the_shift_that_it_sees_has_power_and_the_next_smaller_one_has_not(package):
    told = calibrate_alarms(SECTION, package(north=draw(120)), QUICK)["sites"]["north"]["shift_seen_sd"]
    rng = np.random.default_rng(9)

    def power(shift):
        return np.mean([ks_2samp(rng.normal(size=120), rng.normal(shift, size=60)).pvalue < LEVEL
                        for _ in range(100)])  # fmt: skip

    assert told == 0.6
    assert power(0.6) > 0.7
    assert power(0.4) < 0.8


def test_a_site_with_too_few_subjects_is_not_judged(package):
    sites = calibrate_alarms(SECTION, package(north=draw(19), east=draw(20)), QUICK)["sites"]
    assert sites["north"] == {"subjects": 19, "judged": False, "reason": "too few subjects in the reference"}
    assert sites["east"]["judged"]


def test_the_statement_is_of_the_package_and_the_same_in_every_run(package, tmp_path):
    folder, section = package(north=draw(60), east=draw(30)), SECTION.model_copy(update={"repeats": 50})
    first, second = (calibrate_alarms(section, folder, QUICK) for _ in range(2))
    assert first == second
    assert first != calibrate_alarms(section.model_copy(update={"seed": 6}), folder, QUICK)
    assert first["package"] == digest_package(folder)
    assert first["columns"] == list(COLUMNS)
    assert [first["alpha"], first["window"], first["repeats"]] == [0.2, 60, 50]
    write_alarms(first, tmp_path / "stage" / "reference")
    assert json.loads((tmp_path / "stage" / "reference" / "alarms.json").read_text()) == first


def test_charts_and_windows_of_sites_at_which_nothing_happens_keep_the_budget(package):
    asked = Surveillance(budget_days=20, unit=Unit.DAY, window_share=0.25)
    section = SECTION.model_copy(update={"repeats": 160})
    values = np.random.default_rng(2).normal(size=(60, 8 + len(AXES)))
    told = calibrate_alarms(section, package(north=values, east=values[:25]), asked)["surveillance"]
    assert told["site_days"] == 2 * 20 * DAYS
    assert told["streams"] == 9  # of which one is the distance from the middle of the embeddings
    assert told["limit"] == pytest.approx(limit(asked, 9), abs=1e-6)
    assert told["windows"] == 2 * 20 * (DAYS // 14)
    assert told["asked_days"] == 20
    alarms = sum(told["alarms"].values())
    expected = told["site_days"] / 20
    assert poisson.ppf(0.001, 0.88 * expected) <= alarms <= poisson.ppf(0.999, expected)
    share = binom.ppf((0.001, 0.999), told["windows"], 0.25 * 14 / 20)
    assert share[0] <= told["alarms"]["windows"] <= share[1]
    middle, low, high = told["days_between_alarms"]
    assert middle == pytest.approx(told["site_days"] / alarms, abs=0.001)
    assert low < middle < high


def test_a_reference_without_embeddings_leaves_the_window_test_out_and_says_so(package):
    asked = Surveillance(budget_days=20, window_share=0.25)
    told = calibrate_alarms(SECTION, package(north=draw(40)), asked)["surveillance"]
    assert (told["windows"], told["alarms"]["windows"]) == (0, 0)
    assert told["asked_days"] == pytest.approx(20 / 0.75, abs=0.001)
    assert "left out" in told["method"]


def test_no_site_with_enough_subjects_means_no_measurement(package):
    told = calibrate_alarms(SECTION, package(north=draw(10)))["surveillance"]
    assert (told["site_days"], told["limit"], told["days_between_alarms"]) == (0, None, [None, None, None])


def test_daily_means_keep_the_budget_where_days_differ_and_values_of_subjects_do_not():
    rng, counts = np.random.default_rng(3), {}
    values = rng.normal(size=(12, 180, 20, 4)) + 0.2 * rng.normal(size=(12, 180, 1, 4))
    for unit in Unit:
        asked = Surveillance(budget_days=20, unit=unit, per_day=20, window_share=0.25)
        counts[unit] = len(find_crossings(values, asked, 4, 1))
    expected = 12 * 180 * 0.75 / 20
    assert poisson.ppf(0.001, 0.88 * expected) <= counts[Unit.DAY] <= poisson.ppf(0.999, expected)
    assert counts[Unit.SUBJECT] > 2.5 * expected


def test_all_tasks_of_a_site_together_keep_its_budget():
    rng, asked = np.random.default_rng(5), Surveillance(budget_days=20, tasks=3, window_share=0.25)
    counts = [len(find_crossings(rng.normal(size=(20, 360, 2, 4)), asked, 4, seed)) for seed in range(3)]
    expected = 20 * 360 * 0.75 / 20
    assert poisson.ppf(0.001, 0.88 * expected) <= sum(counts) <= poisson.ppf(0.999, expected)


def test_a_change_is_told_with_its_site_row_and_column_and_with_the_window_that_holds_it():
    rng, asked = np.random.default_rng(4), Surveillance(unit=Unit.SUBJECT, per_day=20, window=100)
    values = rng.normal(size=(3, 20, 20, 5))
    values[1, 10:, :, 2] += 2
    found = find_crossings(values, asked, 500, 1)
    assert {(site, column) for site, _, column in found} == {(1, 2)}
    assert 200 < min(row for _, row, _ in found) < 215
    windows = find_windows(values[1], rng.normal(size=(150, 5)), asked, 1)
    assert windows == [(99, False), (199, False), (299, True), (399, True)]
