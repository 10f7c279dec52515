"""A journal of its own for each test, and predictions to put into it."""

import uuid

import pytest

from monitoring.journal import Prediction, open_journal


@pytest.fixture
def journal(tmp_path):
    return open_journal(tmp_path)


@pytest.fixture
def predict():
    """Make one prediction; what is not said does not matter to the test."""

    def make(**told) -> Prediction:
        usual = {"id": str(uuid.uuid4()), "request_id": "asked", "task": "brain", "site": "north",
                 "version": 1, "package": "sha256:1", "engine": "openvino/f32", "subject": None,
                 "image": "2" * 64,
                 "columns": {"noise": 0.25}, "stages_ms": {"engine": 1.5}}  # fmt: skip
        return Prediction(**{**usual, **told})

    return make
