"""A package that went through every stage once, and a cohort that went through none."""

import json

import pytest

from imaging.config import Places
from imaging.vocabulary import Kind
from tests.tiny import ROOT, make_section, run_stages, write_cohort


@pytest.fixture(scope="session", params=[Kind.CLASSIFICATION, Kind.SEGMENTATION], ids=str)
def built(request, tmp_path_factory):
    """Places, section and digest of a package that went through every stage once."""
    places = Places(root=ROOT, build=tmp_path_factory.mktemp("build"), var=tmp_path_factory.mktemp("var"))
    write_cohort(places, "tiny", request.param)
    section = make_section(request.param)
    digest = run_stages(places, section)
    (places.build / "section.json").write_text(json.dumps(section.model_dump(mode="json")))
    return places, section, digest


@pytest.fixture
def unbuilt(tmp_path):
    """Places with a classification cohort, split, and nothing more."""
    places = Places(root=ROOT, build=tmp_path / "build", var=tmp_path / "var")
    write_cohort(places, "tiny", Kind.CLASSIFICATION)
    return places
