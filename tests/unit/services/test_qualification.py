"""What an engine changes is counted as by hand, bounded by contract and policy, and told alike twice."""

import numpy as np
import pytest

from imaging.config import Places
from imaging.recipe import QualifySection
from imaging.vocabulary import Kind
from registry.engines import Answers
from registry.policy import Policy
from services.agreement import (
    Cases,
    answer,
    check_engines,
    choose_best,
    gather_cases,
    measure_change,
    measure_speed,
)
from tests.tiny import promise, write_cohort
from tests.tiny_onnx import draw, write_package

BOUNDS = {"subjects": 1, "low": {"auc": 0.0}, "margin": {"auc": 0.1}}
ASKED = {"task": "tiny", "why": "A test.", "primary": "auc", "network": BOUNDS, "internal": BOUNDS,
         "external": BOUNDS, "statements": ["evaluation"]}  # fmt: skip
SECTION = QualifySection(
    engines=("openvino/f32", "openvino/bf16", "onnxruntime/f32", "torch/f32", "torch-cuda/f16"),
    batch_sizes=(1, 2, 7),
    images=12,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("qualify")
    places = Places(root=root, build=root / "build", var=root / "var")
    write_cohort(places, "tiny", Kind.CLASSIFICATION)
    contract = write_package(places.stage("tiny", "package"))
    return places, contract, gather_cases(places, "tiny", contract, SECTION)


def ask(made, contract=None, **engines):
    places, promised, cases = made
    policy = Policy.model_validate(ASKED | {"engines": engines})
    return check_engines(places.stage("tiny", "package"), contract or promised, cases, SECTION, policy)


def compare(contract, expected, found, golden=0, masks=()):
    """What `measure_change` says of probabilities whose last row is an edge case."""
    arrays = [np.asarray(each, np.float32) for each in (expected, found)]
    cases = Cases("told", np.empty(0, np.float32), arrays[0], golden, 1, list(masks))
    return measure_change(contract, cases, arrays[1])


def test_flips_and_crossings_of_a_classification_are_counted_as_by_hand():
    contract = promise(Kind.CLASSIFICATION, ("none", "mild", "severe"), positive=("severe",), threshold=0.3)
    expected = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.4, 0.4], [1, 0, 0], [1, 0, 0]]
    found = [[0.4, 0.5, 0.1], [0.1, 0.625, 0.275], [0.2, 0.45, 0.35], [1, 0, 0], [0, 0, 1]]
    told = compare(contract, expected, found)
    assert told["difference"] == pytest.approx(0.2)  # .3 -> .5 of the first image
    assert told["edges"] == 1
    assert told["flips"] == 0.25  # the first of four images
    assert (told["crossed"], told["crossings"]) == (1, 0.25)  # the second: .3 is positive, .275 is not
    assert told["dice"] == 0


def test_the_dice_of_a_segmentation_changes_as_by_hand():
    contract = promise(Kind.SEGMENTATION, ("background", "disc"), rows=8, columns=8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 1  # 32 pixels
    expected = np.stack([mask == 0, mask == 1])[None].astype(np.float32)
    found = expected.copy()
    found[0, :, :, 3] = [[0.75] * 8, [0.25] * 8]  # 8 of them are lost
    edge = np.zeros_like(expected)
    told = compare(contract, np.concatenate([expected, edge]), np.concatenate([found, edge]), 0, [mask])
    assert told["flips"] == 8 / 64
    assert told["dice"] == pytest.approx(1 - 2 * 24 / (32 + 24))
    assert told["crossings"] == 0
    nothing = compare(
        contract, np.concatenate([expected, edge]), np.concatenate([expected, edge]), 0, [0 * mask]
    )
    assert nothing["dice"] == 0


def test_a_detector_is_held_at_its_threshold():
    contract = promise(Kind.DETECTION, ("none", "lesion"), threshold=0.5)
    expected = np.zeros((3, 1, 8, 8), np.float32)
    found = expected.copy()
    expected[0, 0, 2, 2] = 0.55
    found[0, 0, 2, 2] = 0.45
    told = compare(contract, expected, found)
    assert (told["crossed"], told["crossings"], told["flips"]) == (1, 0.5, 1 / 128)


def test_cases_are_golden_and_validation_images_and_edge_cases(made):
    cases = made[2]
    assert (cases.golden, cases.edges, cases.reference) == (8, 5, "onnxruntime/f32")
    assert len(cases.images) == len(cases.expected) == 8 + 12 + 5
    real = cases.images[8:-5]
    assert np.abs(real).max() <= 1
    assert len({image.tobytes() for image in real}) == 12
    assert [float(image.std()) for image in cases.images[-5:-2]] == [0, 0, 0]  # black, grey, saturated


def test_engines_pass_within_contract_and_policy_and_what_is_missing_says_why(made):
    told, speed = ask(made)
    assert [name for name, one in told.items() if one["passed"]] == list(SECTION.engines[:3])
    assert told["openvino/f32"]["difference"] <= 1e-5
    assert 0 < told["openvino/bf16"]["difference"] < 0.1
    assert "came as ONNX" in told["torch/f32"]["reason"]
    assert "reason" in told["torch-cuda/f16"]
    assert list(speed) == list(SECTION.engines[:3])
    assert all(set(ms) == {"1", "2", "7", "8"} for ms in speed.values())
    again, _ = ask(made)
    assert again == told


def test_what_changes_more_than_the_policy_or_the_contract_allows_does_not_pass(made):
    told, _ = ask(made, difference=1e-4)
    assert told["openvino/f32"]["passed"]
    assert not told["openvino/bf16"]["passed"]
    assert "what openvino/bf16 changes, in difference, is 0.00" in told["openvino/bf16"]["reason"]
    silent = made[1].model_copy(update={"tolerance": {"openvino/f32": 1e-3, "openvino/bf16": 1e-6}})
    told, _ = ask(made, silent)
    assert [name for name, one in told.items() if one["passed"]] == ["openvino/f32"]
    assert "the contract promises 1e-06" in told["openvino/bf16"]["reason"]
    assert "promises nothing" in told["onnxruntime/f32"]["reason"]  # though it is the reference itself


class Sloppy:
    """An engine that calls its third image of every full batch the other class, and one that says NaN."""

    name = "onnxruntime/f32"

    def __init__(self, wrong=1.0):
        self.wrong = wrong

    def run(self, batch):
        logits = np.tile(np.array([0, 1], np.float32), (len(batch), 1))
        logits[2:3] = self.wrong, 0
        return Answers(logits, batch[:, 0], np.ones((len(batch), 1), np.float32))


def test_a_fault_that_only_large_batches_show_is_seen(made):
    _, contract, _ = made
    images = draw(6)
    small, large = (answer(Sloppy(), contract, images, size) for size in (2, 6))
    cases = Cases("told", images, small, 5, 1, [])
    assert measure_change(contract, cases, small)["flips"] == 0
    assert measure_change(contract, cases, large)["flips"] == 0.2
    with pytest.raises(Exception, match="NaN or infinity"):
        answer(Sloppy(np.nan), contract, images, 6)


def test_the_first_engine_stays_unless_another_is_faster_by_a_tenth():
    speed = {"a": {"1": 1.0, "8": 8.0}, "b": {"1": 0.95, "8": 7.4}, "c": {"1": 0.5, "8": 4.0}}
    assert choose_best(["a", "b"], speed) == "a"
    assert choose_best(["a", "b", "c"], speed) == "c"
    assert choose_best(["b", "a"], speed) == "b"


def test_speed_is_of_every_size_even_with_fewer_images():
    speed = measure_speed({"sloppy": Sloppy()}, draw(3), [1, 4])
    assert set(speed["sloppy"]) == {"1", "4"}
    assert all(ms >= 0 for ms in speed["sloppy"].values())
