"""A subject's side depends on its name and the seed alone."""

import hashlib

import pytest

from imaging.recipe import SplitSection
from imaging.vocabulary import SiteKind, Split
from training.cohorts.cases import stable_hash, stream
from training.splitting import choose_split, split_table

SECTION = SplitSection(seed=1, train=0.625, validation=0.125)
NAMES = [f"north-{number:04d}" for number in range(4000)]


def test_the_hash_is_sha256_and_so_the_same_in_every_process():
    expected = hashlib.sha256(b"1\x1fnorth-0001").digest()[:8]
    assert stable_hash(1, "north-0001") == int.from_bytes(expected, "big")


def test_parts_of_a_hash_are_kept_apart():
    assert stable_hash("ab", "c") != stable_hash("a", "bc")


def test_shares_are_those_of_the_section():
    sides = [choose_split(name, SiteKind.INTERNAL, SECTION) for name in NAMES]
    assert sides.count(Split.TRAIN) / len(NAMES) == pytest.approx(0.625, abs=0.03)
    assert sides.count(Split.VALIDATION) / len(NAMES) == pytest.approx(0.125, abs=0.02)
    assert sides.count(Split.TEST) / len(NAMES) == pytest.approx(0.25, abs=0.03)


def test_nothing_of_an_external_site_is_trained_on():
    assert {choose_split(name, SiteKind.EXTERNAL, SECTION) for name in NAMES} == {Split.EXTERNAL}


def test_another_seed_moves_subjects():
    other = SECTION.model_copy(update={"seed": 2})
    moved = [
        choose_split(n, SiteKind.INTERNAL, SECTION) != choose_split(n, SiteKind.INTERNAL, other)
        for n in NAMES
    ]
    assert sum(moved) > 1000


def test_streams_of_subject_and_views_differ():
    keys = [(1, "t", "north", 0), (1, "t", "north", 0, 0), (1, "t", "north", 0, 1), (1, "t", "north", 1)]
    keys += [(1, "t", "east", 0), (1, "u", "north", 0), (2, "t", "north", 0)]
    assert len({stream(*key).integers(2**63) for key in keys}) == len(keys)


def test_a_stream_can_be_drawn_again():
    assert stream(1, "t", "north", 5, 1).random() == stream(1, "t", "north", 5, 1).random()


def test_a_site_left_out_is_external_even_where_an_import_brought_its_splits():
    import pandas as pd

    table = pd.DataFrame({"subject": ["a", "b"], "site": ["west", "east"], "site_kind": "internal",
                          "given_split": ["train", "train"]})  # fmt: skip
    told = split_table(SplitSection(seed=1, train=0.6, validation=0.2, left_out=("west",)), table)
    assert told["split"].tolist() == ["external", "train"]
