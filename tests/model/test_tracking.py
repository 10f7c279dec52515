"""Training is followed in MLflow, and never waits for it, fails by it or pretends that it was there."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from registry.store import open_store
from registry.tracking import track
from tests.tiny import ROOT

PARAMS = {"epochs": 3, "architecture": {"name": "cnn", "channels": [4, 8]}}
CHILD = """
import sys
from pathlib import Path
from registry.tracking import track

var, task = sys.argv[1:]
with track(Path(var), task, task, {"epochs": 20}) as run:
    for epoch in range(1, 21):
        run.log({"epoch": epoch, "loss": 1 / epoch, "validation_loss": 2 / epoch})
sys.exit(0 if run.tracked else 1)
"""


def tell(run, *epochs):
    for epoch in epochs:
        run.log({"epoch": epoch, "loss": 1 / epoch, "validation_loss": 2 / epoch, "cpu_seconds": epoch})


def the_run(client, task="tiny"):
    (run,) = client.search_runs([client.get_experiment_by_name(task).experiment_id])
    return run


def history(client, run, name):
    return {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}


@pytest.fixture(autouse=True)
def local(monkeypatch):
    monkeypatch.delenv("FORMULARY_TRACKING", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # MLflow sets it; this puts it back


def test_a_run_is_there_while_it_goes_and_whole_when_it_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    with track(tmp_path, "tiny", "recipe-1", PARAMS) as run:
        tell(run, 1, 2)
        client = open_store(tmp_path)
        until = time.monotonic() + 20
        while not (live := the_run(client)).data.metrics.get("system/cpu_utilization_percentage"):
            assert time.monotonic() < until, "no system metrics while it goes"
            time.sleep(0.2)
        assert live.info.status == "RUNNING"
        assert live.data.params == {
            "epochs": "3", "architecture.name": "cnn", "architecture.channels": "[4, 8]"
        }  # fmt: skip
        assert history(client, live, "validation_loss") == {1: 2.0, 2: 1.0}
        tell(run, 3)
    assert run.tracked
    ended = the_run(client)
    assert ended.info.status == "FINISHED"
    assert history(client, ended, "cpu_seconds") == {1: 1, 2: 2, 3: 3}
    folder = client.download_artifacts(ended.info.run_id, "", str(tmp_path))
    assert {"curves.png", "history.json"} <= {item.path for item in client.list_artifacts(ended.info.run_id)}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG"), folder


def test_the_same_recipe_goes_on_in_the_run_that_failed_and_another_begins_its_own(tmp_path):
    with contextlib.suppress(KeyError), track(tmp_path, "tiny", "recipe-1", PARAMS) as run:
        tell(run, 1, 2)
        raise KeyError
    client = open_store(tmp_path)
    assert the_run(client).info.status == "FAILED"
    with track(tmp_path, "tiny", "recipe-1", PARAMS) as run:
        tell(run, 2, 3)  # 2 was trained again
    ended = the_run(client)
    assert ended.info.status == "FINISHED"
    assert len(client.get_metric_history(ended.info.run_id, "loss")) == 3
    artefact = client.download_artifacts(ended.info.run_id, "history.json", str(tmp_path))
    assert Path(artefact).read_text().count('"epoch"') == 3
    with track(tmp_path, "tiny", "recipe-2", PARAMS):
        pass
    assert len(client.search_runs([client.get_experiment_by_name("tiny").experiment_id])) == 2


def test_two_trainings_share_a_store_that_was_not_there_before(tmp_path):
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), task], cwd=ROOT)
        for task in ("one", "two")
    ]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    client = open_store(tmp_path)
    for task in ("one", "two"):
        run = the_run(client, task)
        assert run.info.status == "FINISHED"
        assert history(client, run, "loss") == {epoch: 1 / epoch for epoch in range(1, 21)}


def test_a_store_that_vanishes_on_the_way_is_told_once_and_the_run_is_not_called_tracked(tmp_path, capsys):
    with track(tmp_path, "tiny", "recipe-1", PARAMS) as run:
        (tmp_path / "mlflow" / "mlflow.db").write_bytes(b"no database " * 1000)
        tell(run, 1, 2, 3)
    assert not run.tracked
    assert capsys.readouterr().err.count("MLflow does not have the whole of this training") == 1


def test_no_child_process_inherits_the_store_of_its_parent(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:///elsewhere.db")
    open_store(tmp_path)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert os.environ["MLFLOW_REGISTRY_URI"] == "sqlite:///elsewhere.db"
