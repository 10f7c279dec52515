"""Weights are found, the same bits each time, and never on another device than was asked for."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from imaging.errors import ConfigError
from imaging.manifest import digest_file
from imaging.recipe import Architecture
from imaging.vocabulary import Kind, Split
from registry.architectures import build
from tests.tiny import make_section
from training.course import Course
from training.datasets import load_split
from training.fitting import find_weights, fit

SMALL, LARGE = Architecture(name="cnn", channels=(4,)), Architecture(name="cnn", channels=(4, 8))


def change(section, **fit_keys):
    return section.model_copy(update={"fit": section.fit.model_copy(update=fit_keys)})


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("FORMULARY_TRACKING", "off")


@pytest.fixture
def data(unbuilt):
    """Training and validation set: 48 and 24 images, discs or none."""
    section = make_section(Kind.CLASSIFICATION)
    return tuple(load_split(unbuilt, "tiny", section, split) for split in (Split.TRAIN, Split.VALIDATION))


def as_masks(data):
    """The same images with the disc as a mask: what is brighter than 20 times its surroundings' noise."""
    blurred = [
        torch.nn.functional.avg_pool2d(torch.from_numpy(part.images), 5, 1, 2).numpy() for part in data
    ]
    return tuple(
        replace(part, truth=(image[:, 0] > np.median(image) + 0.25).astype(np.int64))
        for part, image in zip(data, blurred, strict=True)
    )


def least(found):
    return min(told["validation_loss"] for told in found.epochs)


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


def test_what_it_took_is_told_beside_the_history(unbuilt):
    fit(unbuilt, "tiny", make_section(Kind.CLASSIFICATION))
    cost = json.loads((unbuilt.stage("tiny", "fit") / "cost.json").read_text())
    assert 0 < cost["loading_share"] < 1
    assert cost["cpu_seconds"] > 0
    assert cost["energy_wh"] == pytest.approx(cost["cpu_seconds"] * 10 / 3600, abs=1e-5)
    assert 50 < cost["peak_rss_mb"] < 20_000
    assert (cost["tracked"], cost["resumed"]) == (False, False)


def test_training_stops_after_so_many_epochs_without_a_better_one(data):
    section = change(make_section(Kind.CLASSIFICATION), epochs=20, patience=2, learning_rate=0.3)
    losses = [told["validation_loss"] for told in find_weights(data, section).epochs]
    assert len(losses) < 20
    assert int(np.argmin(losses)) == len(losses) - 3


def test_rates_follow_the_schedule_and_borrowed_weights_learn_more_slowly(data):
    section = make_section(Kind.CLASSIFICATION)
    seen = {}
    for schedule in ("one-cycle", "cosine", "constant"):
        network = build(LARGE, (1, 32, 32), 2, (1,))
        network.borrowed = tuple(
            name for name, _ in network.named_parameters() if name.startswith("features")
        )
        told = change(section, schedule=schedule, backbone_rate=0.1, epochs=2, learning_rate=0.01)
        course, rates = Course(network, told, data), []
        for images, truth in course.batches():
            rates.append([group["lr"] for group in course._optimiser.param_groups])
            course.step(images, truth)
        seen[schedule] = np.array(rates)
    assert np.allclose(seen["constant"], [0.01, 0.001])
    assert np.allclose(seen["cosine"][:, 0], [0.005 * (1 + np.cos(np.pi * step / 12)) for step in range(6)])
    assert np.argmax(seen["one-cycle"][:, 0]) in (3, 4)  # 30 % of 12 steps
    for rates in seen.values():
        assert np.allclose(rates[:, 1], 0.1 * rates[:, 0], rtol=0.01)


def test_class_weights_make_a_rare_class_count_as_much_as_a_frequent_one(data):
    rare = np.concatenate([np.flatnonzero(data[0].truth == 0)[:18], np.flatnonzero(data[0].truth == 1)[:6]])
    told = data[0].take(rare), data[1]
    for class_weights, expected in (("balanced", [24 / (2 * 18), 24 / (2 * 6)]), ("none", None)):
        section = change(make_section(Kind.CLASSIFICATION), class_weights=class_weights)
        weight = Course(build(SMALL, (1, 32, 32), 2, (1,)), section, told)._loss.weight
        assert weight is None if expected is None else np.allclose(weight, expected)


def test_an_ensemble_is_its_members_trained_alone_and_a_bad_one_has_no_say(unbuilt, data):
    section = change(make_section(Kind.CLASSIFICATION), epochs=6)
    poor = SMALL.model_copy(update={"dropout": 0.95})
    ensemble = Architecture(name="ensemble", members=(LARGE, LARGE, poor))
    told = fit(unbuilt, "tiny", change(section, architecture=ensemble))
    found = find_weights(data, change(section, architecture=ensemble))
    alone = find_weights(data, change(section, architecture=LARGE, seed=section.fit.seed + 1))
    for name, value in alone.weights.items():
        assert torch.equal(found.weights[f"members.1.{name}"], value), name
    losses = [member["validation_loss"] for member in told["members"]]
    assert losses[1] == least(alone)
    expected = [loss <= 1.1 * min(losses) for loss in losses]
    assert [member["admitted"] for member in told["members"]] == expected
    assert found.weights["admitted"].tolist() == [float(one) for one in expected]
    assert any(expected)
    assert not expected[2]
    assert [epoch["epoch"] for epoch in told["epochs"]] == list(range(1, 19))
    build(ensemble, (1, 32, 32), 2, (1,)).load_state_dict(found.weights)


def test_it_goes_on_from_weights_that_were_found_elsewhere(data):
    section = change(make_section(Kind.CLASSIFICATION), epochs=6)
    first = find_weights(data, section)
    again = change(section, epochs=1, learning_rate=1e-4, schedule="constant")
    tuned, fresh = find_weights(data, again, start=first.weights), find_weights(data, again)
    assert least(tuned) < 1.2 * least(first) < least(fresh)


def test_a_detector_and_a_segmenter_learn_from_masks(data):
    masks = as_masks(data)
    assert 0.005 < masks[0].truth.mean() < 0.2
    told = {"epochs": 8, "learning_rate": 0.01}
    for kind, name in ((Kind.DETECTION, "detector"), (Kind.SEGMENTATION, "unet")):
        section = make_section(Kind.CLASSIFICATION).model_copy(update={"kind": kind})
        architecture = Architecture(name=name, channels=(8, 16, 16))
        found = find_weights(masks, change(section, architecture=architecture, **told))
        assert least(found) < 0.7 * found.epochs[0]["validation_loss"], kind


def test_volumes_and_memory_maps_are_read_batch_by_batch(data, tmp_path):
    volumes = []
    for number, part in enumerate(as_masks(data)):
        images = np.repeat(part.images[:16, :, None], 8, 2)
        np.save(tmp_path / f"{number}.npy", images)
        mapped = np.load(tmp_path / f"{number}.npy", mmap_mode="r")
        truth = np.repeat(part.truth[:16, None], 8, 1)
        volumes.append(replace(part, images=mapped, truth=truth, rows=part.rows[:16]))
    section = make_section(Kind.CLASSIFICATION).model_copy(update={"kind": Kind.SEGMENTATION})
    told = {"architecture": Architecture(name="unet", channels=(4, 8)), "epochs": 1, "batch_size": 4}
    found = find_weights(tuple(volumes), change(section, **told))
    assert np.isfinite(least(found))


def test_watching_is_told_what_was_spent_and_changes_no_bit(data):
    section, seen = make_section(Kind.CLASSIFICATION), []
    found = find_weights(data, section, watch=lambda told, network: seen.append((told, network.training)))
    assert [told["epoch"] for told, _ in seen] == [1, 2, 3]
    assert not any(training for _, training in seen)
    assert all(a["cpu_seconds"] <= b["cpu_seconds"] for (a, _), (b, _) in itertools.pairwise(seen))
    unseen = find_weights(data, section)
    assert all(torch.equal(found.weights[name], value) for name, value in unseen.weights.items())


def test_mixed_precision_is_used_or_refused_and_never_left_out(data, monkeypatch):
    section = change(make_section(Kind.CLASSIFICATION), mixed_precision=True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    mixed, full = find_weights(data, section), find_weights(data, change(section, mixed_precision=False))
    assert mixed.epochs != full.epochs
    assert least(mixed) == pytest.approx(least(full), rel=0.5)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match=r"no bfloat16.*mixed_precision"):
        find_weights(data, section)


@pytest.mark.parametrize(("key", "value"), [("device", "cuda:7"), ("batch_size", 1000)])
def test_what_cannot_be_done_here_is_refused_and_named(unbuilt, key, value):
    with pytest.raises(ConfigError, match=str(value)):
        fit(unbuilt, "tiny", change(make_section(Kind.CLASSIFICATION), **{key: value}))
    assert not (unbuilt.stage("tiny", "fit") / "weights.safetensors").exists()
