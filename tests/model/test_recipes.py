"""The documentation's recipes are whole, and kinds of task that the demo does not train go every stage."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from imaging.config import Params, Places, read_params, read_sites
from imaging.recipe import Architecture, Profile
from imaging.vocabulary import Kind
from registry.architectures import build
from tests.tiny import describe_params, run_stages, train, write_root
from training.cohorts.building import build_cohort
from training.splitting import split_cohort

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
FAMILIES = re.findall(r"^\| `(\{.+\})` \|", PAGE, re.MULTILINE)
SECTIONS = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.+?)```", PAGE, re.DOTALL)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_the_page_can_be_built(family, monkeypatch, tmp_path):
    section = yaml.safe_load(family)
    section.pop("pretrained", None)  # its file is made by a stage
    network = build(Architecture.model_validate(section), (1, 64, 64), 2)
    assert sum(value.numel() for value in network.parameters()) > 10_000


def test_the_tasks_of_the_page_are_whole():
    params = {"profiles": {"demo": {"internal": 8, "external": 8, "views": 1}}, "tasks": {}}
    for section in SECTIONS:
        params["tasks"] |= {name: task for name, task in section.items() if "kind" in task}
    assert set(Params.model_validate(params).tasks) == {"brain-volume", "nodule-boxes"}


def test_a_detector_goes_every_stage_and_says_where_lesions_are(tmp_path):
    places = write_root(tmp_path, boxes=Kind.DETECTION)
    assert train(places, "boxes") == 1
    told = yaml.safe_load((places.stage("boxes", "evaluate") / "evaluation.json").read_text())
    assert told["overall"]["froc"]["estimate"] > 0.5
    assert told["overall"]["lesion_sensitivity"]["estimate"] > 0.5


def test_volumes_go_every_stage(tmp_path):
    places = Places(root=tmp_path, build=tmp_path / "build", var=tmp_path / "var")
    told = describe_params(tiny=Kind.SEGMENTATION)
    task = next(section for section in SECTIONS if "brain-volume" in section)["brain-volume"]
    small = {"name": "unet", "channels": [4, 8, 8]}
    task["fit"] |= {"architecture": small, "epochs": 4, "learning_rate": 0.02}
    told["tasks"]["tiny"] = task | {"cohort": {**task["cohort"], "profile": "tiny"}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(told))
    (tmp_path / "sites.yaml").write_text((ROOT / "sites.yaml").read_text())
    section, sites = read_params(places).task("tiny"), read_sites(places)
    profile = Profile(internal=16, external=8, views=1)
    build_cohort("tiny", section, profile, sites, places.stage("tiny", "cohort"))
    split_cohort(section.split, places.stage("tiny", "cohort"), places.stage("tiny", "split"))
    run_stages(places, section)
    body = yaml.safe_load((places.stage("tiny", "evaluate") / "evaluation.json").read_text())
    assert body["overall"]["dice"]["estimate"] > 0.4
    with np.load(places.stage("tiny", "package") / "golden.npz") as golden:
        assert golden["images"].shape[1:] == (1, 16, 56, 48)
