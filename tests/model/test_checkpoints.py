"""Training that was killed goes on with the bits that it would have had, or says what it could not use."""

import json
import os
import signal
import sqlite3
import subprocess
import sys

import pytest
import torch

from imaging.errors import DataError
from imaging.manifest import digest_file
from imaging.recipe import Architecture
from imaging.vocabulary import Kind, Split
from tests.tiny import ROOT, make_section
from training import checkpoints
from training.checkpoints import Checkpoints, open_checkpoints
from training.datasets import load_split
from training.fitting import fit

FILES = ("weights.safetensors", "history.json")
CHILD = """
import os, signal, sys
from pathlib import Path
from imaging.config import Places
from imaging.recipe import TaskSection
from training import checkpoints, fitting

root, build, text, kill_after, every_s = sys.argv[1:]
checkpoints.EVERY_S = float(every_s)
saved, save = [], checkpoints.Checkpoints.save

def save_and_die(self, state):
    save(self, state)
    saved.append(len(state["epochs"]))
    if len(saved) == int(kill_after):
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints.Checkpoints.save = save_and_die
places = Places(root=Path(root), build=Path(build), var=Path(build) / "var")
fitting.fit(places, "tiny", TaskSection.model_validate_json(text))
"""


class Stopped(Exception):
    pass


def change(section, **fit_keys):
    return section.model_copy(update={"fit": section.fit.model_copy(update=fit_keys)})


def digests(places):
    return [digest_file(places.stage("tiny", "fit") / name) for name in FILES]


def cost(places):
    return json.loads((places.stage("tiny", "fit") / "cost.json").read_text())


def stop_after(monkeypatch, count):
    """Make training stop as if killed, right after its count-th checkpoint."""
    saved, save = [], Checkpoints.save

    def save_and_stop(self, state):
        save(self, state)
        saved.append(state)
        if len(saved) == count:
            raise Stopped

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("FORMULARY_TRACKING", "off")


@pytest.mark.parametrize(("kill_after", "every_s"), [(2, 120), (17, 0)], ids=["between", "within-an-epoch"])
def test_after_kill_9_the_same_command_writes_the_bytes_of_an_uninterrupted_run(unbuilt, kill_after, every_s):
    section = make_section(Kind.CLASSIFICATION)
    architecture = section.fit.architecture.model_copy(update={"dropout": 0.3})  # torch's generator counts
    section = change(section, epochs=4, architecture=architecture)
    fit(unbuilt, "tiny", section)
    whole = digests(unbuilt)
    for name in FILES:
        (unbuilt.stage("tiny", "fit") / name).unlink()

    def run(kill_after):
        arguments = [str(ROOT), str(unbuilt.build), section.model_dump_json(), str(kill_after), str(every_s)]
        followed = "on" if every_s else "off"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "FORMULARY_TRACKING": followed}
        return subprocess.run([sys.executable, "-c", CHILD, *arguments], env=environment, check=False)

    assert run(kill_after).returncode == -signal.SIGKILL
    assert not (unbuilt.stage("tiny", "fit") / FILES[0]).exists()
    assert run(-1).returncode == 0
    assert cost(unbuilt)["resumed"]
    assert digests(unbuilt) == whole
    assert not unbuilt.stage("tiny", "checkpoints").exists()
    if every_s:
        database = sqlite3.connect(unbuilt.build / "var" / "mlflow" / "mlflow.db")
        assert database.execute("select name, status from runs").fetchall() == [("fit tiny", "FINISHED")]
        steps = database.execute("select step from metrics where key = 'loss' order by step").fetchall()
        assert steps == [(1,), (2,), (3,), (4,)]


RECIPES = {
    "cosine": {"schedule": "cosine", "clip": 0.1},
    "constant": {"schedule": "constant", "class_weights": "none"},
    "stopped-early": {"patience": 1, "learning_rate": 0.3, "epochs": 8},
    "mixed": {"mixed_precision": True},
    "ensemble": {
        "architecture": Architecture(
            name="ensemble",
            members=(Architecture(name="cnn", channels=(4, 8)), Architecture(name="cnn", channels=(4, 4))),
        ),
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_goes_on_exactly(unbuilt, monkeypatch, recipe):
    section = change(make_section(Kind.CLASSIFICATION), **RECIPES[recipe])
    if recipe == "mixed" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("the processor has no bfloat16")
    whole = fit(unbuilt, "tiny", section)
    expected = digests(unbuilt)
    with monkeypatch.context() as patch:
        stop_after(patch, 4 if recipe == "ensemble" else 1)
        with pytest.raises(Stopped):
            fit(unbuilt, "tiny", section)
    assert fit(unbuilt, "tiny", section) == whole
    assert digests(unbuilt) == expected
    assert cost(unbuilt)["resumed"]


@pytest.mark.parametrize("damage", ["flipped", "cut off"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(unbuilt, monkeypatch, capsys, damage):
    section = change(make_section(Kind.CLASSIFICATION), epochs=4)
    fit(unbuilt, "tiny", section)
    expected = digests(unbuilt)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            fit(unbuilt, "tiny", section)
    first, newest = sorted(unbuilt.stage("tiny", "checkpoints").glob("*/*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    fit(unbuilt, "tiny", section)
    told = capsys.readouterr().err
    assert newest.name in told
    assert first.name not in told
    assert digests(unbuilt) == expected


@pytest.mark.parametrize(
    "fit_keys", [{"seed": 12}, {"epochs": 5}, {"learning_rate": 0.01}, {"threads": 2}, {"schedule": "cosine"}]
)
def test_another_recipe_never_goes_on_from_it(unbuilt, fit_keys):
    section = make_section(Kind.CLASSIFICATION)
    data = tuple(load_split(unbuilt, "tiny", section, split) for split in (Split.TRAIN, Split.VALIDATION))
    folder = unbuilt.stage("tiny", "checkpoints")
    opened = open_checkpoints(folder, section, data)
    assert open_checkpoints(folder, section, data).folder == opened.folder
    assert open_checkpoints(folder, change(section, **fit_keys), data).folder != opened.folder
    assert open_checkpoints(folder, section, data[::-1]).folder != opened.folder


def test_a_checkpoint_gives_back_every_bit_and_only_two_are_kept(tmp_path):
    keep = Checkpoints(tmp_path / "task" / "recipe")
    assert keep.latest() is None
    torch.manual_seed(1)
    for number in range(4):
        state = {
            "weights": {"a": torch.randn(3, 4), "half": torch.randn(5).bfloat16(), "count": torch.tensor(7)},
            "random": torch.get_rng_state(), "rates": [0.1 + 0.2, 1e-300, float("inf")], "number": number,
            "none": None, "empty": {}, "yes": True,
        }  # fmt: skip
        keep.save(state)
    found = keep.latest()
    assert {k: v for k, v in found.items() if k not in ("weights", "random")} == {
        k: v for k, v in state.items() if k not in ("weights", "random")
    }
    for name, value in state["weights"].items():
        assert found["weights"][name].dtype == value.dtype
        assert torch.equal(found["weights"][name], value)
    assert torch.equal(found["random"], state["random"])
    assert len(list(keep.folder.iterdir())) == checkpoints.KEPT == 2


def test_a_folder_that_cannot_be_written_is_told_with_a_fix(tmp_path):
    (tmp_path / "task").write_text("A file where a folder must be.")
    with pytest.raises(DataError, match="No checkpoint could be written"):
        Checkpoints(tmp_path / "task" / "recipe").save({"a": torch.ones(2)})
