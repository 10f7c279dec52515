"""A cohort that is broken is refused, and the error says by which expectation."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from imaging.config import Places, read_params, read_sites
from imaging.errors import DataError
from imaging.manifest import digest_pixels
from imaging.recipe import Profile
from training.cohorts.building import build_cohort
from training.expectations import check_cohort, find_near_duplicates, measure_pixels
from training.rules import Question
from training.splitting import split_cohort

ROOT = Path(__file__).parents[2]
PLACES = Places(root=ROOT, build=ROOT / "build", var=ROOT / "var")
SITES = read_sites(PLACES)


def question_of(task):
    section = read_params(PLACES).task(task)
    few = section.check.model_copy(update={"subjects_per_split_and_site": 1})
    return Question(task, section.model_copy(update={"check": few}), SITES)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small sound cohort and its split."""
    folder, question = tmp_path_factory.mktemp("sound"), question_of("lung-nodule")
    build_cohort(
        "lung-nodule", question.section, Profile(internal=40, external=12, views=2), SITES, folder / "cohort"
    )
    split_cohort(question.section.split, folder / "cohort", folder / "split")
    return folder


@pytest.fixture
def broken(sound, tmp_path):
    """A copy to be broken; hands back a function that breaks its manifest."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "split" / "manifest.parquet"

    def rewrite(change):
        table = pd.read_parquet(path)
        result = change(table)
        (table if result is None else result).to_parquet(path, index=False)
        return tmp_path

    return rewrite


def check(folder):
    return check_cohort(question_of("lung-nodule"), folder / "cohort", folder / "split", folder / "check")


def put(column, value, where=slice(0, 1)):
    def change(table):
        table[column] = table[column].astype(object) if value is None else table[column]
        table.loc[table.index[where], column] = value

    return change


def test_a_sound_cohort_passes_and_the_reports_are_written(sound):
    assert len(check(sound)["expectations"]) > 40
    report = json.loads((sound / "check" / "expectations.json").read_text())
    assert report["success"] is True
    assert report["failed"] == []
    assert (sound / "check" / "docs" / "index.html").stat().st_size > 1000


def test_reports_hold_no_rows(sound):
    check(sound)
    subject = pd.read_parquet(sound / "split" / "manifest.parquet")["subject"][0]
    reports = [sound / "check" / "expectations.json", *(sound / "check" / "docs").rglob("*.html")]
    assert all(subject not in path.read_text() for path in reports)


BREAKS = {
    "the columns are the listed ones and no other": lambda t: t.assign(patient_name="Doe"),
    "no two images have the same pixels": lambda t: put("sha256", t["sha256"][0], slice(1, 2))(t),
    "the pixels are those of the sha256": put("sha256", "0" * 64),
    "acquired is a day": put("acquired", "2020-02-31"),
    "spacing_mm is in range": put("spacing_mm", 25.0),
    "sex is in its vocabulary": put("sex", "X"),
    "split is in its vocabulary": put("split", "trian"),
    "age_band is in its vocabulary": put("age_band", "63"),
    "modality is in its vocabulary": put("modality", "PT"),
    "site is in its vocabulary": put("site", "moon"),
    "licence is never empty": put("licence", None),
    "masks are where they must be, and of their image's shape": put("mask", None),
    "no two rows are one image": lambda t: put("row", t["row"][0], slice(1, 2))(t),
    "no image was made in the future": put("acquired", "2999-01-01"),
    "the label agrees with the mask": lambda t: t.assign(label=1 - t["label"]),
    "label is a class": put("label", 2),
    "a subject is of one site": put("site", "south"),
    "a subject has one sex": lambda t: put("sex", "F" if t["sex"][0] == "M" else "M")(t),
    "site_kind is that of sites.yaml": put("site_kind", "external"),
    "a subject is in one split": lambda t: put("split", "test" if t["split"][0] == "train" else "train")(t),
    "external sites are in the external split and internal ones never": put("split", "external", slice(0, 2)),
    "every site is in each of its splits": lambda t: t[(t["site"] != "west") | (t["split"] != "test")],
    "every split has every class": lambda t: t[(t["site"] != "west") | (t["label"] == 0)],
}


@pytest.mark.parametrize("sentence", BREAKS)
def test_a_broken_manifest_is_refused_by_name(sentence, broken):
    folder = broken(BREAKS[sentence])
    with pytest.raises(DataError) as caught:
        check(folder)
    assert sentence in caught.value.fact
    assert caught.value.fix
    report = json.loads((folder / "check" / "expectations.json").read_text())
    assert report["success"] is False
    assert any(sentence in name for name in report["failed"])


def test_an_external_subject_in_training_is_refused(broken):
    folder = broken(lambda t: t.assign(split=t["split"].replace("external", "train")))
    with pytest.raises(DataError, match="external sites are in the external split"):
        check(folder)


def test_pixels_changed_after_the_build_are_refused(broken):
    folder = broken(lambda t: None)
    images = np.load(folder / "cohort" / "images.npy")
    images[3, 10, 10] += 1
    np.save(folder / "cohort" / "images.npy", images)
    with pytest.raises(DataError, match="the pixels are those of the sha256"):
        check(folder)


def test_the_same_pixels_in_two_splits_are_refused(broken):
    images = None

    def copy(table):
        nonlocal images
        images = table.groupby("split")["row"].first()

    folder = broken(copy)
    pixels = np.load(folder / "cohort" / "images.npy")
    pixels[images["test"]] = pixels[images["train"]]
    np.save(folder / "cohort" / "images.npy", pixels)
    with pytest.raises(DataError, match="no pixels are in two splits"):
        check(folder)


@pytest.mark.parametrize(("value", "sentence"), [(np.nan, "every pixel is a finite number"),
                                                 (9000.0, "no pixel is above the range")])  # fmt: skip
def test_pixels_that_cannot_be_are_refused(value, sentence, broken):
    images = np.load(broken(lambda t: None) / "cohort" / "images.npy").astype(np.float32)
    images[0, 0, 0] = value
    folder = broken(lambda t: t.assign(sha256=[digest_pixels(image) for image in images]))
    np.save(folder / "cohort" / "images.npy", images)
    with pytest.raises(DataError, match=sentence):
        check(folder)


def test_mask_labels_beyond_the_classes_are_refused(broken):
    folder = broken(lambda t: None)
    masks = np.load(folder / "cohort" / "masks.npy")
    masks[0, 0, 0] = 7
    np.save(folder / "cohort" / "masks.npy", masks)
    with pytest.raises(DataError, match="mask labels are classes"):
        check(folder)


def test_too_few_subjects_are_refused(sound, tmp_path):
    strict = Question("lung-nodule", read_params(PLACES).task("lung-nodule"), SITES)
    with pytest.raises(DataError, match="every split of a site has subjects enough"):
        check_cohort(strict, sound / "cohort", sound / "split", tmp_path)


def test_a_missing_shard_is_refused_by_name(broken):
    folder = broken(lambda t: None)
    (folder / "cohort" / "masks.npy").unlink()
    with pytest.raises(DataError, match=r"masks\.npy"):
        check(folder)


def test_near_duplicates_across_splits_are_counted_and_stop_nothing(broken):
    folder = broken(lambda t: None)
    path = folder / "split" / "manifest.parquet"
    table = pd.read_parquet(path)
    first = {split: int(row) for split, row in table.groupby("split")["row"].first().items()}
    images = np.load(folder / "cohort" / "images.npy")
    images[first["test"]] = images[first["train"]]
    images[first["test"]][5:8, 5:8] += 3  # other pixels, the same picture
    np.save(folder / "cohort" / "images.npy", images)
    table.assign(sha256=[digest_pixels(images[row]) for row in table["row"]]).to_parquet(path, index=False)
    masks = np.load(folder / "cohort" / "masks.npy")
    masks[first["test"]] = masks[first["train"]]
    np.save(folder / "cohort" / "masks.npy", masks)
    table = pd.read_parquet(path)
    label = table.set_index("row")["label"]
    table.loc[table["row"] == first["test"], "label"] = label[first["train"]]
    table.to_parquet(path, index=False)
    (warning,) = check(folder)["warnings"]
    assert "no image nearly repeats one of another split (2 of" in warning


def test_near_duplicates_are_found_and_other_pictures_are_not():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(4, 16, 16)).astype(np.float32)
    near = 2 * base[:1] + 0.01 * rng.normal(size=(1, 16, 16)).astype(np.float32) + 5  # gain and offset
    thumbnails = np.concatenate([base, near])
    splits = np.array(["train", "train", "test", "test", "test"])
    assert find_near_duplicates(thumbnails, splits).tolist() == [True, False, False, False, True]
    assert not find_near_duplicates(thumbnails, np.array(["train"] * 5)).any()


def test_a_cohort_without_subjects_says_that_no_split_by_subject_was_possible(broken):
    folder = broken(lambda t: None)
    facts = yaml.safe_load((folder / "cohort" / "cohort.yaml").read_text())
    limit = "Subject split not possible: there are no subject ids."
    facts |= {"subject_split": False, "limits": [limit]}
    (folder / "cohort" / "cohort.yaml").write_text(yaml.safe_dump(facts))
    report = check(folder)
    assert report["limits"] == [limit]
    assert "a subject is in one split" not in [row["expectation"] for row in report["expectations"]]


def test_sites_left_out_and_local_subjects_fit_the_expectations(sound, tmp_path):
    question = question_of("lung-nodule")
    how = question.section.split.model_copy(update={"left_out": ("west",), "local": {"harbour": 6}})
    section = question.section.model_copy(update={"split": how})
    split_cohort(how, sound / "cohort", tmp_path / "split")
    report = check_cohort(
        Question("lung-nodule", section, SITES), sound / "cohort", tmp_path / "split", tmp_path / "check"
    )
    assert report["success"]


def test_a_mask_may_have_more_classes_than_a_byte_has_bits(sound, tmp_path):
    manifest = pd.read_parquet(sound / "split" / "manifest.parquet").head(1)
    shutil.copytree(sound / "cohort", tmp_path / "cohort")
    masks = np.load(tmp_path / "cohort" / "masks.npy")
    masks[manifest["row"][0]].ravel()[:12] = range(12)
    np.save(tmp_path / "cohort" / "masks.npy", masks)
    seen = int(measure_pixels(manifest, tmp_path / "cohort")["mask_classes"][0])
    assert seen & 0xFFF == 0xFFF
