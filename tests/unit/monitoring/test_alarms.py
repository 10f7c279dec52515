"""The share of false alarms that is measured is the share that theory gives."""

import json

import numpy as np
import pytest
from scipy.stats import binom, ks_2samp

from imaging.recipe import ReferenceSection
from imaging.vocabulary import Kind
from monitoring.alarms import calibrate_alarms, write_alarms
from monitoring.reference import name_columns, write_reference
from registry.package import FILES, digest_package, write_contract
from tests.tiny import promise

SECTION = ReferenceSection(alpha=0.2, window=60, repeats=200, seed=5)
CONTRACT = promise(Kind.CLASSIFICATION, ("none", "nodule"))
COLUMNS = name_columns(CONTRACT)
LEVEL = SECTION.alpha / len(COLUMNS)


@pytest.fixture
def package(tmp_path):
    """Write a package whose reference has these values, a site each: (subjects, columns)."""

    def make(**sites):
        for name in FILES:
            (tmp_path / name).write_text(name)
        write_contract(CONTRACT, tmp_path)
        rows = [{"sha256": f"{number}-{image}", "subject": str(number), "site": site, "split": "validation",
                 **dict(zip(COLUMNS, values, strict=True))}
                for site, table in sites.items() for number, values in enumerate(table)
                for image in range(2)]  # fmt: skip
        write_reference(rows, COLUMNS, tmp_path / "reference.parquet")
        return tmp_path

    return make


def draw(subjects, alike=False):
    rng = np.random.default_rng(1)
    return np.repeat(rng.normal(size=(subjects, 1)), 8, axis=1) if alike else rng.normal(size=(subjects, 8))


def test_columns_that_tell_different_things_alarm_as_often_as_that_many_tests(package):
    told = calibrate_alarms(SECTION, package(north=draw(120)))["sites"]["north"]
    share, low, high = told["null_alarm_share"]
    expected = 1 - (1 - LEVEL) ** 8
    assert binom.ppf(0.001, 200, expected) <= share * 200 <= binom.ppf(0.999, 200, expected)
    assert low < share < high
    assert (told["subjects"], told["judged"]) == (120, True)


def test_columns_that_tell_the_same_alarm_about_as_often_as_one(package):
    told = calibrate_alarms(SECTION, package(north=draw(120, alike=True)))["sites"]["north"]
    assert told["null_alarm_share"][0] * 200 <= binom.ppf(0.999, 200, 2 * LEVEL)


def test_the_shift_that_it_sees_has_power_and_the_next_smaller_one_has_not(package):
    told = calibrate_alarms(SECTION, package(north=draw(120)))["sites"]["north"]["shift_seen_sd"]
    rng = np.random.default_rng(9)

    def power(shift):
        return np.mean([ks_2samp(rng.normal(size=120), rng.normal(shift, size=60)).pvalue < LEVEL
                        for _ in range(100)])  # fmt: skip

    assert told == 0.6
    assert power(0.6) > 0.7
    assert power(0.4) < 0.8


def test_a_site_with_too_few_subjects_is_not_judged(package):
    sites = calibrate_alarms(SECTION, package(north=draw(19), east=draw(20)))["sites"]
    assert sites["north"] == {"subjects": 19, "judged": False, "reason": "too few subjects in the reference"}
    assert sites["east"]["judged"]


def test_the_statement_is_of_the_package_and_the_same_in_every_run(package, tmp_path):
    folder, section = package(north=draw(60), east=draw(30)), SECTION.model_copy(update={"repeats": 50})
    first, second = (calibrate_alarms(section, folder) for _ in range(2))
    assert first == second
    assert first != calibrate_alarms(section.model_copy(update={"seed": 6}), folder)
    assert first["package"] == digest_package(folder)
    assert first["columns"] == list(COLUMNS)
    assert [first["alpha"], first["window"], first["repeats"]] == [0.2, 60, 50]
    write_alarms(first, tmp_path / "stage" / "reference")
    assert json.loads((tmp_path / "stage" / "reference" / "alarms.json").read_text()) == first
