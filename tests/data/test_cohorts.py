"""The embedded cohorts: the same bytes however made, no short cut to the label, a larger shift outside."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from imaging.config import Places, Profile, Sites, read_params, read_sites
from imaging.errors import ConfigError
from imaging.manifest import COLUMNS, digest_file, digest_pixels, read_manifest
from imaging.preparation import prepare
from imaging.statistics import STATISTICS, describe
from imaging.vocabulary import AgeBand
from training.cohorts.building import Order, build_cohort, load_builder, make_cases
from training.cohorts.cases import Person
from training.traffic import make_traffic

ROOT = Path(__file__).parents[2]
PLACES = Places(root=ROOT, build=ROOT / "build", var=ROOT / "var")
PARAMS, SITES = read_params(PLACES), read_sites(PLACES)
TASKS = {"brain-tissue": "brain_tissue", "lung-nodule": "lung_nodule"}
SMALL = Profile(internal=8, external=8, views=2)
each_task = pytest.mark.parametrize("task", TASKS)


def digest(case):
    return digest_pixels(case.pixels), digest_pixels(case.mask), case.label, case.acquired, case.spacing_mm


def profile_of(task, site, count, changed=False):
    """Statistics (subjects, columns) of prepared images of one site."""
    orders = [Order(site, subject, 0, changed) for subject in range(count)]
    cases = make_cases(TASKS[task], 3, orders, processes=1)
    preparation = PARAMS.task(task).preparation
    rows = [describe(prepare(case.pixels.astype(np.float32), preparation)) for case in cases]
    return np.array([[row[name] for name in STATISTICS] for row in rows])


@each_task
def test_a_case_is_the_same_in_any_order_and_number_of_processes(task):
    orders = [
        Order(site, subject, view) for site in ("north", "harbour") for subject in (0, 9) for view in (0, 1)
    ]
    alone = [digest(case) for case in make_cases(TASKS[task], 5, orders, processes=1)]
    backwards = [digest(case) for case in make_cases(TASKS[task], 5, orders[::-1], processes=1)]
    pooled = [digest(case) for case in make_cases(TASKS[task], 5, orders, processes=2)]
    assert alone == backwards[::-1] == pooled
    assert len({pixels for pixels, *_ in alone}) == len(orders)


@each_task
def test_two_builds_are_the_same_bytes(task, tmp_path):
    for name in ("one", "two"):
        build_cohort(task, PARAMS.task(task), SMALL, SITES, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["cohort.yaml", "images.npy", "manifest.parquet", "masks.npy"]
    for name in files:
        assert digest_file(tmp_path / "one" / name) == digest_file(tmp_path / "two" / name)
    manifest = read_manifest(tmp_path / "one" / "manifest.parquet")
    images = np.load(tmp_path / "one" / "images.npy")
    assert tuple(manifest.columns) == COLUMNS
    assert len(manifest) == len(images) == 5 * 8 * 2
    assert list(manifest["sha256"]) == [digest_pixels(image) for image in images]


@each_task
def test_the_external_site_differs_more_from_an_internal_one_than_internal_ones_do(task):
    north, south, harbour = (profile_of(task, site, 40) for site in ("north", "south", "harbour"))
    scale = north.std(axis=0)
    inside = np.abs(south.mean(axis=0) - north.mean(axis=0)) / scale
    outside = np.abs(harbour.mean(axis=0) - north.mean(axis=0)) / scale
    assert outside.max() > 1.5 * inside.max()


@each_task
def test_the_changed_scanner_is_seen_among_the_statistics(task):
    from scipy.stats import ks_2samp

    before, after = profile_of(task, "east", 60), profile_of(task, "east", 60, changed=True)
    values = [ks_2samp(before[:, column], after[:, column]).pvalue for column in range(len(STATISTICS))]
    assert min(values) < 1e-9


@each_task
def test_the_changed_scanner_leaves_anatomy_and_truth_alone(task):
    orders = [[Order("east", subject, 0, changed) for subject in range(6)] for changed in (False, True)]
    usual, changed = (list(make_cases(TASKS[task], 3, part, processes=1)) for part in orders)
    for one, other in zip(usual, changed, strict=True):
        assert one.label == other.label
        assert one.person == other.person
        assert not np.array_equal(one.pixels, other.pixels)
        assert one.scanner != other.scanner
    if task == "brain-tissue":
        assert all(np.array_equal(a.mask, b.mask) for a, b in zip(usual, changed, strict=True))


def test_brain_slices_have_the_tissues_of_a_brain():
    orders = [Order("north", subject, view) for subject in range(15) for view in (0, 1)]
    cases = list(make_cases("brain_tissue", 3, orders, processes=1))
    shares = np.array([np.bincount(case.mask.ravel(), minlength=4) / case.mask.size for case in cases])
    background, fluid, grey, white = shares.mean(axis=0)
    assert 0.4 < background < 0.7
    assert 0.005 < fluid < 0.1
    assert 0.15 < grey < 0.35
    assert 0.1 < white < 0.3
    for case in cases:
        levels = [case.pixels[case.mask == tissue].mean() for tissue in (0, 2, 3)]
        assert levels == sorted(levels)
        assert case.pixels.dtype == np.uint16
        assert case.pixels.shape == (112, 96)


def test_brain_slices_lie_with_the_front_up_and_the_right_on_the_left():
    module = importlib.import_module("training.cohorts.brain_tissue")
    where = np.mean([module._deform(np.random.default_rng(seed), 16.0) for seed in range(20)], axis=0)
    right, anterior, superior = where
    assert (np.diff(right, axis=1) < 0).all()
    assert (np.diff(anterior, axis=0) < 0).all()
    assert superior.mean() == pytest.approx(16, abs=4)


def test_a_nodule_is_in_the_mask_exactly_where_the_label_says():
    orders = [Order("south", subject, view) for subject in range(40) for view in (0, 1)]
    cases = list(make_cases("lung_nodule", 3, orders, processes=1))
    assert {case.label for case in cases} == {0, 1}
    assert all(bool(case.mask.any()) == bool(case.label) for case in cases)
    assert all(a.label == b.label for a, b in zip(cases[::2], cases[1::2], strict=True))
    assert all(case.pixels.dtype == np.int16 and case.pixels.min() >= -1024 for case in cases)


def test_nodules_are_brighter_than_the_lung_around_them():
    cases = make_cases("lung_nodule", 3, [Order("north", subject, 0) for subject in range(60)], processes=1)
    lit = [case.pixels[case.mask == 1].mean() for case in cases if case.label]
    assert np.median(lit) > -500


def test_neither_brightness_nor_site_and_age_tell_who_has_a_nodule():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sites = SITES.names()[:4]
    orders = [Order(site, subject, 0) for subject in range(300) for site in sites]
    cases = list(make_cases("lung_nodule", 20241, orders))
    labels = np.array([case.label for case in cases])
    moments = np.array([[case.pixels.mean(), case.pixels.std()] for case in cases])
    ages = np.array([[case.person.age] + [order.site == site for site in sites]
                     for case, order in zip(cases, orders, strict=True)], dtype=float)  # fmt: skip
    half = len(cases) // 2
    for features in (moments, ages):
        model = make_pipeline(StandardScaler(), LogisticRegression()).fit(features[:half], labels[:half])
        assert roc_auc_score(labels[half:], model.predict_proba(features[half:])[:, 1]) < 0.65


@each_task
def test_traffic_is_of_new_people_and_changes_one_site_from_the_given_case(task, tmp_path):
    import pandas as pd

    make_traffic(PARAMS.task(task), SITES, 4, 2, tmp_path)
    table = pd.read_parquet(tmp_path / "traffic.parquet")
    assert len(table) == len(np.load(tmp_path / "traffic.npy")) == len(np.load(tmp_path / "masks.npy")) == 20
    assert table["subject"].is_unique
    assert table["subject"].str.extract(r"-(\d+)$")[0].astype(int).min() >= 100_000
    assert list(table.loc[table["site"] == "east", "changed"]) == [False, False, True, True]
    assert not table.loc[table["site"] != "east", "changed"].any()
    assert table.loc[table["site"] == "east", "scanner"].nunique() == 2


@pytest.mark.parametrize(
    ("age", "band"), [(18, "18-39"), (39.9, "18-39"), (40, "40-59"), (74.9, "60-74"), (75, "75+")]
)
def test_an_age_falls_into_its_band(age, band):
    assert Person(age, None, None).age_band == AgeBand(band)


def test_a_builder_that_is_missing_is_refused_by_name():
    with pytest.raises(ConfigError, match="no_such_builder"):
        load_builder("no_such_builder")


def test_a_site_without_an_acquisition_profile_is_refused_by_name(tmp_path):
    sites = Sites.model_validate({"sites": {"moon": {"kind": "internal", "title": "Moon"}}})
    with pytest.raises(ConfigError, match="moon"):
        build_cohort("lung-nodule", PARAMS.task("lung-nodule"), SMALL, sites, tmp_path / "cohort")
    assert not (tmp_path / "cohort").exists()
