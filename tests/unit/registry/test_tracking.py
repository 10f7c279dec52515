"""Training is followed in MLflow, and never waits for it, fails by it or pretends that it was there."""

import time

import pytest

from registry.tracking import track

PARAMS = {"epochs": 3, "architecture": {"name": "cnn", "channels": [4, 8]}}


def tell(run, *epochs):
    for epoch in epochs:
        run.log({"epoch": epoch, "loss": 1 / epoch, "validation_loss": 2 / epoch, "cpu_seconds": epoch})


@pytest.fixture(autouse=True)
def local(monkeypatch):
    monkeypatch.delenv("FORMULARY_TRACKING", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # MLflow sets it; this puts it back


def test_a_store_that_cannot_be_reached_is_told_at_once_and_training_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    began = time.monotonic()
    with track(tmp_path, "tiny", "recipe-1", PARAMS) as run:
        assert "does not answer" in capsys.readouterr().err
        tell(run, 1, 2, 3)
    assert time.monotonic() - began < 20
    assert not run.tracked


def test_it_can_be_switched_off(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORMULARY_TRACKING", "off")
    with track(tmp_path, "tiny", "recipe-1", PARAMS) as run:
        tell(run, 1)
    assert not run.tracked
    assert not (tmp_path / "mlflow").exists()
    assert capsys.readouterr().err == ""
