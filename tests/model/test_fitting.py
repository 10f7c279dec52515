"""Weights are found, the same bits each time, and never on another device than was asked for."""

import json

import pytest

from imaging.errors import ConfigError
from imaging.manifest import digest_file
from imaging.vocabulary import Kind
from tests.tiny import make_section
from training.fitting import fit


def change(section, **fit_keys):
    return section.model_copy(update={"fit": section.fit.model_copy(update=fit_keys)})


def test_two_fits_write_the_same_bytes_and_another_seed_does_not(unbuilt):
    section, weights = make_section(Kind.CLASSIFICATION), unbuilt.stage("tiny", "fit") / "weights.safetensors"
    digests = []
    for told in (section, section, change(section, seed=section.fit.seed + 1)):
        fit(unbuilt, "tiny", told)
        digests.append((digest_file(weights), digest_file(weights.with_name("history.json"))))
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[2][0]


def test_learning_lowers_the_validation_loss_and_the_best_epoch_is_kept(unbuilt):
    told = fit(unbuilt, "tiny", change(make_section(Kind.CLASSIFICATION), epochs=8))
    losses = [epoch["validation_loss"] for epoch in told["epochs"]]
    assert min(losses) < 0.7 * losses[0]
    assert json.loads((unbuilt.stage("tiny", "fit") / "history.json").read_text()) == told


@pytest.mark.parametrize(("key", "value"), [("device", "cuda:7"), ("batch_size", 1000)])
def test_what_cannot_be_done_here_is_refused_and_named(unbuilt, key, value):
    with pytest.raises(ConfigError, match=str(value)):
        fit(unbuilt, "tiny", change(make_section(Kind.CLASSIFICATION), **{key: value}))
    assert not (unbuilt.stage("tiny", "fit") / "weights.safetensors").exists()
