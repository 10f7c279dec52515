"""The embedded cohorts: the same bytes however made, no short cut to the label, a larger shift outside."""

import importlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from imaging.config import Places, Sites, read_params, read_sites
from imaging.errors import ConfigError, DataError
from imaging.image import describe
from imaging.manifest import COLUMNS, digest_file, digest_pixels, read_manifest
from imaging.preparation import Colour, Percentiles, Window, prepare
from imaging.recipe import CohortSection, Profile
from imaging.vocabulary import AgeBand
from tests.debian import need
from training.cohorts import colin27
from training.cohorts.building import Order, build_cohort, load_builder, make_case, make_cases, make_traffic
from training.cohorts.cases import Person

ROOT = Path(__file__).parents[2]
PLACES = Places(root=ROOT, build=ROOT / "build", var=ROOT / "var")
PARAMS, SITES = read_params(PLACES), read_sites(PLACES)
FEW = Sites(sites={name: SITES.site(name) for name in ("north", "east", "harbour")})
MR, CT, COLOUR = Percentiles(low=2, high=98), Window(low_hu=-1000, high_hu=200), Colour()
COHORTS = {
    "brain_tissue": MR,
    "brain_volume": MR,
    "lung_nodule": CT,
    "retinopathy": COLOUR,
    "histology": COLOUR,
}
POSITIVE = {"lung_nodule": (1,), "retinopathy": (2, 3, 4), "histology": (1,)}
each_cohort = pytest.mark.parametrize("cohort", COHORTS)


def source_of(cohort):
    return f"training/cohorts/{cohort}.py"


def section_of(cohort):
    """A task with this cohort; what else it says does not reach the pixels."""
    told = {"cohort": CohortSection(source=source_of(cohort), seed=3)}
    return PARAMS.task("brain-tissue").model_copy(update=told)


def make(cohort, orders, seed=3):
    return list(make_cases(source_of(cohort), seed, orders, processes=1))


def digest(case):
    return digest_pixels(case.pixels), digest_pixels(case.mask), case.label, case.acquired, case.spacing_mm


def profile_of(cohort, site, count, changed=False):
    """Statistics (subjects, columns) of prepared images of one site."""
    cases = make(cohort, [Order(site, subject, 0, changed) for subject in range(count)])
    prepared = [prepare(case.pixels.astype(np.float32), COHORTS[cohort]) for case in cases]
    return np.array([list(describe(image).values()) for image in prepared])


@pytest.fixture(scope="module")
def stranger():
    """Another process, that shares nothing with this one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@each_cohort
def test_a_case_is_the_same_in_any_order_and_process(cohort, stranger):
    orders = [
        Order(site, subject, view) for site in ("north", "harbour") for subject in (0, 9) for view in (0, 1)
    ]
    alone = [digest(case) for case in make(cohort, orders, seed=5)]
    backwards = [digest(case) for case in make(cohort, orders[::-1], seed=5)]
    far = [stranger.submit(make_case, source_of(cohort), 5, order) for order in orders[::3]]
    assert alone == backwards[::-1]
    assert alone[::3] == [digest(case.result()) for case in far]
    assert len({pixels for pixels, *_ in alone}) == len(orders)


def test_the_number_of_processes_changes_nothing():
    orders = [Order("west", subject, 0) for subject in range(20)]
    pooled = make_cases(source_of("lung_nodule"), 5, orders, processes=2)
    assert [digest(case) for case in pooled] == [digest(case) for case in make("lung_nodule", orders, seed=5)]


@each_cohort
def test_two_builds_are_the_same_bytes(cohort, tmp_path):
    for name in ("one", "two"):
        small = Profile(internal=8, external=8, views=1)
        build_cohort("any", section_of(cohort), small, FEW, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["cohort.yaml", "images.npy", "manifest.parquet", "masks.npy"]
    for name in files:
        assert digest_file(tmp_path / "one" / name) == digest_file(tmp_path / "two" / name)
    manifest = read_manifest(tmp_path / "one" / "manifest.parquet")
    images, masks = (np.load(tmp_path / "one" / f"{name}.npy") for name in ("images", "masks"))
    builder = load_builder(source_of(cohort))
    assert tuple(manifest.columns) == COLUMNS
    assert len(manifest) == 3 * 8
    assert images.shape == (3 * 8, *builder.SHAPE)
    assert masks.shape == images.shape[:3] if images.shape[-1] == 3 else images.shape
    assert masks.dtype == np.uint8
    assert list(manifest["sha256"]) == [digest_pixels(image) for image in images]
    assert manifest["spacing_mm"].between(0.85 * builder.SPACING_MM, 1.25 * builder.SPACING_MM).all()


@each_cohort
def test_the_external_site_differs_more_from_an_internal_one_than_internal_ones_do(cohort):
    north, south, harbour = (profile_of(cohort, site, 20) for site in ("north", "south", "harbour"))
    scale = north.std(axis=0) + 0.01  # black corners do not vary
    inside = np.abs(south.mean(axis=0) - north.mean(axis=0)) / scale
    outside = np.abs(harbour.mean(axis=0) - north.mean(axis=0)) / scale
    assert outside.max() > 1.5 * inside.max()


@each_cohort
def test_the_changed_scanner_is_seen_among_the_statistics(cohort):
    from scipy.stats import ks_2samp

    before, after = profile_of(cohort, "east", 30), profile_of(cohort, "east", 30, changed=True)
    values = [ks_2samp(before[:, column], after[:, column]).pvalue for column in range(before.shape[1])]
    assert min(values) < 1e-9


@each_cohort
def test_the_changed_scanner_leaves_anatomy_and_truth_alone(cohort):
    usual, changed = (
        make(cohort, [Order("east", subject, 0, changed) for subject in range(6)])
        for changed in (False, True)
    )
    for one, other in zip(usual, changed, strict=True):
        assert one.label == other.label
        assert one.person == other.person
        assert not np.array_equal(one.pixels, other.pixels)
        assert one.scanner != other.scanner
    if cohort != "lung_nodule":  # whose field of view the scanner sets
        assert all(np.array_equal(a.mask, b.mask) for a, b in zip(usual, changed, strict=True))


def target_of(cohort, case):
    """Whether the label is positive; of brains, the share of grey matter in the tissue."""
    if cohort in POSITIVE:
        return case.label in POSITIVE[cohort]
    grey, white = ((case.mask == tissue).sum() for tissue in (2, 3))
    return grey / (grey + white)


@each_cohort
def test_neither_brightness_nor_site_and_age_tell_the_answer(cohort):
    """Linear models, each image scored by one that was fitted to others; one image a subject."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sites, count = SITES.names()[:4], {"brain_tissue": 80, "brain_volume": 40}.get(cohort, 110)
    orders = [Order(site, subject, 0) for subject in range(count) for site in sites]
    cases = make(cohort, orders, seed=20241)
    answers = np.array([target_of(cohort, case) for case in cases])
    answers = answers if cohort in POSITIVE else answers > np.median(answers)
    planes = [case.pixels.reshape(-1, 3 if COHORTS[cohort] is COLOUR else 1) for case in cases]
    moments = np.array([[*plane.mean(axis=0), *plane.std(axis=0)] for plane in planes])
    ages = np.array([[case.person.age] + [order.site == site for site in sites]
                     for case, order in zip(cases, orders, strict=True)], dtype=float)  # fmt: skip
    model = make_pipeline(StandardScaler(), LogisticRegression())
    for features in (moments, ages):
        scores = cross_val_predict(model, features, answers, method="decision_function")
        assert roc_auc_score(answers, scores) < 0.65


def test_brain_slices_have_the_tissues_of_a_brain():
    orders = [Order("north", subject, view) for subject in range(15) for view in (0, 1)]
    cases = make("brain_tissue", orders)
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
    levels = np.array([16.0, 20.0])
    where = [module.deform(np.random.default_rng(n), levels, module.SHAPE, 2.0) for n in range(20)]
    right, anterior, superior = np.mean(where, axis=0)
    assert right.shape == (2, 112, 96)
    assert (np.diff(right, axis=2) < 0).all()
    assert (np.diff(anterior, axis=1) < 0).all()
    assert (np.diff(superior, axis=0) > 0).all()
    assert superior[0].mean() == pytest.approx(16, abs=4)


def test_brain_volumes_are_the_anatomy_of_the_slices_from_the_feet_up():
    cases = make("brain_volume", [Order("north", subject, view) for subject in range(5) for view in (0, 1)])
    for case in cases:
        assert case.pixels.dtype == np.uint16
        assert set(np.unique(case.mask)) == {0, 1, 2, 3}
        levels = [case.pixels[case.mask == tissue].mean() for tissue in (0, 2, 3)]
        assert levels == sorted(levels)
        assert (case.mask[-1] > 0).sum() < (case.mask[4:12] > 0).sum(axis=(1, 2)).max()  # the crown narrows
    shares = np.mean([np.bincount(case.mask.ravel(), minlength=4) / case.mask.size for case in cases], axis=0)
    assert 0.4 < shares[0] < 0.7
    assert 0.15 < shares[2] < 0.35


def test_a_nodule_is_in_the_mask_exactly_where_the_label_says():
    orders = [Order("south", subject, view) for subject in range(40) for view in (0, 1)]
    cases = make("lung_nodule", orders)
    assert {case.label for case in cases} == {0, 1}
    assert all(bool(case.mask.any()) == bool(case.label) for case in cases)
    assert all(a.label == b.label for a, b in zip(cases[::2], cases[1::2], strict=True))
    assert all(case.pixels.dtype == np.int16 and case.pixels.min() >= -1024 for case in cases)


def test_nodules_are_brighter_than_the_lung_around_them():
    cases = make("lung_nodule", [Order("north", subject, 0) for subject in range(60)])
    lit = [case.pixels[case.mask == 1].mean() for case in cases if case.label]
    assert np.median(lit) > -500


def test_fundus_lesions_are_in_the_mask_exactly_where_the_grade_says():
    cases = make("retinopathy", [Order("south", subject, view) for subject in range(60) for view in (0, 1)])
    assert {case.label for case in cases} == {0, 1, 2, 3, 4}
    assert all(bool(case.mask.any()) == (case.label > 0) for case in cases)
    areas = [np.mean([case.mask.sum() for case in cases if case.label == grade]) for grade in range(4)]
    assert areas == sorted(areas)
    for case in cases:
        assert case.pixels.dtype == np.uint8
        assert case.pixels[:3, :3].max() < 40  # dark outside the round field
        assert case.pixels[48, 30:66, 0].mean() > case.pixels[48, 30:66, 2].mean()  # red within it


def test_the_other_eye_has_the_same_grade_in_seven_of_ten_and_else_the_next():
    from scipy.stats import binomtest

    builder = load_builder(source_of("retinopathy"))
    grades = np.array([[builder.make_case(8, "west", n, view).label for view in (0, 1)] for n in range(80)])
    apart = np.abs(np.diff(grades, axis=1))
    assert apart.max() == 1
    assert binomtest(int((apart == 0).sum()), len(apart), 0.7).pvalue > 0.01


def test_right_and_left_eyes_have_their_optic_disc_on_the_side_of_the_nose():
    cases = make("retinopathy", [Order("north", subject, view) for subject in range(8) for view in (0, 1)])
    for number, case in enumerate(cases):
        smooth = case.pixels[30:66, :, 1].astype(float).mean(axis=0)
        right, left = smooth[65:85].max(), smooth[11:31].max()
        assert (right > left) == (number % 2 == 0)


def test_tumour_nuclei_are_in_the_mask_exactly_where_the_label_says():
    cases = make("histology", [Order("south", subject, view) for subject in range(40) for view in (0, 1)])
    assert {case.label for case in cases} == {0, 1}
    assert all(bool(case.mask.any()) == bool(case.label) for case in cases)
    assert any(a.label != b.label for a, b in zip(cases[::2], cases[1::2], strict=True))
    for case in cases:
        assert case.pixels.dtype == np.uint8
        if case.label:  # nuclei are bluer than the pink around them
            inside, outside = (case.pixels[case.mask == part].mean(axis=0) for part in (1, 0))
            assert inside[0] < outside[0] - 30


def test_colin27_is_told_of_as_missing_where_it_is_not_installed(tmp_path):
    assert "not installed" in colin27.describe_colin27(tmp_path)
    with pytest.raises(DataError, match="mricron-data"):
        colin27.read_colin27(tmp_path)


def test_colin27_lies_in_the_template_and_its_silver_truth_is_nearly_that_of_the_template():
    from sklearn.metrics import f1_score

    need("mricron-data", (colin27.FOLDER / colin27.T1).is_file())
    slices = colin27.read_colin27()
    assert "real person" in colin27.describe_colin27()
    assert all(part.pixels.shape == (112, 96) and part.pixels.dtype == np.uint16 for part in slices)
    ours, theirs = (
        np.stack([part.mask for part in slices]),
        np.stack([template_tissue(part.level_mm) for part in slices]),
    )
    assert f1_score((theirs > 0).ravel(), (ours > 0).ravel()) > 0.94
    for tissue in (2, 3):  # ICBM's maps overlap it by about .70: it needs a truth of its own
        assert 0.65 < f1_score((theirs == tissue).ravel(), (ours == tissue).ravel()) < 0.8


def template_tissue(level):
    """Tissue classes of the undeformed template, at a level in mm: (112, 96)."""
    from training.cohorts.brain_tissue import draw_tissue

    anterior, right = -17.0 + np.arange(111, -112, -2), np.arange(95, -96, -2.0)
    anterior, right = np.meshgrid(anterior, right, indexing="ij")
    where = np.stack([right, anterior, np.full_like(right, level)])
    return draw_tissue(where, np.random.default_rng(0))[1]


@each_cohort
def test_traffic_is_of_new_people_and_changes_one_site_from_the_given_case(cohort, tmp_path):
    import pandas as pd

    make_traffic(section_of(cohort), SITES, 4, 2, tmp_path)
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
        load_builder("training/cohorts/no_such_builder.py")


def test_a_site_without_an_acquisition_profile_is_refused_by_name(tmp_path):
    sites = Sites.model_validate({"sites": {"moon": {"kind": "internal", "title": "Moon"}}})
    with pytest.raises(ConfigError, match="moon"):
        build_cohort(
            "lung-nodule",
            section_of("lung_nodule"),
            Profile(internal=8, external=8, views=1),
            sites,
            tmp_path / "cohort",
        )
    assert not (tmp_path / "cohort").exists()
