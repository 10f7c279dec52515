"""A reference says of each subject what a live row says of each request."""

import numpy as np
import pytest

from imaging.errors import DataError
from imaging.image import COLOURS, STATISTICS
from imaging.vocabulary import Kind
from monitoring.reference import FACTS, name_columns, read_reference, summarise, write_reference
from tests.tiny import promise

CLASSES = ("background", "grey matter", "csf")
LOG2, LOG4 = np.log(2), np.log(4)


def row(subject, sha256, noise, site="north"):
    return {"sha256": sha256, "subject": subject, "site": site, "split": "validation", "noise": noise,
            "probability": noise / 2, "not asked for": 1}  # fmt: skip


def test_a_classification_is_its_positive_probability_and_its_entropy():
    told = summarise(
        promise(Kind.CLASSIFICATION, ("none", "nodule")), np.array([0.75, 0.25], dtype=np.float32)
    )
    assert told == pytest.approx({"probability": 0.25, "uncertainty": 0.75 * np.log(4 / 3) + 0.25 * LOG4})


def test_a_certain_answer_has_no_uncertainty():
    told = summarise(promise(Kind.CLASSIFICATION, ("none", "nodule")), np.array([0, 1], dtype=np.float32))
    assert told == {"probability": 1.0, "uncertainty": 0.0}


def test_a_segmentation_is_the_share_of_each_class_and_the_mean_entropy():
    # Four pixels: background for certain, grey matter for certain, half grey half csf, csf the most likely.
    pixels = [[1, 0, 0], [0, 1, 0], [0, 0.5, 0.5], [0.25, 0.25, 0.5]]
    probabilities = np.array(pixels, dtype=np.float32).T.reshape(3, 2, 2)
    told = summarise(promise(Kind.SEGMENTATION), probabilities)
    entropy = (0 + 0 + LOG2 + (0.5 * LOG4 + 0.5 * LOG2)) / 4
    assert told == pytest.approx({"share_grey_matter": 0.5, "share_csf": 0.25, "uncertainty": entropy})


def test_of_several_classes_the_positive_ones_are_summed():
    grades = promise(
        Kind.CLASSIFICATION, ("none", "mild", "moderate", "severe"), positive=("moderate", "severe")
    )
    told = summarise(grades, np.array([0.5, 0.2, 0.2, 0.1], dtype=np.float32))
    assert told["probability"] == pytest.approx(0.3)


def test_a_detection_is_its_most_certain_lesion():
    told = summarise(
        promise(Kind.DETECTION, ("none", "nodule")), np.array([[[0, 0.5], [0.75, 0]]], np.float32)
    )
    assert told["probability"] == 0.75
    assert told["uncertainty"] == pytest.approx((LOG2 + 0.75 * np.log(4 / 3) + 0.25 * LOG4) / 4, abs=1e-6)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_columns_are_the_statistics_and_what_an_answer_is_summarised_to(kind, channels):
    shape = {Kind.SEGMENTATION: (3, 2, 2), Kind.DETECTION: (1, 8, 8), Kind.CLASSIFICATION: (3,)}[kind]
    contract = promise(kind, CLASSES, channels=channels)
    told = summarise(contract, np.full(shape, 1 / 3, dtype=np.float32))
    assert name_columns(contract) == (*STATISTICS, *(COLOURS if channels == 3 else ()), *told)


def test_what_is_written_is_read_back_one_row_a_subject_of_one_site(tmp_path):
    rows = [row("b", "2", 0.2), row("a", "9", 0.9), row("a", "1", 1 / 3), row("a", "5", 0.5, site="east")]
    write_reference(rows, ("noise", "probability"), tmp_path / "reference.parquet")
    told = read_reference(tmp_path, "north", ("probability", "noise"))
    assert list(told.columns) == ["probability", "noise"]
    assert told["noise"].tolist() == [1 / 3, 0.2]  # of subject a the image that sorts first
    assert told["probability"].tolist() == [1 / 6, 0.1]
    assert list(told.index) == [0, 1]
    assert read_reference(tmp_path, "east", ("noise",))["noise"].tolist() == [0.5]
    assert len(read_reference(tmp_path, "west", ("noise",))) == 0


def test_the_file_holds_the_facts_and_is_the_same_in_any_order(tmp_path):
    import pandas as pd

    rows = [row(f"s{number % 7}", str(number), number / 10) for number in range(20)]
    for name, told in (("one", rows), ("two", rows[::-1])):
        write_reference(told, ("noise", "probability"), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert list(pd.read_parquet(tmp_path / "one")) == [*FACTS, "noise", "probability"]


def test_a_reference_of_other_columns_is_refused(tmp_path):
    write_reference([row("a", "1", 0.1)], ("noise",), tmp_path / "reference.parquet")
    with pytest.raises(DataError, match="probability"):
        read_reference(tmp_path, "north", ("noise", "probability"))
