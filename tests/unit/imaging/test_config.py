"""Decisions in YAML: typed, frozen, and a misspelt key is refused by name."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from imaging.config import Places, read_params, read_places, read_sites
from imaging.errors import ConfigError, UnknownSite, UnknownTask
from imaging.vocabulary import SiteKind

ROOT = Path(__file__).parents[3]
HERE = Places(root=ROOT, build=ROOT / "build", var=ROOT / "var")


def write(tmp_path, change):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    change(params)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    return Places(root=tmp_path, build=tmp_path, var=tmp_path)


def test_the_checkouts_own_files_are_read():
    params, sites = read_params(HERE), read_sites(HERE)
    assert {"brain-tissue", "lung-nodule"} <= set(params.tasks)
    assert sites.names(SiteKind.EXTERNAL) == ["harbour"]
    assert len(sites.names()) == 5


def test_a_misspelt_key_is_named_with_the_nearest_known_one(tmp_path):
    def misspell(params):
        fit = params["tasks"]["lung-nodule"]["fit"]
        fit["epoch"] = fit.pop("epochs")

    with pytest.raises(ConfigError) as caught:
        read_params(write(tmp_path, misspell))
    assert "unknown key 'tasks.lung-nodule.fit.epoch', did you mean 'epochs'" in caught.value.fact


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: p["tasks"]["lung-nodule"]["fit"].update(batch_size=1), "fit.batch_size"),
        (lambda p: p["tasks"]["lung-nodule"]["fit"].update(device="gpu"), "fit.device"),
        (lambda p: p["tasks"]["lung-nodule"]["calibrate"].update(positive=["cyst"]), "positive"),
        (lambda p: p["tasks"]["lung-nodule"]["split"].update(train=0.9), "nothing for the test set"),
        (lambda p: p["tasks"]["lung-nodule"]["cohort"].update(profile="huge"), "no profile 'huge'"),
    ],
)
def test_an_impossible_decision_is_refused_with_its_place(tmp_path, change, told):
    with pytest.raises(ConfigError, match=told):
        read_params(write(tmp_path, change))


def test_a_missing_file_and_a_broken_one_are_told_apart(tmp_path):
    places = Places(root=tmp_path, build=tmp_path, var=tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        read_params(places)
    (tmp_path / "params.yaml").write_text("a: [1, 2")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_params(places)


def test_an_unknown_task_or_site_is_told_with_the_nearest_one():
    with pytest.raises(UnknownTask) as task:
        read_params(HERE).task("lung-nodul")
    known = "Tasks: brain-tissue, histology, lung-nodule, retinopathy."
    assert task.value.fix == f"Did you mean 'lung-nodule'? {known}"
    with pytest.raises(UnknownSite, match="Did you mean 'harbour'"):
        read_sites(HERE).site("harbor")


def test_a_decision_cannot_be_changed_after_reading():
    with pytest.raises(ValidationError, match="frozen"):
        read_params(HERE).task("lung-nodule").fit.epochs = 1


def test_places_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FORMULARY_ROOT", str(tmp_path))
    monkeypatch.setenv("FORMULARY_BUILD", str(tmp_path / "elsewhere"))
    monkeypatch.delenv("FORMULARY_VAR", raising=False)
    places = read_places()
    assert (places.root, places.var) == (tmp_path, tmp_path / "var")
    assert places.stage("brain-tissue", "fit") == tmp_path / "elsewhere" / "brain-tissue" / "fit"
