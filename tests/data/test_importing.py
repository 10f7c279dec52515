"""Images of others come in whole and unchanged, or are refused by file and row."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
import tifffile
import yaml
from PIL import Image as Pillow
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless, generate_uid

import training.items
from imaging.config import Params, Places, read_sites
from imaging.errors import ConfigError, DataError
from imaging.manifest import COLUMNS, Pixels, digest_pixels, read_manifest
from imaging.reading import decode
from training.importing import Order, import_cohort, link_import, make_wish

ROOT = Path(__file__).parents[2]


@pytest.fixture
def places(tmp_path):
    shutil.copy(ROOT / "sites.yaml", tmp_path)
    return Places(root=tmp_path, build=tmp_path / "build", var=tmp_path / "var")


def take(places, name, source, how=None, **options):
    """Import into data/it; what was told, the folder, and its manifest."""
    facts = {"licence": "CC0", "site": "north", "classes": ("no", "yes")} | options
    order = Order(name, source, "data/it", make_wish(name, facts, read_sites(places)), **(how or {}))
    told, _ = import_cohort(order, places)
    folder = places.root / "data/it"
    return told, folder, None if order.dry_run else read_manifest(folder / "manifest.parquet")


def refusal(places, name, source, how=None, **options):
    """The sentences of an import that must fail, which must leave nothing behind."""
    with pytest.raises((DataError, ConfigError)) as caught:
        take(places, name, source, how, **options)
    assert not list((places.root / "data").glob("*")) if (places.root / "data").exists() else True
    return str(caught.value)


def rng():
    return np.random.default_rng(1)


# MedMNIST


def write_mnist(path, counts=(12, 4, 6), shape=(28, 28), dtype=np.uint8, labels=None, **more):
    draw = rng()
    arrays = {}
    for name, count in zip(("train", "val", "test"), counts, strict=True):
        arrays[f"{name}_images"] = draw.integers(0, 256, (count, *shape)).astype(dtype)
        arrays[f"{name}_labels"] = (
            (np.arange(count) % 2)[:, None].astype(np.uint8) if labels is None else labels[name]
        )
    np.savez_compressed(path, **(arrays | more))
    return path


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3), (16, 28, 28)], ids=["grey", "colour", "3D"])
def test_a_medmnist_file_comes_in_pixel_by_pixel_with_its_own_splits(places, tmp_path, shape):
    source = write_mnist(tmp_path / "some.npz", shape=shape)
    told, folder, table = take(places, "medmnist", source)
    assert len(told.rows) == len(table) == 22
    assert set(table.columns) == {*COLUMNS, "given_split"}
    pixels = Pixels(folder)
    with np.load(source) as arrays:
        for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
            rows = table[table["given_split"] == split]
            stored = np.stack(
                [pixels.read(image, row) for image, row in zip(rows["image"], rows["row"], strict=True)]
            )
            assert np.array_equal(stored, arrays[f"{name}_images"])
            assert stored.dtype == np.uint8
            assert rows["label"].tolist() == arrays[f"{name}_labels"][:, 0].tolist()
    assert [digest_pixels(pixels.read("images-0000.npy", row)) for row in table["row"]] == table[
        "sha256"
    ].tolist()
    facts = yaml.safe_load((folder / "cohort.yaml").read_text())
    assert facts["subject_split"] is False
    assert facts["limits"][0].startswith("Subject split not possible: MedMNIST has no subject ids")
    assert facts["depth"] == (16 if len(shape) == 3 and shape[0] == 16 else 0)
    assert table["subject"].is_unique


@pytest.mark.parametrize(
    ("dtype", "stored"), [(">i4", "int16"), ("int64", "int16"), ("uint32", "uint16"), (">u2", "uint16")]
)
def test_integers_of_any_width_and_order_keep_their_numbers(places, tmp_path, dtype, stored):
    source = write_mnist(tmp_path / "odd.npz", dtype=np.dtype(dtype))
    _, folder, _ = take(places, "medmnist", source)
    pixels = np.load(folder / "images-0000.npy")
    assert pixels.dtype == stored
    with np.load(source) as arrays:
        assert np.array_equal(pixels[:12], arrays["train_images"])
    shutil.rmtree(folder)
    _, folder, _ = take(places, "medmnist", source, store="uint8")
    assert np.array_equal(np.load(folder / "images-0000.npy"), pixels)


def test_floats_stay_floats_and_nan_is_refused_by_row(places, tmp_path):
    source = write_mnist(tmp_path / "f.npz", dtype=np.float64)
    with np.load(source) as arrays:
        wrong = dict(arrays)
    wrong["val_images"] = wrong["val_images"].copy()
    wrong["val_images"][2, 3, 3] = np.nan
    np.savez(tmp_path / "nan.npz", **wrong)
    assert "nan.npz val_images row 2" in refusal(places, "medmnist", tmp_path / "nan.npz")
    _, folder, _ = take(places, "medmnist", source)
    assert np.load(folder / "images-0000.npy").dtype == np.float32


def test_medmnist_that_is_wrong_is_refused_by_name_and_row(places, tmp_path):
    labels = {name: (np.arange(n) % 2)[:, None] for name, n in (("train", 12), ("val", 4), ("test", 6))}
    labels["test"] = labels["test"].copy()
    labels["test"][4] = 7
    bad = write_mnist(tmp_path / "label.npz", labels=labels)
    assert "label.npz test_images row 4: The label 7 is no class." in refusal(places, "medmnist", bad)
    several = {name: np.zeros((n, 14), np.uint8) for name, n in (("train", 12), ("val", 4), ("test", 6))}
    multi = write_mnist(tmp_path / "multi.npz", labels=several)
    assert "--label-column" in refusal(places, "medmnist", multi)
    arrays = dict(np.load(bad))
    del arrays["val_images"]
    np.savez(tmp_path / "less.npz", **arrays)
    assert "lacks val_images.npy" in refusal(places, "medmnist", tmp_path / "less.npz")
    (tmp_path / "text.npz").write_text("no zip")
    assert "text.npz cannot be read" in refusal(places, "medmnist", tmp_path / "text.npz")


def test_a_column_of_several_labels_can_be_chosen(places, tmp_path):
    several = {
        name: np.eye(2, dtype=np.uint8)[np.arange(n) % 2]
        for name, n in (("train", 12), ("val", 4), ("test", 6))
    }
    _, _, table = take(places, "medmnist", write_mnist(tmp_path / "m.npz", labels=several), label_column="1")
    assert table["label"].tolist()[:4] == [0, 1, 0, 1]


def test_the_same_pixels_in_two_splits_are_refused_and_in_one_are_counted(places, tmp_path):
    arrays = dict(np.load(write_mnist(tmp_path / "a.npz")))
    arrays["train_images"][4] = arrays["train_images"][2]  # same label, same split
    np.savez(tmp_path / "same.npz", **arrays)
    told, _, table = take(places, "medmnist", tmp_path / "same.npz")
    assert told.notes["repeated images left out"] == 1
    assert len(table) == 21
    shutil.rmtree(places.root / "data")
    arrays["test_images"][0] = arrays["train_images"][0]
    np.savez(tmp_path / "leak.npz", **arrays)
    said = refusal(places, "medmnist", tmp_path / "leak.npz")
    assert (
        "leak.npz test_images row 0: Its pixels are those of leak.npz train_images row 0, with another split"
        in said
    )


# NIfTI: the Decathlon and BIDS


@pytest.mark.parametrize(
    "affine", [np.diag([2.0, 2, 3, 1]), np.diag([-2.0, -2, 3, 1]), np.diag([-2.0, 2, 3, 1])]
)
def test_a_slice_lies_as_a_service_reads_it(places, tmp_path, affine):
    source = write_msd(tmp_path / "Task", 1, affine=affine)
    _, folder, _ = take(places, "msd", source)
    one = nib.Nifti1Image(body()[:, :, 2:3], affine)
    served = decode(one.to_bytes(), "application/x-nifti")
    assert np.array_equal(np.load(folder / "images-0000.npy")[2], served.pixels)


def body(shape=(24, 20, 6), seed=0):
    """Voxels (i, j, k) with a bright corner that shows how they lie: patient's right, anterior, feet."""
    voxels = np.random.default_rng(seed).integers(-100, 100, shape).astype(np.int16)
    voxels[-4:, -4:, :2] = 900
    return voxels


def write_msd(folder, count=3, dtype=np.int16, affine=None, mask_affine=None, modality="CT"):
    affine = np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine
    training = []
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        voxels = body(seed=number)
        nib.save(
            nib.Nifti1Image(voxels.astype(dtype), affine, dtype=dtype), folder / f"imagesTr/c{number}.nii.gz"
        )
        mask = (voxels > 500).astype(np.uint8)
        nib.save(nib.Nifti1Image(mask, affine if mask_affine is None else mask_affine),
                 folder / f"labelsTr/c{number}.nii.gz")  # fmt: skip
        training.append({"image": f"./imagesTr/c{number}.nii.gz", "label": f"./labelsTr/c{number}.nii.gz"})
    facts = {"modality": {"0": modality}, "labels": {"0": "background", "1": "lesion"}, "training": training,
             "test": ["./imagesTs/t.nii.gz"]}  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(facts))
    return folder


def test_a_decathlon_task_becomes_upright_slices_with_masks(places, tmp_path):
    told, folder, table = take(places, "msd", write_msd(tmp_path / "Task"), classes=())
    assert len(told.rows) == 18
    assert told.notes["unlabelled test images"] == 1
    images, masks = np.load(folder / "images-0000.npy"), np.load(folder / "masks-0000.npy")
    assert images.shape == masks.shape == (18, 20, 24)
    assert images.dtype == np.int16
    # In RAS+ the corner is right, anterior, feet: on a radiologist's screen the upper left, low down.
    expected = body()[::-1, ::-1].transpose(2, 1, 0)
    assert np.array_equal(images[:6], expected)
    assert (images[:2, :4, :4] == 900).all()
    assert np.array_equal(masks[:6], expected > 500)
    assert table["subject"].tolist()[::6] == ["c0", "c1", "c2"]
    assert table["label"].isna().all()
    assert table["spacing_mm"].unique().tolist() == [2.0]
    facts = yaml.safe_load((folder / "cohort.yaml").read_text())
    assert facts["classes"] == ["background", "lesion"]


@pytest.mark.parametrize("dtype", [np.float64, np.uint32, np.int8, ">i2", np.float32])
def test_odd_voxel_types_are_stored_as_hounsfield_integers(places, tmp_path, dtype):
    source = write_msd(tmp_path / "Task", 1)
    voxels = np.abs(body()) % 127
    nib.save(
        nib.Nifti1Image(voxels.astype(dtype), np.diag([2.0, 2, 3, 1]), dtype=dtype),
        source / "imagesTr/c0.nii.gz",
    )
    _, folder, _ = take(places, "msd", source)
    stored = np.load(folder / "images-0000.npy")
    assert stored.dtype == np.dtype("int16")
    assert np.array_equal(stored, voxels[::-1, ::-1].transpose(2, 1, 0))


def test_voxels_that_are_no_numbers_or_no_hounsfield_units_are_refused(places, tmp_path):
    source = write_msd(tmp_path / "Task", 4)
    grid, colour = np.diag([2.0, 2, 3, 1]), np.zeros((24, 20, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(np.ones((24, 20, 6), np.complex64), grid), source / "imagesTr/c0.nii.gz")
    nib.save(nib.Nifti1Image(colour, grid), source / "imagesTr/c1.nii.gz")
    nib.save(
        nib.Nifti1Image(rng().random((24, 20, 6)).astype(np.float32), grid), source / "imagesTr/c2.nii.gz"
    )
    broken = body().astype(np.float32)
    broken[3, 3, 3] = np.inf
    nib.save(nib.Nifti1Image(broken, grid), source / "imagesTr/c3.nii.gz")
    said = refusal(places, "msd", source)
    assert "4 refused" in said
    for number, why in enumerate(("complex64", "'R'", "are no HU", "NaN or infinite")):
        assert f"dataset.json training[{number}] ./imagesTr/c{number}.nii.gz: " in said
        assert why in said


def test_missing_masks_files_that_repeat_and_paths_that_escape_are_refused_by_entry(places, tmp_path):
    source = write_msd(tmp_path / "Task", 4)
    (source / "labelsTr/c1.nii.gz").unlink()
    facts = json.loads((source / "dataset.json").read_text())
    del facts["training"][2]["label"]
    facts["training"] += [
        facts["training"][0],
        {"image": "../secret.nii.gz", "label": "./labelsTr/c0.nii.gz"},
    ]
    (source / "dataset.json").write_text(json.dumps(facts))
    said = refusal(places, "msd", source)
    assert "training[1] ./imagesTr/c1.nii.gz: The file './labelsTr/c1.nii.gz' is missing" in said
    assert "training[2] ./imagesTr/c2.nii.gz: It names no label file" in said
    assert "training[4] ./imagesTr/c0.nii.gz: Its pixels are those of dataset.json training[0]" in said
    assert "training[5] ../secret.nii.gz: '../secret.nii.gz' leads out of the folder" in said
    told, folder, table = take(places, "msd", source, {"skip_refused": True})
    assert set(table["subject"]) == {"c0", "c3"}
    assert len(list(csv.reader((folder / "refused.csv").open()))) == 5
    assert yaml.safe_load((folder / "cohort.yaml").read_text())["refused"] == len(told.refused) == 4


def test_a_mask_of_another_place_or_with_an_unknown_class_is_refused(places, tmp_path):
    moved = np.diag([2.0, 2, 3, 1])
    moved[0, 3] = 40
    assert "The mask" in refusal(places, "msd", write_msd(tmp_path / "a", 1, mask_affine=moved))
    source = write_msd(tmp_path / "b", 1)
    nib.save(
        nib.Nifti1Image(np.full((24, 20, 6), 3, np.uint8), np.diag([2.0, 2, 3, 1])),
        source / "labelsTr/c0.nii.gz",
    )
    assert "class 3" in refusal(places, "msd", source)


def test_two_files_with_the_same_voxels_are_refused_by_both_names(places, tmp_path):
    source = write_msd(tmp_path / "Task", 2)
    shutil.copy(source / "imagesTr/c0.nii.gz", source / "imagesTr/c1.nii.gz")
    said = refusal(places, "msd", source)
    assert "training[1]" in said
    assert "those of dataset.json training[0] ./imagesTr/c0.nii.gz" in said


def tilt(degrees, spacing=(1.0, 1.0, 2.0)):
    """An oblique affine: turned about the left-right axis."""
    angle = np.deg2rad(degrees)
    turned = np.eye(4)
    turned[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turned @ np.diag([*spacing, 1.0])


def test_an_oblique_volume_is_resampled_into_the_bodys_axes(places, tmp_path):
    # A ball drawn in world coordinates must be a ball at the same place, whatever grid it was scanned on.
    affine = tilt(25)
    affine[:3, 3] = np.array([-20, -20, -20]) - (affine[:3, :3] @ [0, 0, 0])
    i, j, k = np.indices((41, 41, 41))
    world = np.einsum("ab,bijk->aijk", affine[:3, :3], np.stack([i, j, k])) + affine[:3, 3, None, None, None]
    middle = world.reshape(3, -1).mean(1)
    ball = np.sqrt(((world - middle[:, None, None, None]) ** 2).sum(0)) < 9
    source = write_msd(tmp_path / "Task", 1)
    noise = rng().integers(0, 20, ball.shape)
    nib.save(nib.Nifti1Image((ball * 1000 + noise).astype(np.int16), affine), source / "imagesTr/c0.nii.gz")
    nib.save(nib.Nifti1Image(ball.astype(np.uint8), affine), source / "labelsTr/c0.nii.gz")
    _, folder, table = take(places, "msd", source, spacing_mm=1.5, volumes=True)
    image, mask = np.load(folder / "images-0000.npy")[0], np.load(folder / "masks-0000.npy")[0]
    assert image.shape == mask.shape
    assert table["spacing_mm"].tolist() == [1.5]
    volume = mask.sum() * 1.5**3
    assert volume == pytest.approx(4 / 3 * np.pi * 9**3, rel=0.04)
    for axis in range(3):  # as wide along every axis as the ball is
        extent = np.ptp(np.nonzero(mask.any(tuple({0, 1, 2} - {axis})))[0]) * 1.5
        assert extent == pytest.approx(18, abs=3)
    assert np.median(image[mask == 1]) == pytest.approx(1010, abs=30)
    # Only the part of the grid that was scanned has values: the corners are filled.
    assert image.min() >= 0


def test_volumes_of_several_sizes_need_one_size_and_are_then_cut_to_it(places, tmp_path):
    source = write_msd(tmp_path / "Task", 2)
    more = body((30, 26, 9), seed=8)
    nib.save(nib.Nifti1Image(more, np.diag([2.0, 2, 3, 1])), source / "imagesTr/c1.nii.gz")
    nib.save(
        nib.Nifti1Image((more > 500).astype(np.uint8), np.diag([2.0, 2, 3, 1])), source / "labelsTr/c1.nii.gz"
    )
    assert "--rows" in refusal(places, "msd", source)
    uneven = refusal(places, "msd", source, rows=32, columns=16, depth=8, volumes=True)
    assert "slices are 3 mm apart, its pixels 2" in uneven  # a distance in mm must be one in all directions
    _, folder, _ = take(places, "msd", source, rows=32, columns=16, depth=8, volumes=True, spacing_mm=2.0)
    assert np.load(folder / "images-0000.npy").shape == (2, 8, 32, 16)
    section = yaml.safe_load((folder / "task.yaml").read_text())["it"]
    assert section["fit"]["architecture"]["name"] == "unet"


def test_one_channel_of_several_must_be_chosen(places, tmp_path):
    source = write_msd(tmp_path / "Task", 1, modality="FLAIR")
    four = np.stack([body(seed=n) for n in range(2)], -1).astype(np.float64)
    nib.save(nib.Nifti1Image(four, np.diag([2.0, 2, 3, 1])), source / "imagesTr/c0.nii.gz")
    assert "--channel" in refusal(places, "msd", source, modality="MR")
    _, folder, _ = take(places, "msd", source, modality="MR", channel=1)
    stored = np.load(folder / "images-0000.npy")
    assert stored.dtype == np.float32
    assert np.array_equal(stored, body(seed=1)[::-1, ::-1].transpose(2, 1, 0))


def write_bids(folder, rows, masks=True):
    folder.mkdir()
    lines = ["participant_id\tsex\tage\tdiagnosis\tsite", *("\t".join(row) for row in rows)]
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n")
    for number, name in enumerate(dict.fromkeys(row[0] for row in rows)):
        voxels = body(seed=number).astype(np.float32)
        for place, suffix, data in (
            (folder / name / "ses-1/anat", "T1w", voxels),
            (
                folder / "derivatives/hand" / name / "ses-1/anat",
                "desc-hand_dseg",
                (voxels > 500).astype(np.uint8),
            ),
        ):
            if masks or suffix == "T1w":
                place.mkdir(parents=True)
                nib.save(
                    nib.Nifti1Image(data, np.diag([-2.0, 2, 3, 1])), place / f"{name}_ses-1_{suffix}.nii.gz"
                )
    return folder


PEOPLE = [("sub-01", "F", "71", "yes", "north"), ("sub-02", "male", "89+", "no", "east"),
          ("sub-03", "n/a", "n/a", "yes", "harbour")]  # fmt: skip


def test_a_bids_folder_brings_people_sites_and_labels(places, tmp_path):
    source = write_bids(tmp_path / "bids", PEOPLE)
    sidecar = {"Manufacturer": "Maker", "ManufacturersModelName": "One"}
    (source / "sub-01/ses-1/anat/sub-01_ses-1_T1w.json").write_text(json.dumps(sidecar))
    _, _, table = take(places, "bids", source, label_column="diagnosis")
    people = table.drop_duplicates("subject").set_index("subject")
    assert people["sex"].tolist() == ["F", "M", "unknown"]
    assert people["age_band"].tolist() == ["60-74", "75+", "unknown"]
    assert people["label"].tolist() == [1, 0, 1]
    assert people["site_kind"].tolist() == ["internal", "internal", "external"]
    assert people["scanner"].tolist() == ["Maker One", "unknown", "unknown"]
    assert people["acquired"].tolist() == ["1900-01-01"] * 3
    assert table["mask"].isna().all()


def test_bids_masks_are_found_in_derivatives_and_missing_ones_are_refused(places, tmp_path):
    source = write_bids(tmp_path / "bids", PEOPLE)
    _, folder, table = take(places, "bids", source, mask_suffix="dseg")
    assert set(table["mask"]) == {"masks-0000.npy"}
    # The affine of these files runs to the left: columns are i as it stands.
    assert np.array_equal(np.load(folder / "images-0000.npy")[:6], body()[:, ::-1].transpose(2, 1, 0))
    shutil.rmtree(places.root / "data")
    shutil.rmtree(source / "derivatives/hand/sub-02")
    assert "participants.tsv row 3 sub-02" in refusal(places, "bids", source, mask_suffix="dseg")


def test_people_that_repeat_are_missing_or_are_not_understood_are_refused_by_row(places, tmp_path):
    rows = [*PEOPLE, ("sub-01", "F", "71", "yes", "east"), ("sub-05", "X", "20", "no", "north"),
            ("sub-06", "F", "old", "no", "north"), ("sub-07", "F", "20", "no", "mars")]  # fmt: skip
    source = write_bids(tmp_path / "bids", rows)
    shutil.copytree(source / "sub-02", source / "sub-09")
    shutil.rmtree(source / "sub-03")
    said = refusal(places, "bids", source, label_column="diagnosis")
    assert "participants.tsv row 4: Nothing is of this subject" in said
    assert "participants.tsv row 5: It repeats participants.tsv row 2" in said
    assert "row 6 sub-05" in said
    assert "The sex 'X'" in said
    assert "The age 'old'" in said
    assert "No site 'mars' in sites.yaml" in said
    assert "sub-02_ses-1_T1w.nii.gz: It is not in participants.tsv" in said


# DICOM


def write_series(folder, patient="P1", count=5, gap=3.0, skip=(), seed=0, **more):
    """A CT series; file names are drawn, so that only geometry sorts it."""
    folder.mkdir(parents=True, exist_ok=True)
    uid, draw = generate_uid(), np.random.default_rng(seed)
    stack = draw.integers(0, 2000, (count, 16, 20)).astype(np.uint16)
    paths = []
    for number in (n for n in range(count) if n not in skip):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = more.get("syntax", ExplicitVRLittleEndian)
        data = Dataset()
        data.file_meta = meta
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.PatientID, data.PatientName = uid, patient, "Secret^Name"
        data.Modality, data.PatientSex, data.PatientAge = more.get("modality", "CT"), "F", "045Y"
        data.AcquisitionDate, data.Manufacturer = "20210304", "Maker"
        data.Rows, data.Columns = 16, 20
        data.PixelSpacing, data.SliceThickness = [1.5, 1.5], gap
        data.ImageOrientationPatient = more.get("orientation", [1, 0, 0, 0, 1, 0])
        data.ImagePositionPatient = [0, 0, more.get("places", {}).get(number, number * gap)]
        data.ImageType = more.get("kind", ["ORIGINAL", "PRIMARY", "AXIAL"])
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, more.get("photometric", "MONOCHROME2")
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = stack[number].tobytes()
        if data.file_meta.TransferSyntaxUID.is_compressed:
            data.PixelData = pydicom.encaps.encapsulate([stack[number].tobytes()])
        path = folder / f"{draw.integers(10**9):09d}-{number}"
        data.save_as(path, enforce_file_format=True)
        paths.append(path)
    return stack, paths


def write_labels(path, *rows):
    path.write_text("\n".join(["subject,label,site", *rows]) + "\n")
    return path


def test_mixed_series_are_sorted_apart_in_hounsfield_units_without_names(places, tmp_path):
    source = tmp_path / "dicom"
    stack, _ = write_series(source, "P1", seed=1)
    other, _ = write_series(source, "P2", seed=2)  # in the same folder
    write_series(source, "P1", 2, seed=3, kind=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(source, "P1", 2, seed=4, modality="MR")
    (source / "readme.txt").write_text("not DICOM")
    labels = write_labels(tmp_path / "labels.csv", "P1,yes,north", "P2,no,east")
    assert "mixes CT, MR" in refusal(places, "dicom", source, labels=labels)
    told, folder, table = take(places, "dicom", source, labels=labels, modality="CT")
    assert told.notes["a localizer"] == 2
    assert told.notes["not a DICOM file"] == 1
    assert told.notes["series of another modality"] == 1
    images = np.load(folder / "images-0000.npy")
    first = [images[row] for row in table.loc[table["label"] == 1, "row"]]
    assert np.array_equal(first, stack.astype(np.int16) - 1024)
    assert np.array_equal(
        [images[row] for row in table.loc[table["label"] == 0, "row"]], other.astype(int) - 1024
    )
    assert table["age_band"].unique().tolist() == ["40-59"]
    assert table["acquired"].unique().tolist() == ["2021-03-04"]
    assert set(table["site"]) == {"north", "east"}
    written = b"".join(path.read_bytes() for path in folder.iterdir())
    assert b"Secret" not in written
    assert "P1" not in set(table["subject"])
    assert table["subject"].str.fullmatch("[0-9a-f]{16}").all()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"skip": (2,)}, "A slice is missing between"),
        ({"places": {2: 3.0}}, "lie in one place"),
        ({"places": {4: 13.0}}, "mm apart"),
        ({"syntax": JPEGLSLossless}, "Transfer syntax JPEG-LS"),
        ({"photometric": "MONOCHROME1"}, "not MONOCHROME2"),
    ],
)
def test_a_series_that_is_not_whole_even_and_plain_is_refused_by_file(places, tmp_path, change, why):
    write_series(tmp_path / "dicom", **change)
    said = refusal(
        places, "dicom", tmp_path / "dicom", labels=write_labels(tmp_path / "l.csv", "P1,yes,north")
    )
    assert why in said
    assert "P1" not in said.replace("l.csv", "")
    assert "Secret" not in said


def test_one_series_of_two_sizes_or_two_patients_is_refused(places, tmp_path):
    _, paths = write_series(tmp_path / "dicom")
    labels = write_labels(tmp_path / "l.csv", "P1,yes,north")
    data = pydicom.dcmread(paths[1])
    data.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    data.save_as(paths[1])
    assert "another orientation" in refusal(places, "dicom", tmp_path / "dicom", labels=labels)
    data.ImageOrientationPatient, data.PatientID = [1, 0, 0, 0, 1, 0], "P2"
    data.save_as(paths[1])
    assert "another patient" in refusal(places, "dicom", tmp_path / "dicom", labels=labels)


def test_a_series_without_a_label_and_a_label_without_a_series_are_refused(places, tmp_path):
    write_series(tmp_path / "dicom", "P1")
    said = refusal(
        places, "dicom", tmp_path / "dicom", labels=write_labels(tmp_path / "l.csv", "P9,yes,north")
    )
    assert "l.csv row 2: Nothing is of this subject" in said
    assert "(5 slices): It has neither a label nor a mask" in said
    twice = write_labels(tmp_path / "l.csv", "P1,yes,north", "P1,no,north")
    assert "l.csv row 3: It repeats l.csv row 2" in refusal(places, "dicom", tmp_path / "dicom", labels=twice)


def test_a_coronal_series_is_turned_into_axial_slices(places, tmp_path):
    stack, _ = write_series(tmp_path / "dicom", gap=1.5, orientation=[1, 0, 0, 0, 0, -1],
                            places=dict.fromkeys(range(5), 0.0))  # fmt: skip
    for path in (tmp_path / "dicom").iterdir():  # slices follow each other from front to back
        data = pydicom.dcmread(path)
        data.ImagePositionPatient = [0, int(path.name[-1]) * 1.5, 0]
        data.save_as(path)
    labels = write_labels(tmp_path / "l.csv", "P1,yes,north")
    _, folder, _ = take(places, "dicom", tmp_path / "dicom", labels=labels)
    images = np.load(folder / "images-0000.npy").astype(int) + 1024
    # stack is (front to back, head to feet, right to left); axial slices go from feet to head.
    assert np.array_equal(images, stack.transpose(1, 0, 2)[::-1])


# A folder and a CSV


def write_folder(folder, rows, columns=("path", "subject", "site", "label")):
    folder.mkdir(exist_ok=True)
    with (folder / "images.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return folder


def picture(path, seed, shape=(20, 24), dtype=np.uint8):
    pixels = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels)
    elif path.suffix == ".npy":
        np.save(path, pixels)
    else:
        Pillow.fromarray(pixels).save(path)
    return pixels


@pytest.mark.parametrize(
    ("suffix", "shape", "dtype"),
    [(".png", (20, 24), np.uint8), (".png", (20, 24), np.uint16), (".png", (20, 24, 3), np.uint8),
     (".tif", (20, 24), np.uint16), (".npy", (20, 24), np.int16), (".tif", (20, 24, 3), np.uint8)],
)  # fmt: skip
def test_pictures_come_in_pixel_by_pixel(places, tmp_path, suffix, shape, dtype):
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = [picture(folder / f"{n}{suffix}", n, shape, dtype) for n in range(4)]
    write_folder(folder, [(f"{n}{suffix}", f"s{n}", "north", "no") for n in range(4)])
    _, out, table = take(places, "csv", folder)
    stored = np.load(out / "images-0000.npy")
    assert stored.dtype == dtype
    assert np.array_equal(stored, pixels)
    assert set(table["label"]) == {0}


def test_what_a_row_gets_wrong_is_told_by_row(places, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        picture(folder / f"{number}.png", number)
    picture(tmp_path / "out.png", 77)
    os.symlink(tmp_path / "out.png", folder / "link.png")
    Pillow.fromarray(rng().integers(0, 255, (20, 24, 4)).astype(np.uint8)).save(folder / "alpha.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:80])
    picture(folder / "big.png", 9, (30, 30))
    shutil.copy(folder / "0.png", folder / "copy.png")
    rows = [("0.png", "a", "north", "no"), ("1.png", "a", "east", "no"), ("../out.png", "b", "north", "no"),
            ("/etc/hosts", "b", "north", "no"), ("link.png", "b", "north", "no"),
            ("alpha.png", "c", "north", "no"), ("broken.png", "d", "north", "no"),
            ("gone.png", "e", "north", "no"), ("2.png", "f", "north", "maybe"), ("3.png", "", "north", "no"),
            ("4.png", "g", "north", ""), ("big.png", "h", "north", "no"), ("copy.png", "i", "north", "no"),
            ("0.png", "a", "north", "no"), ("5.png", "j", "moon", "no")]  # fmt: skip
    said = refusal(places, "csv", write_folder(folder, rows))
    told = dict(line.strip().split(": ", 1) for line in said.splitlines() if line.startswith("  "))
    expected = ("has site east, but north", "leads out", "leads out", "leads out", "mode RGBA",
                "cannot be read", "'gone.png' is missing", "'maybe' is no class", "no subject",
                "neither a label", "(30, 30)", "another subject", "pixels are those of images.csv row 2",
                "No site 'moon'")  # fmt: skip
    for row, why in enumerate(expected, 3):
        assert why in told[f"images.csv row {row}"], row
    told, _, table = take(places, "csv", folder, {"skip_refused": True})
    assert table["subject"].tolist() == ["a"]
    assert len(told.refused) == 14


def test_a_subject_of_two_splits_is_refused_and_unknown_columns_are_never_read(places, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        picture(folder / f"{number}.png", number)
    columns = ("path", "subject", "site", "label", "split")
    rows = [("0.png", "a", "north", "no", "train"), ("1.png", "a", "north", "no", "test"),
            ("2.png", "b", "harbour", "no", "train")]  # fmt: skip
    said = refusal(places, "csv", write_folder(folder, rows, columns))
    assert "row 3: Its subject has split test, but train in images.csv row 2" in said
    assert "row 4: The split train does not suit harbour" in said
    write_folder(
        folder, [("0.png", "a", "north", "no", "Smith")], ("path", "subject", "site", "label", "name")
    )
    assert "'name'" in refusal(places, "csv", folder)


def test_masks_of_pictures_are_kept_and_255_is_the_second_class(places, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        picture(folder / f"{number}.png", number)
    mask = np.zeros((20, 24), np.uint8)
    mask[5:9, 5:9] = 255
    Pillow.fromarray(mask).save(folder / "m.png")
    rows = [
        ("0.png", "a", "north", "no", ""),
        ("1.png", "b", "north", "", "m.png"),
        ("2.png", "c", "north", "yes", ""),
    ]
    _, out, table = take(
        places, "csv", write_folder(folder, rows, ("path", "subject", "site", "label", "mask"))
    )
    assert table["label"].tolist() == [0, 1, 1]
    assert table["mask"].isna().tolist() == [True, False, True]
    masks = np.load(out / "masks-0000.npy")
    assert np.array_equal(masks[1], mask // 255)
    shutil.rmtree(places.root / "data")
    assert "row 2: It has no mask" in refusal(places, "csv", folder, kind="segmentation")


# Whole slides


def write_slide(folder):
    """A pyramid of 0.5 um pixels: pink tissue on the left half of white glass."""
    folder.mkdir()
    glass = np.full((1024, 1024, 3), 245, np.uint8)
    glass[:, :512] = rng().integers(0, 60, (1024, 512, 3)) + np.array([190, 90, 150])
    with tifffile.TiffWriter(folder / "a.tif") as tiff:
        options = {"tile": (256, 256), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
        tiff.write(glass, resolution=(20000, 20000), **options)
        tiff.write(glass[::2, ::2], resolution=(10000, 10000), subfiletype=1, **options)
    annotation = np.zeros((64, 64), np.uint8)
    annotation[:32, :32] = 1
    Pillow.fromarray(annotation).save(folder / "a-mask.png")
    return glass


def test_tiles_of_a_slide_are_its_tissue_at_the_asked_size(places, tmp_path):
    glass = write_slide(tmp_path / "slides")
    source = write_folder(
        tmp_path / "slides", [("a.tif", "p", "north", "a-mask.png")], ("slide", "subject", "site", "mask")
    )
    how = {"rows": 128, "columns": 128, "modality": "SM"}
    told, out, table = take(places, "slides", source, **how)
    assert len(told.rows) == 8 * 4
    stored = np.load(out / "images-0000.npy")
    assert np.array_equal(stored[0], glass[:128, :128])
    assert np.array_equal(stored[4], glass[128:256, :128])
    assert table["label"].tolist() == [1] * 16 + [0] * 16
    assert table["spacing_mm"].tolist() == pytest.approx([0.0005] * 32)
    told, out, _ = take(places, "slides", source, {"again": True}, spacing_mm=0.001, **how)
    assert len(told.rows) == 4 * 2
    assert np.array_equal(np.load(out / "images-0000.npy")[0], glass[:256:2, :256:2])


# The import as a whole


def test_the_proposal_can_be_pasted_and_the_cohort_stage_copies_the_import(places, tmp_path):
    _, folder, table = take(places, "medmnist", write_mnist(tmp_path / "some.npz"))
    text = (
        "profiles:\n  demo: {internal: 8, external: 8, views: 1}\ntasks:\n"
        + (folder / "task.yaml").read_text()
    )
    section = Params.model_validate(yaml.safe_load(text)).task("it")
    assert section.cohort.source == "data/it"
    assert section.classes == ("no", "yes")
    link_import(folder, tmp_path / "cohort")
    assert {path.name for path in (tmp_path / "cohort").iterdir()} == {
        "images-0000.npy", "manifest.parquet", "cohort.yaml"}  # fmt: skip
    assert (tmp_path / "cohort/images-0000.npy").stat().st_ino != (folder / "images-0000.npy").stat().st_ino
    pd.testing.assert_frame_equal(read_manifest(tmp_path / "cohort/manifest.parquet"), table)
    (folder / "images-0000.npy").unlink()
    with pytest.raises(DataError, match=r"images-0000\.npy is missing"):
        link_import(folder, tmp_path / "other")
    (folder / "cohort.yaml").unlink()
    with pytest.raises(DataError, match="not a finished import"):
        link_import(folder, tmp_path / "other")


def test_an_option_that_the_format_does_not_use_is_refused(places, tmp_path):
    source = write_mnist(tmp_path / "some.npz")
    assert "medmnist has no use for tissue" in refusal(places, "medmnist", source, tissue=0.2)
    assert "msd has no use for depth" in refusal(places, "msd", write_msd(tmp_path / "Task", 1), depth=8)


def test_volumes_that_no_unet_halves_are_counted_with_the_fix(places, tmp_path):
    told, _, _ = take(places, "msd", write_msd(tmp_path / "Task", 1), {"dry_run": True}, rows=21)
    ((note, count),) = [(note, count) for note, count in told.notes.items() if "U-Net" in note]
    assert count == 6
    assert "--rows, --columns" in note
    told, _, _ = take(places, "msd", tmp_path / "Task", {"dry_run": True}, rows=24)
    assert not any("U-Net" in note for note in told.notes)


def test_a_dry_run_counts_and_writes_nothing(places, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    source = write_mnist(tmp_path / "some.npz")
    told, _, _ = take(places, "medmnist", source, {"dry_run": True})
    assert told.strata["north", "train", "yes"] == 6
    assert sorted(tmp_path.rglob("*")) == sorted([*before, source])


def test_a_finished_import_is_replaced_only_when_told_and_only_by_a_whole_one(places, tmp_path):
    source = write_mnist(tmp_path / "some.npz")
    _, folder, _ = take(places, "medmnist", source)
    with pytest.raises(ConfigError, match="--again"):
        take(places, "medmnist", source)
    bytes_before = (folder / "images-0000.npy").read_bytes()
    arrays = dict(np.load(source))
    arrays["train_labels"] = arrays["train_labels"] + 7
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError):
        take(places, "medmnist", tmp_path / "bad.npz", {"again": True})
    assert (folder / "images-0000.npy").read_bytes() == bytes_before
    told, _, _ = take(places, "medmnist", write_mnist(tmp_path / "more.npz", (20, 4, 6)), {"again": True})
    assert len(told.rows) == 30
    assert [path.name for path in (places.root / "data").iterdir()] == ["it"]


def test_shards_are_files_of_numpy_and_of_bounded_size(places, tmp_path, monkeypatch):
    monkeypatch.setattr(training.items, "BYTES", 10 * 28 * 28)
    source = write_mnist(tmp_path / "some.npz")
    _, folder, table = take(places, "medmnist", source)
    assert sorted(table["image"].unique()) == [f"images-{n:04d}.npy" for n in range(3)]
    with np.load(source) as arrays:
        images = np.concatenate([arrays[f"{name}_images"] for name in ("train", "val", "test")])
    for number in range(3):
        np.save(tmp_path / "expected.npy", images[number * 10 : number * 10 + 10])
        assert (folder / f"images-{number:04d}.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


def run(places, source, out, *more):
    command = [sys.executable, "-m", "formulary", "training", "import", "medmnist", str(source), "--out", out,
               "--licence", "CC0", "--classes", "no,yes", *more]  # fmt: skip
    settings = os.environ | {
        "FORMULARY_ROOT": str(places.root),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    settings |= {"FORMULARY_VAR": str(places.var)}
    return subprocess.Popen(
        command, cwd=places.root, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def test_an_import_that_was_killed_goes_on_to_the_same_bytes(places, tmp_path):
    source = write_mnist(tmp_path / "some.npz", (5000, 500, 500))
    assert run(places, source, "data/whole").wait() == 0
    killed, journal = 0, places.root / "data/.parts.part/journal.jsonl"
    for lines in (500, 3000):
        process = run(places, source, "data/parts")
        while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, "it was done before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
        assert not (places.root / "data/parts").exists()
    assert run(places, source, "data/parts").wait() == 0
    for path in sorted((places.root / "data/whole").iterdir()):
        same = (places.root / "data/parts" / path.name).read_bytes().replace(b"parts", b"whole")
        assert same.replace(b"Parts", b"Whole") == path.read_bytes(), path.name
    assert killed == 2


def test_a_killed_import_of_another_source_starts_again(places, tmp_path):
    source = write_mnist(tmp_path / "some.npz", (3000, 100, 100))
    process = run(places, source, "data/it")
    journal = places.root / "data/.it.part/journal.jsonl"
    while not journal.exists() or not journal.stat().st_size:
        time.sleep(0.005)
    process.kill()
    process.wait()
    told, _, table = take(places, "medmnist", write_mnist(tmp_path / "some.npz", (9, 3, 3)))
    assert len(told.rows) == len(table) == 15


def test_memory_does_not_grow_with_the_number_of_images(places, tmp_path):
    import psutil

    count = 100_000 if os.environ.get("FORMULARY_SOAK") else 15_000

    peaks = []
    for images in (1000, count):
        source = tmp_path / f"{images}.npz"
        draw = np.random.default_rng(images)
        np.savez(source, **{
            f"{name}_{part}": draw.integers(0, high, (number, *shape), dtype=np.uint8)
            for name, number in (("train", images - 200), ("val", 100), ("test", 100))
            for part, high, shape in (("images", 256, (96, 96)), ("labels", 2, (1,)))
        })  # fmt: skip
        process, peak = run(places, source, f"data/n{images}"), 0
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, watched.memory_info().rss)
            time.sleep(0.02)
        assert process.wait() == 0
        peaks.append(peak)
    assert peaks[1] < 1e9
    assert peaks[1] - peaks[0] < 40e6 + count * 2_500, (
        "buffers, names, digests; the pixels are 9,216 bytes each"
    )


def test_numbers_as_names_of_classes_do_not_move_medmnists_labels(places, tmp_path):
    labels = {name: (np.arange(n) % 3)[:, None] for name, n in (("train", 12), ("val", 4), ("test", 6))}
    source = write_mnist(tmp_path / "g.npz", labels=labels)
    _, _, table = take(places, "medmnist", source, classes=("1", "2", "3"))
    assert sorted(table["label"].unique()) == [0, 1, 2]


def test_colours_of_0_to_1_are_refused_instead_of_rounded_to_black(places, tmp_path):
    arrays = dict(np.load(write_mnist(tmp_path / "a.npz")))
    for part in ("train", "val", "test"):
        count = len(arrays[f"{part}_images"])
        arrays[f"{part}_images"] = np.random.default_rng(count).random((count, 28, 28, 3)).astype(np.float32)
    np.savez(tmp_path / "float.npz", **arrays)
    assert "It holds fractions" in refusal(places, "medmnist", tmp_path / "float.npz")
