"""The table of a cohort, its digests and its shards."""

import hashlib

import numpy as np
import pytest

from imaging.errors import DataError
from imaging.manifest import COLUMNS, Pixels, digest_file, digest_pixels, read_manifest, write_manifest


def row(number):
    return dict.fromkeys(COLUMNS, "x") | {"row": number, "spacing_mm": 2.0, "redistributable": True,
                                          "simulated": True, "label": None, "mask": None}  # fmt: skip


def test_what_was_written_is_read_and_the_bytes_are_the_same(tmp_path):
    for name in ("one.parquet", "two.parquet"):
        write_manifest([row(0), row(1)], tmp_path / name)
    assert digest_file(tmp_path / "one.parquet") == digest_file(tmp_path / "two.parquet")
    table = read_manifest(tmp_path / "one.parquet")
    assert tuple(table.columns) == COLUMNS
    assert list(table["row"]) == [0, 1]


@pytest.mark.parametrize("change", [{"patient_name": "x"}, None])
def test_a_row_with_a_column_more_or_less_is_refused(tmp_path, change):
    wrong = row(0) | change if change else {k: v for k, v in row(0).items() if k != "licence"}
    with pytest.raises(DataError, match="patient_name" if change else "licence"):
        write_manifest([wrong], tmp_path / "m.parquet")
    assert not (tmp_path / "m.parquet").exists()


def test_a_missing_manifest_says_what_to_run(tmp_path):
    with pytest.raises(DataError, match="dvc repro"):
        read_manifest(tmp_path / "none.parquet")


def test_a_table_that_lacks_a_column_is_refused(tmp_path):
    import pandas as pd

    pd.DataFrame([row(0)]).drop(columns=["sex"]).to_parquet(tmp_path / "m.parquet")
    with pytest.raises(DataError, match="sex"):
        read_manifest(tmp_path / "m.parquet")


def test_a_file_digest_is_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 500_000)
    assert digest_file(tmp_path / "f") == hashlib.sha256(b"abc" * 500_000).hexdigest()


def test_pixels_are_named_by_values_shape_and_type():
    pixels = np.arange(6, dtype=np.int16).reshape(2, 3)
    assert digest_pixels(pixels) == digest_pixels(np.asfortranarray(pixels))
    others = [pixels.reshape(3, 2), pixels.astype(np.uint16), pixels + 1]
    assert len({digest_pixels(other) for other in [pixels, *others]}) == 4


def test_shards_are_read_by_row_and_a_missing_one_is_named(tmp_path):
    np.save(tmp_path / "images.npy", np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    pixels = Pixels(tmp_path)
    np.testing.assert_array_equal(pixels.read("images.npy", 1), np.arange(12, 24).reshape(3, 4))
    with pytest.raises(DataError, match="no row 2"):
        pixels.read("images.npy", 2)
    with pytest.raises(DataError, match="masks"):
        pixels.read("masks.npy", 0)
